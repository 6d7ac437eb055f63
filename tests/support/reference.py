"""The oracle: a mixture of experts token by token, in NumPy and float64.

Plain loops over tokens and experts, no Keras. Every function works on one
group of tokens unless it says otherwise.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Decision(NamedTuple):
    """Who processes what in one group.

    `weights` `(S, E)`: combine weights; `processed` bool `(S, E)`; `requested`
    bool `(S, E)`: chosen, whether or not the expert had room.
    """

    weights: Any
    processed: Any
    requested: Any


def softmax(logits):
    powers = np.exp(logits - np.max(logits))
    return powers / np.sum(powers)


def slots(num_tokens, num_experts, factor):
    """`ceil(factor * num_tokens / num_experts)` in exact arithmetic."""
    exact = Fraction(str(factor)) * num_tokens / num_experts
    return min(math.ceil(exact), num_tokens)


def finish(weights, processed, requested, normalize):
    """Rescales the weights of the experts that process each token."""
    weights = np.where(processed, weights, 0.0)
    if normalize:
        for row in weights:
            if row.sum() > 0:
                row /= row.sum()
    return Decision(weights, processed, requested)


def top_k(
    logits,
    top_k,
    normalize=True,
    softmax_order="before_top_k",
    capacity_factor=None,
    drop_policy="position",
    mask=None,
    bias=None,
):
    """Top-K routing of one group, logits `(S, E)`.

    `bias` `(E,)` is added to the scores, probabilities or logits by
    `softmax_order`, for the choice alone.
    """
    logits = np.asarray(logits, "float64")
    length, num_experts = logits.shape
    mask = np.ones(length, bool) if mask is None else np.asarray(mask, bool)
    choices, weights = {}, np.zeros((length, num_experts))
    for t in np.flatnonzero(mask):
        scores = logits[t]
        if bias is not None:
            if softmax_order == "before_top_k":
                scores = softmax(scores)
            scores = scores + bias
        best = sorted(range(num_experts), key=lambda e: (-scores[e], e))
        choices[t] = best[:top_k]
        if softmax_order == "before_top_k":
            weights[t, choices[t]] = softmax(logits[t])[choices[t]]
        else:
            weights[t, choices[t]] = softmax(logits[t, choices[t]])
    return dropped(
        choices, weights, top_k, normalize, capacity_factor, drop_policy
    )


def of_groups(scores, groups):
    """Each group's experts, logit, and its experts' shares: one token's.

    `scores` `(E,)` are what the kernel gives, `groups` each expert's group.
    """
    found = []
    for group in range(max(groups) + 1):
        members = [e for e, of in enumerate(groups) if of == group]
        own = [scores[e] for e in members]
        found.append((members, np.mean(own), softmax(np.array(own))))
    return found


def top_k_of_groups(
    scores,
    top_k,
    groups,
    normalize=True,
    softmax_order="before_top_k",
    capacity_factor=None,
    mask=None,
    bias=None,
):
    """Top-K of groups, the likeliest expert of each: scores `(S, E)`."""
    scores = np.asarray(scores, "float64")
    length, num_experts = scores.shape
    mask = np.ones(length, bool) if mask is None else np.asarray(mask, bool)
    bias = np.zeros(num_experts) if bias is None else np.asarray(bias)
    choices, weights = {}, np.zeros((length, num_experts))
    for t in np.flatnonzero(mask):
        found = of_groups(scores[t], groups)
        logits = np.array([logit for _, logit, _ in found])
        worth = softmax(logits) if softmax_order == "before_top_k" else logits
        best, ranks = [], []
        for (members, logit, shares), group in zip(found, worth, strict=True):
            each = logit + np.log(shares)
            if softmax_order == "before_top_k":
                each = group * shares
            best.append(members[np.argmax(each + bias[members])])
            ranks.append(group + np.mean(bias[members]))
        order = sorted(range(len(found)), key=lambda g: (-ranks[g], g))[:top_k]
        choices[t] = [best[g] for g in order]
        if softmax_order == "before_top_k":
            weights[t, choices[t]] = worth[order]
        else:
            weights[t, choices[t]] = softmax(logits[order])
    return dropped(
        choices, weights, top_k, normalize, capacity_factor, "position"
    )


def dropped(choices, weights, top_k, normalize, capacity_factor, drop_policy):
    """The decision where experts take as many as they have room for.

    `choices` are each real token's experts, best first.
    """
    length, num_experts = weights.shape
    assignments = [(k, t) for k in range(top_k) for t in choices]
    if drop_policy == "batch_priority":
        assignments.sort(
            key=lambda kt: (kt[0], -weights[kt[1], choices[kt[1]][0]], kt[1])
        )
    elif drop_policy == "probability":
        assignments.sort(
            key=lambda kt: (-weights[kt[1], choices[kt[1]][kt[0]]], kt)
        )
    limit = len(choices)
    if capacity_factor is not None:
        factor = Fraction(str(capacity_factor)) * top_k
        limit = slots(len(choices), num_experts, factor)
    processed = np.zeros((length, num_experts), bool)
    requested = np.zeros((length, num_experts), bool)
    for k, t in assignments:
        expert = choices[t][k]
        requested[t, expert] = True
        processed[t, expert] = processed[:, expert].sum() < limit
    return finish(weights, processed, requested, normalize)


def expert_choice(logits, capacity_factor, normalize=True, mask=None):
    """Expert Choice routing of one group, logits `(S, E)`."""
    logits = np.asarray(logits, "float64")
    length, num_experts = logits.shape
    real = np.arange(length) if mask is None else np.flatnonzero(mask)
    weights = np.stack([softmax(row) for row in logits])
    processed = np.zeros((length, num_experts), bool)
    for e in range(num_experts):
        ranked = sorted(real, key=lambda t: (-weights[t, e], t))
        for t in ranked[: slots(len(real), num_experts, capacity_factor)]:
            processed[t, e] = True
    return finish(weights, processed, processed, normalize)


def ds_moe(
    logits, selection, top_k=None, threshold=None, normalize=False, mask=None
):
    """DS-MoE's routing at inference, of all groups: logits `(G, S, E)`.

    Returns:
        A `Decision` for each group.
    """
    logits = np.asarray(logits, "float64")
    groups, length, num_experts = logits.shape
    mask = np.ones((groups, length), bool) if mask is None else mask
    real = [tuple(place) for place in np.argwhere(mask)]
    above = {
        place: [
            p for p in softmax(logits[place]) if num_experts * p > threshold
        ]
        for place in real
        if threshold is not None
    }
    mean = Fraction(sum(map(len, above.values())), max(len(real), 1))
    decisions = []
    for g in range(groups):
        weights = np.zeros((length, num_experts))
        processed = np.zeros((length, num_experts), bool)
        for place in real:
            if place[0] != g:
                continue
            count = {
                "all": lambda place: num_experts,
                "top_k": lambda place: top_k,
                "threshold": lambda place: max(len(above[place]), 1),
                "batch_threshold": lambda place: max(
                    math.floor(mean + Fraction(1, 2)), 1
                ),
            }[selection](place)
            scores = softmax(logits[place])
            best = sorted(range(num_experts), key=lambda e: (-scores[e], e))
            for e in best[:count]:
                weights[place[1], e] = scores[e]
                processed[place[1], e] = True
        decisions.append(finish(weights, processed, processed, normalize))
    return decisions


def default_moe_by_logits(
    logits, decision, outputs, vectors, cotangent, renormalised
):
    """Default MoE's gradient by one group's logits: `(S, E)`.

    Equation 8: the softmax's Jacobian on `<dL/dy, f_i>`, `f_i` what expert `i`
    put out, or its vector where it does not process the token. Renormalised,
    `<dL/dy, f_i - y> / P` with `y` the output and `P` the probability of all
    experts that process the token; where none does, `y = 0` and `P = 1`.

    Args: `decision` a `Decision`, `outputs` `(S, E, D)` of every expert on
    every token, `vectors` `(E, D)`, `cotangent` `(S, D)`.
    """
    found = np.zeros(logits.shape)
    for t in np.flatnonzero(decision.requested.any(1)):
        p, ran = softmax(logits[t].astype("float64")), decision.processed[t]
        f = np.where(ran[:, None], outputs[t], vectors)
        if renormalised:
            total = p[ran].sum() if ran.any() else 1.0
            y = (p[ran, None] * f[ran]).sum(0) / total
            f = (f - y) / total
        by_p = f @ cotangent[t]
        found[t] = p * (by_p - p @ by_p)
    return found


def moved_vectors(vectors, decay, probabilities, decisions, outputs):
    """Default vectors after a step: outputs averaged by probability.

    `probabilities`, `decisions` and `outputs` are lists over groups.
    """
    new = np.array(vectors, "float64")
    for e in range(len(new)):
        total, weight = 0.0, 0.0
        for p, decision, out in zip(
            probabilities, decisions, outputs, strict=True
        ):
            for t in np.flatnonzero(decision.processed[:, e]):
                total, weight = total + p[t, e] * out[t, e], weight + p[t, e]
        if weight:
            new[e] = decay * new[e] + (1 - decay) * total / weight
    return new


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def relu(x):
    return np.maximum(x, 0.0)


ACTIVATIONS = {"gelu": gelu, "relu": relu}


def expert(token, weights, e, activation="gelu"):
    """Expert `e` on a token `(D,)`; `gradients.weights_of` names weights."""

    def linear(x, role):
        x = x @ weights[role][e]
        bias = weights.get(f"{role}_bias")
        return x if bias is None else x + bias[e, 0]

    if activation == "clipped_swiglu":
        gate = np.minimum(linear(token, "gate"), 7.0)
        up = np.clip(linear(token, "up"), -7.0, 7.0)
        hidden = (up + 1.0) * gate / (1.0 + np.exp(-1.702 * gate))
        return linear(hidden, "down")
    activate = ACTIVATIONS[activation]
    if "gate" in weights:
        hidden = activate(linear(token, "gate")) * linear(token, "up")
    else:
        hidden = activate(linear(token, "up"))
    return linear(hidden, "down")


def combine(tokens, decision, weights, activation="gelu"):
    """The outputs `(S, D)` of one group of tokens under a decision."""
    outputs = np.zeros_like(tokens)
    for t, e in zip(*np.nonzero(decision.processed), strict=True):
        output = expert(tokens[t], weights, e, activation)
        outputs[t] += decision.weights[t, e] * output
    return outputs


def grouped(array, group):
    """`(B, S, ...)` as groups: by example, or the whole batch as one."""
    if group == "example":
        return array
    return array.reshape(1, -1, *array.shape[2:])


def moe(inputs, weights, route, group, mask=None, activation="gelu"):
    """The whole layer: `(B, S, D)` to `(B, S, D)`.

    `route(logits, mask)` is a function of one group, made from `top_k` or
    `expert_choice`.
    """
    inputs = np.asarray(inputs, "float64")
    tokens = grouped(inputs, group)
    masks = [None] * len(tokens) if mask is None else grouped(mask, group)
    outputs = [
        combine(x, route(x @ weights["router"], m), weights, activation)
        for x, m in zip(tokens, masks, strict=True)
    ]
    return np.reshape(outputs, inputs.shape)


def load_balance(logits, top_k, mask=None):
    """`E * sum_e f_e * P_e` over the real tokens, logits `(G, S, E)`."""
    num_experts = logits.shape[-1]
    if mask is not None:
        logits = logits[mask]
    rows = logits.reshape(-1, num_experts).astype("float64")
    share, probability = np.zeros(num_experts), np.zeros(num_experts)
    for row in rows:
        probability += softmax(row) / len(rows)
        for e in sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k]:
            share[e] += 1 / (top_k * len(rows))
    return num_experts * np.sum(share * probability)


def z_loss(logits, mask=None):
    """Mean over the real tokens of `log(sum(exp(logits))) ** 2`."""
    if mask is not None:
        logits = logits[mask]
    rows = logits.reshape(-1, logits.shape[-1]).astype("float64")
    return np.mean([np.log(np.exp(row).sum()) ** 2 for row in rows])


def squared_variation(values):
    """Variance over squared mean of a list of numbers."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return variance / mean**2


def real_groups(arrays, mask):
    """The real tokens of each group that has any, float64 `(n, E)` an array."""
    for g in range(len(arrays[0])):
        real = slice(None) if mask is None else mask[g]
        rows = [np.asarray(array[g][real], "float64") for array in arrays]
        if len(rows[0]):
            yield rows


def importance(probabilities, mask=None):
    """Squared variation of the experts' summed probabilities `(G, S, E)`."""
    losses = []
    for (rows,) in real_groups([probabilities], mask):
        losses.append(squared_variation(sum(rows)))
    return sum(losses) / max(len(losses), 1)


def load(logits, noisy, noise_stddev, top_k, mask=None):
    """Squared variation of the experts' mean chance to be chosen again."""
    losses = []
    for rows, noisy_rows in real_groups([logits, noisy], mask):
        chances = np.zeros(logits.shape[-1])
        for row, noisy_row in zip(rows, noisy_rows, strict=True):
            threshold = sorted(noisy_row)[-top_k]
            for e, logit in enumerate(row):
                needed = (threshold - logit) / noise_stddev
                chances[e] += math.erfc(needed / math.sqrt(2.0)) / 2
        losses.append(squared_variation(chances / len(rows)))
    return sum(losses) / max(len(losses), 1)


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def mutual_information(probabilities, mask=None):
    """`-H(e) + mean_x H(e|x)` over the real tokens, `(G, S, E)`."""
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    if mask is not None:
        rows = rows[mask.ravel()]
    if not len(rows):
        return 0.0
    each = sum(entropy(row) for row in rows) / len(rows)
    return each - entropy(rows.astype("float64").mean(axis=0))


def moved_bias(bias, decisions, rate):
    """The bias `(E,)` after a training call that made these decisions."""
    load = sum(decision.requested.sum(axis=0) for decision in decisions)
    mean = Fraction(int(load.sum()), len(load))
    return np.array(
        [
            b + rate * ((count < mean) * 1 - (count > mean) * 1)
            for b, count in zip(bias, load.tolist(), strict=True)
        ]
    )


def gradient(function, array, step=1e-6):
    """Central differences of a scalar function of an array, one by one."""
    found = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        ends = []
        for sign in (1, -1):
            moved = array.astype("float64")
            moved[place] += sign * step
            ends.append(function(moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def slope(function, point, direction, step=1e-6):
    """Central difference of a scalar function of named arrays.

    `direction` names the arrays that move.
    """

    def moved(sign):
        return {
            name: value + sign * step * direction[name]
            if name in direction
            else value
            for name, value in point.items()
        }

    return (function(moved(1)) - function(moved(-1))) / (2 * step)

"""Logits to routing: which tokens meet which experts, with which weights.

Pure functions of tensors. They hold the three rules that make a routing safe:

* Capacity counts real tokens and is computed in integers, so that padding a
  batch further changes nothing and `1.1 * 50` is 55 slots, not 56.
* Renormalised weights sum to 1 over the experts that *process* the token,
  that is after drops: with identical experts the layer is then the dense
  block (Sparse Upcycling, arXiv 2212.05055, appendix B.7).
* Ties go to the lowest index.
"""

from fractions import Fraction
from typing import Any

from keras import ops

from keras_upcycle import backend
from keras_upcycle.routing import drop_policies
from keras_upcycle.routing import expert_groups as groups_of_experts
from keras_upcycle.routing.drop_policies import membership as membership
from keras_upcycle.types import ExpertChoice, Routing, Tensor, TokenChoice

SOFTMAX_ORDERS = ("before_top_k", "after_top_k")
# An expert may process a token that hardly wants it. Renormalised, its weight
# is 1 all the same; the gradient divides by the square of the probability,
# which must not underflow.
LEAST = 1e-12


def capacity(num_tokens: Any, num_experts: int, factor: float) -> Any:
    """Slots per expert: `ceil(factor * num_tokens / num_experts)`, at most `S`.

    For Expert Choice pass the layer's capacity factor; for Top-K pass
    `capacity_factor * top_k`.

    Args:
        num_tokens: An integer, a symbolic dimension, or an int32 tensor of
            token counts (any shape).
        num_experts: Integer, `E`.
        factor: Positive number; it is taken to the nearest fraction with a
            denominator up to 1000.

    Returns:
        What `num_tokens` is, of the same shape.

    Example:
        >>> capacity(50, 1, 1.1), capacity(197, 32, 2.0), capacity(3, 8, 1.0)
        (50, 13, 1)
    """
    exact = Fraction(str(factor)).limit_denominator(1000)
    share = max(exact, Fraction(1, 1000)) / num_experts
    if share >= 1:
        return num_tokens
    return -((-share.numerator * num_tokens) // share.denominator)


def real_capacity(
    mask: Tensor | None, num_experts: int, factor: float
) -> Tensor | None:
    """Capacity of each group from its number of real tokens.

    Args:
        mask: bool `(G, S)`, `True` at real tokens, or `None`.
        num_experts: Integer, `E`.
        factor: As for `capacity`.

    Returns:
        int32 `(G,)`, or `None` where `mask` is `None`.
    """
    if mask is None:
        return None
    real = ops.sum(ops.cast(mask, "int32"), axis=1)
    return capacity(real, num_experts, factor)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last axis, `E` or the `K` chosen.

    Without Keras's warning where that axis has one entry: one expert, or one
    a token, is no mistake here.
    """
    if logits.shape[-1] == 1:
        return ops.ones_like(logits)
    return ops.softmax(logits, axis=-1)


def top_k(
    logits: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    softmax: str = "before_top_k",
    capacity_factor: float | None = None,
    drop_policy: str = "position",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    expert_groups: tuple[int, ...] | None = None,
) -> TokenChoice:
    """Every token chooses its `top_k` experts.

    Args:
        logits: float32 `(G, S, E)`.
        top_k: Integer in `[1, E]`.
        normalize: Whether the weights of the experts that process a token are
            rescaled to sum to 1.
        softmax: `"before_top_k"` (over all experts) or `"after_top_k"` (over
            the chosen ones).
        capacity_factor: Each expert takes
            `ceil(capacity_factor * S * K / E)` tokens of a group and drops
            the others. `None` drops nothing.
        drop_policy: Who gets the slots. `"position"`: all first choices
            before all second ones, earlier tokens first. `"batch_priority"`:
            as before, but tokens surest of their first choice first (V-MoE,
            arXiv 2106.05974, section 3.4). `"probability"`: the likeliest
            assignments of each expert, whichever choice they are.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.
        bias: float32 `(E,)`, added to the scores for the choice and its order
            alone; weights come from the scores without it. Scores are what
            `softmax` says: probabilities, or logits with `"after_top_k"`.
            Loss-free balancing (arXiv 2408.15664), equation 3. `None` adds
            nothing.
        expert_groups: Each expert's group, from 0: a token chooses `top_k`
            groups, each by the probability of its experts together, which is
            its weight, and the likeliest expert in each. With a `bias` a
            group's is the mean of its experts'. `None`: any experts.

    Returns:
        A `TokenChoice`.

    Example:
        >>> logits = ops.array([[[0.0, 2.0, 1.0]]])
        >>> chosen = top_k(logits, top_k=2)
        >>> ops.convert_to_numpy(chosen.experts).tolist()
        [[[1, 2]]]
        >>> round(float(ops.sum(chosen.weights)), 6)
        1.0
    """
    num_experts = int(logits.shape[-1])
    best = None
    if expert_groups is not None:
        _, ranked = _scores(logits, softmax, bias)
        best, logits = groups_of_experts.best_of_each(
            logits, ranked, expert_groups
        )
        if bias is not None:
            bias = groups_of_experts.mean(bias, expert_groups)
    scores, ranked = _scores(logits, softmax, bias)
    _, experts = backend.top_k(ops.stop_gradient(ranked), top_k)
    # Read through a product: its gradient is one too, where that of `top_k`
    # scatters.
    weights = ops.einsum(
        "gske,gse->gsk", membership(experts, scores.shape[-1]), scores
    )
    if softmax == "after_top_k":
        weights = probabilities(weights)
    if best is not None:
        experts = ops.take_along_axis(best, experts, axis=-1)
    if mask is not None:
        experts = ops.where(ops.expand_dims(mask, -1), experts, num_experts)
    requested = experts
    ranks = slots = None
    if capacity_factor is not None:
        factor = capacity_factor * top_k
        slots = capacity(ops.shape(logits)[1], num_experts, factor)
        limit = real_capacity(mask, num_experts, factor)
        limit = slots if limit is None else ops.reshape(limit, (-1, 1, 1))
        ranks = drop_policies.ranks(experts, weights, num_experts, drop_policy)
        experts = ops.where(ranks < limit, experts, num_experts)
    weights = weights_of_kept(weights, experts < num_experts, normalize)
    return TokenChoice(experts, weights, requested, ranks, slots)


def _scores(logits, softmax, bias):
    """What weights are read from, and what experts are ranked by."""
    scores = probabilities(logits) if softmax == "before_top_k" else logits
    return scores, scores if bias is None else scores + bias


def weights_of_kept(weights: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    """Combine weights where some of a token's experts do not process it.

    Args:
        weights: float32 `(G, S, K)`, not negative.
        kept: bool `(G, S, K)`, whether the expert processes the token.
        normalize: Whether those of a token are rescaled to sum to 1.

    Returns:
        float32 `(G, S, K)`, 0 where not kept.
    """
    if normalize:
        weights = ops.maximum(weights, LEAST)
    weights = ops.where(kept, weights, 0.0)
    if normalize:
        weights = _safe_divide(
            weights, ops.sum(weights, axis=-1, keepdims=True)
        )
    return weights


def expert_choice(
    logits: Tensor,
    capacity_factor: float,
    *,
    normalize: bool = True,
    mask: Tensor | None = None,
) -> ExpertChoice:
    """Every expert chooses its likeliest tokens of each group.

    Expert Choice routing (arXiv 2202.09368), with the combine weights of
    Sparse Upcycling (arXiv 2212.05055, appendix B.7) when `normalize`.

    Args:
        logits: float32 `(G, S, E)`.
        capacity_factor: Each expert takes `ceil(capacity_factor * S / E)`
            tokens of a group: a token is processed by that many experts on
            average.
        normalize: Whether each processed token's weights are rescaled to sum
            to 1. A token that no expert chose keeps 0.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        An `ExpertChoice`.

    Example:
        >>> logits = ops.array([[[3.0, 0.0], [0.0, 3.0]]])
        >>> ops.convert_to_numpy(expert_choice(logits, 1.0).tokens).tolist()
        [[[0], [1]]]
    """
    num_experts = int(logits.shape[-1])
    length = ops.shape(logits)[1]
    scores = ops.transpose(probabilities(logits), (0, 2, 1))
    if mask is not None:
        # Below every probability: padding is chosen last, and then not used.
        scores = ops.where(ops.expand_dims(mask, 1), scores, -1.0)
    slots = capacity(length, num_experts, capacity_factor)
    best, tokens = backend.top_k(ops.stop_gradient(scores), slots)
    active = best >= 0.0
    weights = _pick(scores, tokens)
    limit = real_capacity(mask, num_experts, capacity_factor)
    if limit is not None:
        rank = ops.arange(slots, dtype="int32")
        in_limit = rank < ops.reshape(limit, (-1, 1, 1))
        active = ops.logical_and(active, in_limit)
    if normalize:
        weights = ops.maximum(weights, LEAST)
    weights = ops.where(active, weights, 0.0)
    routing = ExpertChoice(tokens, weights, active)
    if normalize:
        total = token_weights(routing, length)
        groups, flat = _flat_slots(routing)
        own_total = backend.gather_rows(ops.expand_dims(total, -1), flat)
        own_total = ops.reshape(own_total, (groups, num_experts, slots))
        routing = routing._replace(weights=_safe_divide(weights, own_total))
    return routing


def combine_matrix(routing: Routing, length: Any, num_experts: int) -> Tensor:
    """The routing as a table of combine weights: what `dense` multiplies by.

    Args:
        routing: A `TokenChoice` or `ExpertChoice`.
        length: `S`.
        num_experts: `E`.

    Returns:
        float32 `(G, S, E)`, 0 where a token does not meet an expert.
    """
    if isinstance(routing, TokenChoice):
        one_hot = membership(routing.experts, num_experts)
        return ops.einsum("gske,gsk->gse", one_hot, routing.weights)
    # Own column in an (E, C) slot's row, then rows added up token by token.
    groups, flat = _flat_slots(routing)
    columns = ops.eye(num_experts, dtype="float32")
    rows = ops.einsum("gec,ef->gecf", routing.weights, columns)
    rows = ops.reshape(rows, (groups, ops.shape(flat)[1], num_experts))
    return backend.scatter_add_rows(rows, flat, length)


def token_weights(routing: Routing, length: Any) -> Tensor:
    """Sum of each token's combine weights, float32 `(G, S)`.

    With identical experts this is the factor by which the layer scales the
    dense block's output: 1 where the function is preserved.
    """
    if isinstance(routing, TokenChoice):
        return ops.sum(routing.weights, axis=-1)
    return _add_to_tokens(routing, routing.weights, length)


def experts_per_token(routing: Routing, length: Any, num_experts: int):
    """How many experts process each token: float32 `(G, S)`, 0 for padding."""
    if isinstance(routing, TokenChoice):
        kept = ops.cast(routing.experts < num_experts, "float32")
        return ops.sum(kept, axis=-1)
    active = ops.cast(routing.active, "float32")
    return _add_to_tokens(routing, active, length)


def expert_load(routing: Routing, num_experts: int) -> Tensor:
    """Tokens that each expert processes, over all groups: float32 `(E,)`."""
    if isinstance(routing, TokenChoice):
        one_hot = membership(routing.experts, num_experts)
        return ops.sum(one_hot, axis=(0, 1, 2))
    return ops.sum(ops.cast(routing.active, "float32"), axis=(0, 2))


def _pick(scores, tokens):
    """`scores[g, e, tokens[g, e, c]]`, with the backend's gather's gradient.

    Args:
        scores: `(G, E, S)`.
        tokens: int32 `(G, E, C)`.

    Returns:
        `(G, E, C)`.
    """
    groups, experts, length = ops.shape(scores)
    slots = ops.shape(tokens)[2]
    first = ops.arange(experts, dtype="int32") * length
    index = tokens + ops.reshape(first, (1, experts, 1))
    rows = ops.reshape(scores, (groups, experts * length, 1))
    picked = backend.gather_rows(
        rows, ops.reshape(index, (groups, experts * slots))
    )
    return ops.reshape(picked, (groups, experts, slots))


def _flat_slots(routing):
    """`(G, E * C)` token positions, and `G`."""
    groups, experts, slots = ops.shape(routing.tokens)
    return groups, ops.reshape(routing.tokens, (groups, experts * slots))


def _add_to_tokens(routing, values, length):
    """Adds per-slot values `(G, E, C)` up at their tokens: `(G, S)`."""
    groups, flat = _flat_slots(routing)
    rows = ops.reshape(values, (groups, ops.shape(flat)[1], 1))
    return backend.scatter_add_rows(rows, flat, length)[..., 0]


def _safe_divide(weights, total):
    """`weights / total`, 0 where `total` is 0, without an epsilon.

    Raw sums go down to 0.05, where even an epsilon of 1e-6 costs 2e-5 of the
    equality with the dense block.
    """
    routed = total > 0.0
    return ops.where(routed, weights / ops.where(routed, total, 1.0), 0.0)

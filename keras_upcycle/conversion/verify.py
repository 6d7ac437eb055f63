"""`verify_upcycle`: what the conversion did to the model's output, measured."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_upcycle.analysis import similarity
from keras_upcycle.conversion import differences, pairing
from keras_upcycle.conversion.verify_report import (
    SMALL,
    LayerReport,
    UpcycleReport,
    named,
)
from keras_upcycle.layers.call_context import LayerCall, record_calls
from keras_upcycle.layers.moe_layers import check_batch
from keras_upcycle.routing import functional


def verify_upcycle(
    dense: keras.Model, moe: keras.Model, inputs: Any
) -> UpcycleReport:
    """Compares a sparse model with the dense one that it came from.

    Both run once, at inference, on the same inputs; every converted block is
    also compared with the dense block on its own input. Blocks are compared
    at routed tokens and real positions only, where they can be equal.

    Where outputs differ, the report names what was measured to differ with
    them and nothing else: routing, experts' weights, layers outside the
    blocks, the precision. Where none does it says so.

    Args:
        dense: A Keras model, the dense one, as given to `upcycle_model`.
        moe: A Keras model, what `upcycle_model` made of it; reloaded or trained
            since, too.
        inputs: Array, tensor or structure of them: a batch as the models are
            called on, after preprocessing. A few dozen examples are enough;
            they run eagerly, in one piece. Padding, where the inputs say what
            it is, is left out.

    Returns:
        An `UpcycleReport`.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
        TypeError, ValueError: For inputs without an example, or token ids
            outside the vocabulary.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> report = verify_upcycle(dense, moe, keras.ops.ones((2, 8)))
        >>> report.relative_difference < 1e-5
        True
    """
    family, places = pairing.converted(dense, moe)
    check_batch("inputs", inputs, dense)
    family.check_inputs(dense, inputs)
    expected = dense(inputs, training=False)
    with record_calls() as calls:
        received = moe(inputs, training=False)
    real = family.real_positions(dense, inputs)
    difference, scale = _difference(expected, received, real)
    layers = []
    for site, layer in places:
        own = [call for call in calls if call.layer is layer]
        layers.append(_layer_report(site, layer, own))
    relative = difference / scale if scale else difference
    changed = differences.outside_blocks(dense, moe)
    observations = []
    if not relative < SMALL:
        observations = _observed(
            dense, moe, inputs, (expected, received), real, relative
        )
        if changed is None:
            observations.append(
                "other weights than the blocks' do not match one another"
            )
        observations += [
            f"no token reached the block {layer.path!r}"
            for layer in layers
            if not layer.tokens
        ]
    return UpcycleReport(
        max_difference=difference,
        relative_difference=relative,
        layers=tuple(layers),
        changed=changed or (),
        observations=tuple(observations),
    )


def _observed(dense, moe, inputs, outputs, real, relative):
    """What the rest of the verdict needs, in words; all of it measured."""
    if not np.isfinite(relative):
        return _not_finite(dense, moe, inputs, outputs)
    found = []
    again = dense(inputs, training=False)
    repeated, scale = _difference(outputs[0], again, real)
    if scale and repeated / scale >= SMALL:
        found.append(
            "the dense model itself gives another output when it runs again, "
            f"by {repeated / scale:.1e}"
        )
    coarse = differences.rounding(moe)
    if coarse is not None and relative < 16 * coarse[1]:
        found.append(
            f"layers compute in {coarse[0]}, whose numbers are {coarse[1]:.1e} "
            "apart at 1"
        )
    return found


def _not_finite(dense, moe, inputs, outputs):
    finite = [differences.all_finite(output) for output in outputs]
    found = [
        {
            (False, False): "both models' outputs have such values",
            (True, False): "the dense model's output is finite",
            (False, True): "the dense model's is not, the sparse one's is",
            (True, True): "their difference is not",
        }[tuple(finite)]
    ]
    if not differences.all_finite(inputs):
        found.append("the inputs have such values")
    for model, whose in ((dense, "dense"), (moe, "sparse")):
        paths = differences.not_finite(model)
        if paths:
            found.append(
                f"weights of the {whose} model have: "
                + named([repr(path) for path in paths])
            )
    if len(found) == 1:
        found.append(
            "inputs and weights are finite, so it comes up on the way, such "
            "as by an overflow"
        )
    return found


def _difference(expected, received, real):
    """Largest absolute difference, and largest absolute expected value.

    At real positions: an MoE layer gives padding the output 0, which a dense
    block does not, and nobody reads either.
    """
    worst = scale = 0.0
    expected, received = tree.flatten(expected), tree.flatten(received)
    masks = [None] * len(expected) if real is None else tree.flatten(real)
    for a, b, mask in zip(expected, received, masks, strict=True):
        a, b = _numpy(a), _numpy(b)
        if mask is not None:
            mask = ops.convert_to_numpy(mask).astype(bool)
            a, b = a[mask], b[mask]
        worst = _largest(a - b, worst)
        scale = _largest(a, scale)
    return worst, scale


def _largest(values, known):
    """Largest absolute value, or what is known already.

    Not a number where any value is none: Python's `max` would pass over it,
    and a model that computes nothing at all would differ by 0.
    """
    return float(np.max(np.abs(values), initial=known))


def _layer_report(site, layer, calls: list[LayerCall]) -> LayerReport:
    worst = scale = 0.0
    weights, unrouted, met = [], [], []
    for call in calls:
        dense_output = _numpy(site(call.inputs))
        width = dense_output.shape[-1]
        a = dense_output.reshape(-1, width)
        b = _numpy(call.outputs).reshape(-1, width)
        real, number, weight = _tokens(call, len(a))
        routed = number > 0
        met.append(number[real])
        worst = _largest((a - b)[real & routed], worst)
        scale = _largest(a[real], scale)
        weights.append(weight[real])
        unrouted.append(~routed[real])
    return LayerReport(
        path=site.path,
        max_difference=worst,
        relative_difference=worst / scale if scale else worst,
        unrouted_fraction=_mean(unrouted),
        mean_combine_weight=_mean(weights),
        tokens=sum(len(part) for part in weights),
        expert_difference=differences.from_dense(site, layer),
        slices=layer.num_experts if layer.router.adds_slices else None,
        slices_met=_mean(met) if layer.router.adds_slices else None,
        **_receipt(site, layer, _mean(met)),
    )


def _receipt(site, layer, experts_per_token):
    """What the method left of the dense block, and what a token meets."""
    sizes = [
        sum(math.prod(weight.shape) for weight in networks.weights)
        for networks in layer.networks
    ]
    router = sum(math.prod(w.shape) for w in layer.router.weights)
    active = experts_per_token * sizes[0] / layer.num_experts
    always = sum(sizes[1:]) + router
    if layer.output_bias is not None:
        always += math.prod(layer.output_bias.bias.shape)
    return {
        "intact_neurons": similarity.intact_neurons(site, layer),
        "expert_cosine": similarity.expert_cosine(layer),
        "active_share": (active + always) / (sizes[0] + always),
    }


def _tokens(call, count):
    """Per token: is it real, how many experts it meets, its total weight."""
    experts = call.layer.num_experts
    number = functional.experts_per_token(call.routing, call.length, experts)
    weight = functional.token_weights(call.routing, call.length)
    real = np.ones(count, bool)
    if call.mask is not None:
        real = ops.convert_to_numpy(call.mask).reshape(-1)[:count]
    number, weight = (_numpy(x).reshape(-1)[:count] for x in (number, weight))
    return real, number, weight


def _mean(parts):
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.mean(values)) if values.size else 0.0


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))

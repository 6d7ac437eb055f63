"""`verify_upcycle`: what the conversion did to the model's output, measured."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_upcycle import converted, expert_receipt, routing, tables
from keras_upcycle.moe_feed_forward import LayerCall, record_calls


@dataclass(frozen=True)
class LayerReport:
    """One converted block, on the tokens that reached it.

    Attributes:
        path: Where the block was in the dense model.
        max_difference: Largest absolute difference from the dense block's
            output on the same input, over routed tokens.
        relative_difference: The same, divided by the largest absolute value
            of the dense block's output.
        unrouted_fraction: Share of real tokens that no expert processed; the
            residual branch alone carries them.
        mean_combine_weight: Mean over real tokens of the sum of combine
            weights: the factor on the dense output. 1 preserves it.
        intact_neurons: Share of the experts' hidden neurons that are whole
            dense neurons, up to a factor; `None` for integer kernels.
        expert_cosine: Mean cosine between two experts; `None` as above.
        active_share: Parameters that a token meets on average, as a share of
            the block's: experts, what is shared, and the router.
    """

    path: str
    max_difference: float
    relative_difference: float
    unrouted_fraction: float
    mean_combine_weight: float
    intact_neurons: float | None
    expert_cosine: float | None
    active_share: float


@dataclass(frozen=True)
class UpcycleReport:
    """What `verify_upcycle` measured. Print it.

    Attributes:
        max_difference: Largest absolute difference of the models' outputs.
        relative_difference: The same, divided by the largest absolute output
            of the dense model.
        layers: A `LayerReport` for each converted block.
    """

    max_difference: float
    relative_difference: float
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.path,
                f"{layer.max_difference:.1e}",
                f"{layer.relative_difference:.1e}",
                f"{layer.unrouted_fraction:.1%}",
                f"{layer.mean_combine_weight:.3f}",
                _share(layer.intact_neurons),
                "-"
                if layer.expert_cosine is None
                else f"{layer.expert_cosine:.3f}",
                _share(layer.active_share),
            )
            for layer in self.layers
        ]
        table = tables.text(
            (
                "converted block",
                "max |diff|",
                "relative",
                "unrouted",
                "mean weight",
                "intact",
                "cosine",
                "active",
            ),
            rows,
        )
        return (
            f"Output: max |difference| {self.max_difference:.1e}, relative "
            f"{self.relative_difference:.1e}.\n{self._verdict()}\n{table}\n"
            "intact: the experts' neurons that are whole dense neurons; "
            "cosine: between two\nexperts, mean of all pairs; active: the "
            "block's parameters that a token meets."
        )

    def _verdict(self):
        if not np.isfinite(self.relative_difference):
            return (
                "An output is not a finite number: weights or inputs are not, "
                "or they overflow."
            )
        unrouted = max(layer.unrouted_fraction for layer in self.layers)
        scale = min(layer.mean_combine_weight for layer in self.layers)
        causes = []
        if unrouted > 0.0:
            causes.append(
                f"up to {unrouted:.1%} of a block's tokens meet no expert "
                "(raise `capacity_factor`, or route by Top-K)"
            )
        if scale < 0.999 - unrouted:
            causes.append(
                f"combine weights sum to {scale:.3f} on average in one block "
                "(`normalize=True` makes that 1 for every routed token)"
            )
        if self.relative_difference < 1e-4:
            note = f" Yet {'; and '.join(causes)}." if causes else ""
            return f"The sparse model computes what the dense one does.{note}"
        if not causes:
            causes.append(
                "experts are not the dense block they came from, as they are "
                "not once trained, or the dtype policy rounds as coarsely"
            )
        return f"The output differs because {'; and '.join(causes)}."


def verify_upcycle(
    dense: keras.Model, moe: keras.Model, inputs: Any
) -> UpcycleReport:
    """Compares a sparse model with the dense one that it came from.

    Both run once, at inference, on the same inputs; every converted block is
    also compared with the dense block on its own input. Blocks are compared
    at routed tokens and real positions only, where they can be equal.

    Args:
        dense: The dense model, as given to `upcycle_model`.
        moe: What `upcycle_model` made of it; reloaded or trained since, too.
        inputs: A batch as the models are called on, after preprocessing. A
            few dozen examples are enough; they run eagerly, in one piece.
            Padding, where the inputs say what it is, is left out.

    Returns:
        An `UpcycleReport`.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
        ValueError: For token ids outside the vocabulary.

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
    family, places = converted.converted(dense, moe)
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
    return UpcycleReport(
        max_difference=difference,
        relative_difference=difference / scale if scale else difference,
        layers=tuple(layers),
    )


def _difference(expected, received, real):
    """Largest absolute difference, and largest absolute expected value.

    At real positions: a mixture gives padding the output 0, which a dense
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
        "intact_neurons": expert_receipt.intact_neurons(site, layer),
        "expert_cosine": expert_receipt.expert_cosine(layer),
        "active_share": (active + always) / (sizes[0] + always),
    }


def _tokens(call, count):
    """Per token: is it real, how many experts it meets, its total weight."""
    experts = call.layer.num_experts
    number = routing.experts_per_token(call.routing, call.length, experts)
    weight = routing.token_weights(call.routing, call.length)
    real = np.ones(count, bool)
    if call.mask is not None:
        real = ops.convert_to_numpy(call.mask).reshape(-1)[:count]
    number, weight = (_numpy(x).reshape(-1)[:count] for x in (number, weight))
    return real, number, weight


def _share(value):
    return "-" if value is None else f"{value:.1%}"


def _mean(parts):
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.mean(values)) if values.size else 0.0


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))

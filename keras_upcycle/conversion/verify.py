"""`verify_upcycle`: what the conversion did to the model's output, measured."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_upcycle import tables
from keras_upcycle.analysis import expert_receipt
from keras_upcycle.conversion import differences, pairing
from keras_upcycle.layers.moe_feed_forward import LayerCall, record_calls
from keras_upcycle.layers.moe_layers import check_batch
from keras_upcycle.routing import functional

# Relative differences of outputs that rounding makes, and of equal weights
# that were once written in another precision.
_SMALL, _EQUAL = 1e-4, 1e-6
_NAMED = 5


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
        tokens: How many real tokens reached the block; with none, what is
            measured on tokens is 0 and means nothing.
        expert_difference: Largest absolute difference of an expert's weights
            from the dense block's, divided by the largest of those; `None`
            for experts of another width, beside a shared one, or of integer
            kernels.
    """

    path: str
    max_difference: float
    relative_difference: float
    unrouted_fraction: float
    mean_combine_weight: float
    intact_neurons: float | None
    expert_cosine: float | None
    active_share: float
    tokens: int = 0
    expert_difference: float | None = None

    def missing_weight(self) -> float:
        """By how much the mean combine weight of routed tokens is not 1."""
        if not self.tokens:
            return 0.0
        return abs(1.0 - self.unrouted_fraction - self.mean_combine_weight)


@dataclass(frozen=True)
class UpcycleReport:
    """What `verify_upcycle` measured. Print it.

    Attributes:
        max_difference: Largest absolute difference of the models' outputs.
        relative_difference: The same, divided by the largest absolute output
            of the dense model.
        layers: A `LayerReport` for each converted block.
        changed: The layers outside converted blocks that hold something else
            than the dense model's.
        observations: What else was measured, where the outputs differ: which
            values are not finite, blocks that no token reached, a dense model
            that gives another output when it runs again, the precision.
    """

    max_difference: float
    relative_difference: float
    layers: tuple[LayerReport, ...]
    changed: tuple[differences.LayerDifference, ...] = ()
    observations: tuple[str, ...] = ()

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
                "An output is not a finite number: "
                f"{'; '.join(self.observations)}."
            )
        causes = [*self._routing_causes(), *self._weight_causes()]
        if self.relative_difference < _SMALL:
            causes = self._routing_causes()
            note = f" Yet {'; and '.join(causes)}." if causes else ""
            return f"The sparse model computes what the dense one does.{note}"
        causes += self._block_causes() + list(self.observations)
        if causes:
            return f"The output differs because {'; and '.join(causes)}."
        return (
            "The output differs, and nothing that was measured tells why: "
            "every block gives on the same input what the dense block gives, "
            "and what layers outside hold is equal as far as it can be "
            "compared."
        )

    def _routing_causes(self):
        met = [layer for layer in self.layers if layer.tokens]
        causes = []
        unrouted = max((layer.unrouted_fraction for layer in met), default=0.0)
        if unrouted > 0.0:
            causes.append(
                f"up to {unrouted:.1%} of a block's tokens meet no expert "
                "(raise `capacity_factor`, or route by Top-K)"
            )
        off = max(met, key=LayerReport.missing_weight, default=None)
        if off is not None and off.missing_weight() > 0.001:
            causes.append(
                f"combine weights sum to {off.mean_combine_weight:.3f} on "
                "average in one block (`normalize=True` makes that 1 for "
                "every routed token)"
            )
        return causes

    def _weight_causes(self):
        causes = []
        moved = [
            layer
            for layer in self.layers
            if (layer.expert_difference or 0.0) > _EQUAL
        ]
        if moved:
            worst = max(moved, key=lambda layer: layer.expert_difference)
            causes.append(
                f"experts of {_blocks(moved)} have other weights than the "
                f"dense block, by up to {worst.expert_difference:.1e} of its "
                f"largest in {worst.path!r}"
            )
        weights = [c for c in self.changed if (c.difference or 0.0) > _EQUAL]
        if weights:
            causes.append(
                "weights outside the blocks differ: "
                + _named([f"{c.path!r} by {c.difference:.1e}" for c in weights])
            )
        others = [c for c in self.changed if c.difference is None]
        if others:
            causes.append(
                "layers outside the blocks hold something else: "
                + _named([f"{c.path!r} ({', '.join(c.holds)})" for c in others])
            )
        return causes

    def _block_causes(self):
        """Blocks that differ on the same input, if nothing above says why."""
        differ = [
            layer
            for layer in self.layers
            if layer.relative_difference >= _SMALL
            and layer.missing_weight() <= 0.001
            and (layer.expert_difference or 0.0) <= _EQUAL
        ]
        if not differ:
            return []
        worst = max(differ, key=lambda layer: layer.relative_difference)
        why = (
            "with the dense block's weights in all its experts"
            if worst.expert_difference is not None
            else "with experts that cannot be compared with it weight by "
            "weight (of another width, quantized, or beside a shared one)"
        )
        return [
            f"{_blocks(differ)} of itself differs from the dense one on the "
            f"same input, by {worst.relative_difference:.1e} in "
            f"{worst.path!r}, {why}"
        ]


def _blocks(layers):
    return "1 block" if len(layers) == 1 else f"{len(layers)} blocks"


def _named(words):
    shown = ", ".join(words[:_NAMED])
    more = len(words) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown


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
        dense: The dense model, as given to `upcycle_model`.
        moe: What `upcycle_model` made of it; reloaded or trained since, too.
        inputs: A batch as the models are called on, after preprocessing. A
            few dozen examples are enough; they run eagerly, in one piece.
            Padding, where the inputs say what it is, is left out.

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
    check_batch("inputs", inputs)
    family, places = pairing.converted(dense, moe)
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
    if not relative < _SMALL:
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
    if scale and repeated / scale >= _SMALL:
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
                + _named([repr(path) for path in paths])
            )
    if len(found) == 1:
        found.append(
            "inputs and weights are finite, so it comes up on the way, such "
            "as by an overflow"
        )
    return found


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
        tokens=sum(len(part) for part in weights),
        expert_difference=differences.from_dense(site, layer),
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
    number = functional.experts_per_token(call.routing, call.length, experts)
    weight = functional.token_weights(call.routing, call.length)
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

"""What differs between a dense model and its sparse copy, outside blocks."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_upcycle import keras_internals
from keras_upcycle.conversion import pairing
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import FeedForwardSite, surgery
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.state import sameness


@dataclass(frozen=True)
class LayerDifference:
    """A layer outside the converted blocks that holds something else.

    Attributes:
        path: Of the layer in the dense model.
        difference: Largest absolute difference of its weights, divided by the
            largest absolute weight of the dense layer; `None` where another
            thing than a weight differs.
        holds: What differs, such as `("kernel", "bias")` or `("mean",)`.
    """

    path: str
    difference: float | None
    holds: tuple[str, ...]


def outside_blocks(
    dense: keras.Model, moe: keras.Model
) -> tuple[LayerDifference, ...] | None:
    """The layers outside converted blocks that differ, inputs first.

    Weights, and what else a layer holds as far as two values can be compared.

    Returns:
        `None` where the two models' other weights do not match one another.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    try:
        pairs = list(pairing.copied(dense, moe))
    except UpcycleError:
        return None
    found: dict[str, list[tuple[str, float]]] = {}
    for source, variable in pairs:
        difference = weight_difference(source, variable.value)
        if difference != 0.0:
            path, _, name = source.path.rpartition("/")
            found.setdefault(path, []).append((name, difference))
    changed = [
        LayerDifference(
            path=path,
            difference=float(np.max([size for _, size in parts])),
            holds=tuple(name for name, _ in parts),
        )
        for path, parts in found.items()
    ]
    for old, new in surgery.matched(dense, moe):
        place = old.path or old.name
        names = sameness.unequal(old, new)
        # What is made of weights that differ differs with them.
        if names and place not in found:
            changed.append(LayerDifference(place, None, tuple(names)))
    return tuple(changed)


def from_dense(site: FeedForwardSite, layer: MoEFeedForward) -> float | None:
    """How far the experts' weights are from those of the dense block.

    Returns:
        Largest absolute difference of any expert's weights, divided by the
        largest absolute weight of the dense block, the worst of its kernels
        and biases; 0 after copying. `None` where the experts are of another
        width, are quantized, or stand beside a shared one.
    """
    if layer.intermediate_dim != site.intermediate_dim:
        return None
    if len(layer.networks) > 1 or layer.experts.are_quantized:
        return None
    worst = 0.0
    for pair in pairing.of_block(site, layer):
        if pair.dense is None:
            continue
        copies = 1 if pair.relation == pairing.COPIED else layer.num_experts
        for value in ops.reshape(pair.sparse, (copies, *pair.dense.shape)):
            difference = weight_difference(pair.dense, value)
            worst = float(np.maximum(worst, difference))
    return worst


def weight_difference(source: keras.Variable, value: Any) -> float:
    """Largest absolute difference, over the largest absolute weight."""
    a, b = _array(source.value), _array(value)
    if a.dtype != b.dtype or not np.issubdtype(a.dtype, np.floating):
        return 0.0 if np.array_equal(a, b) else 1.0
    if np.array_equal(a, b) or not a.size:
        return 0.0
    scale = np.max(np.abs(a))
    return float(np.max(np.abs(a - b)) / (scale if scale else 1.0))


def not_finite(model: keras.Model) -> tuple[str, ...]:
    """Paths of the float weights that hold a value that is no number."""
    return tuple(
        variable.path
        for variable in model.weights
        if keras.backend.is_float_dtype(variable.dtype)
        and not bool(ops.all(ops.isfinite(variable.value)))
    )


def all_finite(values: Any) -> bool:
    """Whether all floats in a structure of arrays or tensors are finite."""
    for value in tree.flatten(values):
        value = np.asarray(ops.convert_to_numpy(value))
        if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
            return False
    return True


def rounding(model: keras.Layer) -> tuple[str, float] | None:
    """The coarsest half precision that a layer computes in, and its step.

    Returns:
        Name, and the difference between 1 and the next larger number; `None`
        where all compute in float32 or better.
    """
    steps = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
    used = {each.compute_dtype for each in keras_internals.all_layers(model)}
    return next(
        ((name, step) for name, step in steps.items() if name in used), None
    )


def _array(tensor):
    tensor = ops.stop_gradient(ops.convert_to_tensor(tensor))
    if keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(tensor.dtype)
    ):
        tensor = ops.cast(tensor, "float32")
    return ops.convert_to_numpy(tensor)

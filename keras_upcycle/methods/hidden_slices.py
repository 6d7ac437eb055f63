"""A dense block cut along its hidden layer: what fine-grained experts hold."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers import activations
from keras_upcycle.layers.expert_init import FirstValue, whole
from keras_upcycle.state.first_values import ByExpert
from keras_upcycle.types import Tensor

BIAS = "down_bias"


def first_values(
    kernels: Mapping[str, keras.Variable],
    parts: int,
    factors: Mapping[str, float],
    *,
    groups: int = 1,
    order: Any = None,
) -> dict[str, FirstValue]:
    """What experts start from that are slices of a dense block.

    Args:
        kernels: The dense block's, as in a `FeedForwardSite`.
        parts: How many slices; a divisor of `F`.
        factors: From each kernel's name to what it is multiplied by.
        groups: How often all slices are repeated, one group after the other.
        order: int `(F,)`, a permutation of the hidden neurons to apply before
            the cut; `None` leaves them in their order.

    Returns:
        As `ExpertInit.values` does, for `groups * parts` experts of a layer
        with `layer_settings`: the output bias is one for all.
    """
    found = {
        name: _first_value(name, variable, parts, factors[name], order)
        for name, variable in kernels.items()
    }
    return once(found, kernels)


def check(block: Any) -> None:
    """Raises `UpcycleError` where a part of the hidden layer is no part.

    Args:
        block: The dense block, a `FeedForwardSite`.
    """
    if activations.is_elementwise(block.activation):
        return
    activation = keras.activations.get(block.activation)
    name = getattr(activation, "__name__", type(activation).__name__)
    raise UpcycleError(
        "A hidden layer that is cut into slices must have an activation of "
        f"each hidden unit by itself. Received: {name!r} in block "
        f"{block.path!r}, whose values depend on the whole hidden layer. "
        'Take experts that hold it whole, such as `expert_init="copy"`, or '
        "leave the block dense with `layers=`."
    )


def layer_settings(kernels: Mapping[str, keras.Variable]) -> dict[str, Any]:
    """What the `MoEFeedForward` of slices needs; see `output_bias`.

    Args:
        kernels: The dense block's.
    """
    return {"output_bias": True} if BIAS in kernels else {}


def once(
    values: Mapping[str, FirstValue], kernels: Mapping[str, Any]
) -> dict[str, FirstValue]:
    """First values of slices, with the output bias whole and outside.

    Slices have no part of it each: how many run, and with which weights, is
    the router's to say. DS-MoE's authors add it once, outside the experts.

    Args:
        values: As `ExpertInit.values` gives them.
        kernels: The dense block's.
    """
    found = {name: v for name, v in values.items() if name != BIAS}
    if BIAS in kernels:
        found["output_bias"] = whole(kernels[BIAS])
    return found


def neuron_axis(name: str) -> int | None:
    """The axis of hidden neurons of a dense block's weight.

    From the end, so that it is an expert's too. `None` for the output bias,
    which belongs to no neuron.

    Args:
        name: Which: `"up_kernel"`, `"down_bias"` and so on.

    Example:
        >>> neuron_axis("gate_kernel"), neuron_axis("down_kernel")
        (-1, -2)
    """
    if name == BIAS:
        return None
    return -2 if name == "down_kernel" else -1


def cut(value: Tensor, name: str, parts: int) -> Tensor:
    """`(parts, ...)`: slices along the hidden width.

    The output bias has no such axis; each slice gets all of it.

    Args:
        value: A kernel or bias of a dense block.
        name: Which: `"up_kernel"`, `"down_bias"` and so on.
        parts: How many slices.

    Example:
        >>> tuple(cut(keras.ops.ones((8, 16)), "up_kernel", 4).shape)
        (4, 8, 4)
        >>> tuple(cut(keras.ops.ones((16, 8)), "down_kernel", 4).shape)
        (4, 4, 8)
    """
    if name == BIAS:
        return ops.tile(ops.expand_dims(value, 0), (parts, 1))
    if name == "down_kernel":
        return ops.reshape(value, (parts, -1, value.shape[1]))
    if len(value.shape) == 1:
        return ops.reshape(value, (parts, -1))
    slices = ops.reshape(value, (value.shape[0], parts, -1))
    return ops.transpose(slices, (1, 0, 2))


def _first_value(name, variable, parts, factor, order):
    def make(experts):
        dense = variable.value * factor
        axis = neuron_axis(name)
        if order is not None and axis is not None:
            dense = ops.take(dense, order, axis=axis)
        own = np.array([e % parts for e in experts], "int32")
        return ops.take(cut(dense, name, parts), own, axis=0)

    return ByExpert(make)

"""Whether a stock layer does what experts do in its place, and no more.

Experts are told a few things of the layers they take the place of: kernels,
biases, an activation, a rate, a dtype. Whatever else a layer does, by its
settings, by what it holds or by what was changed on the object, would be lost.
Each function says in words what that is, for people, or `None`.
"""

import numbers
from collections import defaultdict

import keras
import numpy as np
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.families import surgery
from keras_upcycle.layers import activations

_LINEAR = (None, keras.activations.linear)
CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


def named(layer):
    """A layer's class and name, for messages."""
    return f"{type(layer).__name__} {layer.name!r}"


def why_not_plain(layer, holds=()):
    """What any layer may do besides its own arithmetic.

    Args:
        layer: A built layer of a stock class.
        holds: The layers that are known to be in it. A layer given as its
            activation is, see `why_not_activation`.
    """
    changed = keras_internals.own_methods(layer)
    if changed:
        return (
            f"{named(layer)} has a `{changed[0]}` of its own, put on this "
            "very object, which neither experts nor a copy would have"
        )
    if layer.activity_regularizer is not None:
        return (
            f"{named(layer)} has an activity_regularizer, whose loss experts "
            "do not add"
        )
    if not layer.autocast:
        return (
            f"{named(layer)} has autocast=False, while experts cast their "
            "inputs"
        )
    known = {id(each) for each in (*holds, getattr(layer, "activation", None))}
    for below in keras_internals.sublayers(layer):
        if id(below) not in known:
            return (
                f"{named(layer)} holds a layer, {named(below)}, which experts "
                "do not"
            )
    return None


def why_not_dense(layer, masks=True):
    """What a `Dense` does besides `activation(x @ kernel + bias)`.

    An `EinsumDense` whose equation is a matrix's on the last axis is one, and
    a convolution that sees one position.

    Args:
        layer: A built layer.
        masks: Whether a Keras mask must pass, as it does at experts.
    """
    if not is_projection(layer):
        return f"{layer.name!r} {not_exactly(layer, keras.layers.Dense)}"
    return (
        why_not_weights(layer)
        or why_not_plain(layer)
        or (why_no_mask(layer) if masks else None)
    )


def why_not_weights(layer):
    """What holds the weights of a `Dense` or `EinsumDense` back from experts.

    Args:
        layer: A built layer with a kernel and perhaps a bias.
    """
    if getattr(layer, "quantization_mode", None) is not None:
        return (
            f"{named(layer)} is quantized to {layer.quantization_mode!r}. "
            "Upcycle the model before it is quantized, then quantize the "
            "result"
        )
    if keras_internals.has_lora(layer):
        return (
            f"{named(layer)} has LoRA adapters. Merge them into the kernel "
            "first: `save_weights` writes merged kernels, `load_weights` "
            "reads them into a model without adapters"
        )
    if getattr(layer, "quantization_config", None) is not None:
        return (
            f"{named(layer)} has a quantization_config, which experts do not "
            "carry. Give one to `quantize` of the result"
        )
    for part in ("kernel", "bias"):
        variable = getattr(layer, part)
        for kind in ("regularizer", "constraint"):
            of_variable = variable is not None and getattr(variable, kind)
            if getattr(layer, f"{part}_{kind}") is not None or of_variable:
                return (
                    f"{named(layer)} has a {part}_{kind}, which experts do "
                    "not carry"
                )
        if variable is not None and variable.dtype != layer.variable_dtype:
            return (
                f"{named(layer)} has a {part} of dtype {variable.dtype}, "
                f"which its policy does not say ({layer.variable_dtype})"
            )
    own = [v for v in (layer.kernel, layer.bias) if v is not None]
    if {id(v) for v in keras_internals.own_variables(layer)} != {
        id(v) for v in own
    }:
        return (
            f"{named(layer)} has other weights than a kernel and a bias of "
            "its own"
        )
    return None


def is_projection(layer):
    """Whether a layer is a matrix on the last axis, of a class of Keras's."""
    if type(layer) is keras.layers.EinsumDense:
        return is_on_last_axis(layer.equation)
    if type(layer) in CONVOLUTIONS:
        return is_pointwise(layer) and layer.data_format == "channels_last"
    return type(layer) is keras.layers.Dense


def is_pointwise(layer):
    """Whether a convolution sees one position at a time, and all of it."""
    return (
        set(layer.kernel_size) == {1}
        and set(layer.strides) == {1}
        and layer.groups == 1
    )


def kernel_of(layer):
    """A projection's kernel `(D, F)`; of a convolution seen as such."""
    if type(layer) in CONVOLUTIONS:
        kernel = layer.kernel
        return keras_internals.Reshaped(kernel, kernel.shape[-2:])
    return layer.kernel


def is_on_last_axis(equation):
    """Whether an einsum's equation is a matrix's on the last axis."""
    inputs, outputs = equation.replace(" ", "").split("->")
    tokens, kernel = inputs.split(",")
    return (
        len(kernel) == 2
        and tokens[-1:] == kernel[0]
        and outputs == tokens[:-1] + kernel[1]
        and kernel[1] not in tokens
    )


def why_not_dropout(layer):
    """What a `Dropout` does besides dropping single values at its rate."""
    if type(layer) is not keras.layers.Dropout:
        return f"{layer.name!r} {not_exactly(layer, keras.layers.Dropout)}"
    if layer.noise_shape is not None:
        return (
            f"{named(layer)} has noise_shape={layer.noise_shape}, while "
            "experts drop every value by itself"
        )
    rate = layer.rate
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        return (
            f"{named(layer)} has rate={rate!r}, while experts take a number "
            "in [0, 1)"
        )
    return why_not_plain(layer) or why_no_mask(layer)


def why_not_network(first, last, gate=None, dropout=None, masks=True):
    """What the layers of a feed-forward network do besides being one.

    Args:
        first: The layer with the activation.
        last: The layer that returns to the width of the first one's input.
        gate: The layer whose output multiplies the first one's, or `None`.
        dropout: The layer on the hidden layer, or `None`.
        masks: Whether a Keras mask must pass all of them.
    """
    dense = [layer for layer in (first, gate, last) if layer is not None]
    for layer in dense:
        reason = why_not_dense(layer, masks)
        if reason is not None:
            return reason
        if layer is not first and layer.activation not in _LINEAR:
            return f"{named(layer)} has an activation, which experts have not"
        if (layer.bias is None) != (first.bias is None):
            return "some of its layers have a bias and others have none"
    before, after = (kernel_of(layer).shape for layer in (first, last))
    if tuple(after) != tuple(reversed(before)):
        return (
            f"{named(last)} has a kernel of shape {tuple(after)}, which does "
            f"not lead back from {tuple(before)}"
        )
    layers = [*dense]
    if dropout is not None:
        reason = why_not_dropout(dropout)
        if reason is not None:
            return reason
        layers.append(dropout)
    return why_not_one_dtype(layers) or why_not_activation(
        first.activation, first.kernel.shape[-1]
    )


def why_no_mask(layer):
    """That a mask ends at a layer, as it does not at experts."""
    if layer.supports_masking:
        return None
    return (
        f"{named(layer)} has supports_masking=False and lets no mask pass, as "
        "experts do"
    )


def why_not_activation(activation, width, rank=3):
    """Why experts could not apply an activation to tokens in their order.

    What is not Keras's own is tried: a token's values must not depend on
    other tokens, for experts meet them in other company.

    Args:
        activation: A function or layer.
        width: How many values a token's hidden layer has.
        rank: Number of axes where the dense layer applies it.
    """
    if isinstance(activation, keras.Layer):
        return (
            f"the activation is a layer, {named(activation)}, and experts "
            "take a function, such as `keras.activations.relu`"
        )
    if activations.is_stock(activation):
        return None
    name = getattr(activation, "__name__", type(activation).__name__)
    shape = (*[2] * (rank - 1), width)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    last = x.reshape(-1, width)[-1:]
    try:
        there = ops.convert_to_numpy(activation(ops.convert_to_tensor(x)))
        here = ops.convert_to_numpy(
            activation(ops.convert_to_tensor(last[None]))
        )
    except Exception as error:  # it is anybody's function
        return (
            f"the activation {name!r} fails on a float32 tensor of shape "
            f"{shape}: {type(error).__name__}: {error}"
        )
    if there.shape != shape or here.shape != (1, *last.shape):
        return (
            f"the activation {name!r} makes {there.shape} of {shape}, while "
            "experts need one that keeps the shape"
        )
    if np.allclose(there.reshape(-1, width)[-1:], here[0], 1e-4, 1e-5):
        return None
    return (
        f"the activation {name!r} gives a token other values in other "
        "company, and experts meet tokens in another order"
    )


def why_not_one_dtype(layers):
    """Which layer computes in another dtype than the first one does."""
    first, *others = layers
    for layer in others:
        if _dtypes(layer) != _dtypes(first):
            compute, variables = _dtypes(layer)
            return (
                f"{named(layer)} and {named(first)} have different dtype "
                f"policies: the one computes in {compute} with weights in "
                f"{variables}, the other in {first.compute_dtype} with "
                f"{first.variable_dtype}"
            )
    return None


def why_not_policy(layer, policy):
    """That a layer's dtype is not what a policy says at any path."""
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy.default_policy
    if _dtypes(layer) == (policy.compute_dtype, policy.variable_dtype):
        return None
    compute, variables = _dtypes(layer)
    return (
        f"{named(layer)} computes in {compute} with weights in {variables}, "
        f"and the layer around it is of the dtype policy {policy.name!r}, "
        "which experts follow"
    )


def not_exactly(layer, kind):
    """What is said of a layer that is not exactly of a kind."""
    if not isinstance(layer, kind):
        return f"is a {type(layer).__name__}, not a {kind.__name__}"
    return (
        f"is a {type(layer).__name__}, a subclass of {kind.__name__}, which "
        f"may do more than a {kind.__name__} does. Use "
        f"`keras.layers.{kind.__name__}` itself"
    )


class Sharing:
    """Which layers of a model share weights, or stand inside others.

    Args:
        model: A model.
    """

    def __init__(self, model):
        self._owners = defaultdict(list)
        self._around = {}
        for layer in keras_internals.all_layers(model):
            for variable in keras_internals.own_variables(layer):
                self._owners[id(variable)].append(layer)
            if surgery.is_plain_model(layer) or layer is model:
                continue
            for below in keras_internals.sublayers(layer):
                self._around[id(below)] = layer

    def why(self, layer):
        """With whom a layer is shared."""
        around = self._around.get(id(layer))
        if around is not None:
            return f"{named(layer)} is also inside {named(around)}"
        for variable in keras_internals.own_variables(layer):
            for other in self._owners[id(variable)]:
                if other is not layer:
                    return (
                        f"{named(layer)} shares its {variable.name} with "
                        f"{named(other)}"
                    )
        return None


def _dtypes(layer):
    return layer.compute_dtype, layer.variable_dtype

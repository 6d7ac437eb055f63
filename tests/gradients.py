"""Gradients on whichever backend runs, as NumPy arrays."""

import keras
import numpy as np
from keras import ops


def pull_back(function, *arrays):
    """Gradients of a scalar function at float arrays.

    Args:
        function: Of tensors, to a scalar tensor or to `(scalar, others)`.
        *arrays: Where to differentiate.

    Returns:
        `(scalar, others, gradients)`; `others` is `None` where there are
        none, and a gradient is 0 where the scalar does not depend on it.
    """
    arrays = [ops.convert_to_tensor(array) for array in arrays]

    def paired(*tensors):
        result = function(*tensors)
        return result if isinstance(result, tuple) else (result, None)

    if keras.backend.backend() == "jax":
        import jax

        places = tuple(range(len(arrays)))
        (value, others), found = jax.value_and_grad(
            paired, places, has_aux=True
        )(*arrays)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(arrays)
            value, others = paired(*arrays)
        found = tape.gradient(value, arrays)
    else:
        import torch

        arrays = [array.detach().requires_grad_() for array in arrays]
        value, others = paired(*arrays)
        found = torch.autograd.grad(value, arrays, allow_unused=True)
    found = [
        np.zeros(array.shape, "float32")
        if gradient is None
        else ops.convert_to_numpy(gradient)
        for gradient, array in zip(found, arrays, strict=True)
    ]
    return float(ops.convert_to_numpy(value)), others, found


def of_layer(layer, inputs, cotangent=None, *, mask=None, training=False):
    """Outputs of a built layer, and gradients by weight path.

    The scalar is `sum(outputs * cotangent)` where a cotangent is given, plus
    the layer's auxiliary losses.

    Returns:
        `(outputs, gradients)`; `gradients["inputs"]` is that of the inputs,
        the others have the weights' paths without the layer's own name.
    """
    frozen = [v.value for v in layer.non_trainable_variables]
    if cotangent is not None:
        cotangent = ops.convert_to_tensor(cotangent)

    def scalar(x, *weights):
        outputs, _, losses = layer.stateless_call(
            list(weights),
            frozen,
            x,
            mask=mask,
            training=training,
            return_losses=True,
        )
        total = sum(losses, ops.zeros((), "float32"))
        if cotangent is not None:
            total = total + ops.sum(ops.cast(outputs, "float32") * cotangent)
        return total, outputs

    values = [v.value for v in layer.trainable_variables]
    _, outputs, found = pull_back(scalar, inputs, *values)
    names = [v.path.split("/", 1)[1] for v in layer.trainable_variables]
    return as_float(outputs), dict(zip(["inputs", *names], found, strict=True))


def as_float(tensor):
    """Any float tensor as a float32 NumPy array."""
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))

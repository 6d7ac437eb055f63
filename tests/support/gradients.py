"""Values and gradients on whichever backend runs, as NumPy arrays."""

import functools

import keras
import numpy as np
from keras import ops

# A program here runs once or twice, so it is compiled quickly and not well:
# four times as fast. Names of XLA's options, jaxlib 0.10.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def quick_options():
    """`QUICKLY`, or `None` where jaxlib does not know one of them."""
    import jax

    try:
        jax.jit(lambda x: x, compiler_options=QUICKLY)(0.0)
    except jax.errors.JaxRuntimeError:
        return None
    return QUICKLY


def compiled(function):
    """The function, on JAX as one program: quicker than operation by operation.

    Of tensors to tensors; everything else by closure.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function, compiler_options=quick_options())
    return function


def compiled_pull_back(function):
    """`pull_back` of one function, for calls at many points."""

    def paired(*tensors):
        result = function(*tensors)
        return result if isinstance(result, tuple) else (result, None)

    @functools.cache
    def jax_program(places):
        import jax

        return compiled(jax.value_and_grad(paired, places, has_aux=True))

    def call(*arrays):
        arrays = [ops.convert_to_tensor(array) for array in arrays]
        if keras.backend.backend() == "jax":
            (value, others), found = jax_program(tuple(range(len(arrays))))(
                *arrays
            )
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

    return call


def pull_back(function, *arrays):
    """Gradients of a scalar function at float arrays.

    Args:
        function: Of tensors, to a scalar tensor or to `(scalar, others)`.
        *arrays: Where to differentiate.

    Returns:
        `(scalar, others, gradients)`; `others` is `None` where there are
        none, and a gradient is 0 where the scalar does not depend on it.
    """
    return compiled_pull_back(function)(*arrays)


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
    if cotangent is not None:
        outputs = as_float(outputs)
    return outputs, dict(zip(["inputs", *names], found, strict=True))


def as_float(tensor):
    """Any float tensor as a float32 NumPy array."""
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def weights_of(layer):
    """The weights of a `MoEFeedForward` or `Experts` as float64 arrays.

    `"router"`, `"gate"`, `"up"`, `"up_bias"`, ... whichever there are.
    """
    return {
        oracle_name(v.path): as_float(v.value).astype("float64")
        for v in layer.trainable_variables
    }


def oracle_name(path):
    """`"up_bias"` for `".../expert_up/bias"`, as `reference` says it."""
    owner, kind = path.split("/")[-2:]
    role = owner.removeprefix("expert_")
    return f"{role}_bias" if kind == "bias" else role


def normal(stddev, seed=0):
    """An initializer drawn by NumPy: JAX compiles its own for each shape."""
    rng = np.random.default_rng(seed)

    def initialize(shape, dtype=None):
        return ops.cast(stddev * rng.normal(size=shape), dtype or "float32")

    return initialize

"""JAX: products of rows and kernels, and all experts at inference."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_upcycle.backend import portable

# Experts with so many rows run one after the other at inference on a CPU.
_ROWS_WORTH_A_TURN = 64


def multiply(rows, kernels):
    """See `portable.multiply`; wide where a narrow product is slow.

    XLA's CPU compiler runs a product of bfloat16 that is asked for in float32
    by the processor's own instructions, several times as fast as one that is
    asked for in bfloat16.
    """
    if _narrow_on_cpu(rows):
        return _wide_multiply(rows, kernels)
    return jnp.matmul(rows, kernels)


def _narrow_on_cpu(array):
    return array.dtype.itemsize < 4 and jax.default_backend() == "cpu"


def _product(equation, a, b):
    """An einsum of two arrays of one dtype, into float32 on a CPU."""
    wide = jnp.float32 if _narrow_on_cpu(a) else None
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


@jax.custom_vjp
def _wide_multiply(rows, kernels):
    return _product("...nd,...df->...nf", rows, kernels).astype(rows.dtype)


_wide_multiply.defvjp(
    lambda rows, kernels: (_wide_multiply(rows, kernels), (rows, kernels)),
    lambda saved, gradient: (
        by_rows(gradient, saved[1]).astype(saved[0].dtype),
        by_kernels(saved[0], gradient).astype(saved[1].dtype),
    ),
)


def by_rows(gradient, kernels):
    """The gradient of a product by its rows, float32 on a CPU."""
    return _product("...nf,...df->...nd", gradient, kernels)


def by_kernels(rows, gradient):
    """The gradient of a product by its kernels, float32 on a CPU."""
    return _product("...nd,...nf->...df", rows, gradient)


def infer_slots(slots, weights, activation):
    """See `portable.infer_slots`; expert by expert on a CPU.

    The hidden layer of one expert stays in the cache, where that of all is
    written to memory and read again. A gradient needs it written anyway. With
    several devices experts may lie on different ones, and run at once.
    """
    experts, rows, _ = slots.shape
    one_by_one = (
        experts > 1
        and isinstance(rows, int)
        and rows >= _ROWS_WORTH_A_TURN
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
    )
    run = _one_by_one if one_by_one else _all_at_once
    return run(activation, slots, weights)


def _all_at_once(activation, slots, weights):
    return portable.feed_forward(slots, weights, activation, multiply=multiply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(activation, slots, weights):
    return lax.map(lambda own: _all_at_once(activation, *own), (slots, weights))


# Should there be a gradient after all, it is that of all at once.
_one_by_one.defvjp(
    lambda activation, *args: jax.vjp(
        functools.partial(_all_at_once, activation), *args
    ),
    lambda activation, pull_back, gradient: pull_back(gradient),
)

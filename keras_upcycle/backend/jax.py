"""JAX: native top-k, batched gathers and their gradients.

Needs nothing beyond jax. `gather_rows` and `scatter_add_rows` are each other's
gradient, and say so: the scatter that JAX derives for a gather's gradient took
ten times as long on a CPU as the one written here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_upcycle.backend import portable

_IN_BOUNDS = "promise_in_bounds"


def top_k(x, k):
    """See `portable.top_k`.

    `lax.top_k` breaks ties lowest index first and is an order of magnitude
    faster than sorting. While exporting, shapes are symbolic and TensorFlow
    cannot run what `lax.top_k` exports to; the portable sort it can.
    """
    if all(isinstance(size, int) for size in x.shape):
        return lax.top_k(x, k)
    return portable.top_k(x, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(rows, index, length):
    del length
    return jax.vmap(lambda group, at: group.at[at].get(mode=_IN_BOUNDS))(
        rows, index
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter(rows, index, length):
    def add(group, at):
        zeros = jnp.zeros((length, group.shape[-1]), group.dtype)
        return zeros.at[at].add(group, mode=_IN_BOUNDS)

    return jax.vmap(add)(rows, index)


_gather.defvjp(
    lambda rows, index, length: (_gather(rows, index, length), index),
    lambda length, index, grad: (_scatter(grad, index, length), None),
)
_scatter.defvjp(
    lambda rows, index, length: (_scatter(rows, index, length), index),
    lambda length, index, grad: (_gather(grad, index, length), None),
)


def gather_rows(rows, index):
    """See `portable.gather_rows`; stays within a group, so groups shard."""
    return _gather(rows, index, rows.shape[1])


def scatter_add_rows(rows, index, length):
    """See `portable.scatter_add_rows`."""
    return _scatter(rows, index, length)


@jax.custom_vjp
def to_slots(tokens, source, place):
    """See `portable.to_slots`."""
    del place
    return gather_rows(tokens, source)


to_slots.defvjp(
    lambda tokens, source, place: (to_slots(tokens, source, place), place),
    lambda place, gradient: (
        portable.to_slots_gradient(gather_rows, gradient, place),
        None,
        None,
    ),
)


@jax.custom_vjp
def from_slots(outputs, weights, source, place):
    """See `portable.from_slots`."""
    return portable.from_slots(outputs, weights, source, place, gather_rows)


from_slots.defvjp(
    lambda *args: (from_slots(*args), args),
    lambda args, gradient: (
        *portable.from_slots_gradient(
            gather_rows, scatter_add_rows, gradient, *args
        ),
        None,
        None,
    ),
)

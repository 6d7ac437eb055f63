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


@jax.custom_vjp
def block_matmul(blocks, kernels, owners):
    """See `portable.block_matmul`.

    A loop over blocks. Gathering one kernel a block, as `portable` does,
    copies more bytes than the products read, and took five times as long on a
    CPU; the loop takes what one batched matmul over all experts takes.
    """

    def one(block_and_owner):
        block, owner = block_and_owner
        return lax.cond(
            owner < len(kernels),
            lambda: block @ _row(kernels, owner),
            lambda: jnp.zeros(
                (block.shape[0], kernels.shape[-1]),
                jnp.result_type(block, kernels),
            ),
        )

    return lax.map(one, (blocks, owners))


def _block_matmul_gradient(saved, gradient):
    blocks, kernels, owners = saved
    by_blocks = block_matmul(
        gradient, jnp.swapaxes(kernels, 1, 2), owners
    ).astype(blocks.dtype)

    def add(total, part):
        block, upstream, owner = part
        product = lax.cond(
            owner < len(kernels),
            lambda: block.T @ upstream,
            lambda: jnp.zeros(kernels.shape[1:], total.dtype),
        )
        at = jnp.minimum(owner, len(kernels) - 1)
        row = _row(total, at) + product
        return lax.dynamic_update_index_in_dim(total, row, at, 0), None

    by_kernels, _ = lax.scan(
        add, jnp.zeros_like(kernels), (blocks, gradient, owners)
    )
    return by_blocks, by_kernels, None


def _row(kernels, owner):
    return lax.dynamic_index_in_dim(kernels, owner, keepdims=False)


block_matmul.defvjp(
    lambda *args: (block_matmul(*args), args), _block_matmul_gradient
)


def smallest_block(num_tokens):
    """See `portable.smallest_block`.

    One token meets each expert once: its blocks hold one row. XLA multiplies
    that almost twice as fast as eight of which seven are padding.
    """
    return 1 if num_tokens == 1 else 8

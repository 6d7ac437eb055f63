"""JAX: native top-k, batched gathers and their gradients.

Needs nothing beyond jax; on an accelerator tokamax's ragged product is taken
where it is installed. `gather_rows` and `scatter_add_rows` are each other's
gradient, and say so: the scatter that JAX derives for a gather's gradient took
ten times as long on a CPU as the one written here.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax

from keras_upcycle.backend import jax_mesh, portable
from keras_upcycle.backend import jax_tile_loop as tile_loop
from keras_upcycle.backend.jax_mesh import is_at_hand as is_at_hand
from keras_upcycle.backend.jax_mesh import on_each_device as on_each_device
from keras_upcycle.backend.jax_mesh import to_experts as to_experts
from keras_upcycle.backend.jax_mesh import to_groups as to_groups
from keras_upcycle.backend.jax_products import infer_slots as infer_slots
from keras_upcycle.backend.jax_products import multiply as multiply

_IN_BOUNDS = "promise_in_bounds"


def top_k(x, k):
    """See `portable.top_k`.

    `lax.top_k` breaks ties lowest index first and is an order of magnitude
    faster than sorting. While exporting, shapes are symbolic and TensorFlow
    cannot run what `lax.top_k` exports to; the portable sort it can.
    """
    if all(isinstance(size, int) for size in x.shape):
        return jax_mesh.top_k(x, k)
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


def grouped_feed_forward(
    slots,
    tiles,
    tile_experts,
    used,
    weights,
    activation,
    keep=(None, None),
    training=False,
):
    """See `portable.grouped_feed_forward`; ragged products where they are fast.

    Else one batched product for the slots, and a loop over the tiles in use.
    """
    del training
    ragged_dot = _ragged_dot()
    if ragged_dot is None or tiles.shape[1] != 1:
        return tile_loop.feed_forward(
            activation, slots, tiles, tile_experts, used, weights, keep
        )
    experts = weights["up_kernel"].shape[0]
    counts = jnp.bincount(tile_experts, length=experts).astype("int32")
    # What a ragged product leaves in rows of no expert is not said to be 0,
    # nor is its gradient, and a bias' gradient is a sum over all rows.
    filled = jnp.arange(len(tiles))[:, None] < used

    def multiply_ragged(rows, kernels):
        rows = jnp.where(filled, rows, 0)
        return jnp.where(filled, ragged_dot(rows, kernels, counts), 0)

    own = {
        name: w[jnp.minimum(tile_experts, experts - 1), 0]
        if name.endswith("bias")
        else w
        for name, w in weights.items()
    }
    rows = portable.feed_forward(
        tiles[:, 0],
        own,
        activation,
        None if keep[1] is None else keep[1][:, 0],
        multiply=multiply_ragged,
    )
    return (
        portable.feed_forward(slots, weights, activation, keep[0]),
        rows[:, None],
    )


def packing(num_tokens, top_k, num_experts, training):
    """See `portable.packing`; a ragged product takes rows one by one."""
    if _ragged_dot() is None:
        return portable.packing(num_tokens, top_k, num_experts, training)
    return 0, 1


def _ragged_dot():
    """A product of sorted rows that is worth its name; `None` elsewhere.

    tokamax's on an accelerator if it is installed, JAX's own on a TPU. JAX's
    own runs every expert on every row on a CPU (`benchmarks.layer`), and by
    report on GPUs.
    """
    device = jax.default_backend()
    if device == "cpu":
        return None
    try:
        return importlib.import_module("tokamax").ragged_dot
    except ImportError:
        return lax.ragged_dot if device == "tpu" else None


def remat(function):
    """See `portable.remat`.

    Not `jax.checkpoint`: XLA's CPU compiler drops the barrier by which that
    asks to compute late, computes everything again as early as it can, and
    holds it all at once. Here what is computed again needs the gradient that
    came in, so it cannot be early.
    """

    def call(*args):
        # Kernels that the function closes over become arguments.
        converted, constants = jax.closure_convert(function, *args)
        return _computed_again(converted, args, tuple(constants))

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _computed_again(function, args, constants):
    return function(*args, *constants)


def _computed_again_gradient(function, saved, gradients):
    args, constants = saved
    largest = max(jax.tree.leaves(gradients), key=lambda leaf: leaf.size)
    if largest.size:
        # 0, which the compiler does not know; a NaN would be one anyway.
        zero = jnp.minimum(jnp.abs(largest[(0,) * largest.ndim]), 0)
        args = tuple(a + zero.astype(a.dtype) for a in args)
    _, pull_back = jax.vjp(
        lambda args, constants: function(*args, *constants), args, constants
    )
    return pull_back(gradients)


_computed_again.defvjp(
    lambda function, *saved: (_computed_again(function, *saved), saved),
    _computed_again_gradient,
)


def lay_out(make, shape, dtype, layout):
    """See `portable.lay_out`.

    Keras calls initializers with a layout over an abstract mesh, under which
    arrays that lie on devices cannot be read: only its `spec` is of use, and
    the mesh of the distribution is set for as long as the value is made. Of
    experts that are spread each device gets its own, and no more are made.
    """
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    spec = getattr(layout, "backend_layout", layout).spec
    sharding = jax.sharding.NamedSharding(mesh, spec)
    spread = any(entry is not None for entry in spec)
    with jax.set_mesh(mesh):
        if spread and hasattr(make, "of"):  # experts that are all one weight
            fill = jax.jit(
                lambda value: make.of(value, shape, dtype),
                out_shardings=sharding,
            )
            return fill(make.source.value)
        if spread and hasattr(make, "some"):

            def some(index):
                experts = range(*index[0].indices(shape[0]))
                value = np.asarray(make.some(experts, shape, dtype))
                return value[(slice(None), *index[1:])]

            return jax.make_array_from_callback(shape, sharding, some)
        return jax.device_put(make(shape, dtype), sharding)

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
from jax import lax

from keras_upcycle.backend import portable

_IN_BOUNDS = "promise_in_bounds"
# Experts with so many rows run one after the other at inference on a CPU.
_ROWS_WORTH_A_TURN = 64
# So many blocks of one expert, if they lie side by side, are one product.
_BLOCKS_TOGETHER = 4


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
        _by_rows(gradient, saved[1]).astype(saved[0].dtype),
        _by_kernels(saved[0], gradient).astype(saved[1].dtype),
    ),
)


def _by_rows(gradient, kernels):
    return _product("...nf,...df->...nd", gradient, kernels)


def _by_kernels(rows, gradient):
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


def grouped_feed_forward(
    slots,
    blocks,
    owners,
    used,
    weights,
    activation,
    keep=(None, None),
    training=False,
):
    """See `portable.grouped_feed_forward`; ragged products where they are fast.

    Else one batched product for the slots, and a loop over the blocks in use.
    """
    del training
    ragged_dot = _ragged_dot()
    if ragged_dot is None or blocks.shape[1] != 1:
        return _feed_forward(
            activation, slots, blocks, owners, used, weights, keep
        )
    experts = weights["up_kernel"].shape[0]
    counts = jnp.bincount(owners, length=experts).astype("int32")
    # What a ragged product leaves in rows of no expert is not said to be 0,
    # nor is its gradient, and a bias' gradient is a sum over all rows.
    filled = jnp.arange(len(blocks))[:, None] < used

    def multiply_ragged(rows, kernels):
        rows = jnp.where(filled, rows, 0)
        return jnp.where(filled, ragged_dot(rows, kernels, counts), 0)

    own = {
        name: w[jnp.minimum(owners, experts - 1), 0]
        if name.endswith("bias")
        else w
        for name, w in weights.items()
    }
    rows = portable.feed_forward(
        blocks[:, 0],
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(activation, slots, blocks, owners, used, weights, keep):
    """XLA's shapes are static, but how often a loop runs is not.

    All of a block's network runs in one turn of the loop, so that spare blocks
    cost nothing but the zeros that their results start from. Gathering a
    kernel for each block, as `portable` does, would copy more bytes than the
    products read. A turn copies its expert's kernels, too, and its gradient
    adds to theirs: four blocks of one expert take one turn.
    """
    run = functools.partial(portable.feed_forward, multiply=multiply)
    if keep[0] is None:
        out_slots = infer_slots(slots, weights, activation)
    else:
        out_slots = run(slots, weights, activation, keep[0])

    def step(n, count, outputs):
        own = _own(weights, owners[n])
        rows = run(
            _rows(blocks, n, count), own, activation, _rows(keep[1], n, count)
        )
        return _put_rows(outputs, rows, n)

    outputs = _over_blocks(
        step, owners, _experts(weights), used, jnp.zeros_like(blocks)
    )
    return out_slots, outputs


def _feed_forward_and_what_led_to_it(
    activation, slots, blocks, owners, used, weights, keep
):
    project = functools.partial(portable.project, multiply=multiply)
    before_slots, before = {}, {}
    for role in portable.hidden_roles(weights):
        before_slots[role] = project(slots, weights, role)
        width = weights[f"{role}_kernel"].shape[2]
        before[role] = jnp.zeros((*blocks.shape[:2], width), blocks.dtype)
    hidden = portable.hidden_layer(before_slots, activation, keep[0])
    out_slots = project(hidden, weights, "down")

    def step(n, count, state):
        outputs, before = state
        own = _own(weights, owners[n])
        rows = _rows(blocks, n, count)
        found = {role: project(rows, own, role) for role in before}
        kept = _rows(keep[1], n, count)
        hidden = portable.hidden_layer(found, activation, kept)
        before = {r: _put_rows(before[r], found[r], n) for r in before}
        return _put_rows(outputs, project(hidden, own, "down"), n), before

    outputs, before = _over_blocks(
        step, owners, _experts(weights), used, (jnp.zeros_like(blocks), before)
    )
    saved = slots, blocks, owners, used, weights, keep, before_slots, before
    return (out_slots, outputs), saved


def _feed_forward_gradient(activation, saved, gradients):
    slots, blocks, owners, used, weights, keep, before_slots, before = saved

    def pull_back(rows, before, keep, weights, gradient):
        """Gradients by rows and by weights, of one network or a stack."""
        hidden, pull = jax.vjp(
            lambda before: portable.hidden_layer(before, activation, keep),
            before,
        )
        by_hidden = _by_rows(gradient, weights["down_kernel"])
        (by_before,) = pull(by_hidden.astype(hidden.dtype))
        by_weights = _by_weights("down", hidden, gradient, weights)
        by_rows = 0.0
        for role, by_role in by_before.items():
            by_rows += _by_rows(by_role, weights[f"{role}_kernel"])
            by_weights |= _by_weights(role, rows, by_role, weights)
        return by_rows.astype(rows.dtype), by_weights

    # Sums over blocks are float32: more exact, and XLA's CPU compiler adds
    # bfloat16 arrays ten times as slowly.
    by_slots, by_weights = pull_back(
        slots, before_slots, keep[0], weights, gradients[0]
    )

    def add(n, count, state):
        by_blocks, sums = state
        rows, by_own = pull_back(
            _rows(blocks, n, count),
            {role: _rows(array, n, count) for role, array in before.items()},
            _rows(keep[1], n, count),
            _own(weights, owners[n]),
            _rows(gradients[1], n, count),
        )
        sums = {
            name: _put(array, _row(array, owners[n]) + by_own[name], owners[n])
            for name, array in sums.items()
        }
        return _put_rows(by_blocks, rows, n), sums

    by_blocks, by_weights = _over_blocks(
        add,
        owners,
        _experts(weights),
        used,
        (jnp.zeros_like(blocks), by_weights),
    )
    by_weights = {
        name: sums.astype(weights[name].dtype)
        for name, sums in by_weights.items()
    }
    return by_slots, by_blocks, None, None, by_weights, None


_feed_forward.defvjp(_feed_forward_and_what_led_to_it, _feed_forward_gradient)


def _by_weights(role, rows, gradient, weights):
    """Gradients by a role's kernel and bias, in float32 at least."""
    found = {f"{role}_kernel": _by_kernels(rows, gradient)}
    if f"{role}_bias" in weights:
        found[f"{role}_bias"] = jnp.sum(gradient, axis=-2, keepdims=True)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return {name: array.astype(wide) for name, array in found.items()}


def _over_blocks(step, owners, num_experts, used, state):
    """`state = step(first, count, state)` until all blocks in use have run.

    `count` blocks of one expert from `first` on: several at a time where they
    are whole groups, counted from the expert's first, and then the others.
    """
    total = owners.shape[0]
    if total == 0:
        return state  # JAX could not even trace a step
    if not isinstance(total, int) or total < _BLOCKS_TOGETHER:
        # Few; or, while exporting, of a number that is not known.
        return lax.fori_loop(0, used, lambda n, at: step(n, 1, at), state)
    starts, others = portable.groups_of_blocks(
        owners, num_experts, _BLOCKS_TOGETHER
    )
    for count, chosen in ((_BLOCKS_TOGETHER, starts), (1, others)):
        chosen &= jnp.arange(total) < used
        at = jnp.argsort(~chosen, stable=True)

        def turn(n, state, at=at, count=count):
            return step(at[n], count, state)

        state = lax.fori_loop(0, jnp.sum(chosen), turn, state)
    return state


def _experts(weights):
    return weights["up_kernel"].shape[0]


def _own(weights, owner):
    return {name: _row(array, owner) for name, array in weights.items()}


def _rows(blocks, first, count):
    """Those of some blocks `(N, M, D)`: `(count * M, D)`; `None` of `None`."""
    if blocks is None:
        return None
    return lax.dynamic_slice_in_dim(blocks, first, count).reshape(
        -1, blocks.shape[2]
    )


def _put_rows(blocks, rows, first):
    """`_rows` undone."""
    rows = rows.reshape(-1, *blocks.shape[1:])
    return lax.dynamic_update_slice_in_dim(blocks, rows, first, 0)


def _row(array, at):
    return lax.dynamic_index_in_dim(array, at, keepdims=False)


def _put(array, row, at):
    return lax.dynamic_update_index_in_dim(array, row, at, 0)


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
    the mesh of the distribution is set for as long as the value is made.
    """
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    spec = getattr(layout, "backend_layout", layout).spec
    with jax.set_mesh(mesh):
        value = make(shape, dtype)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))

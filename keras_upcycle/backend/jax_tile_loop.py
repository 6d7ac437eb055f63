"""JAX: feed-forward networks on tiles of rows, in a loop; its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_upcycle.backend import portable
from keras_upcycle.backend.jax_products import (
    by_kernels,
    by_rows,
    infer_slots,
    multiply,
)

# So many tiles of one expert, if they lie side by side, are one product.
_TILES_TOGETHER = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def feed_forward(activation, slots, tiles, tile_experts, used, weights, keep):
    """XLA's shapes are static, but how often a loop runs is not.

    All of a tile's network runs in one turn of the loop, so that spare tiles
    cost nothing but the zeros that their results start from. Gathering a
    kernel for each tile, as `portable` does, would copy more bytes than the
    products read. A turn copies its expert's kernels, too, and its gradient
    adds to theirs: four tiles of one expert take one turn.
    """
    run = functools.partial(portable.feed_forward, multiply=multiply)
    if keep[0] is None:
        out_slots = infer_slots(slots, weights, activation)
    else:
        out_slots = run(slots, weights, activation, keep[0])

    def step(n, count, outputs):
        own = _own(weights, tile_experts[n])
        rows = run(
            _rows(tiles, n, count), own, activation, _rows(keep[1], n, count)
        )
        return _put_rows(outputs, rows, n)

    outputs = _over_tiles(
        step, tile_experts, _experts(weights), used, jnp.zeros_like(tiles)
    )
    return out_slots, outputs


def _feed_forward_and_what_led_to_it(
    activation, slots, tiles, tile_experts, used, weights, keep
):
    project = functools.partial(portable.project, multiply=multiply)
    before_slots, before = {}, {}
    for role in portable.hidden_roles(weights):
        before_slots[role] = project(slots, weights, role)
        width = weights[f"{role}_kernel"].shape[2]
        before[role] = jnp.zeros((*tiles.shape[:2], width), tiles.dtype)
    hidden = portable.hidden_layer(before_slots, activation, keep[0])
    out_slots = project(hidden, weights, "down")

    def step(n, count, state):
        outputs, before = state
        own = _own(weights, tile_experts[n])
        rows = _rows(tiles, n, count)
        found = {role: project(rows, own, role) for role in before}
        kept = _rows(keep[1], n, count)
        hidden = portable.hidden_layer(found, activation, kept)
        before = {r: _put_rows(before[r], found[r], n) for r in before}
        return _put_rows(outputs, project(hidden, own, "down"), n), before

    outputs, before = _over_tiles(
        step,
        tile_experts,
        _experts(weights),
        used,
        (jnp.zeros_like(tiles), before),
    )
    saved = (
        slots,
        tiles,
        tile_experts,
        used,
        weights,
        keep,
        before_slots,
        before,
    )
    return (out_slots, outputs), saved


def _feed_forward_gradient(activation, saved, gradients):
    slots, tiles, tile_experts, used, weights, keep, before_slots, before = (
        saved
    )

    def pull_back(rows, before, keep, weights, gradient):
        """Gradients by rows and by weights, of one network or a stack."""
        hidden, pull = jax.vjp(
            lambda before: portable.hidden_layer(before, activation, keep),
            before,
        )
        by_hidden = by_rows(gradient, weights["down_kernel"])
        (by_before,) = pull(by_hidden.astype(hidden.dtype))
        by_weights = _by_weights("down", hidden, gradient, weights)
        of_rows = 0.0
        for role, by_role in by_before.items():
            of_rows += by_rows(by_role, weights[f"{role}_kernel"])
            by_weights |= _by_weights(role, rows, by_role, weights)
        return of_rows.astype(rows.dtype), by_weights

    # Sums over tiles are float32: more exact, and XLA's CPU compiler adds
    # bfloat16 arrays ten times as slowly.
    by_slots, by_weights = pull_back(
        slots, before_slots, keep[0], weights, gradients[0]
    )

    def add(n, count, state):
        by_tiles, sums = state
        rows, by_own = pull_back(
            _rows(tiles, n, count),
            {role: _rows(array, n, count) for role, array in before.items()},
            _rows(keep[1], n, count),
            _own(weights, tile_experts[n]),
            _rows(gradients[1], n, count),
        )
        sums = {
            name: _put(
                array,
                _row(array, tile_experts[n]) + by_own[name],
                tile_experts[n],
            )
            for name, array in sums.items()
        }
        return _put_rows(by_tiles, rows, n), sums

    by_tiles, by_weights = _over_tiles(
        add,
        tile_experts,
        _experts(weights),
        used,
        (jnp.zeros_like(tiles), by_weights),
    )
    by_weights = {
        name: sums.astype(weights[name].dtype)
        for name, sums in by_weights.items()
    }
    return by_slots, by_tiles, None, None, by_weights, None


feed_forward.defvjp(_feed_forward_and_what_led_to_it, _feed_forward_gradient)


def _by_weights(role, rows, gradient, weights):
    """Gradients by a role's kernel and bias, in float32 at least."""
    found = {f"{role}_kernel": by_kernels(rows, gradient)}
    if f"{role}_bias" in weights:
        found[f"{role}_bias"] = jnp.sum(gradient, axis=-2, keepdims=True)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return {name: array.astype(wide) for name, array in found.items()}


def _over_tiles(step, tile_experts, num_experts, used, state):
    """`state = step(first, count, state)` until all tiles in use have run.

    `count` tiles of one expert from `first` on: several at a time where they
    are whole groups, counted from the expert's first, and then the others.
    """
    total = tile_experts.shape[0]
    if total == 0:
        return state  # JAX could not even trace a step
    if not isinstance(total, int) or total < _TILES_TOGETHER:
        # Few; or, while exporting, of a number that is not known.
        return lax.fori_loop(0, used, lambda n, at: step(n, 1, at), state)
    starts, others = portable.groups_of_tiles(
        tile_experts, num_experts, _TILES_TOGETHER
    )
    for count, chosen in ((_TILES_TOGETHER, starts), (1, others)):
        chosen &= jnp.arange(total) < used
        at = jnp.argsort(~chosen, stable=True)

        def turn(n, state, at=at, count=count):
            return step(at[n], count, state)

        state = lax.fori_loop(0, jnp.sum(chosen), turn, state)
    return state


def _experts(weights):
    return weights["up_kernel"].shape[0]


def _own(weights, expert):
    return {name: _row(array, expert) for name, array in weights.items()}


def _rows(tiles, first, count):
    """Those of some tiles `(N, M, D)`: `(count * M, D)`; `None` of `None`."""
    if tiles is None:
        return None
    return lax.dynamic_slice_in_dim(tiles, first, count).reshape(
        -1, tiles.shape[2]
    )


def _put_rows(tiles, rows, first):
    """`_rows` undone."""
    rows = rows.reshape(-1, *tiles.shape[1:])
    return lax.dynamic_update_slice_in_dim(tiles, rows, first, 0)


def _row(array, at):
    return lax.dynamic_index_in_dim(array, at, keepdims=False)


def _put(array, row, at):
    return lax.dynamic_update_index_in_dim(array, row, at, 0)

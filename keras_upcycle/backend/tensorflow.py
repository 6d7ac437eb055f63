"""TensorFlow: native top-k, batched gathers and their gradients.

Needs nothing beyond TensorFlow.
"""

import functools

import tensorflow as tf

from keras_upcycle.backend import portable

# So many tiles of one expert, if they lie side by side, are one product.
_TILES_TOGETHER = 4


def top_k(x, k):
    """See `portable.top_k`; here `k` may be a tensor."""
    return tuple(tf.math.top_k(x, k, sorted=True))


def gather_rows(rows, index):
    """See `portable.gather_rows`."""
    return tf.gather(rows, index, batch_dims=1)


def to_slots(tokens, source, place):
    """See `portable.to_slots`."""

    @tf.custom_gradient
    def call(tokens):
        def gradient(upstream):
            return portable.to_slots_gradient(gather_rows, upstream, place)

        return gather_rows(tokens, source), gradient

    return call(tokens)


def from_slots(outputs, weights, source, place):
    """See `portable.from_slots`."""

    @tf.custom_gradient
    def call(outputs, weights):
        def gradient(upstream):
            return portable.from_slots_gradient(
                gather_rows,
                portable.scatter_add_rows,
                upstream,
                outputs,
                weights,
                source,
                place,
            )

        result = portable.from_slots(
            outputs, weights, source, place, gather_rows
        )
        return result, gradient

    return call(outputs, weights)


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
    """See `portable.grouped_feed_forward`.

    One batched product for the slots, and a loop over the tiles in use; all
    of a tile's network runs in one turn. Gathering a kernel for each tile,
    as `portable` does, would copy more bytes than the products read, and give
    the kernels a sparse gradient.
    """

    @tf.custom_gradient
    def call(slots, tiles, *values):
        given = dict(zip(weights, values, strict=True))
        on_slots = functools.partial(
            _forward, weights=given, activation=activation, keep=keep[0]
        )
        on_tiles = functools.partial(
            _forward_tiles,
            tiles,
            tile_experts,
            used,
            given,
            activation,
            keep[1],
        )
        out_slots, before_slots = on_slots(slots)
        outputs, before = on_tiles(saves=training)

        def gradient(by_slots, by_outputs):
            saved = before or on_tiles(saves=True)[1]
            by_slots, by_weights = _backward(
                slots, before_slots, given, activation, keep[0], by_slots
            )
            by_tiles, by_weights = _backward_tiles(
                tiles,
                tile_experts,
                used,
                given,
                activation,
                keep[1],
                saved,
                by_outputs,
                by_weights,
            )
            return by_slots, by_tiles, *(by_weights[n] for n in given)

        return (out_slots, outputs), gradient

    return call(slots, tiles, *weights.values())


def packing(num_tokens, top_k, num_experts, training):
    """See `portable.packing`.

    XLA, as TensorFlow has it, takes six times as long for a row alone as for
    four, where the kernel is one of many.
    """
    slots, rows = portable.packing(num_tokens, top_k, num_experts, training)
    return slots, max(rows, 4)


def _forward(rows, weights, activation, keep):
    """The network's output, and what led to its hidden layer."""
    before = {
        role: portable.project(rows, weights, role, tf.matmul)
        for role in portable.hidden_roles(weights)
    }
    hidden = portable.hidden_layer(before, activation, keep)
    return portable.project(hidden, weights, "down", tf.matmul), before


def _backward(rows, before, weights, activation, keep, gradient):
    """Gradients by rows and by weights."""
    with tf.GradientTape() as tape:
        tape.watch(before)
        hidden = portable.hidden_layer(before, activation, keep)
    by_hidden = tf.matmul(gradient, weights["down_kernel"], transpose_b=True)
    by_before = tape.gradient(
        hidden,
        before,
        output_gradients=by_hidden,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    by_weights = _by_weights("down", hidden, gradient, weights)
    by_rows = []
    for role, by_role in by_before.items():
        kernel = weights[f"{role}_kernel"]
        by_rows.append(tf.matmul(by_role, kernel, transpose_b=True))
        by_weights |= _by_weights(role, rows, by_role, weights)
    return tf.add_n(by_rows), by_weights


def _by_weights(role, rows, gradient, weights):
    found = {f"{role}_kernel": tf.matmul(rows, gradient, transpose_a=True)}
    if f"{role}_bias" in weights:
        found[f"{role}_bias"] = tf.reduce_sum(gradient, -2, keepdims=True)
    return found


def _forward_tiles(tiles, tile_experts, used, weights, activation, keep, saves):
    widths = {"outputs": tiles.shape[2]}
    if saves:
        for role in portable.hidden_roles(weights):
            widths[role] = weights[f"{role}_kernel"].shape[2]
    start = {name: _array_of_tiles(tiles, w) for name, w in widths.items()}

    def step(n, count, state):
        outputs, before = _forward(
            _rows(tiles, n, count),
            _own(weights, tile_experts, n),
            activation,
            _rows(keep, n, count),
        )
        found = {"outputs": outputs, **before}
        return {
            name: _write_rows(array, found[name], n, count)
            for name, array in state.items()
        }

    state = _over_tiles(step, tile_experts, _experts(weights), used, start)
    state = {name: array.stack() for name, array in state.items()}
    return state.pop("outputs"), state


def _backward_tiles(
    tiles,
    tile_experts,
    used,
    weights,
    activation,
    keep,
    before,
    gradient,
    by_weights,
):
    def add(n, count, state):
        rows, by_own = _backward(
            _rows(tiles, n, count),
            {role: _rows(array, n, count) for role, array in before.items()},
            _own(weights, tile_experts, n),
            activation,
            _rows(keep, n, count),
            _rows(gradient, n, count),
        )
        at = tf.reshape(tf.gather(tile_experts, n), (1, 1))
        sums = {
            name: tf.tensor_scatter_nd_add(
                array, at, tf.cast(by_own[name], array.dtype)[None]
            )
            for name, array in state["by_weights"].items()
        }
        return {
            "by_tiles": _write_rows(state["by_tiles"], rows, n, count),
            "by_weights": sums,
        }

    # Sums over tiles are float32: more exact, and XLA's CPU compiler adds
    # bfloat16 arrays ten times as slowly.
    wide = tf.float32 if tiles.dtype.size < 4 else tiles.dtype
    start = {
        "by_tiles": _array_of_tiles(tiles, tiles.shape[2]),
        "by_weights": _cast_all(by_weights, wide),
    }
    state = _over_tiles(add, tile_experts, _experts(weights), used, start)
    by_weights = _cast_all(state["by_weights"], tiles.dtype)
    return state["by_tiles"].stack(), by_weights


def _cast_all(arrays, dtype):
    return {name: tf.cast(array, dtype) for name, array in arrays.items()}


def _experts(weights):
    return weights["up_kernel"].shape[0]


def _own(weights, tile_experts, n):
    # Not `kernels[tile_experts[n]]`: of the start of a slice XLA wants to know
    # whether it is constant, and evaluates the router to find out.
    expert = tf.gather(tile_experts, n)
    return {name: tf.gather(array, expert) for name, array in weights.items()}


def _rows(tiles, first, count):
    """Those of some tiles `(N, M, D)`: `(count * M, D)`; `None` of `None`."""
    if tiles is None:
        return None
    taken = tf.gather(tiles, first + tf.range(count))
    return tf.reshape(taken, (-1, tiles.shape[2]))


def _write_rows(array, rows, first, count):
    """Rows of some tiles at their place, tile by tile."""
    for n, tile in enumerate(tf.split(rows, count)):
        array = array.write(first + n, tile)
    return array


def _array_of_tiles(tiles, width):
    """Room for one `(M, width)` a tile, zeros until it is written.

    Not a tensor to scatter rows into: every row would copy all of it.
    """
    count = tiles.shape[0]
    return tf.TensorArray(
        tiles.dtype,
        tf.shape(tiles)[0] if count is None else count,
        element_shape=(tiles.shape[1], width),
    )


def _over_tiles(step, tile_experts, num_experts, used, state):
    """`state = step(first, count, state)` until all tiles in use have run.

    `count` tiles of one expert from `first` on: several at a time where they
    are whole groups, counted from the expert's first, and then the others. A
    turn copies its expert's kernels, and its gradient adds to theirs.
    """
    in_use = tf.range(tf.shape(tile_experts)[0]) < used
    starts, others = portable.groups_of_tiles(
        tile_experts, num_experts, _TILES_TOGETHER
    )
    for count, chosen in ((_TILES_TOGETHER, starts), (1, others)):
        chosen = tf.cast(chosen & in_use, "int32")
        # Not `tf.where`: how many there are is known only at run time.
        at = tf.argsort(chosen, direction="DESCENDING", stable=True)

        def turn(n, state, at=at, count=count):
            return n + 1, step(tf.gather(at, n), count, state)

        times = tf.reduce_sum(chosen)
        _, state = tf.while_loop(
            lambda n, _, times=times: n < times, turn, (tf.constant(0), state)
        )
    return state


def num_replicas():
    """See `portable.num_replicas`."""
    if tf.distribute.get_replica_context() is None:
        return 1
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_number():
    """See `portable.replica_number`."""
    if num_replicas() == 1:
        return 0
    context = tf.distribute.get_replica_context()
    number = tf.get_static_value(context.replica_id_in_sync_group)
    return 0 if number is None else int(number)


def sum_over_replicas(x):
    """See `portable.sum_over_replicas`."""
    if num_replicas() == 1:
        return x
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, x)

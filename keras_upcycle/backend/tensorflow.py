"""TensorFlow: native top-k, batched gathers and their gradients.

Needs nothing beyond TensorFlow.
"""

import tensorflow as tf

from keras_upcycle.backend import portable


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


def grouped_matmul(slots, blocks, kernels, owners, used):
    """See `portable.grouped_matmul`.

    One batched product for the slots, then a loop over the blocks in use.
    Gathering a kernel for each block, as `portable` does, would copy more
    bytes than the products read, and give the kernels a sparse gradient.
    """

    @tf.custom_gradient
    def call(slots, blocks, kernels):
        def gradient(by_slots, by_blocks):
            by_kernels = tf.matmul(slots, by_slots, transpose_a=True)
            return (
                tf.matmul(by_slots, kernels, transpose_b=True),
                _blocks_times_kernels(
                    by_blocks, kernels, owners, used, transpose_b=True
                ),
                _add_blocks_times_blocks(
                    by_kernels, blocks, by_blocks, owners, used
                ),
            )

        outputs = (
            tf.matmul(slots, kernels),
            _blocks_times_kernels(blocks, kernels, owners, used),
        )
        return outputs, gradient

    return call(slots, blocks, kernels)


def _blocks_times_kernels(blocks, kernels, owners, used, transpose_b=False):
    width = kernels.shape[1 if transpose_b else 2]
    shape = (tf.shape(blocks)[0], blocks.shape[1], width)

    def multiply(n, outputs):
        # Not `kernels[owners[n]]`: of the start of a slice XLA wants to know
        # whether it is constant, and evaluates the router to find out.
        kernel = tf.gather(kernels, tf.gather(owners, n))
        product = tf.matmul(blocks[n], kernel, transpose_b=transpose_b)
        return tf.tensor_scatter_nd_update(
            outputs, tf.reshape(n, (1, 1)), tf.expand_dims(product, 0)
        )

    return _repeat(multiply, used, tf.zeros(shape, blocks.dtype))


def _add_blocks_times_blocks(sums, blocks, gradient, owners, used):
    def add(n, sums):
        product = tf.matmul(blocks[n], gradient[n], transpose_a=True)
        return tf.tensor_scatter_nd_add(
            sums, tf.reshape(owners[n], (1, 1)), tf.expand_dims(product, 0)
        )

    return _repeat(add, used, sums)


def _repeat(step, times, state):
    """`state = step(n, state)` for `n` from 0; `times` may be a tensor."""
    _, state = tf.while_loop(
        lambda n, _: n < times,
        lambda n, state: (n + 1, step(n, state)),
        (tf.constant(0), state),
    )
    return state

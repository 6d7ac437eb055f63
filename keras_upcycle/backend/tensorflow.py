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


def block_matmul(blocks, kernels, owners):
    """See `portable.block_matmul`.

    A loop over blocks: gathering a kernel for each would copy more bytes than
    the products read, and give the kernels a sparse gradient.
    """

    @tf.custom_gradient
    def call(blocks, kernels):
        def gradient(upstream):
            products = tf.matmul(blocks, upstream, transpose_a=True)
            return (
                _owned_matmul(upstream, kernels, owners, transpose_b=True),
                tf.math.unsorted_segment_sum(
                    products, owners, kernels.shape[0] + 1
                )[:-1],
            )

        return _owned_matmul(blocks, kernels, owners), gradient

    return call(blocks, kernels)


def _owned_matmul(blocks, kernels, owners, transpose_b=False):
    last = kernels.shape[0] - 1
    width = kernels.shape[1 if transpose_b else 2]

    def one(block_and_owner):
        block, owner = block_and_owner
        return tf.cond(
            owner <= last,
            lambda: tf.matmul(
                block, kernels[tf.minimum(owner, last)], transpose_b=transpose_b
            ),
            lambda: tf.zeros((tf.shape(block)[0], width), block.dtype),
        )

    return tf.map_fn(one, (blocks, owners), fn_output_signature=blocks.dtype)

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

"""The primitives in `keras.ops`: complete, correct, the definition of right."""

from keras import ops

from keras_upcycle.types import Tensor


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest entries along the last axis, largest first.

    Args:
        x: Float tensor `(..., N)`.
        k: How many, at most `N`. A scalar tensor is accepted on TensorFlow,
            where a length may only be known at run time.

    Returns:
        `(values, indices)`, both `(..., k)`; indices are int32. Equal values
        come lowest index first, on every backend.
    """
    order = ops.argsort(ops.negative(x), axis=-1)[..., :k]
    return ops.take_along_axis(x, order, axis=-1), ops.cast(order, "int32")


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Picks rows group by group.

    Args:
        rows: `(G, S, D)`.
        index: int32 `(G, N)`, each in `[0, S)`.

    Returns:
        `(G, N, D)`, with `out[g, n] = rows[g, index[g, n]]`.
    """
    groups, length, width = ops.shape(rows)
    picked = ops.shape(index)[1]
    offset = ops.expand_dims(ops.arange(groups, dtype="int32") * length, 1)
    flat = ops.reshape(index + offset, (groups * picked,))
    out = ops.take(ops.reshape(rows, (groups * length, width)), flat, axis=0)
    return ops.reshape(out, (groups, picked, width))


def scatter_add_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Adds rows up at the places that `index` names: `gather_rows` undone.

    Args:
        rows: `(G, N, D)`.
        index: int32 `(G, N)`, each in `[0, length)`.
        length: Rows of each group in the result.

    Returns:
        `(G, length, D)`, zero where no index points.
    """
    groups, count, width = ops.shape(rows)
    offset = ops.expand_dims(ops.arange(groups, dtype="int32") * length, 1)
    flat = ops.reshape(index + offset, (groups * count,))
    out = ops.segment_sum(
        ops.reshape(rows, (groups * count, width)),
        flat,
        num_segments=groups * length,
    )
    return ops.reshape(out, (groups, length, width))

"""Who gets an expert's slots: assignments in the order of a policy."""

from keras import ops

from keras_upcycle.types import Tensor

DROP_POLICIES = ("position", "batch_priority", "probability")


def membership(
    experts: Tensor, num_experts: int, dtype: str = "float32"
) -> Tensor:
    """`(..., E)`: 1 at each assignment's expert, all 0 for "nowhere".

    A comparison and not `ops.one_hot`, which raises on torch for an index of
    `E` instead of giving a row of zeros.
    """
    known = ops.arange(num_experts, dtype="int32")
    return ops.cast(ops.equal(ops.expand_dims(experts, -1), known), dtype)


def ranks_within_experts(
    experts: Tensor, num_experts: int, order: Tensor | None = None
) -> Tensor:
    """How many assignments reached the same expert before each one.

    Args:
        experts: int32 `(G, N)`; entries equal to `E` belong to nobody.
        num_experts: Integer, `E`.
        order: int32 `(G, N)`, a permutation of each group's assignments that
            says who comes first; `None` means as listed.

    Returns:
        int32 `(G, N)`, ranks in listed order; -1 for nobody's.
    """
    if order is not None:
        experts = ops.take_along_axis(experts, order, axis=1)
    # (G, N, E): one row an assignment, never one entry a slot.
    one_hot = membership(experts, num_experts, "int32")
    ranks = ops.sum(ops.cumsum(one_hot, axis=1) * one_hot, axis=-1) - 1
    if order is not None:
        ranks = ops.take_along_axis(ranks, ops.argsort(order, axis=1), axis=1)
    return ranks


def ranks(
    experts: Tensor, weights: Tensor, num_experts: int, drop_policy: str
) -> Tensor:
    """Ranks under a drop policy; slots go to low ones.

    Args:
        experts: int32 `(G, S, K)`.
        weights: float32 `(G, S, K)`.
        num_experts: Integer, `E`.
        drop_policy: One of `DROP_POLICIES`, see `functional.top_k`.

    Returns:
        int32 `(G, S, K)`.
    """
    groups, length, top_k = ops.shape(experts)
    count = length * top_k

    def choice_major(x):  # (G, S, K) -> (G, K * S): first choices first
        return ops.reshape(ops.transpose(x, (0, 2, 1)), (groups, count))

    order = None
    if drop_policy == "batch_priority":
        surest = ops.argsort(ops.negative(weights[..., 0]), axis=1)
        start = ops.arange(top_k, dtype="int32") * length
        order = ops.cast(ops.expand_dims(surest, 1), "int32")
        order = ops.reshape(
            order + ops.reshape(start, (1, -1, 1)), (groups, count)
        )
    elif drop_policy == "probability":
        order = ops.argsort(ops.negative(choice_major(weights)), axis=1)
    found = ranks_within_experts(choice_major(experts), num_experts, order)
    return ops.transpose(ops.reshape(found, (groups, top_k, length)), (0, 2, 1))

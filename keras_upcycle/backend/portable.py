"""The primitives in `keras.ops`: complete, correct, the definition of right.

`to_slots` and `from_slots` come with their gradients written out: a partial
one-to-one map of assignments to slots turns the scatter of a gather's gradient
into another gather. The backend files register them as such.
"""

from collections.abc import Callable, Mapping

import keras
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


def to_slots(tokens: Tensor, source: Tensor, place: Tensor) -> Tensor:
    """Copies tokens into expert slots.

    Args:
        tokens: `(G, S, D)`.
        source: int32 `(G, N)`, the token of each slot; any for an empty one.
        place: int32 `(G, S, K)`, the slot of each assignment, `N` for none.
            Says the same as `source`, from the tokens' side.

    Returns:
        `(G, N, D)`. An empty slot holds some token, and gives it no gradient.
    """
    del place
    return gather_rows(tokens, source)


def to_slots_gradient(gather, gradient: Tensor, place: Tensor) -> Tensor:
    """Gradient of `to_slots` by `tokens`, from that of its result."""
    last = ops.shape(gradient)[1] - 1
    total = 0.0
    for k in range(place.shape[2]):
        at = place[:, :, k]
        rows = gather(gradient, ops.minimum(at, last))
        total = total + ops.where(ops.expand_dims(at <= last, -1), rows, 0.0)
    return ops.cast(total, gradient.dtype)


def from_slots(
    outputs: Tensor,
    weights: Tensor,
    source: Tensor,
    place: Tensor,
    gather=gather_rows,
) -> Tensor:
    """Brings slots back to their tokens, weighted, and adds them up.

    Args:
        outputs: `(G, N, D)`.
        weights: float32 `(G, S, K)`, 0 where `place` is `N`.
        source: int32 `(G, N)`, as for `to_slots`.
        place: int32 `(G, S, K)`, as for `to_slots`.
        gather: `gather_rows` of the backend.

    Returns:
        `(G, S, D)`, of the dtype of `outputs`; products and sums in float32.
    """
    del source
    last = ops.shape(outputs)[1] - 1
    total = 0.0
    for k in range(place.shape[2]):
        weight = ops.expand_dims(weights[:, :, k], -1)
        rows = gather(outputs, ops.minimum(place[:, :, k], last))
        # A weight of 0 does not silence an infinity or a NaN in somebody
        # else's row, and a token that goes nowhere reads one.
        rows = ops.where(weight != 0.0, ops.cast(rows, "float32"), 0.0)
        total = total + rows * weight
    return ops.cast(total, outputs.dtype)


def from_slots_gradient(
    gather, scatter_add, gradient, outputs, weights, source, place
):
    """Gradients of `from_slots` by `outputs` and by `weights`."""
    groups, length, top_k = ops.shape(place)
    slots = ops.shape(outputs)[1]
    flat_place = ops.reshape(place, (groups, length * top_k))
    flat_weights = ops.reshape(weights, (groups, length * top_k, 1))
    slot_weights = scatter_add(flat_weights, flat_place, slots + 1)[:, :slots]
    rows = ops.cast(gather(gradient, source), "float32")
    by_outputs = ops.cast(rows * slot_weights, outputs.dtype)
    # An einsum, because XLA's CPU compiler runs the same sum over a product
    # five times slower. Empty slots hold anything, and are not read.
    products = ops.einsum("gnd,gnd->gn", ops.cast(outputs, "float32"), rows)
    products = ops.expand_dims(products, -1)
    by_weights = gather(products, ops.minimum(flat_place, slots - 1))
    by_weights = ops.where(
        ops.expand_dims(flat_place < slots, -1), by_weights, 0.0
    )
    return by_outputs, ops.reshape(by_weights, (groups, length, top_k))


def multiply(rows: Tensor, kernels: Tensor) -> Tensor:
    """Rows times the kernel of their expert.

    Args:
        rows: `(E, N, D)`, or `(N, D)` of one expert.
        kernels: `(E, D, F)`, or `(D, F)`, of the dtype of `rows`.

    Returns:
        `(E, N, F)` or `(N, F)`, of that dtype.
    """
    return ops.matmul(rows, kernels)


def grouped_feed_forward(
    slots: Tensor,
    tiles: Tensor,
    tile_experts: Tensor,
    used: Tensor,
    weights: Mapping[str, Tensor],
    activation: Callable,
    keep: tuple[Tensor | None, Tensor | None] = (None, None),
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row through the network of its expert, in whatever numbers.

    Rows come in two shapes: `slots`, as many for each expert, and `tiles`
    of the experts that have more.

    Args:
        slots: `(E, C, D)`; `C` may be 0.
        tiles: `(N, M, D)`; `N` may be 0.
        tile_experts: int32 `(N,)`, ascending, the expert of each tile; `E`
            for a spare one.
        used: int32 scalar. Tiles from there on are spare: nobody reads what
            comes of them, or of their gradient.
        weights: `"up_kernel"` `(E, D, F)`, `"down_kernel"` `(E, F, D)`, where
            gated `"gate_kernel"` `(E, D, F)`, and with biases `"up_bias"`
            `(E, 1, F)` and so on.
        activation: Of the hidden layer, elementwise.
        keep: Factors on the hidden layer, `(E, C, F)` and `(N, M, F)`, such
            as a dropout's; `None` for none.
        training: Whether a gradient will be asked for. What it needs is kept
            then; without, a gradient is right all the same.

    Returns:
        `(E, C, D)` and `(N, M, D)`.
    """
    del used, training
    last = weights["up_kernel"].shape[0] - 1
    index = ops.minimum(tile_experts, last)
    own = {name: ops.take(w, index, axis=0) for name, w in weights.items()}
    return (
        feed_forward(slots, weights, activation, keep[0]),
        feed_forward(tiles, own, activation, keep[1]),
    )


def feed_forward(
    rows: Tensor,
    weights: Mapping[str, Tensor],
    activation: Callable,
    keep: Tensor | None = None,
    multiply: Callable = multiply,
) -> Tensor:
    """One network on some rows, or a stack of networks on a stack of rows."""
    before = {
        role: project(rows, weights, role, multiply)
        for role in hidden_roles(weights)
    }
    hidden = hidden_layer(before, activation, keep)
    return project(hidden, weights, "down", multiply)


def infer_slots(
    slots: Tensor, weights: Mapping[str, Tensor], activation: Callable
) -> Tensor:
    """Expert `e` on `slots[e]`, where no gradient is likely to be asked for.

    If one is all the same, it is right.

    Args:
        slots: `(E, N, D)`.
        weights: As for `grouped_feed_forward`.
        activation: Of the hidden layer, elementwise.

    Returns:
        `(E, N, D)`.
    """
    return feed_forward(slots, weights, activation)


def hidden_roles(weights: Mapping[str, Tensor]) -> list[str]:
    """What leads to the hidden layer, the activated projection first.

    `["gate", "up"]` where gated, else `["up"]`.
    """
    return [role for role in ("gate", "up") if f"{role}_kernel" in weights]


def project(
    rows: Tensor,
    weights: Mapping[str, Tensor],
    role: str,
    multiply: Callable = multiply,
) -> Tensor:
    """Rows times a role's kernel, plus its bias where there is one."""
    outputs = multiply(rows, weights[f"{role}_kernel"])
    bias = weights.get(f"{role}_bias")
    return outputs if bias is None else outputs + bias


def hidden_layer(
    before: Mapping[str, Tensor], activation: Callable, keep: Tensor | None
) -> Tensor:
    """The hidden layer from what leads to it; elementwise."""
    hidden = activated(activation, before["up"], before.get("gate"))
    return hidden if keep is None else hidden * keep


def activated(activation: Callable, up: Tensor, gate: Tensor | None) -> Tensor:
    """The hidden layer, before anything of it is dropped.

    Args:
        activation: What is applied to `gate`, or to `up` where nothing gates.
            One with a method `gated(gate, up)` says itself how both meet.
        up: The projection to the hidden layer.
        gate: Of the same shape; `None` where nothing gates.
    """
    if gate is None:
        return activation(up)
    if hasattr(activation, "gated"):
        return activation.gated(gate, up)
    return activation(gate) * up


def groups_of_tiles(
    tile_experts: Tensor, num_experts: int, size: int
) -> tuple[Tensor, Tensor]:
    """Which tiles of an expert can be taken `size` at a time.

    Args:
        tile_experts: int32 `(N,)`, ascending, the expert of each tile; `E`
            for a spare one.
        num_experts: Integer, `E`.
        size: How many tiles of one expert make a group, counted from its
            first.

    Returns:
        Bool `(N,)` twice: where a whole group starts, and what is in none.
    """
    number = ops.arange(ops.shape(tile_experts)[0], dtype="int32")
    # Counted, not looked up by `searchsorted`, which LiteRT does not have.
    known = ops.arange(num_experts + 1, dtype="int32")
    owned = ops.equal(ops.expand_dims(tile_experts, -1), known)
    counts = ops.sum(ops.cast(owned, "int32"), axis=0)
    ends = ops.cumsum(counts, axis=0)
    end = ops.take(ends, tile_experts, axis=0)
    first = end - ops.take(counts, tile_experts, axis=0)
    place = number - first
    whole = place // size * size + size <= end - first
    starts = ops.logical_and(whole, place % size == 0)
    return starts, ops.logical_not(whole)


def packing(
    num_tokens: int, top_k: int, num_experts: int, training: bool
) -> tuple[int, int]:
    """How `grouped_feed_forward` likes its rows best.

    Slots are multiplied in one go, at their full number, and need no loop; but
    they also read the experts that have no rows, and a quick product of few
    rows at inference is quicker tile by tile. In training every kernel is
    read, and has a gradient to write.

    Args:
        num_tokens: `T`.
        top_k: `K`.
        num_experts: `E`.
        training: Whether a gradient will be asked for.

    Returns:
        `C`, slots for every expert, and `M`, rows of a tile of those that
        have more.
    """
    share = num_tokens * top_k // num_experts
    if training or share >= 64:
        rows = 1 << max(share // 4, 1).bit_length() - 1
        # Fewer slots leave more to the loop, where experts are balanced; more
        # are idle where one is crowded (`benchmarks.growth`).
        return share, max(8, min(64, rows))
    if share > 8:
        return 0, 16
    # An expert has no more than all tokens; a power of 2 from there.
    return 0, 1 << (min(num_tokens, 8) - 1).bit_length()


def is_recorded() -> bool:
    """Whether what runs is written down from one example, for a file.

    Shapes of work that hang on values, as the rows of each expert do, would be
    those of the example for ever. Never so where graphs have loops.
    """
    return False


def remat(function: Callable) -> Callable:
    """The function, which in training keeps its arguments and no more.

    Its gradient computes it once more.

    Args:
        function: Takes float tensors. What it closes over gets its gradient
            too: variables, and except on TensorFlow tensors.
    """
    return keras.remat(function)

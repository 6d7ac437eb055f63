"""Moves tokens to experts and back: the engines.

An engine takes tokens `(G, S, D)`, a routing and the experts, and returns
`(G, S, D)`. Given a `tally` as well, weights of the shape of the routing's, it
returns a pair: that, and float32 `(E, D)`, what each expert put out, summed
over its tokens with these weights; no gradient flows through the sums. All
engines give the same result for the same routing; they differ in what they
spend, and in what an overflow does to others: where `dense` weights an expert
with 0 that nobody chose, infinity becomes NaN.

* `capacity`: each expert has a buffer of `C` slots; tokens are gathered into
  `(E, G * C, D)`, one batched matmul runs all experts, outputs are gathered
  back. The work is the active arithmetic, and shapes are static.
* `dropless`: each expert has slots for its fair share, which run as in
  `capacity`; whatever a crowded expert has beyond goes into blocks of a few
  dozen rows, and no more blocks run than have rows.
* `dense`: every expert on every token. The oracle, and the right choice for
  few tokens that need most experts, where moving rows costs more than
  multiplying them; and for routers that run all experts. Narrow experts run as
  one wide network then.
"""

from typing import Any, Protocol

from keras import ops

from keras_upcycle import backend
from keras_upcycle.routing import functional
from keras_upcycle.types import ExpertChoice, Routing, Tensor

# Narrow experts run as one network for so many tokens. It needs their kernels
# side by side, and for fewer, copying them takes longer than it saves.
# Measured by `python -m benchmarks.all_experts`.
AS_ONE_FROM_TOKENS = 64


# Rows of a `dropless` block where the number of tokens is unknown.
DEFAULT_BLOCK = 64


class ExpertBank(Protocol):
    """What an engine needs of the experts; see `experts.Experts`."""

    num_experts: int
    are_narrow: bool

    def apply_slots(self, slots: Tensor, training: Any) -> Tensor:
        """Expert `e` on `slots[e]`: `(E, N, D)` to `(E, N, D)`."""

    def apply_groups(
        self,
        slots: Tensor,
        blocks: Tensor,
        owners: Tensor,
        used: Tensor,
        training: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `apply_slots`, and expert `owners[n]` on `blocks[n]`.

        `(E, C, D)` and `(N, M, D)` to the same; blocks from `used` on are
        spare, of owner `E`, and what comes of them is not read.
        """

    def apply_as_one(
        self, tokens: Tensor, weights: Tensor, training: Any
    ) -> Tensor:
        """All experts on `(T, D)`, added up with weights `(T, E)`.

        Asked for if `are_narrow`.
        """


def capacity(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    tally: Tensor | None = None,
) -> Any:
    """Buffers of `C` slots an expert; see the module's docstring."""
    groups, length, width = ops.shape(tokens)
    num_experts = experts.num_experts
    if isinstance(chosen, ExpertChoice):
        slots = ops.shape(chosen.tokens)[2]
        source = ops.reshape(chosen.tokens, (groups, num_experts * slots))
        place = None
    else:
        ranks, slots = chosen.ranks, chosen.capacity
        if ranks is None:  # dropless routing in buffers that hold everything
            top_k = chosen.experts.shape[-1]
            flat = ops.reshape(chosen.experts, (groups, length * top_k))
            ranks = functional.ranks_within_experts(flat, num_experts)
            ranks = ops.reshape(ranks, ops.shape(chosen.experts))
            slots = length
        place = ops.where(
            chosen.experts < num_experts,
            chosen.experts * slots + ranks,
            num_experts * slots,
        )
        source = _source_of_places(place, num_experts * slots)
    if place is None:
        buffers = backend.gather_rows(tokens, source)
    else:
        buffers = backend.to_slots(tokens, source, place)
    outputs = _run_buffers(buffers, experts, slots, training)
    if place is None:
        weights = ops.reshape(chosen.weights, (groups, num_experts * slots))
        result = _scale_rows(ops.cast(outputs, "float32"), weights)
        result = backend.scatter_add_rows(result, source, length)
        result = ops.cast(result, outputs.dtype)
    else:
        result = backend.from_slots(outputs, chosen.weights, source, place)
    if tally is None:
        return result
    if place is not None:
        tally = _at_places(tally, place, num_experts * slots)
    split = ops.reshape(outputs, (groups, num_experts, slots, width))
    tally = ops.reshape(tally, (groups, num_experts, slots))
    return result, _sum_of_rows("gecd,gec->ed", split, tally)


def dropless(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    tally: Tensor | None = None,
) -> Any:
    """Slots, and blocks for the rest; see the module's docstring.

    Expert Choice has no drops to avoid: its buffers are full by design, so
    `capacity` serves it.
    """
    if isinstance(chosen, ExpertChoice):
        return capacity(tokens, chosen, experts, training, tally)
    if backend.is_recorded():
        raise ValueError(
            "torch writes a model down from one example, and the file would "
            "keep that example's rows of each expert. Received: "
            'dispatch="dropless" while exporting or tracing. Build the model '
            'with dispatch="auto", "dense" or "capacity".'
        )
    groups, length, width = ops.shape(tokens)
    num_experts = experts.num_experts
    top_k = chosen.experts.shape[-1]
    total = groups * length
    slots, rows = _packing(total, top_k, num_experts, training)
    if chosen.partial:
        slots = 0  # slots run whether or not they are filled
    num_blocks = most_blocks(total * top_k, num_experts, slots, rows)
    num_slots = num_experts * slots
    num_places = num_slots + num_blocks * rows

    # The first rows of an expert go to its slots; it owns whole blocks for
    # the others, one after the other.
    flat = ops.reshape(chosen.experts, (1, total * top_k))
    ranks = functional.ranks_within_experts(flat, num_experts)
    counts = ops.sum(
        functional.membership(flat[0], num_experts, "int32"), axis=0
    )
    block_counts = (ops.maximum(counts - slots, 0) + (rows - 1)) // rows
    ends = ops.cumsum(block_counts, axis=0)
    first = num_slots - slots + (ends - block_counts) * rows
    first = ops.take(ops.pad(first, [[0, 1]]), flat, axis=0)
    place = ranks + ops.where(ranks < slots, flat * slots, first)
    place = ops.where(flat < num_experts, place, num_places)
    place = ops.reshape(place, (1, total, top_k))
    source = _source_of_places(place, num_places)
    owners = ops.sum(
        ops.cast(
            ops.expand_dims(ops.arange(num_blocks, dtype="int32"), 1)
            >= ops.expand_dims(ends, 0),
            "int32",
        ),
        axis=1,
    )

    flat_tokens = ops.reshape(tokens, (1, total, width))
    packed = backend.to_slots(flat_tokens, source, place)
    in_slots, in_blocks = experts.apply_groups(
        ops.reshape(packed[:, :num_slots], (num_experts, slots, width)),
        ops.reshape(packed[:, num_slots:], (num_blocks, rows, width)),
        owners,
        ends[-1],
        training,
    )
    outputs = ops.concatenate(
        [
            ops.reshape(in_slots, (1, num_slots, width)),
            ops.reshape(in_blocks, (1, num_blocks * rows, width)),
        ],
        axis=1,
    )
    weights = ops.reshape(chosen.weights, (1, total, top_k))
    result = backend.from_slots(outputs, weights, source, place)
    result = ops.reshape(result, (groups, length, width))
    if tally is None:
        return result
    tally = ops.reshape(tally, (1, total, top_k))
    tally = _at_places(tally, place, num_places)[0]
    sums = _sum_of_rows(
        "ecd,ec->ed",
        in_slots,
        ops.reshape(tally[:num_slots], (num_experts, slots)),
    )
    of_blocks = _sum_of_rows(
        "nmd,nm->nd",
        in_blocks,
        ops.reshape(tally[num_slots:], (num_blocks, rows)),
    )
    owned = functional.membership(owners, num_experts)
    return result, sums + ops.einsum("nd,ne->ed", of_blocks, owned)


def dense(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    tally: Tensor | None = None,
) -> Any:
    """Every expert on every token; see the module's docstring."""
    groups, length, width = ops.shape(tokens)
    num_experts = experts.num_experts
    total = groups * length
    flat = ops.reshape(tokens, (total, width))
    weights = functional.combine_matrix(chosen, length, num_experts)
    weights = ops.reshape(weights, (total, num_experts))
    few = isinstance(total, int) and total < AS_ONE_FROM_TOKENS
    if tally is None and experts.are_narrow and not few:
        result = experts.apply_as_one(flat, weights, training)
        return ops.reshape(result, (groups, length, width))
    slots = ops.broadcast_to(flat[None], (num_experts, total, width))
    outputs = experts.apply_slots(slots, training)
    # In float32, as `from_slots` does: three thirds are 1.002 in bfloat16.
    wide = ops.cast(outputs, "float32")
    result = ops.einsum("etd,te->td", wide, weights)
    result = ops.reshape(
        ops.cast(result, outputs.dtype), (groups, length, width)
    )
    if tally is None:
        return result
    counted = chosen._replace(weights=tally)
    tally = functional.combine_matrix(counted, length, num_experts)
    tally = ops.transpose(ops.reshape(tally, (total, num_experts)))
    return result, _sum_of_rows("etd,et->ed", outputs, tally)


def most_blocks(
    assignments: Any, num_experts: int, slots: int, rows: int
) -> Any:
    """The most blocks that `dropless` can need, for any routing.

    With `n` experts that have more than their slots, those slots are full, and
    rounding up costs each at most `rows - 1` rows: `(A - n * slots +
    n * (rows - 1)) // rows` blocks. That is linear in `n`, so most at an end.

    Args:
        assignments: `A`, an integer, or a size known only at run time.
        num_experts: `E`.
        slots: Slots of each expert.
        rows: Rows of a block.

    Example:
        >>> most_blocks(8192, num_experts=32, slots=192, rows=64)
        125
    """
    spare = rows - 1 - slots
    crowded = 1 if spare < 0 else _at_most(assignments, num_experts)
    most = (assignments + crowded * spare) // rows
    if isinstance(most, int):
        return max(most, 0)
    return most


def _packing(num_tokens, top_k, num_experts, training):
    """Slots of each expert and rows of a block."""
    if not isinstance(num_tokens, int):
        return 0, DEFAULT_BLOCK
    return backend.packing(num_tokens, top_k, num_experts, bool(training))


def _at_most(size, limit):
    """The lesser of the two; `limit` for a size that JAX left symbolic."""
    if ops.is_tensor(size):
        return ops.minimum(size, limit)
    return min(size, limit) if isinstance(size, int) else limit


def _source_of_places(place, num_places):
    """The token that fills each place; 0 for an empty one, which is unread.

    Args:
        place: int32 `(G, S, K)`, each place taken once, `num_places` for none.
        num_places: How many places a group has.

    Returns:
        int32 `(G, num_places)`.
    """
    groups, length, top_k = ops.shape(place)
    token = ops.reshape(ops.arange(length, dtype="int32"), (1, length, 1))
    token = ops.broadcast_to(token, (groups, length, top_k))
    return _at_places(token, place, num_places)


def _at_places(values, place, num_places):
    """Each assignment's value `(G, S, K)` at its place; 0 at an empty one.

    Returns:
        `(G, num_places)`.
    """
    groups, length, top_k = ops.shape(place)
    flat = ops.reshape(place, (groups, length * top_k))
    column = ops.reshape(values, (groups, length * top_k, 1))
    filled = backend.scatter_add_rows(column, flat, num_places + 1)
    return filled[:, :num_places, 0]


def _sum_of_rows(equation, rows, weights):
    """Weighted rows added up, in float32 and without a gradient."""
    rows = ops.cast(ops.stop_gradient(rows), "float32")
    weights = ops.stop_gradient(weights)
    # A row that nobody reads may hold anything, and 0 times NaN is NaN.
    counted = ops.expand_dims(weights != 0.0, -1)
    return ops.einsum(equation, ops.where(counted, rows, 0.0), weights)


def _scale_rows(rows, weights):
    """`(G, N, D)` rows times `(G, N)` weights.

    An einsum and not a product with broadcasting: the gradient of `weights`
    is a sum over `D`, which XLA's CPU compiler runs ten times faster as the
    einsum's transpose than as the broadcast's. LiteRT has no einsum of rows
    whose number is unknown.
    """
    if not isinstance(ops.shape(rows)[1], int):
        return rows * ops.expand_dims(weights, -1)
    return ops.einsum("gnd,gn->gnd", rows, weights)


def _run_buffers(buffers, experts, slots, training):
    """`(G, E * C, D)` through the experts, as `(E, G * C, D)` and back.

    Groups stay apart until the last step, so that a partitioner with groups
    sharded over one mesh axis and experts over another needs one all-to-all
    each way and no gather of all tokens.
    """
    groups, _, width = ops.shape(buffers)
    num_experts = experts.num_experts
    split = ops.reshape(buffers, (groups, num_experts, slots, width))
    by_expert = ops.reshape(
        ops.transpose(split, (1, 0, 2, 3)),
        (num_experts, groups * slots, width),
    )
    outputs = experts.apply_slots(by_expert, training)
    split = ops.reshape(outputs, (num_experts, groups, slots, width))
    return ops.reshape(
        ops.transpose(split, (1, 0, 2, 3)),
        (groups, num_experts * slots, width),
    )

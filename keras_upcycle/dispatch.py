"""Moves tokens to experts and back: the engines.

An engine takes tokens `(G, S, D)`, a routing and the experts, and returns
`(G, S, D)`. All engines give the same result for the same routing; they
differ in what they spend:

* `capacity`: each expert has a buffer of `C` slots; tokens are gathered into
  `(E, G * C, D)`, one batched matmul runs all experts, outputs are gathered
  back. The work is the active arithmetic, and shapes are static.
* `dropless`: assignments are sorted by expert into blocks of a few dozen
  rows, so a crowded expert gets more blocks instead of dropping tokens.
* `dense`: every expert on every token. The oracle, and the right choice for
  few tokens that need most experts, where moving rows costs more than
  multiplying them.
"""

from typing import Any, Protocol

from keras import ops

from keras_upcycle import backend, routing
from keras_upcycle.types import ExpertChoice, Routing, Tensor, TokenChoice

# `auto` runs every expert on every token up to this many rows (E * T): below
# it, finding and moving rows takes longer than the spared arithmetic.
# Measured by `benchmarks/layer.py --crossover`.
DENSE_UP_TO_ROWS = 256
# At inference up to this many assignments an expert (T * K / E) go `dropless`
# all the same: the experts that nobody chose need not be read.
FEW_PER_EXPERT = 4
# Rows of a `dropless` block where the number of tokens is unknown.
DEFAULT_BLOCK = 64


class ExpertBank(Protocol):
    """What an engine needs of the experts; see `experts.Experts`."""

    num_experts: int

    def apply_slots(self, slots: Tensor, training: Any) -> Tensor:
        """Expert `e` on `slots[e]`: `(E, N, D)` to `(E, N, D)`."""

    def apply_blocks(
        self, blocks: Tensor, owners: Tensor, training: Any
    ) -> Tensor:
        """Expert `owners[n]` on `blocks[n]`: `(N, M, D)` to `(N, M, D)`.

        Blocks of owner `E` are spare; what comes of them is not read.
        """


def choose(
    chosen: Routing, num_tokens: Any, num_experts: int, training: Any = None
) -> str:
    """The engine that `dispatch="auto"` runs, by shape and `training`.

    `dropless` at inference for so few tokens that they need few experts: a
    `TokenChoice` of at most `FEW_PER_EXPERT` assignments an expert
    (`T * K <= FEW_PER_EXPERT * E`), as in decoding step by step. Else `dense`
    for at most `DENSE_UP_TO_ROWS / E` tokens or where every expert runs
    anyway; else `capacity` where the routing has buffers and `dropless` where
    it has none. A number of tokens known only at run time counts as large.

    `python -m benchmarks.layer --crossover` prints what this rests on.
    """
    known = isinstance(num_tokens, int)
    if known and not training and isinstance(chosen, TokenChoice):
        top_k = chosen.experts.shape[-1]
        few = num_tokens * top_k <= FEW_PER_EXPERT * num_experts
        if few and top_k < num_experts:
            return "dropless"
    if known and num_tokens * num_experts <= DENSE_UP_TO_ROWS:
        return "dense"
    if isinstance(chosen, ExpertChoice) or chosen.capacity is not None:
        return "capacity"
    if chosen.experts.shape[-1] == num_experts:
        return "dense"
    return "dropless"


def capacity(
    tokens: Tensor, chosen: Routing, experts: ExpertBank, training: Any = None
) -> Tensor:
    """Buffers of `C` slots an expert; see the module's docstring."""
    groups, length, _ = ops.shape(tokens)
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
            ranks = routing.ranks_within_experts(flat, num_experts)
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
        outputs = _scale_rows(outputs, weights)
        return backend.scatter_add_rows(outputs, source, length)
    return backend.from_slots(outputs, chosen.weights, source, place)


def dropless(
    tokens: Tensor, chosen: Routing, experts: ExpertBank, training: Any = None
) -> Tensor:
    """Blocks of rows, as many an expert as it needs; see the module.

    Expert Choice has no drops to avoid: its buffers are full by design, so
    `capacity` serves it.
    """
    if isinstance(chosen, ExpertChoice):
        return capacity(tokens, chosen, experts, training)
    groups, length, width = ops.shape(tokens)
    num_experts = experts.num_experts
    top_k = chosen.experts.shape[-1]
    total = groups * length
    flat = ops.reshape(chosen.experts, (1, total * top_k))
    rows = block_rows(total, top_k, num_experts)

    # Each expert owns whole blocks, one after the other. Rounding up costs
    # less than a block for each expert that has any rows, which bounds their
    # number statically; no tokens need no blocks, which would read one.
    ranks = routing.ranks_within_experts(flat, num_experts)
    counts = ops.sum(routing.membership(flat[0], num_experts, "int32"), axis=0)
    block_counts = (counts + (rows - 1)) // rows
    ends = ops.cumsum(block_counts, axis=0)
    num_blocks = -((-total * top_k) // rows) + _at_most(
        total * top_k, num_experts
    )
    first_row = ops.pad((ends - block_counts) * rows, [[0, 1]])
    place = ops.where(
        flat < num_experts,
        ops.take(first_row, flat, axis=0) + ranks,
        num_blocks * rows,
    )
    place = ops.reshape(place, (1, total, top_k))
    source = _source_of_places(place, num_blocks * rows)
    owner = ops.sum(
        ops.cast(
            ops.expand_dims(ops.arange(num_blocks, dtype="int32"), 1)
            >= ops.expand_dims(ends, 0),
            "int32",
        ),
        axis=1,
    )

    flat_tokens = ops.reshape(tokens, (1, total, width))
    blocks = backend.to_slots(flat_tokens, source, place)
    blocks = ops.reshape(blocks, (num_blocks, rows, width))
    outputs = experts.apply_blocks(blocks, owner, training)
    outputs = ops.reshape(outputs, (1, num_blocks * rows, width))
    weights = ops.reshape(chosen.weights, (1, total, top_k))
    result = backend.from_slots(outputs, weights, source, place)
    return ops.reshape(result, (groups, length, width))


def dense(
    tokens: Tensor, chosen: Routing, experts: ExpertBank, training: Any = None
) -> Tensor:
    """Every expert on every token; see the module's docstring."""
    groups, length, width = ops.shape(tokens)
    num_experts = experts.num_experts
    flat = ops.reshape(tokens, (1, groups * length, width))
    slots = ops.broadcast_to(flat, (num_experts, groups * length, width))
    outputs = experts.apply_slots(slots, training)
    weights = routing.combine_matrix(chosen, length, num_experts)
    weights = ops.reshape(weights, (groups * length, num_experts))
    result = ops.einsum("etd,te->td", outputs, ops.cast(weights, outputs.dtype))
    return ops.reshape(result, (groups, length, width))


def block_rows(num_tokens: Any, top_k: int, num_experts: int) -> int:
    """Rows of a `dropless` block.

    About a quarter of an expert's fair share and a power of two, at most 256
    and at least what the backend multiplies well: larger blocks waste rows on
    rounding, smaller ones read kernels more often.
    """
    if not isinstance(num_tokens, int):
        return DEFAULT_BLOCK
    share = num_tokens * top_k // (4 * num_experts)
    least = backend.smallest_block(num_tokens)
    return min(256, max(least, 1 << max(share, 1).bit_length() - 1))


ENGINES = {"capacity": capacity, "dropless": dropless, "dense": dense}


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
    token = ops.reshape(ops.arange(length, dtype="int32"), (1, length, 1, 1))
    token = ops.broadcast_to(token, (groups, length, top_k, 1))
    token = ops.reshape(token, (groups, length * top_k, 1))
    flat = ops.reshape(place, (groups, length * top_k))
    filled = backend.scatter_add_rows(token, flat, num_places + 1)
    return filled[:, :num_places, 0]


def _scale_rows(rows, weights):
    """`(G, N, D)` rows times `(G, N)` weights.

    An einsum and not a product with broadcasting: the gradient of `weights`
    is a sum over `D`, which XLA's CPU compiler runs ten times faster as the
    einsum's transpose than as the broadcast's.
    """
    return ops.einsum("gnd,gn->gnd", rows, ops.cast(weights, rows.dtype))


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

"""Tokens as rows that experts run on, and their outputs as tokens again.

Each class is one way to lay tokens `(G, S, D)` out for experts: `run` gives
the rows that experts put out, `combine` adds them up with the routing's
weights to `(G, S, D)`, and `sum_by_expert` with any weights to `(E, D)`.
"""

from typing import Any, Protocol

from keras import ops

from keras_upcycle import backend
from keras_upcycle.routing import drop_policies, functional
from keras_upcycle.types import ExpertChoice, Routing, Tensor, TokenChoice

# Rows of a `dropless` tile where the number of tokens is unknown.
DEFAULT_BLOCK = 64


class ExpertBank(Protocol):
    """What an engine needs of the experts; see `experts.Experts`."""

    num_experts: int
    are_narrow: bool
    placement: Any  # a `distribution.Placement`, or `None`

    def apply_slots(self, slots: Tensor, training: Any) -> Tensor:
        """Expert `e` on `slots[e]`: `(E, N, D)` to `(E, N, D)`."""

    def apply_groups(
        self,
        slots: Tensor,
        tiles: Tensor,
        tile_experts: Tensor,
        used: Tensor,
        training: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `apply_slots`, and expert `tile_experts[n]` on `tiles[n]`.

        `(E, C, D)` and `(N, M, D)` to the same; tiles from `used` on are
        spare, of expert `E`, and what comes of them is not read.
        """

    def apply_as_one(
        self, tokens: Tensor, weights: Tensor, training: Any
    ) -> Tensor:
        """All experts on `(T, D)`, added up with weights `(T, E)`.

        Asked for if `are_narrow`.
        """


class Packing(Protocol):
    """Tokens of one routing, laid out for experts."""

    def run(self, experts: ExpertBank, training: Any) -> Any:
        """What experts put out, in the order of the layout."""

    def combine(self, outputs: Any) -> Tensor:
        """What `run` gave, added up for each token: `(G, S, D)`."""

    def sum_by_expert(self, outputs: Any, weights: Tensor) -> Tensor:
        """What `run` gave, added up for each expert: float32 `(E, D)`.

        Without a gradient. `weights` are of the shape of the routing's.
        """


class ChosenByTokens:
    """Buffers of `C` slots an expert, for a `TokenChoice`."""

    def __init__(self, tokens: Tensor, chosen: TokenChoice, num_experts: int):
        groups, length, _ = ops.shape(tokens)
        ranks, slots = chosen.ranks, chosen.capacity
        if ranks is None:  # dropless routing in buffers that hold everything
            top_k = chosen.experts.shape[-1]
            flat = ops.reshape(chosen.experts, (groups, length * top_k))
            ranks = drop_policies.ranks_within_experts(flat, num_experts)
            ranks = ops.reshape(ranks, ops.shape(chosen.experts))
            slots = length
        self.chosen = chosen
        self.sizes = num_experts, slots
        self.place = ops.where(
            chosen.experts < num_experts,
            chosen.experts * slots + ranks,
            num_experts * slots,
        )
        self.source = _source_of_places(self.place, num_experts * slots)
        self.buffers = backend.to_slots(tokens, self.source, self.place)

    def run(self, experts, training):
        return _run_buffers(self.buffers, experts, self.sizes[1], training)

    def combine(self, outputs):
        return backend.from_slots(
            outputs, self.chosen.weights, self.source, self.place
        )

    def sum_by_expert(self, outputs, weights):
        num_experts, slots = self.sizes
        weights = _at_places(weights, self.place, num_experts * slots)
        return _sum_of_buffers(outputs, weights, *self.sizes)


class ChosenByExperts:
    """Buffers of `C` slots an expert, for an `ExpertChoice`: all are full."""

    def __init__(self, tokens: Tensor, chosen: ExpertChoice, num_experts: int):
        groups, self.length, _ = ops.shape(tokens)
        slots = ops.shape(chosen.tokens)[2]
        self.chosen = chosen
        self.sizes = num_experts, slots
        self.source = ops.reshape(chosen.tokens, (groups, num_experts * slots))
        self.buffers = backend.gather_rows(tokens, self.source)

    def run(self, experts, training):
        return _run_buffers(self.buffers, experts, self.sizes[1], training)

    def combine(self, outputs):
        weights = ops.reshape(self.chosen.weights, ops.shape(self.source))
        result = _scale_rows(ops.cast(outputs, "float32"), weights)
        result = backend.scatter_add_rows(result, self.source, self.length)
        return ops.cast(result, outputs.dtype)

    def sum_by_expert(self, outputs, weights):
        return _sum_of_buffers(outputs, weights, *self.sizes)


class SlotsAndTiles:
    """Slots for an expert's fair share, and tiles of rows for the rest."""

    def __init__(
        self,
        tokens: Tensor,
        chosen: TokenChoice,
        num_experts: int,
        training: Any,
    ):
        self.shape = groups, length, width = ops.shape(tokens)
        self.chosen = chosen
        self.num_experts = num_experts
        top_k = chosen.experts.shape[-1]
        total = groups * length
        slots, rows = _packing(total, top_k, num_experts, training)
        if chosen.partial:
            slots = 0  # slots run whether or not they are filled
        num_tiles = most_tiles(total * top_k, num_experts, slots, rows)
        self.slots, self.rows, self.num_tiles = slots, rows, num_tiles
        self.num_slots = num_experts * slots
        num_places = self.num_slots + num_tiles * rows

        # The first rows of an expert go to its slots; it owns whole tiles for
        # the others, one after the other.
        flat = ops.reshape(chosen.experts, (1, total * top_k))
        ranks = drop_policies.ranks_within_experts(flat, num_experts)
        counts = ops.sum(
            functional.membership(flat[0], num_experts, "int32"), axis=0
        )
        tile_counts = (ops.maximum(counts - slots, 0) + (rows - 1)) // rows
        ends = ops.cumsum(tile_counts, axis=0)
        first = self.num_slots - slots + (ends - tile_counts) * rows
        first = ops.take(ops.pad(first, [[0, 1]]), flat, axis=0)
        place = ranks + ops.where(ranks < slots, flat * slots, first)
        place = ops.where(flat < num_experts, place, num_places)
        self.place = ops.reshape(place, (1, total, top_k))
        self.source = _source_of_places(self.place, num_places)
        self.tile_experts = ops.sum(
            ops.cast(
                ops.expand_dims(ops.arange(num_tiles, dtype="int32"), 1)
                >= ops.expand_dims(ends, 0),
                "int32",
            ),
            axis=1,
        )
        self.ends = ends  # the last one: how many tiles are in use
        flat_tokens = ops.reshape(tokens, (1, total, width))
        self.packed = backend.to_slots(flat_tokens, self.source, self.place)

    def run(self, experts, training):
        width, packed = self.shape[-1], self.packed
        return experts.apply_groups(
            ops.reshape(
                packed[:, : self.num_slots],
                (self.num_experts, self.slots, width),
            ),
            ops.reshape(
                packed[:, self.num_slots :],
                (self.num_tiles, self.rows, width),
            ),
            self.tile_experts,
            self.ends[-1],
            training,
        )

    def combine(self, outputs):
        in_slots, in_tiles = outputs
        width = self.shape[-1]
        outputs = ops.concatenate(
            [
                ops.reshape(in_slots, (1, self.num_slots, width)),
                ops.reshape(in_tiles, (1, self.num_tiles * self.rows, width)),
            ],
            axis=1,
        )
        weights = ops.reshape(self.chosen.weights, ops.shape(self.place))
        result = backend.from_slots(outputs, weights, self.source, self.place)
        return ops.reshape(result, self.shape)

    def sum_by_expert(self, outputs, weights):
        in_slots, in_tiles = outputs
        weights = ops.reshape(weights, ops.shape(self.place))
        num_places = self.num_slots + self.num_tiles * self.rows
        weights = _at_places(weights, self.place, num_places)[0]
        sums = _sum_of_rows(
            "ecd,ec->ed",
            in_slots,
            ops.reshape(
                weights[: self.num_slots], (self.num_experts, self.slots)
            ),
        )
        of_tiles = _sum_of_rows(
            "nmd,nm->nd",
            in_tiles,
            ops.reshape(weights[self.num_slots :], (self.num_tiles, self.rows)),
        )
        owned = functional.membership(self.tile_experts, self.num_experts)
        return sums + ops.einsum("nd,ne->ed", of_tiles, owned)


class Everywhere:
    """Every expert on every token."""

    def __init__(self, tokens: Tensor, chosen: Routing, num_experts: int):
        self.shape = groups, length, width = ops.shape(tokens)
        self.chosen = chosen
        self.num_experts = num_experts
        self.total = groups * length
        self.flat = ops.reshape(tokens, (self.total, width))
        self.weights = self._matrix(chosen)

    def run(self, experts, training):
        slots = ops.broadcast_to(
            self.flat[None], (self.num_experts, self.total, self.shape[-1])
        )
        return experts.apply_slots(slots, training)

    def run_as_one(self, experts, training):
        """`run` and `combine` in one, of narrow experts."""
        result = experts.apply_as_one(self.flat, self.weights, training)
        return ops.reshape(result, self.shape)

    def combine(self, outputs):
        # In float32, as `from_slots` does: three thirds are 1.002 in bfloat16.
        wide = ops.cast(outputs, "float32")
        result = ops.einsum("etd,te->td", wide, self.weights)
        return ops.reshape(ops.cast(result, outputs.dtype), self.shape)

    def sum_by_expert(self, outputs, weights):
        weights = self._matrix(self.chosen._replace(weights=weights))
        return _sum_of_rows("etd,et->ed", outputs, ops.transpose(weights))

    def _matrix(self, chosen):
        """The routing's weights as `(T, E)`."""
        matrix = functional.combine_matrix(
            chosen, self.shape[1], self.num_experts
        )
        return ops.reshape(matrix, (self.total, self.num_experts))


def most_tiles(
    assignments: Any, num_experts: int, slots: int, rows: int
) -> Any:
    """The most tiles that `dropless` can need, for any routing.

    With `n` experts that have more than their slots, those slots are full, and
    rounding up costs each at most `rows - 1` rows: `(A - n * slots +
    n * (rows - 1)) // rows` tiles. That is linear in `n`, so most at an end.

    Args:
        assignments: `A`, an integer, or a size known only at run time.
        num_experts: `E`.
        slots: Slots of each expert.
        rows: Rows of a tile.

    Example:
        >>> most_tiles(8192, num_experts=32, slots=192, rows=64)
        125
    """
    spare = rows - 1 - slots
    crowded = 1 if spare < 0 else _at_most(assignments, num_experts)
    most = (assignments + crowded * spare) // rows
    if isinstance(most, int):
        return max(most, 0)
    return most


def _packing(num_tokens, top_k, num_experts, training):
    """Slots of each expert and rows of a tile."""
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


def _sum_of_buffers(outputs, weights, num_experts, slots):
    """`(G, E * C, D)` summed by expert, with as many weights."""
    groups, _, width = ops.shape(outputs)
    split = ops.reshape(outputs, (groups, num_experts, slots, width))
    weights = ops.reshape(weights, (groups, num_experts, slots))
    return _sum_of_rows("gecd,gec->ed", split, weights)


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

    Groups stay apart until the last step: with groups spread over a mesh and
    experts too, there is one all-to-all each way and no gather of all tokens.
    """
    groups, _, width = ops.shape(buffers)
    num_experts = experts.num_experts
    split = ops.reshape(buffers, (groups, num_experts, slots, width))
    by_expert = ops.reshape(
        backend.to_experts(split, experts.placement),
        (num_experts, groups * slots, width),
    )
    outputs = experts.apply_slots(by_expert, training)
    split = ops.reshape(outputs, (num_experts, groups, slots, width))
    return ops.reshape(
        backend.to_groups(split, experts.placement),
        (groups, num_experts * slots, width),
    )

"""The `dropless` engine where experts lie on several devices.

Each device gathers the tokens of those that hold the other experts, runs its
own experts on the tokens that chose them, and results are added up and
scattered back. No token is dropped, so a causal model stays causal; an
all-gather and a scattered sum a layer, of tokens and not of kernels.
"""

from typing import Any

import keras
from keras import ops

from keras_upcycle import backend
from keras_upcycle.distribution.placement import Placement
from keras_upcycle.layers import packings
from keras_upcycle.types import Tensor, TokenChoice


def is_even(tokens: Tensor, placement: Placement) -> bool:
    """Whether every device has as many of the tokens `(G, S, D)`."""
    groups, length, _ = tokens.shape
    total = groups * length
    return isinstance(total, int) and total % placement.shards == 0


def dropless(
    tokens: Tensor,
    chosen: TokenChoice,
    experts: Any,
    training: Any = None,
    sum_weights: Tensor | None = None,
) -> Any:
    """See `engines`; `experts` is an `Experts` with a `placement`."""
    groups, length, width = ops.shape(tokens)
    total, top_k = groups * length, chosen.experts.shape[-1]
    local = (
        experts.num_experts
        // experts.placement.sizes[experts.placement.expert_axis]
    )
    seed = experts.dropout_seed(training, drawn=True)

    def run(device, rows, kernels):
        mine = _OwnExperts(experts, local, kernels, seed, device.number)
        flat, ids, *weights = (device.gather(each) for each in rows)
        ids = ids - device.number * local
        here = ops.logical_and(ids >= 0, ids < local)
        ids = ops.where(here, ids, local)[None]
        weights = [ops.where(here, each, 0.0)[None] for each in weights]
        choice = TokenChoice(ids, weights[0], ids, None, None, partial=True)
        packed = packings.SlotsAndTiles(flat[None], choice, local, training)
        outputs = packed.run(mine, training)
        # Added up over devices in float32, as over experts.
        wide = tuple(ops.cast(each, "float32") for each in outputs)
        result = device.add_up(packed.combine(wide)[0])
        sums = ops.zeros((local, width), "float32")
        if sum_weights is not None:
            sums = packed.sum_by_expert(outputs, weights[1])
            sums = device.add_over_others(sums)
        return result, sums

    rows = [
        ops.reshape(tokens, (total, width)),
        ops.reshape(chosen.experts, (total, top_k)),
        ops.reshape(chosen.weights, (total, top_k)),
    ]
    if sum_weights is not None:
        rows.append(ops.reshape(sum_weights, (total, top_k)))
    result, sums = backend.on_each_device(
        run, experts.placement, tuple(rows), experts.weights_by_name()
    )
    result = ops.cast(result, experts.compute_dtype)
    result = ops.reshape(result, (groups, length, width))
    return result if sum_weights is None else (result, sums)


class _OwnExperts:
    """The experts of one device, for a `Packing`."""

    placement = None
    are_narrow = False

    def __init__(self, experts, num_experts, kernels, seed, number):
        self.num_experts = num_experts
        self._experts, self._kernels = experts, kernels
        self._seed, self._number = seed, number

    def apply_groups(self, slots, tiles, tile_experts, used, training):
        experts = self._experts
        keep = tuple(
            self._kept(rows, n) for n, rows in enumerate((slots, tiles))
        )

        # What is computed again may close over no whole number of this device.
        def compute(slots, tiles, tile_experts, used):
            return backend.grouped_feed_forward(
                slots,
                tiles,
                tile_experts,
                used,
                self._kernels,
                experts.activation,
                keep,
                bool(training),
            )

        if experts.remat and training:
            compute = backend.remat(compute)
        return compute(
            ops.cast(slots, experts.compute_dtype),
            ops.cast(tiles, experts.compute_dtype),
            tile_experts,
            used,
        )

    def _kept(self, rows, number):
        """The factors of the hidden dropout: each device's its own."""
        if self._seed is None:
            return None
        experts = self._experts
        shape = (*ops.shape(rows)[:2], experts.intermediate_dim)
        # Slots and tiles of all devices draw numbers of their own.
        seed = self._seed.other(2 * self._number + number)
        ones = ops.ones(shape, experts.compute_dtype)
        return keras.random.dropout(ones, experts.dropout, seed=seed)

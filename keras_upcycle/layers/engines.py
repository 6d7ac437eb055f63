"""Moves tokens to experts and back: the engines.

An engine takes tokens `(G, S, D)`, a routing and the experts, and returns
`(G, S, D)`. Given `sum_weights` as well, of the shape of the routing's
weights, it returns a pair: that, and float32 `(E, D)`, what each expert put
out, summed over its tokens with these weights; no gradient flows through the
sums. `packings` has the way there and back. All
engines give the same result for the same routing; they differ in what they
spend, and in what an overflow does to others: where `dense` weights an expert
with 0 that nobody chose, infinity becomes NaN.

* `capacity`: each expert has a buffer of `C` slots; tokens are gathered into
  `(E, G * C, D)`, one batched matmul runs all experts, outputs are gathered
  back. The work is the active arithmetic, and shapes are static.
* `dropless`: each expert has slots for its fair share, which run as in
  `capacity`; whatever a crowded expert has beyond goes into tiles of a few
  dozen rows, and no more tiles run than have rows.
* `dense`: every expert on every token. The oracle, and the right choice for
  few tokens that need most experts, where moving rows costs more than
  multiplying them; and for routers that run all experts. Narrow experts run as
  one wide network then.
"""

from typing import Any

from keras_upcycle import backend
from keras_upcycle.layers import mesh_dropless, packings
from keras_upcycle.layers.packings import ExpertBank, Packing
from keras_upcycle.types import ExpertChoice, Routing, Tensor

# Narrow experts run as one network for so many tokens. It needs their kernels
# side by side, and for fewer, copying them takes longer than it saves.
# Measured by `python -m benchmarks.all_experts`.
AS_ONE_FROM_TOKENS = 64


def capacity(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    sum_weights: Tensor | None = None,
) -> Any:
    """Buffers of `C` slots an expert; see the module's docstring."""
    packed: Packing
    if isinstance(chosen, ExpertChoice):
        packed = packings.ChosenByExperts(tokens, chosen, experts.num_experts)
    else:
        packed = packings.ChosenByTokens(tokens, chosen, experts.num_experts)
    return _there_and_back(packed, experts, training, sum_weights)


def dropless(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    sum_weights: Tensor | None = None,
) -> Any:
    """Slots, and tiles for the rest; see the module's docstring.

    Expert Choice has no drops to avoid: its buffers are full by design, so
    `capacity` serves it.
    """
    if isinstance(chosen, ExpertChoice):
        return capacity(tokens, chosen, experts, training, sum_weights)
    if backend.is_recorded():
        raise ValueError(
            "torch writes a model down from one example, and the file would "
            "keep that example's rows of each expert. Received: "
            'dispatch="dropless" while exporting or tracing. Build the model '
            'with dispatch="auto", "dense" or "capacity".'
        )
    if experts.placement is not None:
        given = tokens, chosen, experts, training, sum_weights
        if mesh_dropless.is_even(tokens, experts.placement):
            return mesh_dropless.dropless(*given)
        return dense(*given)
    packed = packings.SlotsAndTiles(
        tokens, chosen, experts.num_experts, training
    )
    return _there_and_back(packed, experts, training, sum_weights)


def dense(
    tokens: Tensor,
    chosen: Routing,
    experts: ExpertBank,
    training: Any = None,
    sum_weights: Tensor | None = None,
) -> Any:
    """Every expert on every token; see the module's docstring."""
    packed = packings.Everywhere(tokens, chosen, experts.num_experts)
    few = isinstance(packed.total, int) and packed.total < AS_ONE_FROM_TOKENS
    # As one network no expert has outputs of its own that could be summed.
    if sum_weights is None and experts.are_narrow and not few:
        return packed.run_as_one(experts, training)
    return _there_and_back(packed, experts, training, sum_weights)


def _there_and_back(packed: Packing, experts, training, sum_weights):
    outputs = packed.run(experts, training)
    result = packed.combine(outputs)
    if sum_weights is None:
        return result
    return result, packed.sum_by_expert(outputs, sum_weights)

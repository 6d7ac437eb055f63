"""Which engine moves tokens to experts: `dispatch="auto"`, and by name."""

from typing import Any

from keras_upcycle import backend
from keras_upcycle.layers.engines import capacity, dense, dropless
from keras_upcycle.types import ExpertChoice, Routing, TokenChoice

# `auto` runs every expert on every token up to this many rows (E * T): below
# it, finding and moving rows takes longer than the spared arithmetic.
# Measured by `python -m benchmarks.crossover`.
DENSE_UP_TO_ROWS = 256
# At inference up to this many assignments an expert (T * K / E) go `dropless`
# all the same if they leave experts that need not be read (`_leave_experts`).
FEW_PER_EXPERT = 4


def choose(
    chosen: Routing, num_tokens: Any, num_experts: int, training: Any = None
) -> str:
    """The engine that `dispatch="auto"` runs, by shape and `training`.

    `dropless` at inference for so few tokens that they need few experts, as in
    decoding step by step: a `TokenChoice` of at most `FEW_PER_EXPERT`
    assignments an expert (`T * K <= FEW_PER_EXPERT * E`), of which balanced
    choices reach a share of the experts `1 - (1 - K / E) ** T` of at most
    `1 / 2 + T / 64`. Else `dense` for at most `DENSE_UP_TO_ROWS / E` tokens or
    where every expert runs on every token anyway; else `capacity` where the
    routing has buffers and `dropless` where it has none. A number of tokens
    known only at run time counts as large, and a `partial` routing as one in
    which few experts run.

    `dense` too while torch writes a model down from one example
    (`backend.is_recorded`): the file must serve other routings.

    `python -m benchmarks.crossover` prints what this rests on.
    """
    if backend.is_recorded():
        return "dense"
    known = isinstance(num_tokens, int)
    if known and not training and isinstance(chosen, TokenChoice):
        top_k = chosen.experts.shape[-1]
        few = num_tokens * top_k <= FEW_PER_EXPERT * num_experts
        if few and (
            chosen.partial or _leave_experts(num_tokens, top_k, num_experts)
        ):
            return "dropless"
    if known and num_tokens * num_experts <= DENSE_UP_TO_ROWS:
        return "dense"
    if isinstance(chosen, ExpertChoice):
        return "capacity"
    length, top_k = chosen.experts.shape[1:]
    all_run = top_k == num_experts and not chosen.partial
    if all_run and chosen.capacity in (None, length):
        return "dense"
    return "dropless" if chosen.capacity is None else "capacity"


ENGINES = {"capacity": capacity, "dropless": dropless, "dense": dense}


def _leave_experts(num_tokens, top_k, num_experts):
    """Whether so few experts are likely to be chosen that finding them pays.

    An expert by itself takes up to twice as long as one of all in a row: for
    few tokens that is no more than reading its kernels. The more tokens, the
    less that matters.
    """
    reached = 1.0 - (1.0 - top_k / num_experts) ** num_tokens
    return reached <= 0.5 + num_tokens / 64

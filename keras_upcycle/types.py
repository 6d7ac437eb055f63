"""Words and letters that the whole package shares.

Shapes are written with these letters, in docstrings, comments and einsums:

| letter | is                                                               |
|--------|------------------------------------------------------------------|
| `G`    | groups: tokens of one group compete for one set of expert slots  |
| `S`    | tokens in a group                                                |
| `T`    | all tokens, `G * S`                                              |
| `D`    | `hidden_dim`, the width of the residual stream                   |
| `F`    | `intermediate_dim`, the width inside the feed-forward block      |
| `E`    | `num_experts`                                                    |
| `K`    | `top_k`, experts per token                                       |
| `C`    | capacity, slots per expert and group                             |
"""

from typing import Any, NamedTuple, TypeAlias

# A tensor of whichever backend runs. `Any`, because jax.Array, tf.Tensor and
# torch.Tensor share no base class and importing them here would load them.
Tensor: TypeAlias = Any


class TokenChoice(NamedTuple):
    """A routing in which every token chose `K` experts.

    Attributes:
        experts: int32 `(G, S, K)`. The chosen experts, best first. The value
            `E` (one past the last expert) means "nowhere": the token is
            padding, or the expert had no slot left for it.
        weights: float32 `(G, S, K)`. Combine weights, 0 where `experts` is
            `E`.
        requested: int32 `(G, S, K)`. The experts chosen before any was full;
            differs from `experts` where an assignment was dropped.
        ranks: int32 `(G, S, K)`, the slot that the token takes in the
            expert's buffer, or `None` where no buffer limits the expert.
        capacity: slots per expert and group (`C`), an integer or, where the
            sequence length is only known at run time, a scalar tensor.
            `None` for dropless routing.
        probabilities: float32 `(G, S, E)`, of all experts, for a router whose
            `run` needs them; `None` for the others.
        partial: Whether many of the `K` choices may be nowhere: `K` is then
            the most that a token may meet, and no measure of the work. A
            Python bool, known when a step is compiled.
    """

    experts: Tensor
    weights: Tensor
    requested: Tensor
    ranks: Tensor | None
    capacity: Any
    probabilities: Tensor | None = None
    partial: bool = False


class ExpertChoice(NamedTuple):
    """A routing in which every expert chose `C` tokens of each group.

    Attributes:
        tokens: int32 `(G, E, C)`. Positions, in `[0, S)`, of the chosen
            tokens, best first.
        weights: float32 `(G, E, C)`. Combine weights, 0 for a slot that is
            off because the group holds fewer real tokens than positions.
        active: bool `(G, E, C)`. Whether the slot is in use.
    """

    tokens: Tensor
    weights: Tensor
    active: Tensor


Routing: TypeAlias = TokenChoice | ExpertChoice

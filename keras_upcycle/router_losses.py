"""Auxiliary losses of routers: one definition each, in float32.

Every loss is a mean over real tokens (padding is left out), so its size
depends neither on the batch nor on its padding; a router multiplies it by its
own coefficient and adds it once.
"""

from keras import ops

from keras_upcycle import routing
from keras_upcycle.types import Tensor


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over groups and real tokens.

    Args:
        values: float32 `(G, S, ...)`.
        mask: bool `(G, S)`, `True` at real tokens, or `None`: all are real.

    Returns:
        `(...)`; 0 where no token is real.
    """
    if mask is None:
        return ops.mean(values, axis=(0, 1))
    weight = ops.cast(mask, values.dtype)
    real = ops.maximum(ops.sum(weight), 1.0)
    for _ in range(len(values.shape) - 2):
        weight = ops.expand_dims(weight, -1)
    # Not by the weight alone: padding may hold anything, and 0 * inf is NaN.
    values = ops.where(weight > 0.0, values, 0.0)
    return ops.sum(values, axis=(0, 1)) / real


def load_balance(
    probabilities: Tensor, experts: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Load-balancing loss: smallest, 1, when all experts get equal shares.

    `E * sum_e f_e * P_e`, with `f_e` the share of the tokens' choices that
    fell on expert `e` (all `K` choices count alike, before any is dropped) and
    `P_e` its mean probability: Switch Transformers (arXiv 2101.03961),
    equations 4 to 6, with GShard's extension to `K` choices.

    Args:
        probabilities: float32 `(G, S, E)`, softmax over experts.
        experts: int32 `(G, S, K)`, the choices before capacity.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32. Gradients flow through `probabilities` alone.

    Example:
        >>> import numpy as np
        >>> even = np.full((1, 4, 2), 0.5, "float32")
        >>> picks = np.array([[[0], [1], [0], [1]]], "int32")
        >>> float(load_balance(even, picks))
        1.0
    """
    num_experts = probabilities.shape[-1]
    chosen = ops.mean(routing.membership(experts, num_experts), axis=2)
    share = ops.stop_gradient(token_mean(chosen, mask))
    return num_experts * ops.sum(share * token_mean(probabilities, mask))


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router z-loss: keeps logits small. ST-MoE (arXiv 2202.08906), equation 5.

    Args:
        logits: float32 `(G, S, E)`.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32, the mean of `logsumexp(logits) ** 2`.

    Example:
        >>> import numpy as np
        >>> round(float(z_loss(np.zeros((1, 3, 4), "float32"))), 4)
        1.9218
    """
    return token_mean(ops.square(ops.logsumexp(logits, axis=-1)), mask)

"""Auxiliary losses of routers: one definition each, in float32.

Every loss is made of means over real tokens (padding is left out, whatever it
holds), so its size depends neither on the batch nor on its padding; a router
multiplies it by its own coefficient and adds it once.

`load_balance`, `z_loss` and `mutual_information` take all tokens as one;
`importance` and `load` are worked out group by group, and their mean is taken
over the groups that hold a real token.
"""

from keras import ops

from keras_upcycle import backend
from keras_upcycle.routing import functional
from keras_upcycle.types import Tensor


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over groups and real tokens.

    Args:
        values: float32 `(G, S, ...)`.
        mask: bool `(G, S)`, `True` at real tokens, or `None`: all are real.

    Returns:
        `(...)`; 0 where no token is real.
    """
    return _mean(values, mask, axis=(0, 1))


def load_balance(
    probabilities: Tensor,
    experts: Tensor,
    mask: Tensor | None = None,
    share: Tensor | None = None,
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
        share: float32 `(E,)`, `f` of more tokens than these; `None` for theirs.

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
    if share is None:
        chosen = ops.mean(functional.membership(experts, num_experts), axis=2)
        share = token_mean(chosen, mask)
    share = ops.stop_gradient(share)
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
    logits = _without_padding(logits, mask)
    return token_mean(ops.square(ops.logsumexp(logits, axis=-1)), mask)


def importance(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Importance loss: smallest, 0, when all experts get equal probability.

    `Var(I) / Mean(I) ** 2` over the experts, the squared coefficient of
    variation, where an expert's importance `I_e` is the sum of its
    probabilities over a group's real tokens; then the mean over groups.
    Largest, `E - 1`, where one expert gets everything. V-MoE (arXiv
    2106.05974), appendix A, after Shazeer et al. (1701.06538), section 4.

    Args:
        probabilities: float32 `(G, S, E)`, softmax over experts, without the
            noise of the choice.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32.

    Example:
        >>> float(importance(ops.full((1, 4, 2), 0.5)))
        0.0
        >>> float(importance(ops.array([[[1.0, 0.0]]])))
        1.0
    """
    # The mean of the tokens for their sum: a factor that the quotient loses.
    return _squared_variation(_mean(probabilities, mask, axis=1), mask)


def load(
    logits: Tensor,
    noisy_logits: Tensor,
    noise_stddev: float,
    top_k: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Load loss: smallest, 0, when all experts are as likely to be chosen.

    A count of choices has no gradient; the probability of being chosen has
    one. It is that of an expert's logit to reach the token's `top_k`-th
    largest noisy logit if the expert's own noise were drawn again. The loss is
    the squared coefficient of variation, over the experts, of its mean over a
    group's real tokens, `Var(p) / Mean(p) ** 2`; then the mean over groups.
    V-MoE (arXiv 2106.05974), appendix A, and its released code, which
    compares every expert with the same threshold where Shazeer et al.
    (1701.06538) leave out the expert's own logit.

    Args:
        logits: float32 `(G, S, E)`, before noise.
        noisy_logits: float32 `(G, S, E)`, those that the choice was made of.
        noise_stddev: Standard deviation of the Gaussian noise, positive.
        top_k: Integer in `[1, E]`.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32. Gradients flow through the logits and through the
        noisy logit that is the threshold.

    Example:
        >>> even = ops.zeros((1, 3, 4))
        >>> float(load(even, even, noise_stddev=0.25, top_k=2))
        0.0
    """
    logits = _without_padding(logits, mask)
    noisy = _without_padding(noisy_logits, mask)
    _, best = backend.top_k(ops.stop_gradient(noisy), top_k)
    last = functional.membership(best[..., -1], logits.shape[-1])
    threshold = ops.sum(last * noisy, axis=-1, keepdims=True)
    chance = _normal_cdf((logits - threshold) / noise_stddev)
    return _squared_variation(_mean(chance, mask, axis=1), mask)


def mutual_information(
    probabilities: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Minus the mutual information of token and expert, in nats.

    `-H(e) + mean_x H(e|x)`: the entropy of the mean probabilities, which the
    loss makes large (every expert is used), and the mean entropy of each
    token's own, which it makes small (every token is sure). Between `-log(E)`,
    where each token is sure of one expert and the experts get equal shares,
    and 0, where all tokens have the same probabilities, be they uniform or all
    on one expert. Not positive: the mutual information with its sign turned,
    since losses are minimised. DS-MoE (arXiv 2404.05567), equations 4 and 5,
    as in ModuleFormer (2306.04640).

    Args:
        probabilities: float32 `(G, S, E)`, softmax over experts.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32. Finite, and so is its gradient, where probabilities
        are 0.

    Example:
        >>> sure = ops.eye(2)[None]
        >>> round(float(mutual_information(sure)), 4)
        -0.6931
    """
    probabilities = _without_padding(probabilities, mask)
    of_tokens = token_mean(_entropy(probabilities), mask)
    return of_tokens - _entropy(token_mean(probabilities, mask))


def _without_padding(values, mask):
    """The values, 0 at padding: it may hold anything, and 0 * inf is NaN.

    First of all in a loss, since the same holds for its gradient.
    """
    if mask is None:
        return values
    for _ in range(len(values.shape) - 2):
        mask = ops.expand_dims(mask, -1)
    return ops.where(mask, values, 0.0)


def _mean(values, mask, axis):
    """Mean over real tokens, of all groups or of each; 0 where none is."""
    if mask is None:
        return ops.mean(values, axis=axis)
    total = ops.sum(_without_padding(values, mask), axis=axis)
    real = ops.maximum(ops.sum(ops.cast(mask, values.dtype), axis=axis), 1.0)
    for _ in range(len(total.shape) - len(real.shape)):
        real = ops.expand_dims(real, -1)
    return total / real


def _squared_variation(shares, mask):
    """Squared coefficient of variation of `(G, E)`: mean over real groups."""
    mean = ops.mean(shares, axis=-1, keepdims=True)
    # A group of padding has shares of 0, whose variation is none.
    relative = shares / ops.where(mean > 0.0, mean, 1.0)
    squares = ops.square(relative - ops.mean(relative, axis=-1, keepdims=True))
    variation = ops.mean(squares, axis=-1)
    if mask is None:
        return ops.mean(variation)
    real = ops.sum(ops.cast(ops.any(mask, axis=1), "float32"))
    return ops.sum(variation) / ops.maximum(real, 1.0)


def _entropy(probabilities):
    """`-sum_e p_e * log(p_e)`, with `0 * log(0)` taken as 0."""
    # Smaller ones add less than 1e-35, and XLA takes the log of a float below
    # the smallest normal one for that of 0.
    some = probabilities > 1e-37
    logs = ops.log(ops.where(some, probabilities, 1.0))
    return ops.negative(ops.sum(probabilities * logs, axis=-1))


def _normal_cdf(x):
    return 0.5 * (1.0 + ops.erf(x / 2.0**0.5))

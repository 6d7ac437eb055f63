"""What a router learns from: the experts a token met, or all of them."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_upcycle.routing import functional
from keras_upcycle.types import Tensor, TokenChoice

TOP_K, DENSE_MIXER = "top_k", "dense_mixer"
ROUTER_GRADIENTS = (TOP_K, DENSE_MIXER)


def with_probabilities(
    chosen: TokenChoice, logits: Tensor, mask: Tensor | None
) -> TokenChoice:
    """The choice with the probabilities of all experts, 0 for padding.

    Args:
        chosen: What was chosen.
        logits: float32 `(G, S, E)`, by which, noise included.
        mask: bool `(G, S)`, `True` at real tokens, or `None`.
    """
    scores = functional.probabilities(logits)
    if mask is not None:
        scores = ops.where(ops.expand_dims(mask, -1), scores, 0.0)
    return chosen._replace(probabilities=scores)


def of_unmet(
    scores: Tensor,
    met: Tensor,
    outputs: Tensor,
    weighted: Callable[[Tensor], Tensor],
    normalized: bool,
) -> Tensor:
    """0, with the gradient of the experts that a token does not meet.

    What an expert puts out, or would, is `f_i`. Where weights are
    probabilities, that of `p_i` is `<dL/dy, f_i>`. Where they are divided by
    `P`, the probability of all that a token meets, it is
    `<dL/dy, f_i - y> / P`: experts that it meets get theirs from the weights'
    renormalisation, and without `-y` the two halves would be about different
    points.

    Args:
        scores: float32 `(G, S, E)`, probabilities, 0 for padding.
        met: float32 `(G, S, E)`, 1 where the expert processes the token.
        outputs: `(G, S, D)`, what the layer puts out, `y`.
        weighted: From float32 `(G, S, E)` to the sum of `f_i` with these
            weights, float32 `(G, S, D)`; without gradients of its own.
        normalized: Whether the weights of those that a token meets sum to 1.

    Returns:
        float32 `(G, S, D)`.
    """
    rest = scores * (1.0 - met)
    if not normalized:
        added = weighted(rest)
        return added - ops.stop_gradient(added)
    total = ops.sum(scores * met, axis=-1, keepdims=True)
    some = ops.any(met > 0.0, axis=-1, keepdims=True)
    # As small as the renormalised weights' own divisor may be.
    total = ops.where(some, ops.maximum(total, functional.LEAST), 1.0)
    share = rest / ops.stop_gradient(total)
    centre = ops.stop_gradient(ops.cast(outputs, "float32"))
    added = weighted(share) - ops.sum(share, axis=-1, keepdims=True) * centre
    return added - ops.stop_gradient(added)


def of_all_experts(
    tokens: Tensor, experts: Any, training: Any
) -> Callable[[Tensor], Tensor]:
    """`weighted` of what every expert makes of each token, by running it.

    Args:
        tokens: Float `(G, S, D)`.
        experts: Of which each runs on every token, forward alone.
        training: Whether the model trains.
    """
    groups, length, dim = ops.shape(tokens)
    rows = ops.stop_gradient(ops.reshape(tokens, (1, groups * length, dim)))
    rows = ops.repeat(rows, experts.num_experts, axis=0)
    outputs = ops.stop_gradient(experts.apply_slots(rows, training))

    def weighted(weights):
        flat = ops.reshape(weights, (groups * length, experts.num_experts))
        found = ops.einsum("te,etd->td", flat, ops.cast(outputs, "float32"))
        return ops.reshape(found, (groups, length, dim))

    return weighted

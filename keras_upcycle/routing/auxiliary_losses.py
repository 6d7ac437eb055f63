"""Auxiliary losses of a Top-K router by name."""

from collections.abc import Callable

from keras_upcycle.routing import functional, losses
from keras_upcycle.types import Tensor

# Functions of the router, logits, logits with noise, the experts asked for and
# the mask. A router's weight of each is its attribute `<name>_loss`.
AUXILIARY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "load_balance": lambda router, logits, noisy, requested, mask: (
        losses.load_balance(
            functional.probabilities(noisy),
            requested,
            mask,
            router.share_of_step(requested),
        )
    ),
    "importance": lambda router, logits, noisy, requested, mask: (
        losses.importance(functional.probabilities(logits), mask)
    ),
    "load": lambda router, logits, noisy, requested, mask: losses.load(
        logits, noisy, router.stddev_of_logits(), router.top_k, mask
    ),
    "mutual_information": lambda router, logits, noisy, requested, mask: (
        losses.mutual_information(functional.probabilities(logits), mask)
    ),
}

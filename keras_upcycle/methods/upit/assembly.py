"""Step 4: checkpoints and routing vectors become a mixture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_upcycle import checks
from keras_upcycle.conversion.pairing import converted
from keras_upcycle.methods.donors import (
    AVERAGE,
    LAST,
    FromDonors,
    check_hold_others,
    write_others,
)
from keras_upcycle.methods.expert_weights import ExpertWeights
from keras_upcycle.methods.upit.routing_vectors import RoutingVectors

MODEL = "model"


class UpIT(FromDonors):
    """Experts from a pool of checkpoints, routers from trained vectors.

    Expert `i` of every block starts as checkpoint `i`, and column `i` of its
    router as the checkpoint's routing vector. Train the result with a Top-2
    router and its load-balancing loss, as the paper does.

    What is in no expert, which the paper takes from "the dense model", comes
    from the model that is upcycled: pass the tuned one for that of the last
    checkpoint, or the one before it was tuned.

    References: UpIT (arXiv 2410.01610), model upcycling.

    Args:
        experts: List of `ExpertWeights`, or of dense Keras models: as many as
            experts are asked of `upcycle_model`; `expand_experts` makes more of
            them.
        routing_vectors: A `RoutingVectors`, what `routing_vectors` gave, or its
            `kernels`, a mapping from a block's number to float arrays `(D, E)`.
            `None` (default) leaves the routers their own initializer.
        other_weights: String, whose weights stand outside the experts.
            `"model"` (default), see above; `"last"`: those of the last expert
            that holds them; `"average"`: their mean over the experts that hold
            them. Collect them with `ExpertCheckpoints(other_weights=True)`.
            Children of an expansion hold none.

    Raises:
        TypeError, ValueError: For a bad argument; when used, if `num_experts`
            is not the number of experts, or vectors do not fit.
        UpcycleError: When used, if an expert does not fit the model. Nothing
            was changed or built then.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> experts = [ExpertWeights.from_model(dense)] * 4
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, expert_init=UpIT(experts),
        ... )
        >>> moe.layers[0].num_experts
        4
    """

    def __init__(
        self,
        experts: Sequence[Any],
        routing_vectors: RoutingVectors | Mapping[int, Any] | None = None,
        *,
        other_weights: str = MODEL,
    ):
        super().__init__(experts, "expert")
        checks.check_choice(
            "other_weights", other_weights, (MODEL, LAST, AVERAGE)
        )
        holders = [
            expert
            for expert in self.donors
            if not isinstance(expert, ExpertWeights)
            or expert.others is not None
        ]
        if other_weights != MODEL and not holders:
            check_hold_others(self.donors, "expert", 'other_weights="model"')
        self.other_weights = other_weights
        self.holders = holders[-1:] if other_weights == LAST else holders
        self.kernels = None
        if routing_vectors is not None:
            kernels = getattr(routing_vectors, "kernels", routing_vectors)
            if not isinstance(kernels, Mapping):
                raise TypeError(
                    "`routing_vectors` must be what `routing_vectors` gave, "
                    "or a mapping from a block's number to its router's "
                    f"kernel (D, E). Received: {type(kernels).__name__}. Leave "
                    "them out for random ones."
                )
            self.kernels = {
                _block_number(index): _floats(index, kernel)
                for index, kernel in kernels.items()
            }
            for index, kernel in self.kernels.items():
                if not np.isfinite(kernel).all():
                    raise ValueError(
                        "`routing_vectors` must be finite. Received: NaN or "
                        f"infinity for block {index}. Train them again, with "
                        "a lower `learning_rate`."
                    )

    def order(self, num_experts):
        return range(num_experts)

    def check(self, block, router, num_experts):
        count = len(self.donors)
        if count < num_experts:
            raise ValueError(
                "There must be a checkpoint for each expert. Received: "
                f"{count} for num_experts={num_experts}. Collect more, with a "
                "lower `every` of `ExpertCheckpoints`, or make more of them "
                "with `expand_experts`."
            )
        if count > num_experts:
            raise ValueError(
                "There must be an expert for each checkpoint. Received: "
                f"{count} for num_experts={num_experts}. Choose some of them; "
                "the paper found later ones better: "
                f"`experts[-{num_experts}:]`."
            )
        if self.kernels is None:
            return
        expected = (block.hidden_dim, num_experts)
        kernel = self.kernels.get(block.index)
        if kernel is None or kernel.shape != expected:
            got = "none" if kernel is None else f"shape {kernel.shape}"
            raise ValueError(
                "There must be routing vectors of shape "
                f"{expected} for every block that is converted. Received: "
                f"{got} for block {block.index}, {block.path!r}. Make them "
                "with the same `layers` and `router`."
            )

    def finish(self, dense, moe):
        if self.other_weights != MODEL:
            write_others(dense, moe, self.holders)
        if self.kernels is not None:
            for site, layer in converted(dense, moe)[1]:
                layer.router.kernel.assign(self.kernels[site.index])


def _block_number(index):
    """A block's number, which `routing_vectors` may have as NumPy's."""
    if not checks.is_integer(index):
        raise TypeError(
            "`routing_vectors` must be a mapping from blocks' numbers. "
            f"Received: {index!r} of type {type(index).__name__}. "
            "`FeedForwardSite.index` is such a number."
        )
    return int(index)


def _floats(index, kernel):
    made = checks.array_of(kernel)
    if made.ndim != 2 or made.dtype.kind not in "fiu":
        raise ValueError(
            "`routing_vectors` must be float arrays (D, E). Received: "
            f"{type(kernel).__name__} of dtype {made.dtype} and shape "
            f"{made.shape} for block {index}. Pass what `routing_vectors` gave."
        )
    return made.astype("float32")

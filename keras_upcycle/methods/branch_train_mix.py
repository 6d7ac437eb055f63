"""Branch-Train-MiX: experts that were trained apart, mixed into one model.

Sukhbaatar et al. (arXiv 2403.07816) train copies of a model on data of their
own, make each one's feed-forward blocks an expert, average everything else,
and train the whole with a new router.
"""

from collections.abc import Iterable
from typing import Any

from keras_upcycle import checks
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    Required,
    add_recipe,
)
from keras_upcycle.methods.donors import (
    AVERAGE,
    BASE,
    UPCYCLED,
    FromDonors,
    check_hold_others,
    write_others,
)
from keras_upcycle.routing.top_k_router import TopKRouter

TOP_2 = {"top_k": 2, "capacity_factor": None, "load_balance_loss": 0.01}
SILENT = "whether the layers' losses are added up, as here, it does not say"


class BranchTrainMix(FromDonors):
    """Experts from models that were trained apart; the rest is their mean.

    Expert `e` of every block starts as donor `e * n // num_experts`, with `n`
    donors, so that each is repeated equally often. What is in no expert, the
    blocks that stay dense among it, is the mean over the donors. The router is
    new. Frozen layers and compile settings are those of the upcycled model.

    The paper converts every block (`layers="all"`), chooses two experts a
    token, and weights the load-balancing loss with 0.01. Its load-balancing
    loss takes an expert's mean weight where ours counts choices.

    References: Sukhbaatar et al., Branch-Train-MiX (arXiv 2403.07816), section
    2; repeated donors as in Drop-Upcycling's comparison (2502.19261).

    Args:
        donors: List of Keras models, dense ones of the class and architecture
            of the upcycled one, or of `ExpertWeights` of such.
        other_weights: String. `"average"` (default): the mean over the donors
            of every other float weight, computed in float32 or better.
            `ExpertWeights` must hold them then. `"base"`: those of the upcycled
            model.
        include_base: Boolean, whether the upcycled model is a donor too, before
            the others, as the paper's generalist is. Defaults to `False`.

    Raises:
        TypeError, ValueError: For a bad argument; when used, if `num_experts`
            is no multiple of the number of donors.
        UpcycleError: When used, if a donor is sparse, holds weights that are
            not finite, or is of another class or architecture. Nothing was
            changed or built then.

    Example:
        >>> def model():
        ...     return keras.Sequential([
        ...         keras.Input((8,)),
        ...         keras.layers.Dense(16, activation="relu"),
        ...         keras.layers.Dense(8),
        ...     ])
        >>> base, poems, code = model(), model(), model()
        >>> moe = keras_upcycle.upcycle_model(
        ...     base, 4, expert_init=BranchTrainMix([poems, code]),
        ... )
        >>> moe.layers[0].num_experts
        4
    """

    def __init__(
        self,
        donors: Iterable[Any],
        *,
        other_weights: str = AVERAGE,
        include_base: bool = False,
    ):
        super().__init__(donors, "donor")
        checks.check_choice("other_weights", other_weights, (AVERAGE, BASE))
        if other_weights == AVERAGE:
            check_hold_others(self.donors, "donor", 'other_weights="base"')
        if checks.check_flag("include_base", include_base):
            self.donors.insert(0, UPCYCLED)
        self.other_weights = other_weights

    def order(self, num_experts):
        count = len(self.donors)
        return [expert * count // num_experts for expert in range(num_experts)]

    def check(self, block, router, num_experts):
        count = len(self.donors)
        if num_experts % count:
            raise ValueError(
                "`num_experts` must be a multiple of the number of donors, so "
                "that each makes equally many experts. Received: num_experts="
                f"{num_experts} with {count} donors. Ask for "
                f"{-(-num_experts // count) * count}, or change the donors."
            )

    def finish(self, dense, moe):
        if self.other_weights == AVERAGE:
            write_others(dense, moe, self.donors)


RECIPE = Recipe(
    name="branch_train_mix",
    paper="Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816",
    changes="experts come from models that were tuned apart",
    costs="the models' own training",
    fails="needs the domains' models; models far apart have no useful mean",
    choices={
        ANY: (
            Choice(
                "expert_init",
                Required("BranchTrainMix([first_model, second_model, ...])"),
                "the paper, section 2: experts are the feed-forward blocks of "
                "models tuned apart, all other weights their mean",
            ),
            Choice(
                "router",
                (TopKRouter, dict(TOP_2)),
                "the paper: Top-2, softmax over the chosen, loss 0.01 in a "
                "form whose least value is 1 a layer, as ours (its shares are "
                f"mean weights where ours are counts); {SILENT}",
            ),
            Choice("layers", "all", "the paper: every block, the first too"),
            Note("learning rate", "1e-4", "the paper, for 80B tokens"),
        ),
    },
)
add_recipe(RECIPE)

"""Recipes of methods that need more than the dense model: other models of it.

`donors.py` and `upit/` have the methods.
"""

from keras_upcycle.conversion.recipe import ANY, Choice, Recipe, Required
from keras_upcycle.routing.routers import TopKRouter

_TOP_2 = {"top_k": 2, "capacity_factor": None, "load_balance_loss": 0.01}
_SILENT = "whether the layers' losses are added up, as here, it does not say"

BRANCH_TRAIN_MIX = Recipe(
    name="branch_train_mix",
    paper="Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816",
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
                (TopKRouter, dict(_TOP_2)),
                "the paper: Top-2, softmax over the chosen, loss 0.01 in a "
                "form whose least value is 1 a layer, as ours (its shares are "
                f"mean weights where ours are counts); {_SILENT}",
            ),
            Choice("layers", "all", "the paper: every block, the first too"),
            Choice("learning rate", "1e-4", "the paper, for 80B tokens"),
        ),
    },
)

UPIT = Recipe(
    name="upit",
    paper="Hui et al., Upcycling Instruction Tuning, arXiv 2410.01610",
    choices={
        ANY: (
            Choice(
                "expert_init",
                Required("UpIT(experts, routing_vectors)"),
                "the paper: checkpoints of instruction tuning are the experts, "
                "tuned vectors the router; `upit_upcycle` takes all the steps",
            ),
            Choice(
                "router",
                (TopKRouter, dict(_TOP_2)),
                "the paper: Top-2 with the load-balancing loss n * sum(f * P), "
                f"of least value 1 as ours; its weight is ours, and {_SILENT}",
            ),
            Choice(
                "layers",
                "all",
                "ours: the paper turns the feed-forward blocks into mixtures "
                "and names none that stays dense",
            ),
            Choice(
                "learning rate",
                "2e-5 for feed-forward experts",
                "the paper; half of four epochs before, half after",
            ),
        ),
    },
)

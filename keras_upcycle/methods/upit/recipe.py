"""The recipe `"upit"`."""

from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    Required,
    add_recipe,
)
from keras_upcycle.methods.branch_train_mix import SILENT, TOP_2
from keras_upcycle.routing.top_k_router import TopKRouter

RECIPE = Recipe(
    name="upit",
    paper="Hui et al., Upcycling Instruction Tuning, arXiv 2410.01610",
    changes=(
        "experts come from checkpoints of one tuning run, routers are "
        "trained first"
    ),
    costs="the tuning run; routers' first training",
    fails=(
        "its expansion buys experts, not quality: 53.3 without it, 52.2 with it"
    ),
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
                (TopKRouter, dict(TOP_2)),
                "the paper: Top-2 with the load-balancing loss n * sum(f * P), "
                f"of least value 1 as ours; its weight is ours, and {SILENT}",
            ),
            Choice(
                "layers",
                "all",
                "ours: the paper turns the feed-forward blocks into MoE layers "
                "and names none that stays dense",
            ),
            Note(
                "learning rate",
                "2e-5 for feed-forward experts",
                "the paper; half of four epochs before, half after",
            ),
        ),
    },
)
add_recipe(RECIPE)

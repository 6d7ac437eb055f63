"""Sparse Upcycling as its paper has it: the recipe `"sparse_upcycling"`."""

from keras_upcycle.conversion.recipe import (
    LANGUAGE,
    VISION,
    Choice,
    Note,
    Recipe,
    SharedOut,
    add_recipe,
)
from keras_upcycle.routing.expert_choice_router import ExpertChoiceRouter
from keras_upcycle.routing.top_k_router import TopKRouter

# Where the paper's own text could not be consulted, the source says whose
# word it is.
_SUMMARIES = "summaries of the paper; its own text was not consulted on this"
_FLAXFORMER = "the released flaxformer code"

_SHARED = (
    Note("num_experts", 32, "the paper, main results; you pass your own"),
    Choice("expert_init", "copy", "the paper, figure 1 and appendix B.5"),
)
_ROUTER_KERNEL = Note(
    "router kernel", "N(0, 0.02^2)", f"`router_init` of {_FLAXFORMER}"
)

RECIPE = Recipe(
    name="sparse_upcycling",
    paper="Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055",
    changes="experts are copies; of vision and encoders they choose tokens",
    costs="nothing",
    fails=(
        "gains fade as the extra budget nears the dense model's own; the "
        "very first block is better left dense (its section 4.2, appendix "
        "B.4)"
    ),
    choices={
        LANGUAGE: (
            *_SHARED,
            Choice(
                "layers",
                "every_other",
                "the paper, appendix B (half, interspersed); from the second: "
                f"the MIXED layout of {_FLAXFORMER}",
            ),
            Choice(
                "router",
                (
                    ExpertChoiceRouter,
                    {"capacity_factor": 2.0, "normalize": False},
                ),
                "the paper, appendices B.1 (Expert Choice), B.2 (C=2) and B.7 "
                "(no renormalisation)",
            ),
            Choice(
                "causal_router",
                (
                    TopKRouter,
                    {
                        "top_k": 2,
                        "normalize": False,
                        "load_balance_loss": SharedOut(0.01, times_top_k=True),
                    },
                ),
                f"K=2: {_SUMMARIES}; no renormalisation: appendix B.7; loss: "
                f"AUX_LOSS_FACTOR 0.01 of {_FLAXFORMER}, whose loss is not "
                "divided by K and of which t5x takes the mean over all L "
                "mixtures (an Expert Choice one adds 0): 0.01 K / L of ours, "
                "which are added up",
            ),
            Note(
                "Top-K capacity",
                "1.25 in training, none at inference",
                "ours: dropless inference keeps a decoder causal",
            ),
            _ROUTER_KERNEL,
            Note(
                "optimizer state",
                "new, the step kept: pass "
                '`upcycle_optimizer(..., slots="new")` to `compile`',
                "the paper, appendix B.6: resuming gained nothing in language",
            ),
        ),
        VISION: (
            *_SHARED,
            Choice(
                "layers",
                "last_half",
                "the paper, appendix B (6 blocks, the last of B/16's 12)",
            ),
            Choice(
                "router",
                (
                    ExpertChoiceRouter,
                    {"capacity_factor": 2.0, "normalize": True},
                ),
                f"C=2: {_SUMMARIES}; renormalised: the paper, appendix B.7",
            ),
            _ROUTER_KERNEL,
            Note(
                "optimizer state",
                "carried over as it is: pass `upcycle_optimizer(..., "
                "rescale_moments=False)` to `compile`",
                "the paper, appendix B.6",
            ),
        ),
    },
)
add_recipe(RECIPE)

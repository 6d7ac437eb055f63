"""Recipes: what a paper chose, and where it says so.

A recipe fills in the arguments of `upcycle_model` that were left out. Each of
its choices carries its source, and printing a recipe shows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras_upcycle import routers

LANGUAGE, VISION = "language", "vision"


@dataclass(frozen=True)
class Choice:
    """One setting of a recipe.

    Attributes:
        setting: Which. `"layers"`, `"router"`, `"causal_router"` and
            `"expert_init"` are acted on; others inform.
        value: What was chosen; a router as `(name, settings)`.
        source: Where it comes from, or that it is ours and why.
    """

    setting: str
    value: Any
    source: str

    @property
    def text(self) -> str:
        """The value as a person would write it."""
        if not isinstance(self.value, tuple):
            return str(self.value)
        name, settings = self.value
        given = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        return f"{routers.ROUTERS[name].__name__}({given})"


@dataclass(frozen=True)
class Recipe:
    """What a paper chose, for each kind of model. Print it.

    Attributes:
        name: As `upcycle_model(recipe=...)` takes it.
        paper: Its reference.
        choices: From `"language"` and `"vision"` to `Choice`s.

    Example:
        >>> recipe = get_recipe("sparse_upcycling")
        >>> recipe.value("language", "layers")
        'every_other'
    """

    name: str
    paper: str
    choices: Mapping[str, tuple[Choice, ...]]

    def value(self, modality: str, setting: str) -> Any:
        """The choice for a setting; `None` where the recipe makes none."""
        for choice in self.choices[modality]:
            if choice.setting == setting:
                return choice.value
        return None

    def router(self, modality: str, causal: bool) -> routers.Router:
        """A new router with the recipe's settings."""
        name, settings = self.value(
            modality, "causal_router" if causal else "router"
        )
        return routers.ROUTERS[name](**settings)

    def __str__(self) -> str:
        lines = [f"Recipe {self.name!r}: {self.paper}"]
        for modality, choices in self.choices.items():
            lines += ["", f"{modality}:"]
            for choice in choices:
                lines.append(f"  {choice.setting} = {choice.text}")
                lines.append(f"      {choice.source}")
        return "\n".join(lines)


# Where the paper's own text could not be consulted, the source says whose
# word it is.
_SUMMARIES = "summaries of the paper; its own text was not consulted on this"
_FLAXFORMER = "the released flaxformer code"

_SHARED = (
    Choice("num_experts", 32, "the paper, main results; you pass your own"),
    Choice("expert_init", "copy", "the paper, figure 1 and appendix B.5"),
)
_ROUTER_KERNEL = Choice(
    "router kernel", "N(0, 0.02^2)", f"`router_init` of {_FLAXFORMER}"
)

SPARSE_UPCYCLING = Recipe(
    name="sparse_upcycling",
    paper="Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055",
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
                ("expert_choice", {"capacity_factor": 2.0, "normalize": False}),
                "the paper, appendices B.1 (Expert Choice), B.2 (C=2) and B.7 "
                "(no renormalisation)",
            ),
            Choice(
                "causal_router",
                (
                    "top_k",
                    {
                        "top_k": 2,
                        "normalize": False,
                        "load_balance_loss": 0.01,
                    },
                ),
                f"K=2: {_SUMMARIES}; no renormalisation: appendix B.7; loss: "
                f"AUX_LOSS_FACTOR of {_FLAXFORMER}",
            ),
            Choice(
                "Top-K capacity",
                "1.25 in training, none at inference",
                "ours: dropless inference keeps a decoder causal",
            ),
            _ROUTER_KERNEL,
            Choice(
                "optimizer state",
                "new",
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
                ("expert_choice", {"capacity_factor": 2.0, "normalize": True}),
                f"C=2: {_SUMMARIES}; renormalised: the paper, appendix B.7",
            ),
            _ROUTER_KERNEL,
            Choice(
                "optimizer state",
                "carried over: pass `upcycle_optimizer(...)` to `compile`",
                "the paper, appendix B.6",
            ),
        ),
    },
)

RECIPES = {SPARSE_UPCYCLING.name: SPARSE_UPCYCLING}


def get_recipe(identifier: Any) -> Recipe:
    """The recipe with that name, or the recipe itself. Print it.

    Args:
        identifier: `"sparse_upcycling"`, or a `Recipe`.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor a `Recipe`.

    Example:
        >>> print(get_recipe("sparse_upcycling"))
        Recipe 'sparse_upcycling': Komatsuzaki et al., ...
    """
    if isinstance(identifier, Recipe):
        return identifier
    if not isinstance(identifier, str):
        raise TypeError(
            "`recipe` must be a name or a `Recipe`. Received: "
            f"recipe={identifier!r} of type {type(identifier).__name__}."
        )
    if identifier not in RECIPES:
        raise ValueError(
            f"`recipe` must be one of {sorted(RECIPES)} or a `Recipe`. "
            f"Received: recipe={identifier!r}."
        )
    return RECIPES[identifier]

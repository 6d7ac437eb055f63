"""What a recipe is: the choices of a paper, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras_upcycle.named import Named

# Kinds of models, and what holds for all that have no choices of their own.
LANGUAGE, VISION, ANY = "language", "vision", "any"


@dataclass(frozen=True)
class Required:
    """A choice that nobody but the user can make.

    Attributes:
        example: What it may look like, in code.
        what: What is needed, in a word.
    """

    example: str
    what: str = "models"

    def __str__(self) -> str:
        return f"yours, such as {self.example}"


@dataclass(frozen=True)
class SharedOut:
    """A loss weight that all MoE layers of a model have together.

    Each MoE layer here adds its own load-balancing loss, whose least value is
    1, and a model's are summed. A code that takes their mean, or one loss over
    the logits of all layers, gives every layer `1 / L` of its weight; one that
    does not divide by `K` has a least value of `K`.

    Attributes:
        weight: As the paper or its code has it.
        times_top_k: Whether its loss is `K` times ours.
    """

    weight: float
    times_top_k: bool = False

    def each(self, num_layers: int, top_k: int) -> float:
        """The weight of one MoE layer.

        Args:
            num_layers: `L`, MoE layers in the model.
            top_k: `K`, experts a token chooses.

        Example:
            >>> SharedOut(0.02, times_top_k=True).each(num_layers=4, top_k=2)
            0.01
        """
        return self.weight * (top_k if self.times_top_k else 1) / num_layers

    def __repr__(self) -> str:
        return f"{self.weight}{' * K' if self.times_top_k else ''} / L"


# What `upcycle_model` takes from a recipe.
SETTINGS = ("layers", "router", "causal_router", "expert_init", "attention")


@dataclass(frozen=True)
class Choice:
    """One setting of a recipe, which `upcycle_model` acts on.

    Attributes:
        setting: One of `SETTINGS`.
        value: What was chosen; a router as `(class, settings)`, in which a
            setting may be `SharedOut`.
        source: Where it comes from, or that it is ours and why.
    """

    setting: str
    value: Any
    source: str

    def __post_init__(self):
        if not isinstance(self, Note) and self.setting not in SETTINGS:
            raise ValueError(
                f"A `Choice` must be one of {list(SETTINGS)}, which are acted "
                f"on. Received: {self.setting!r}. What informs alone is a "
                "`Note`."
            )

    @property
    def text(self) -> str:
        """The value as a person would write it."""
        if not isinstance(self.value, tuple):
            return str(self.value)
        kind, settings = self.value
        given = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        return f"{kind.__name__}({given})"


class Note(Choice):
    """What a paper chose and only its reader can act on; `setting` in words."""


@dataclass(frozen=True)
class Recipe:
    """What a paper chose, for each kind of model. Print it.

    Attributes:
        name: As `upcycle_model(recipe=...)` takes it.
        paper: Its reference.
        choices: From `"language"`, `"vision"`, or `"any"` for all else, to
            `Choice`s and `Note`s.
        changes: What it changes, in a phrase.
        costs: What it costs beside copies with Top-K, in a phrase.
        fails: Where its paper, or another, found it to fail.

    Example:
        >>> recipe = get_recipe("sparse_upcycling")
        >>> recipe.value("language", "layers")
        'every_other'
    """

    name: str
    paper: str
    choices: Mapping[str, tuple[Choice, ...]]
    changes: str = ""
    costs: str = ""
    fails: str = ""

    def __post_init__(self):
        known = isinstance(self.choices, Mapping) and all(
            isinstance(choice, Choice)
            for choices in self.choices.values()
            for choice in choices
        )
        if not known:
            raise TypeError(
                "`choices` must be a mapping from a kind of model to "
                f"`Choice`s. Received: choices={self.choices!r}. Such as "
                f"{{{ANY!r}: (Choice(setting, value, source),)}}."
            )

    def covers(self, modality: str | None) -> bool:
        """Whether the recipe has choices for this kind of model."""
        return modality in self.choices or ANY in self.choices

    def value(self, modality: str | None, setting: str) -> Any:
        """The choice for a setting; `None` where the recipe makes none."""
        for choice in self.choices.get(modality or ANY) or self.choices[ANY]:
            if choice.setting == setting:
                return choice.value
        return None

    def router(
        self,
        modality: str | None,
        causal: bool,
        *,
        num_layers: int,
        num_experts: int,
    ) -> Any:
        """A new `Router` with the recipe's settings; `None` without any.

        A recipe without a `"causal_router"` has the same for all stacks.

        Args:
            modality: String or `None`, the kind of the model, a key of
                `choices`. `None` is `"any"`.
            causal: Boolean, whether it is for a causal stack.
            num_layers: Integer, how many blocks of the model become MoE layers,
                which share out some weights of losses.
            num_experts: Integer, the experts of the MoE layer: no token chooses
                more.

        Example:
            >>> recipe = get_recipe("drop_upcycling")
            >>> router = recipe.router(
            ...     "vision", causal=False, num_layers=4, num_experts=8,
            ... )
            >>> router.top_k, router.load_balance_loss
            (2, 0.01)
        """
        chosen = self.value(modality, "router")
        if causal:
            chosen = self.value(modality, "causal_router") or chosen
        if chosen is None:
            return None
        kind, settings = chosen
        settings = dict(settings)
        if settings.get("top_k") is not None:
            settings["top_k"] = min(settings["top_k"], num_experts)
        shared = {
            name: settings.pop(name)
            for name, value in tuple(settings.items())
            if isinstance(value, SharedOut)
        }
        if shared:
            # `K` of the router itself, which may have it by default.
            top_k = getattr(kind(**settings), "top_k", 1)
            for name, value in shared.items():
                settings[name] = value.each(num_layers, top_k)
        return kind(**settings)

    def __str__(self) -> str:
        lines = [f"Recipe {self.name!r}: {self.paper}"]
        for title, text in (
            ("changes", self.changes),
            ("costs", self.costs),
            ("where it fails", self.fails),
        ):
            if text:
                lines.append(f"  {title}: {text}")
        for modality, choices in self.choices.items():
            lines += ["", f"{modality}:"]
            for choice in choices:
                lines.append(f"  {choice.setting} = {choice.text}")
                lines.append(f"      {choice.source}")
        return "\n".join(lines)


# By name, in the order in which they were added.
RECIPES: Named[Recipe] = Named("recipe", " or a `Recipe`")


def add_recipe(recipe: Recipe) -> None:
    """Makes a recipe known to `upcycle_model(recipe=...)` by its name."""
    RECIPES.add(recipe.name, recipe)


def get_recipe(identifier: Any) -> Recipe:
    """The recipe with that name, or the recipe itself. Print it.

    Args:
        identifier: String, one of `RECIPES`, such as `"sparse_upcycling"`, or a
            `Recipe`.

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
        raise RECIPES.refusal(identifier)
    return RECIPES.find(identifier)

"""What a recipe is: the choices of a paper, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Kinds of models, and what holds for all that have no choices of their own.
LANGUAGE, VISION, ANY = "language", "vision", "any"


@dataclass(frozen=True)
class Required:
    """A choice that nobody but the user can make.

    Attributes:
        example: What it may look like, in code.
    """

    example: str

    def __str__(self) -> str:
        return f"yours, such as {self.example}"


@dataclass(frozen=True)
class Choice:
    """One setting of a recipe.

    Attributes:
        setting: Which. `"layers"`, `"router"`, `"causal_router"` and
            `"expert_init"` are acted on; others inform.
        value: What was chosen; a router as `(class, settings)`.
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
        kind, settings = self.value
        given = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        return f"{kind.__name__}({given})"


@dataclass(frozen=True)
class Recipe:
    """What a paper chose, for each kind of model. Print it.

    Attributes:
        name: As `upcycle_model(recipe=...)` takes it.
        paper: Its reference.
        choices: From `"language"`, `"vision"`, or `"any"` for all else, to
            `Choice`s.

    Example:
        >>> recipe = get_recipe("sparse_upcycling")
        >>> recipe.value("language", "layers")
        'every_other'
    """

    name: str
    paper: str
    choices: Mapping[str, tuple[Choice, ...]]

    def covers(self, modality: str | None) -> bool:
        """Whether the recipe has choices for this kind of model."""
        return modality in self.choices or ANY in self.choices

    def value(self, modality: str | None, setting: str) -> Any:
        """The choice for a setting; `None` where the recipe makes none."""
        for choice in self.choices.get(modality) or self.choices[ANY]:
            if choice.setting == setting:
                return choice.value
        return None

    def router(self, modality: str, causal: bool) -> Any:
        """A new `Router` with the recipe's settings; `None` without any.

        A recipe without a `"causal_router"` has the same for all stacks.
        """
        chosen = self.value(modality, "router")
        if causal:
            chosen = self.value(modality, "causal_router") or chosen
        if chosen is None:
            return None
        kind, settings = chosen
        return kind(**settings)

    def __str__(self) -> str:
        lines = [f"Recipe {self.name!r}: {self.paper}"]
        for modality, choices in self.choices.items():
            lines += ["", f"{modality}:"]
            for choice in choices:
                lines.append(f"  {choice.setting} = {choice.text}")
                lines.append(f"      {choice.source}")
        return "\n".join(lines)

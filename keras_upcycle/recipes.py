"""The table of recipes: a new one is a file and a row here.

A recipe fills in the arguments of `upcycle_model` that were left out. Each of
its choices carries its source, and printing a recipe shows them.
"""

from typing import Any

from keras_upcycle.conversion.recipe import Recipe
from keras_upcycle.methods import (
    branch_train_mix,
    default_moe,
    drop_upcycling,
    ds_moe,
    qwen2_moe,
    shared_experts,
    sparse_upcycling,
    virtual_groups,
)

_ALL = (
    sparse_upcycling.RECIPE,
    drop_upcycling.RECIPE,
    default_moe.RECIPE,
    ds_moe.RECIPE,
    virtual_groups.RECIPE,
    qwen2_moe.RECIPE,
    shared_experts.RECIPE,
    branch_train_mix.BRANCH_TRAIN_MIX,
    branch_train_mix.UPIT,
)
RECIPES = {made.name: made for made in _ALL}


def get_recipe(identifier: Any) -> Recipe:
    """The recipe with that name, or the recipe itself. Print it.

    Args:
        identifier: One of `RECIPES`, such as `"sparse_upcycling"`, or a
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

"""A router says its own name, and is then known by it everywhere."""

import keras
import pytest

import keras_upcycle as ku
from keras_upcycle.conversion.recipe import RECIPES, Choice, Recipe, add_recipe
from keras_upcycle.layers import expert_init
from keras_upcycle.routing import registry

pytestmark = pytest.mark.one_backend


def dense():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(8),
        ]
    )


@pytest.fixture
def tables(monkeypatch):
    """What a test adds is gone after it."""
    for table in (registry.ROUTERS, expert_init.INITS, RECIPES):
        monkeypatch.setattr(table, "things", dict(table))


def test_a_method_is_known_by_the_names_it_says(tables):
    @registry.named("three")
    class Three(ku.TopKRouter):
        def __init__(self, top_k=3, **kwargs):
            super().__init__(top_k, **kwargs)

    @expert_init.named("halved")
    class Halved(ku.ExpertInit):
        def values(self, block, router, num_experts, seed):
            return {
                name: lambda shape, dtype=None, v=v: keras.ops.reshape(
                    keras.ops.stack([v.value / 2] * num_experts), shape
                )
                for name, v in block.kernels.items()
            }

    add_recipe(
        Recipe(
            name="three_halves",
            paper="none",
            choices={
                "any": (
                    Choice("router", (Three, {"normalize": True}), "ours"),
                    Choice("expert_init", "halved", "ours"),
                )
            },
        )
    )
    moe = ku.upcycle_model(dense(), 4, router="three", expert_init="halved")
    (layer,) = [x for x in moe.layers if isinstance(x, ku.MoEFeedForward)]
    assert isinstance(layer.router, Three)
    by_recipe = ku.upcycle_model(dense(), 4, recipe="three_halves")
    (layer,) = [x for x in by_recipe.layers if isinstance(x, ku.MoEFeedForward)]
    assert layer.router.top_k == 3
    with pytest.raises(ValueError, match=r"'halved', 'low_rank', 'random'"):
        expert_init.get_init("quartered")


def test_a_name_lowers_what_nobody_asked_for(tables):
    @registry.named("three")
    class Three(ku.TopKRouter):
        def __init__(self, top_k=3, **kwargs):
            super().__init__(top_k, **kwargs)

    assert ku.MoEFeedForward(2, 8, router="three").router.top_k == 2
    with pytest.raises(ValueError, match="top_k=3, num_experts=2"):
        ku.MoEFeedForward(2, 8, router=Three())

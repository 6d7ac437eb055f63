"""Recipes: what each sets, where it says it is from, what overrides it."""

import functools

import keras_hub
import models
import pytest

import keras_upcycle as ku
from keras_upcycle import keras_internals
from keras_upcycle.conversion import plan
from keras_upcycle.conversion.recipe import RECIPES, Choice, Note

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.filterwarnings("ignore:top_k=1 with"),
]

EXPERTS = 4


@functools.cache
def shapes(kind):
    """Models without values: decisions are made on shapes."""
    with keras_internals.without_values():
        if kind == "t5":
            return keras_hub.models.T5Backbone(
                models.VOCABULARY, 4, 2, models.WIDTH, models.HIDDEN
            )
        return keras_hub.models.ViTBackbone(
            models.IMAGE, 4, 4, 2, models.WIDTH, models.HIDDEN
        )


def decided(kind, **arguments):
    arguments.setdefault("recipe", "sparse_upcycling")
    return plan.make(shapes(kind), EXPERTS, **arguments)


def test_for_language_every_other_block_and_no_renormalisation():
    made = decided("t5")
    assert {(s.stack, s.index % 4) for s in made.chosen} == {
        (stack, number) for stack in ("encoder", "decoder") for number in (1, 3)
    }
    for site in made.chosen:
        router = made.routers[site.index]
        assert not router.normalize
        if site.causal:
            assert isinstance(router, ku.TopKRouter)
            assert router.top_k == 2
            # 0.01 K of a mean over all four mixtures.
            assert router.load_balance_loss == pytest.approx(0.005)
        else:
            assert isinstance(router, ku.ExpertChoiceRouter)
            assert router.capacity_factor == 2.0


def test_for_vision_the_last_half_renormalised():
    made = decided("vit")
    assert [site.index for site in made.chosen] == [2, 3]
    for router in made.routers.values():
        assert isinstance(router, ku.ExpertChoiceRouter)
        assert (router.capacity_factor, router.normalize) == (2.0, True)


ALL, FIRST_DENSE = [0, 1, 2, 3], [1, 2, 3]


@pytest.mark.parametrize("kind", ["vit", "t5"])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("ds_moe", ALL),
        ("drop_upcycling", ALL),
        ("virtual_group", ALL),
        ("qwen2_moe", ALL),
        ("branch_train_mix", ALL),
        ("upit", ALL),
        ("carving", ALL),
        ("shared_experts", ALL),
        ("default_moe", FIRST_DENSE),
    ],
)
def test_a_recipe_converts_what_its_paper_did(name, numbers, kind):
    given = {}
    if name in ("branch_train_mix", "upit"):
        given["init"] = "copy"
    if name == "carving":
        given["init"] = ku.Carving(models.tokens(2, 3))  # not looked at yet
    made = decided(kind, recipe=name, **given)
    stacks = ["encoder", "decoder"] if kind == "t5" else ["encoder"]
    assert [(s.stack, s.index % 4) for s in made.chosen] == [
        (stack, number) for stack in stacks for number in numbers
    ]
    # Its paper converts the first block, so nobody is warned of that.
    assert made.first_blocks == ()


def test_every_recipe_says_where_its_layers_are_from():
    for recipe in RECIPES.values():
        for choices in recipe.choices.values():
            (layers,) = [c for c in choices if c.setting == "layers"]
            assert layers.source.startswith(("the ", "ours"))


def test_layers_of_ones_own_are_warned_of_beside_a_recipe():
    made = decided("t5", recipe="ds_moe", layers={"encoder": "all"})
    assert len(made.chosen) == 8
    (path,) = made.first_blocks
    assert "encoder" in path
    assert (
        decided("t5", recipe="ds_moe", layers="all_but_first").first_blocks
        == ()
    )


def test_a_recipe_that_leaves_nothing_to_convert_says_so():
    dense = models.vit_backbone(1)
    with pytest.raises(
        ku.UpcycleError, match=r"recipe='default_moe'.*layers=\[0\]"
    ):
        ku.upcycle_model(dense, EXPERTS, recipe="default_moe")


def test_what_is_said_overrides_a_recipe():
    made = decided(
        "t5",
        router={"decoder": ku.TopKRouter(top_k=1)},
        layers={"encoder": [2]},
    )
    assert {(s.stack, s.index % 4) for s in made.chosen} == {
        ("encoder", 2),
        ("decoder", 1),
        ("decoder", 3),
    }
    encoder, *decoder = (made.routers[site.index] for site in made.chosen)
    assert not encoder.normalize  # the recipe's
    assert [(r.top_k, r.normalize) for r in decoder] == [(1, True)] * 2


def test_without_a_recipe_the_defaults_preserve_the_function():
    made = decided("t5", recipe=None)
    assert all(router.normalize for router in made.routers.values())


def test_a_recipe_reaches_the_model_and_its_report():
    dense = models.t5_backbone()
    moe = ku.upcycle_model(dense, EXPERTS, recipe="sparse_upcycling", seed=0)
    report = ku.verify_upcycle(dense, moe, models.t5_inputs())
    decoder = report.layers[-1]
    assert 0.5 <= decoder.mean_combine_weight < 0.99
    assert "combine weights sum to" in str(report)


def test_one_expert_is_enough_for_the_recipes_decoder():
    made = plan.make(shapes("t5"), 1, recipe="sparse_upcycling")
    assert {
        r.top_k for r in made.routers.values() if isinstance(r, ku.TopKRouter)
    } == {1}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_every_choice_is_printed_with_its_source(recipe):
    text = str(recipe)
    assert recipe.name in text
    assert recipe.paper in text
    for choices in recipe.choices.values():
        assert len({choice.setting for choice in choices}) == len(choices)
        for choice in choices:
            assert choice.source
            assert f"  {choice.setting} = {choice.text}\n" in text
            assert choice.source in text


def test_a_router_is_printed_as_it_is_written():
    text = str(ku.get_recipe("sparse_upcycling"))
    assert "ExpertChoiceRouter(capacity_factor=2.0, normalize=False)" in text


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("best", ValueError, r"'sparse_upcycling'.*recipe='best'"),
        (3, TypeError, "recipe=3 of type int"),
    ],
)
def test_no_such_recipe(recipe, error, message):
    for function in (ku.upcycle_model, ku.estimate_upcycle):
        with pytest.raises(error, match=message):
            function(shapes("vit"), EXPERTS, recipe=recipe)
    with pytest.raises(error, match=message):
        ku.get_recipe(recipe)


def test_a_model_of_neither_kind_has_no_recipe():
    dense = models.dense_pairs()
    with pytest.raises(
        ValueError, match=r"neither.*Pass `router` and `layers`"
    ):
        ku.upcycle_model(dense, EXPERTS, recipe="sparse_upcycling")


@pytest.mark.parametrize("name", ["branch_train_mix", "upit"])
def test_a_recipe_that_needs_models_says_which(name):
    dense = models.dense_pairs()
    before = models.weights(dense)
    with pytest.raises(ValueError, match=r"only you have.*expert_init="):
        ku.upcycle_model(dense, EXPERTS, recipe=name)
    models.assert_same_weights(dense, before)
    given = ku.upcycle_model(dense, EXPERTS, recipe=name, expert_init="copy")
    (router, *_) = [m.router for m in models.mixtures(given)]
    assert (router.top_k, router.capacity_factor) == (2, None)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("default_moe", True),
        ("ds_moe", True),
        ("virtual_group", False),
        ("shared_experts", True),
        ("drop_upcycling", False),
        ("qwen2_moe", False),
    ],
)
def test_every_recipe_converts_any_model_and_says_what_it_kept(name, exact):
    dense = models.vit_backbone()
    moe = ku.upcycle_model(dense, 8, recipe=name, seed=0)
    report = ku.verify_upcycle(dense, moe, models.images())
    assert (report.relative_difference < 1e-5) == exact
    assert len(report.layers) == (1 if name == "default_moe" else 2)
    drawn_anew = name in ("drop_upcycling", "qwen2_moe")
    for layer in report.layers:
        assert layer.intact_neurons == (0.5 if drawn_anew else 1.0)
        assert -1.0 <= layer.expert_cosine <= 1.0 + 1e-6
        assert 0.0 < layer.active_share <= 1.0


def test_a_misspelt_choice_is_refused():
    with pytest.raises(ValueError, match=r"'routers'.*is a `Note`"):
        Choice("routers", "top_k", "a paper")
    assert Note("routers", "top_k", "a paper").text == "top_k"

"""A recipe's loss weights, in the units of the code that they come from.

Each reference adds up a whole model's load-balancing loss as one code base
does, in NumPy; ours is what the recipe's routers add in training.
"""

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.conversion.recipe import ANY, Choice, Recipe, SharedOut

TOKENS, EXPERTS = 24, 8


def softmax(logits):
    values = np.exp(logits - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def chosen(logits, top_k):
    """`(T, E)`, 1 where a token chose an expert."""
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    made = np.zeros(logits.shape)
    np.put_along_axis(made, best, 1.0, axis=-1)
    return made


def hugging_face(layers, top_k):
    """`load_balancing_loss_func`: all layers' logits at once, no `/ K`."""
    logits = np.concatenate(layers)
    mask = chosen(logits, top_k)
    tokens_per_expert = mask.mean(0)  # of all K choices: adds up to K
    probability = softmax(logits).mean(0)
    return logits.shape[1] * np.sum(tokens_per_expert * probability)


def megablocks(layers, top_k):
    """`batched_load_balancing_loss`: scale = E / (L * tokens * K)."""
    total = sum(
        np.dot(chosen(x, top_k).sum(0), softmax(x).mean(0)) for x in layers
    )
    return total * EXPERTS / (len(layers) * len(layers[0]) * top_k)


def megatron(layers, top_k):
    """`switch_load_balancing_loss_func`, whose gradient each layer adds."""
    return sum(
        np.sum(softmax(x).sum(0) * chosen(x, top_k).sum(0))
        * (EXPERTS / (top_k * len(x) ** 2))
        for x in layers
    )


def flaxformer(layers, top_k):
    """`_load_balancing_loss`, and t5x's mean over all mixtures."""
    found = [
        np.mean(chosen(x, top_k).mean(0) * softmax(x).mean(0)) * EXPERTS**2
        for x in layers
    ]
    return np.mean(found)


def deepseek(layers, top_k):
    """DeepSeekMoE, equations 12 to 14."""
    return sum(
        np.sum(
            EXPERTS
            / (top_k * len(x))
            * chosen(x, top_k).sum(0)
            * softmax(x).mean(0)
        )
        for x in layers
    )


def ours(name, layers, modality="language", causal=False):
    """What the recipe's routers add, one for each layer's logits."""
    total, top_k = 0.0, None
    for logits in layers:
        router = ku.get_recipe(name).router(
            modality,
            causal,
            num_layers=len(layers),
            num_experts=EXPERTS,
        )
        router.num_experts = EXPERTS
        router.build((None, None, EXPERTS))
        router.kernel.assign(np.eye(EXPERTS))
        router(ops.convert_to_tensor(logits[None]), training=True)
        total += float(sum(router.losses))
        top_k = router.top_k
    return total, top_k


def random_layers(count):
    rng = np.random.default_rng(count)
    shape = (count, TOKENS, EXPERTS)
    return list(rng.normal(size=shape).astype("float32"))


@pytest.mark.thinned("name")
@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize(
    ("name", "theirs", "weight", "causal"),
    [
        ("default_moe", megablocks, 0.01, False),
        ("virtual_group", megatron, 0.01, False),
        ("shared_experts", deepseek, 0.01, False),
        ("sparse_upcycling", flaxformer, 0.01, True),
    ],
)
def test_a_models_loss_is_that_of_the_code(name, theirs, weight, causal, count):
    layers = random_layers(count)
    found, top_k = ours(name, layers, causal=causal)
    assert found == pytest.approx(weight * theirs(layers, top_k), rel=1e-5)


@pytest.mark.thinned
@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize(
    ("name", "weight", "top_k"),
    [("drop_upcycling", 0.02, 2), ("qwen2_moe", 0.001, 8)],
)
def test_hugging_faces_loss_where_layers_are_alike(name, weight, top_k, count):
    """And so its gradient there: ours is a function of each layer alone."""
    layers = random_layers(1) * count
    found, used = ours(name, layers)
    assert used == top_k
    assert found == pytest.approx(weight * hugging_face(layers, top_k), 1e-5)


@pytest.mark.thinned
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("name", "weight"),
    [("drop_upcycling", 0.02), ("qwen2_moe", 0.001)],
)
def test_hugging_faces_loss_at_balance(name, weight, count):
    """Layers that differ, each balanced: `K` for theirs, 1 a layer for ours."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(count):
        first = rng.permutation(EXPERTS).astype("float32")
        rolled = [np.roll(first, step) for step in range(EXPERTS)]
        layers.append(np.stack(rolled * 3))
    found, top_k = ours(name, layers)
    assert hugging_face(layers, top_k) == pytest.approx(top_k)
    assert found == pytest.approx(weight * top_k, rel=1e-5)
    plain = ku.TopKRouter(top_k, load_balance_loss=1.0)
    plain.num_experts = EXPERTS
    plain.build((None, None, EXPERTS))
    plain.kernel.assign(np.eye(EXPERTS))
    plain(ops.convert_to_tensor(layers[0][None]), training=True)
    assert float(sum(plain.losses)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["branch_train_mix", "upit"])
def test_whose_form_has_our_least_value(name):
    even = [np.zeros((TOKENS, EXPERTS), "float32")] * 3
    found, _ = ours(name, even)
    assert found == pytest.approx(3 * 0.01, rel=1e-5)


@pytest.mark.one_backend
def test_layers_are_counted_in_the_model():
    """0.02 of Hugging Face's loss, whose value is K with even logits."""
    dense = models.vit_backbone(3)
    for layers, count in ((None, 3), ([1, 2], 2)):
        moe = ku.upcycle_model(
            dense, EXPERTS, recipe="drop_upcycling", layers=layers, seed=0
        )
        mixtures = models.mixtures(moe)
        assert len(mixtures) == count
        for mixture in mixtures:
            weight = mixture.router.load_balance_loss
            assert weight == pytest.approx(0.04 / count)
            mixture.router.kernel.assign(0.0 * mixture.router.kernel)
        moe(models.images(), training=True)
        assert float(sum(moe.losses)) == pytest.approx(0.04, rel=1e-5)


@pytest.mark.one_backend
def test_fewer_experts_than_top_k():
    """K is what a token really chooses."""
    dense = models.vit_backbone()
    moe = ku.upcycle_model(dense, 1, recipe="drop_upcycling")
    for mixture in models.mixtures(moe):
        assert mixture.router.top_k == 1
        assert mixture.router.load_balance_loss == pytest.approx(0.02 / 2)


@pytest.mark.one_backend
def test_a_weight_that_is_shared_out_is_printed_so():
    text = str(ku.get_recipe("drop_upcycling"))
    assert "load_balance_loss=0.02 * K / L" in text
    assert "load_balance_loss=0.01 / L" in str(ku.get_recipe("default_moe"))
    assert SharedOut(0.02, times_top_k=True).each(4, 2) == 0.01


@pytest.mark.one_backend
def test_a_recipe_of_ones_own_may_leave_top_k_to_the_router():
    recipe = Recipe(
        "mine",
        "nowhere",
        {
            ANY: (
                Choice(
                    "router",
                    (
                        ku.TopKRouter,
                        {"load_balance_loss": SharedOut(0.3, True)},
                    ),
                    "ours",
                ),
            )
        },
    )
    moe = ku.upcycle_model(models.dense_pairs(blocks=4), EXPERTS, recipe=recipe)
    for mixture in models.mixtures(moe):
        assert mixture.router.load_balance_loss == pytest.approx(0.3)


def test_saved_with_its_value(tmp_path):
    dense = models.vit_backbone(3)
    moe = ku.upcycle_model(dense, 4, recipe="drop_upcycling")
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    for mixture in models.mixtures(loaded):
        assert mixture.router.load_balance_loss == pytest.approx(0.04 / 3)

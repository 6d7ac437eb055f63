"""`estimate_upcycle` against the models that it describes."""

import dataclasses

import keras
import keras_hub
import models
import numpy as np
import pytest
from recorded_products import products_in

import keras_upcycle
from keras_upcycle import estimate_upcycle, keras_internals, tables

EXPERTS = 4


@pytest.fixture(params=models.CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def nbytes(variables):
    return sum(models.array(v).nbytes for v in variables)


@pytest.mark.one_backend
def test_the_estimate_is_what_is_built(case):
    dense = case.build()
    estimate = estimate_upcycle(dense, EXPERTS)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert estimate.num_experts == EXPERTS
    assert estimate.dense_params == dense.count_params()
    assert estimate.total_params == moe.count_params()
    floats = [
        [v for v in model.weights if keras.backend.is_float_dtype(v.dtype)]
        for model in (dense, moe)
    ]
    # Random states are integers, and are counted with the weights.
    states = [
        sum(
            models.weights(model)[i].nbytes
            for i, v in enumerate(model.weights)
            if not keras.backend.is_float_dtype(v.dtype)
        )
        for model in (dense, moe)
    ]
    assert estimate.dense_weight_bytes == nbytes(floats[0]) + states[0]
    assert estimate.weight_bytes == nbytes(floats[1]) + states[0]
    assert estimate.adam_bytes == 2 * nbytes(moe.trainable_weights)


@pytest.mark.thinned
def test_nothing_is_built_or_changed(case):
    dense = case.build()
    before = models.weights(dense)
    estimate_upcycle(dense, 10**6)
    models.assert_same_weights(dense, before)


def test_a_function_that_makes_a_model_will_do():
    made = []

    def make():
        made.append(shapes_only())
        return made[0]

    estimate = estimate_upcycle(make, EXPERTS)
    built = estimate_upcycle(models.vit_backbone(), EXPERTS)
    assert estimate == built
    assert not any(keras_internals.has_value(v) for v in made[0].weights)


def shapes_only():
    return keras_hub.models.ViTBackbone(
        models.IMAGE, 4, 2, 2, models.WIDTH, models.HIDDEN
    )


@pytest.mark.one_backend
def test_slots_of_a_short_example_are_rounded_up():
    dense = models.vit_backbone()  # 17 tokens
    whole = estimate_upcycle(dense, 8, sequence_length=17)
    # ceil(2 * 17 / 8) = 5 slots for each of 8 experts, instead of 34.
    matmuls = 2 * 2 * models.WIDTH * models.HIDDEN
    routing = 2 * models.WIDTH * 8
    assert whole.dense_flops_per_example == 17 * whole.dense_flops_per_token
    assert whole.flops_per_example == (
        whole.dense_flops_per_example + (40 - 17) * matmuls + 17 * routing
    )
    assert whole.flops_ratio == (
        whole.flops_per_example / whole.dense_flops_per_example
    )
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="sequence_length"):
            estimate_upcycle(dense, 8, sequence_length=wrong)


@pytest.mark.one_backend
def test_what_stands_around_a_backbone_is_done_once_an_example():
    dense = models.transfer_model()
    inside = dense.get_layer("trunk")
    estimate = estimate_upcycle(
        dense, EXPERTS, sequence_length={"trunk/encoder": 17}
    )
    trunk = estimate_upcycle(inside, EXPERTS, sequence_length=17)
    head = 2 * models.WIDTH * models.CLASSES
    assert estimate.dense_flops_per_example == (
        trunk.dense_flops_per_example + head
    )


@pytest.mark.one_backend
def test_adam_has_slots_for_trainable_weights_only():
    dense = models.vit_backbone(4)
    blocks = dense.get_layer("vit_encoder").encoder_layers
    blocks[1].trainable = False
    blocks[2].trainable = False
    blocks[3].mlp.dense_2.trainable = False
    estimate = estimate_upcycle(dense, EXPERTS)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert estimate.adam_bytes == 2 * nbytes(moe.trainable_weights)
    moe.compile("adam", "mse")
    moe.optimizer.build(moe.trainable_variables)
    slots = [v for v in moe.optimizer.variables if len(v.shape)]
    assert estimate.adam_bytes == nbytes(slots)


@pytest.mark.one_backend
def test_half_precision_weights_take_half_the_bytes():
    whole, half = (
        estimate_upcycle(
            keras.Sequential(
                [
                    keras.Input((models.WIDTH,)),
                    keras.layers.Dense(models.HIDDEN, dtype=dtype),
                    keras.layers.Dense(models.WIDTH, dtype=dtype),
                ]
            ),
            EXPERTS,
        )
        for dtype in ("float32", "bfloat16")
    )
    assert half.total_params == whole.total_params
    router = 4 * models.WIDTH * EXPERTS
    assert half.weight_bytes - router == (whole.weight_bytes - router) / 2


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("router", "experts", "slots"),
    [
        (keras_upcycle.TopKRouter(top_k=3), 3.0, 3.75),
        (keras_upcycle.TopKRouter(top_k=3, capacity_factor=2), 3.0, EXPERTS),
        (keras_upcycle.TopKRouter(top_k=3, capacity_factor=None), 3.0, 3.0),
        (keras_upcycle.TopKRouter(top_k=2, capacity_factor=0.5), 1.0, 1.0),
        (keras_upcycle.ExpertChoiceRouter(capacity_factor=1.5), 1.5, 1.5),
        (keras_upcycle.ExpertChoiceRouter(capacity_factor=9), EXPERTS, EXPERTS),
    ],
    ids=[
        "top_3",
        "more slots than tokens",
        "dropless",
        "top_2 at half capacity",
        "C=1.5",
        "C=9",
    ],
)
def test_cost_follows_the_slots_and_size_the_experts(router, experts, slots):
    dense = models.sequence_dense_pairs()
    estimate = estimate_upcycle(dense, EXPERTS, router=router, layers=[1])
    (layer,) = estimate.layers
    width, hidden = models.WIDTH, models.HIDDEN
    block = 2 * width * hidden + width + hidden
    routing = width * EXPERTS
    assert layer.dense_params == block
    assert layer.total_params == EXPERTS * block + routing
    assert layer.active_params == experts * block + routing
    matmuls = 2 * 2 * width * hidden
    assert layer.dense_flops_per_token == matmuls
    assert layer.flops_per_token == slots * matmuls + 2 * routing
    assert layer.flops_ratio == layer.flops_per_token / matmuls
    assert estimate.active_params - estimate.dense_params == (
        layer.active_params - block
    )
    head = width * models.CLASSES
    assert estimate.dense_flops_per_token == 2 * matmuls + 2 * head
    assert estimate.flops_per_token == (
        estimate.dense_flops_per_token - matmuls + layer.flops_per_token
    )


@pytest.mark.one_backend
def test_an_estimate_prints_totals_and_every_block():
    dense = models.vit_backbone(4)
    estimate = estimate_upcycle(dense, EXPERTS)
    text = str(estimate)
    assert "2 blocks to 4 experts" in text
    for layer in estimate.layers:
        assert layer.path in text
    assert tables.count(estimate.total_params) in text
    assert tables.size(estimate.adam_bytes) in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.total_params = 0


@pytest.mark.one_backend
@pytest.mark.slow
def test_vit_b16_matches_the_published_arithmetic():
    """E=32, last 6 blocks: 0.96B parameters (`2 d f + d + f` an expert)."""
    width, hidden, experts = 768, 3072, 32
    dense = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=width,
        mlp_dim=hidden,
    )
    attention = 4 * (width * width + width)
    expert = 2 * width * hidden + width + hidden
    block = attention + expert + 2 * 2 * width
    patches = 16 * 16 * 3 * width + width
    positions = (14 * 14 + 1) * width + width
    expected = 12 * block + patches + positions + 2 * width
    estimate = estimate_upcycle(dense, experts)
    assert estimate.dense_params == dense.count_params() == expected
    grown = 6 * ((experts - 1) * expert + width * experts)
    assert estimate.total_params == expected + grown
    assert tables.count(estimate.dense_params) == "85.8M"
    assert round(estimate.total_params / 1e9, 2) == 0.96
    assert estimate.weight_bytes == 4 * estimate.total_params
    # Expert Choice at C=2 doubles half of the blocks' MLPs.
    mlps = 12 * 2 * 2 * width * hidden
    added = estimate.flops_per_token - estimate.dense_flops_per_token
    assert added == mlps / 2 + 6 * 2 * width * experts
    assert np.isclose(
        estimate.dense_flops_per_token,
        12 * 2 * 2 * width * hidden
        + 12 * 2 * 4 * width**2
        + 2 * 16 * 16 * 3 * width,
    )


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="counts the products of a recorded JAX program",
)
@pytest.mark.parametrize(
    "router",
    [
        keras_upcycle.TopKRouter(2),
        keras_upcycle.TopKRouter(2, capacity_factor=1.5),
        keras_upcycle.TopKRouter(2, capacity_factor=0.5),
        keras_upcycle.TopKRouter(2, group="example"),
        keras_upcycle.ExpertChoiceRouter(capacity_factor=2),
    ],
    ids=["top_2", "more slots", "half", "by example", "expert_choice"],
)
def test_the_program_multiplies_as_often_as_the_estimate_says(router):
    length, batch = 24, 16
    dense = models.dense_pairs((length, models.WIDTH), name="pairs")
    moe = keras_upcycle.upcycle_model(dense, 8, router=router)
    estimate = estimate_upcycle(dense, 8, router=router, sequence_length=length)
    inputs = np.zeros((batch, *dense.input_shape[1:]), "float32")
    counted = [products_in(model, inputs) for model in (dense, moe)]
    assert counted[0] == batch * estimate.dense_flops_per_example
    # A little more: the experts' outputs are added up by a product too.
    assert counted[1] >= batch * estimate.flops_per_example
    assert counted[1] <= 1.02 * batch * estimate.flops_per_example


@pytest.mark.one_backend
def test_a_function_that_compiles_is_told_what_to_return():
    def make():
        return models.vit_classifier()

    with pytest.raises(
        keras_upcycle.UpcycleError, match=r"Return the task's backbone"
    ):
        estimate_upcycle(make, EXPERTS)
    whole = estimate_upcycle(make_backbone, EXPERTS)
    assert whole.total_params > whole.dense_params


def make_backbone():
    return keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )

"""Adapters, int8, precision, frozen parts and remat, on unlike rows."""

import hub_models
import keras
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.families import registry
from keras_upcycle.layers.moe_layers import moe_layers_in

pytestmark = pytest.mark.thinned
EXPERTS = 4
# Gated outside its layers; by einsums; whole; encoder and decoder.
NAMES = ("T5Backbone", "LlamaBackbone", "GemmaBackbone", "ViTBackbone")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def converted(dense, **kwargs):
    settings = {
        "router": ku.TopKRouter(2, capacity_factor=None),
        "seed": 3,
        "layers": "all_but_first",
        **kwargs,
    }
    return ku.upcycle_model(dense, EXPERTS, **settings)


def outputs(model, inputs):
    found = keras.tree.flatten(model(inputs, training=False))[-1]
    masks = registry.family_of(model).real_positions(model, inputs)
    found = ops.convert_to_numpy(ops.cast(found, "float32"))
    if masks is None:
        return found
    mask = list(masks.values())[-1] if isinstance(masks, dict) else masks
    return found[np.asarray(mask).astype(bool)]


def step(model, inputs):
    target = keras.tree.map_structure(
        lambda x: np.full(tuple(x.shape), 0.1, "float32"),
        model(inputs, training=False),
    )
    model.compile(keras.optimizers.SGD(0.05), loss="mse")
    model.train_on_batch(inputs, target)


def values(model):
    return [
        np.array(ops.convert_to_numpy(ops.cast(v.value, "float32")))
        for v in model.trainable_variables
    ]


def test_in_mixed_precision_it_starts_as_the_dense_model(name):
    dense = hub_models.MODELS[name](dtype="mixed_bfloat16")
    inputs = hub_models.inputs_of(dense)
    expected = outputs(dense, inputs)
    moe = converted(dense)
    for layer in moe_layers_in(moe):
        assert layer.compute_dtype == "bfloat16"
        assert layer.router.weights[0].dtype == "float32"
    # A third of a bfloat16's step at 1: no rounding that the dense has not.
    difference = np.abs(outputs(moe, inputs) - expected)
    assert difference.mean() < 2e-3 * np.abs(expected).mean()


@pytest.mark.parametrize("layers", [None, ["expert_up", "expert_down"]])
def test_adapters_change_nothing_and_train_alone(name, layers, tmp_path):
    dense = hub_models.dense(name)
    if layers is None and name == "T5Backbone":
        pytest.skip("KerasHub names other layers of T5: it adapts none")
    moe, inputs = converted(dense), hub_models.inputs_of(dense)
    expected = outputs(moe, inputs)
    moe.enable_lora(2, layers)
    np.testing.assert_allclose(outputs(moe, inputs), expected, 1e-5, 1e-5)
    before = values(moe)
    step(moe, inputs)
    assert any(
        (old != new).any() for old, new in zip(before, values(moe), strict=True)
    )
    path = str(tmp_path / "adapters.lora.h5")
    moe.save_lora_weights(path)
    fresh = converted(dense)
    fresh.load_lora_weights(path)
    np.testing.assert_allclose(
        outputs(fresh, inputs), outputs(moe, inputs), 1e-4, 1e-4
    )


@pytest.mark.one_backend
def test_int8_reaches_the_experts_and_is_saved(name, tmp_path):
    dense = hub_models.dense(name)
    moe, inputs = converted(dense), hub_models.inputs_of(dense)
    moe.quantize("int8")
    for layer in moe_layers_in(moe):
        assert layer.experts.are_quantized
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(outputs(loaded, inputs), outputs(moe, inputs))


@pytest.mark.one_backend
def test_an_expert_is_frozen_where_its_kernel_was(name):
    dense = hub_models.MODELS[name]()
    site = ku.find_feed_forwards(dense)[-1]
    dense.trainable = False
    moe = converted(dense)
    assert not moe.trainable_variables
    dense = hub_models.MODELS[name]()
    site = ku.find_feed_forwards(dense)[-1]
    site.kernels["down_kernel"].trainable = False
    layer = moe_layers_in(converted(dense))[-1]
    assert not layer.experts.expert_down.kernel.trainable
    assert layer.experts.expert_up.kernel.trainable


def test_remat_trains_to_the_same(name):
    dense = hub_models.dense(name)
    inputs = hub_models.inputs_of(dense)
    found = []
    for remat in (False, True):
        moe = converted(dense, remat=remat)
        step(moe, inputs)
        found.append(values(moe))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)


def test_reports_agree_with_the_model(name):
    dense = hub_models.dense(name)
    inputs = hub_models.inputs_of(dense)
    moe = converted(dense)
    estimate = ku.estimate_upcycle(
        dense, EXPERTS, router="top_k", layers="all_but_first"
    )
    assert estimate.total_params == moe.count_params()
    report = ku.verify_upcycle(dense, moe, inputs)
    assert report.max_difference < 1e-4

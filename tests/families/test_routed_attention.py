"""Heads as experts in every model of the table whose attention has heads.

All of them on torch, a handful of unlike ones on the other backends.
"""

import importlib.util

import hub_models
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from test_every_row import difference, outputs

import keras_upcycle as ku
from keras_upcycle.families import registry
from keras_upcycle.layers.moe_layers import routed_heads_in

# On backends that compile: heads merged in a `Dense`, grouped, in windows.
UNLIKE = ("T5Backbone", "LlamaBackbone", "ViTBackbone")
# Whose heads nobody can route, each for a reason of its own.
WITHOUT = {
    "FNetBackbone": "has no attention",
    "XLNetBackbone": "two streams share a projection",
    "RWKV7Backbone": "has no attention",
    "MMDiT": "its attention stands outside of its blocks",
}
NAMES = [name for name in hub_models.MODELS if name not in WITHOUT]
if keras.backend.backend() != "torch" and importlib.util.find_spec("torch"):
    NAMES = list(UNLIKE)


# For files too, which hold the same of all: also a layer in a layer, shared
# layers, windows, several stacks.
WITH_FILES = (
    *(*UNLIKE, "DINOV2Backbone", "AlbertBackbone", "SwinTransformerBackbone"),
    *("T5Gemma2Backbone", "BLIP2Backbone"),
)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def inputs(name):
    return hub_models.inputs_of(hub_models.dense(name))


@pytest.fixture(scope="module")
def routed(name):
    return ku.upcycle_attention(hub_models.dense(name))


def scored(model, seed=0):
    """Routers that tell heads apart."""
    rng = np.random.default_rng(seed)
    for layer in routed_heads_in(model):
        kernel = layer.router.kernel
        kernel.assign(rng.normal(0, 1, tuple(kernel.shape)))
    return model


def test_it_starts_as_the_dense_model(name, routed, inputs):
    dense = hub_models.dense(name)
    assert difference(outputs(dense, inputs), outputs(routed, inputs)) < 1e-6
    assert isinstance(routed, type(dense))
    sites = ku.find_attention(dense)
    assert len(routed_heads_in(routed)) == len({id(s.layer) for s in sites})
    added = sum(
        layer.router.count_params() for layer in routed_heads_in(routed)
    )
    assert routed.count_params() == dense.count_params() + added


def test_scores_change_the_output_and_files_keep_them(
    name, routed, inputs, tmp_path
):
    before = outputs(routed, inputs)
    expected = outputs(scored(routed), inputs)
    assert difference(before, expected) > 1e-4
    if name not in WITH_FILES:
        return
    routed.save(tmp_path / "routed.keras")
    loaded = keras.saving.load_model(tmp_path / "routed.keras")
    assert type(loaded) is type(routed)
    assert difference(expected, outputs(loaded, inputs)) == 0
    routed.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert difference(expected, outputs(loaded, inputs)) == 0


def test_without_its_routers_it_is_the_dense_model(name, routed, inputs):
    dense = hub_models.dense(name)
    again = ku.densify_model(scored(routed))
    assert type(again) is type(dense)
    assert difference(outputs(dense, inputs), outputs(again, inputs)) == 0


def test_a_head_that_is_left_out_takes_its_rows_with_it(name, inputs):
    """What an expert's heads put out is what its rows of `W_O` get."""
    dense = hub_models.dense(name)
    sites = ku.find_attention(dense)
    top = ku.TopKRouter(1, capacity_factor=None)
    routed = ku.upcycle_attention(
        dense, ku.AttentionExperts(top, layers=lambda site: site.index == 0)
    )
    (layer,) = routed_heads_in(routed)
    rows = layer.projection.kernel.value
    layer.router.kernel.assign(ops.zeros(layer.router.kernel.shape))
    # Of equal scores the first expert is chosen.
    found = outputs(routed, inputs)
    kernel = ops.convert_to_numpy(rows).copy()
    by_head = kernel.reshape(sites[0].num_heads, -1, kernel.shape[-1])
    by_head[layer._expert_of_head() != 0] = 0
    other = ku.upcycle_attention(dense, ku.AttentionExperts(layers=lambda _: 1))
    routed_heads_in(other)[0].projection.kernel.assign(
        by_head.reshape(kernel.shape)
    )
    assert difference(outputs(other, inputs), found) < 1e-5


def test_with_experts_too_a_step_trains_both_routers(name, inputs):
    dense = hub_models.dense(name)
    settings = {"layers": "all_but_first", "seed": 3, "attention": True}
    moe = ku.upcycle_model(dense, 4, **settings)
    estimate = ku.estimate_upcycle(
        dense, 4, layers="all_but_first", attention=True
    )
    assert estimate.total_params == moe.count_params()
    layers = routed_heads_in(moe)
    before = [
        ops.convert_to_numpy(ops.copy(layer.router.kernel.value))
        for layer in layers
    ]
    target = keras.tree.map_structure(
        lambda x: np.zeros(tuple(x.shape), "float32"),
        moe(inputs, training=False),
    )
    moe.compile(
        keras.optimizers.SGD(0.05),
        loss=lambda y_true, y_pred: ops.mean(ops.square(y_pred - 0.1)),
    )
    moe.train_on_batch(inputs, target)
    moved = [
        np.abs(ops.convert_to_numpy(layer.router.kernel.value) - old).max()
        for layer, old in zip(layers, before, strict=True)
    ]
    assert max(moved) > 0


@pytest.mark.one_backend
def test_only_those_models_are_without():
    for name, reason in WITHOUT.items():
        model = hub_models.dense(name)
        assert reason
        assert not registry.family_of(model).find_attention(model).sites
        with pytest.raises(ku.UpcycleError, match="must have self-attention"):
            ku.upcycle_attention(model)

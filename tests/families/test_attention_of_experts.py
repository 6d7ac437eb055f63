"""Attention that becomes several experts in every model that can have it.

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
from test_routed_attention import WITHOUT

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import attention_mixtures_in

# Heads merged in a `Dense`, grouped heads, Keras's own attention.
UNLIKE = ("T5Backbone", "LlamaBackbone", "ViTBackbone")
# Whose queries, keys and values are one kernel.
FUSED = (
    "GPTNeoXBackbone",
    "SwinTransformerBackbone",
    "ViTDetBackbone",
    "SAMBackbone",
)
NAMES = [n for n in hub_models.MODELS if n not in (*WITHOUT, *FUSED)]
if keras.backend.backend() != "torch" and importlib.util.find_spec("torch"):
    NAMES = list(UNLIKE)
# Its decoder's attention is handed a pair of caches that are not there.
WITH_FILES = [n for n in (*UNLIKE, "T5Gemma2Backbone") if n in NAMES]
EXPERTS = 3


def copied(name, **settings):
    experts = ku.CopiedAttention(EXPERTS, **settings)
    return ku.upcycle_attention(hub_models.dense(name), experts, seed=1)


def changed(model, seed=0):
    """Experts that differ, and routers that tell tokens apart."""
    rng = np.random.default_rng(seed)
    for layer in attention_mixtures_in(model):
        kernels = [one.kernel for one in layer.projections.values()]
        for variable in [layer.router.kernel, *kernels]:
            noise = rng.normal(0, 0.3, tuple(variable.shape))
            variable.assign(ops.convert_to_numpy(variable.value) + noise)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_dense_model(name):
    dense, model = hub_models.dense(name), copied(name)
    inputs = hub_models.inputs_of(dense)
    assert difference(outputs(dense, inputs), outputs(model, inputs)) < 5e-6
    sites = {id(s.layer): s for s in ku.find_attention(dense)}
    mixtures = attention_mixtures_in(model)
    assert len(mixtures) == len(sites)
    added = sum(
        layer.router.count_params() + (EXPERTS - 1) * layer.expert_params
        for layer in mixtures
    )
    assert model.count_params() == dense.count_params() + added


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", WITH_FILES)
def test_experts_change_the_output_and_files_keep_them(name, shared, tmp_path):
    model = copied(name, shared_key_values=shared)
    dense = hub_models.dense(name)
    inputs = hub_models.inputs_of(dense)
    start = outputs(dense, inputs)
    assert difference(start, outputs(model, inputs)) < 5e-6
    expected = outputs(changed(model), inputs)
    assert difference(start, expected) > 1e-3
    model.save(tmp_path / "copied.keras")
    loaded = keras.saving.load_model(tmp_path / "copied.keras")
    assert type(loaded) is type(model)
    assert difference(expected, outputs(loaded, inputs)) == 0
    model.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert difference(expected, outputs(loaded, inputs)) == 0
    for mixture in attention_mixtures_in(loaded):
        assert mixture.shared_key_values is shared
        assert mixture.router.mutual_information_loss == 0


@pytest.mark.parametrize("name", UNLIKE)
def test_a_step_trains_experts_and_routers(name):
    dense = hub_models.dense(name)
    inputs = hub_models.inputs_of(dense)
    model = changed(copied(name))
    target = keras.tree.map_structure(
        lambda x: np.zeros(tuple(x.shape), "float32"),
        model(inputs, training=False),
    )
    model.compile(
        keras.optimizers.SGD(0.05),
        loss=lambda y_true, y_pred: ops.mean(ops.square(y_pred - 0.1)),
    )

    def values():
        return {
            (layer.path, name): ops.convert_to_numpy(ops.copy(v.value))
            for layer in attention_mixtures_in(model)
            for name, v in {
                "router": layer.router.kernel,
                **{r: p.kernel for r, p in layer.projections.items()},
            }.items()
        }

    before = values()
    model.train_on_batch(inputs, target)
    for key, value in values().items():
        moved = np.abs(value - before[key])
        if key[1] != "router":  # every expert, for every token has all
            moved = moved.reshape(EXPERTS, -1).max(axis=1)
        assert moved.all() if key[1] != "router" else moved.any(), key


@pytest.mark.one_backend
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_kernel_is_refused(name):
    with pytest.raises(ku.UpcycleError, match="one kernel holds its queries"):
        copied(name)

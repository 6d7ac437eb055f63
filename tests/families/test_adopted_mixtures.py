"""KerasHub's own mixtures with our layers: the same model, and all of ours.

All of them run on torch; two unlike ones on the other backends.
"""

import importlib.util
import warnings

import gradients
import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.families import keras_hub_mixtures, registry, stock_mixtures
from keras_upcycle.layers.moe_layers import moe_layers_in

UNLIKE = ("QwenMoeBackbone", "GptOssBackbone")
NAMES = list(hub_models.MIXTURES)
if keras.backend.backend() != "torch" and importlib.util.find_spec("torch"):
    NAMES = list(UNLIKE)
each_mixture = pytest.mark.parametrize("name", NAMES)
# What is the same wherever outputs are: once where programs are compiled.
FEW = NAMES if len(NAMES) > len(UNLIKE) else NAMES[-1:]
few_mixtures = pytest.mark.parametrize("name", FEW)


@pytest.fixture(scope="module")
def adopted():
    """From a name to the model with our layers, which no test may change."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = ku.adopt_model(hub_models.mixture(name))
        return made[name]

    return model


def real(model, inputs):
    """What it gives at real positions."""
    outputs = models.array(model(inputs, training=False))
    return outputs[inputs["padding_mask"].astype(bool)]


def counterparts(stock, moe):
    """All weights of the mixtures: ours, the stock one, the way between."""
    family = registry.family_of(stock)
    sites = family.mixtures(stock)
    layers = family.current_layers(moe, sites)
    return [
        pair
        for site, layer in zip(sites, layers, strict=True)
        for pair in stock_mixtures.counterparts(site.found, layer)
    ]


@each_mixture
def test_it_computes_what_the_stock_model_does(name, adopted):
    stock = hub_models.mixture(name)
    inputs = hub_models.inputs_of(stock, seed=7)
    expected = real(stock, inputs)
    found = real(adopted(name), inputs)
    np.testing.assert_allclose(
        found, expected, atol=2e-6 * np.abs(expected).max()
    )
    assert type(adopted(name)).__name__ == f"Upcycled{name}"
    assert adopted(name).count_params() == stock.count_params()


@few_mixtures
def test_changed_experts_change_the_output(name):
    stock = hub_models.mixture(name)
    other = ku.adopt_model(stock)
    inputs = hub_models.inputs_of(stock)
    before = real(other, inputs)
    for layer in moe_layers_in(other):
        down = layer.experts.expert_down.kernel
        down.assign(
            down * np.linspace(1.1, 2, layer.num_experts)[:, None, None]
        )
    assert np.abs(real(other, inputs) - before).max() > 1e-4


@each_mixture
def test_training_has_its_losses_and_gradients(name, adopted):
    stock, moe = hub_models.mixture(name), adopted(name)
    inputs = hub_models.inputs_of(stock)
    # Some stock losses count padding, others do not.
    inputs["padding_mask"] = np.ones_like(inputs["padding_mask"])
    rng = np.random.default_rng(0)
    shape = (*inputs["token_ids"].shape, stock.hidden_dim)
    cotangent = ops.convert_to_tensor(rng.normal(size=shape), "float32")

    def of(model):
        frozen = [v.value for v in model.non_trainable_variables]

        def scalar(*weights):
            outputs, _, losses = model.stateless_call(
                list(weights),
                frozen,
                inputs,
                training=True,
                return_losses=True,
            )
            loss = sum(losses, ops.zeros(()))
            total = loss + ops.sum(outputs * cotangent)
            return total, ops.stop_gradient(loss)

        values = [v.value for v in model.trainable_variables]
        _, loss, found = gradients.pull_back(scalar, *values)
        by_id = {
            id(variable): gradient
            for variable, gradient in zip(
                model.trainable_variables, found, strict=True
            )
        }
        return float(models.array(loss)), by_id

    loss, expected = of(stock)
    own_loss, found = of(moe)
    np.testing.assert_allclose(own_loss, loss, rtol=1e-5)
    without = ("GptOssBackbone", "Gemma4Backbone")
    assert bool(loss) == (name not in without)
    for pair in counterparts(stock, moe):
        wanted = models.array(
            pair.read(ops.convert_to_tensor(expected[id(pair.stock)]))
        )
        np.testing.assert_allclose(
            found[id(pair.ours)],
            wanted,
            atol=2e-5 * max(1, np.abs(wanted).max()),
            err_msg=pair.stock.path,
        )


@few_mixtures
def test_files_give_the_same_model(name, adopted, tmp_path):
    moe = adopted(name)
    inputs = hub_models.inputs_of(moe)
    expected = real(moe, inputs)
    moe.save(tmp_path / "moe.keras")
    moe.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.saving.load_model(tmp_path / "moe.keras"),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset")),
    ):
        assert type(loaded) is type(moe)
        np.testing.assert_array_equal(real(loaded, inputs), expected)


@few_mixtures
def test_a_task_generates_the_same_tokens(name):
    backbone = hub_models.MIXTURES[name]()
    kind = getattr(keras_hub.models, name.replace("Backbone", "CausalLM"), None)
    stock = kind(backbone=backbone, preprocessor=None)
    stock.compile(sampler="greedy")
    moe = ku.adopt_model(stock)
    assert isinstance(moe, kind)
    assert moe.compiled
    prompt = {
        "token_ids": np.array([[3, 9, 4, 0, 0, 0], [5, 7, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
    }
    expected = stock.generate(dict(prompt), stop_token_ids=None)
    found = moe.generate(dict(prompt), stop_token_ids=None)
    np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])


@few_mixtures
def test_what_takes_experts_takes_them(name, tmp_path):
    moe = ku.adopt_model(hub_models.mixture(name))
    inputs = hub_models.inputs_of(moe)
    before = real(moe, inputs)
    layers = moe_layers_in(moe)
    expected = 1 if name == "Qwen3MoeBackbone" else 2
    assert len(layers) == expected
    monitor = ku.RouterMonitor()
    moe.compile(keras.optimizers.SGD(0.01), "mse")
    targets = np.zeros((*inputs["token_ids"].shape, moe.hidden_dim))
    moe.fit(inputs, targets, verbose=0, callbacks=[monitor])
    assert str(monitor)
    assert np.abs(real(moe, inputs) - before).max() > 0
    larger, _ = ku.grow_experts(moe, layers[0].num_experts + 3, seed=1)
    wanted = real(moe, inputs)
    np.testing.assert_allclose(
        real(larger, inputs), wanted, atol=1e-5 * np.abs(wanted).max()
    )
    smaller, _ = ku.prune_experts(moe, inputs, num_experts=3)
    assert {layer.num_experts for layer in moe_layers_in(smaller)} == {3}
    smaller.save(tmp_path / "smaller.keras")
    loaded = keras.saving.load_model(tmp_path / "smaller.keras")
    np.testing.assert_array_equal(real(loaded, inputs), real(smaller, inputs))
    ku.freeze(moe, "experts")
    assert not any(layer.experts.trainable for layer in layers)


@few_mixtures
def test_lora_and_int8_reach_its_experts(name, adopted):
    moe = ku.adopt_model(hub_models.mixture(name))
    inputs = hub_models.inputs_of(moe)
    expected = real(adopted(name), inputs)
    scale = np.abs(expected).max()
    moe.enable_lora(2)
    assert any("lora" in v.path for v in moe.trainable_variables)
    np.testing.assert_allclose(real(moe, inputs), expected, atol=2e-6 * scale)
    # As near as the stock model comes, whose experts stay floats.
    errors = []
    for model in (
        hub_models.MIXTURES[name](),
        ku.adopt_model(hub_models.mixture(name)),
    ):
        model.quantize("int8")
        errors.append(np.abs(real(model, inputs) - expected).max())
    assert all(layer.experts.are_quantized for layer in moe_layers_in(model))
    assert 0 < errors[1] < 1.5 * errors[0] + 0.05 * scale


@pytest.mark.one_backend
def test_frozen_parts_stay_frozen():
    stock = hub_models.MIXTURES["QwenMoeBackbone"]()
    first, second = (block.mlp for block in stock.transformer_layers)
    first.expert_bank.trainable = False
    second._sparse_feedforward_gate_dense.trainable = False
    stock.transformer_layers[1]._self_attention_layer.trainable = False
    moe = ku.adopt_model(stock)
    frozen, routed = moe_layers_in(moe)
    assert not frozen.experts.trainable_variables
    assert frozen.router.trainable_variables
    assert frozen.shared.trainable_variables
    assert not routed.router.trainable_variables
    assert routed.experts.trainable_variables
    assert len(moe.trainable_variables) == (
        len(stock.trainable_variables) + 1  # gate and up were one kernel
    )


@pytest.mark.one_backend
def test_the_model_is_not_changed():
    stock = hub_models.MIXTURES["MixtralBackbone"]()
    before = [models.array(v).copy() for v in stock.weights]
    moe = ku.adopt_model(stock)
    for variable in moe.weights:
        variable.assign(ops.zeros_like(variable))
    for variable, value in zip(stock.weights, before, strict=True):
        np.testing.assert_array_equal(models.array(variable), value)


@pytest.mark.one_backend
def test_compile_settings_come_along():
    stock = hub_models.MIXTURES["MixtralBackbone"]()
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(
        var_list=[
            block._sparse_moe_block.expert_bank._expert_feedforward_gate_dense
            for block in stock.transformer_layers
        ]
    )
    stock.compile(optimizer, "mse")
    moe = ku.adopt_model(stock)
    assert isinstance(moe.optimizer, keras.optimizers.AdamW)
    moe.optimizer.build(moe.trainable_variables)
    for layer in moe_layers_in(moe):
        gate, up = (
            layer.experts.projections[role].kernel for role in ("gate", "up")
        )
        assert not moe.optimizer._use_weight_decay(gate)
        assert moe.optimizer._use_weight_decay(up)


def _quantized():
    model = hub_models.MIXTURES["MixtralBackbone"]()
    model.quantize("int8")
    return model


def _with_nan():
    model = hub_models.MIXTURES["MixtralBackbone"]()
    bank = model.transformer_layers[1]._sparse_moe_block.expert_bank
    kernel = bank._expert_feedforward_output_dense
    kernel.assign(kernel * np.nan)
    return model


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "mixtral", TypeError, "`model` must be a Keras model"),
        (
            lambda: hub_models.dense("LlamaBackbone"),
            ku.UpcycleError,
            "MixtralBackbone.*upcycle_model",
        ),
        (
            lambda: ku.adopt_model(hub_models.mixture("MixtralBackbone")),
            ku.UpcycleError,
            "must be dense|already",
        ),
        (_quantized, ku.UpcycleError, "quantized to 'int8'.*Adopt"),
        (_with_nan, ku.UpcycleError, "must be finite.*output_dense"),
    ],
    ids=["a name", "dense", "adopted", "int8", "nan"],
)
def test_what_cannot_be_adopted_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        ku.adopt_model(make())


@pytest.mark.one_backend
def test_upcycling_a_mixture_names_the_other_way():
    with pytest.raises(ku.UpcycleError, match=r"sparse already.*adopt_model"):
        ku.upcycle_model(hub_models.mixture("MixtralBackbone"), 4)


@pytest.mark.one_backend
def test_there_is_no_dense_model_to_go_back_to():
    stock = hub_models.mixture("MixtralBackbone")
    moe = ku.adopt_model(stock)
    inputs = hub_models.inputs_of(stock)
    with pytest.raises(ku.UpcycleError, match=r"no dense model.*export_model"):
        ku.densify_model(moe)
    with pytest.raises(ku.UpcycleError, match="mixture of KerasHub's own"):
        ku.verify_upcycle(stock, moe, inputs)


@few_mixtures
def test_in_mixed_bfloat16_it_is_as_near_as_the_stock_model(name):
    """To the float32 model of the same weights; at most positions.

    A choice that is nearly even may go the other way, in the one or the other.
    """
    exact = hub_models.mixture(name)
    inputs = hub_models.inputs_of(exact)
    expected = real(exact, inputs)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        stock = hub_models.MIXTURES[name](dtype="mixed_bfloat16")
        moe = ku.adopt_model(stock)
        errors = [
            np.median(np.abs(real(model, inputs) - expected).max(-1))
            for model in (stock, moe)
        ]
    finally:
        keras.config.set_dtype_policy(before)
    assert 0 < errors[1] < 1.3 * errors[0]


@pytest.mark.one_backend
def test_noise_that_stock_models_cannot_run_is_said_to_be_lost():
    stock = hub_models.MIXTURES["MixtralBackbone"](router_jitter_noise=0.1)
    with pytest.warns(UserWarning, match=r"router_jitter_noise=0\.1"):
        moe = ku.adopt_model(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ku.adopt_model(hub_models.mixture("MixtralBackbone"))
    assert moe_layers_in(moe)


@pytest.mark.one_backend
def test_every_row_is_tried():
    rows = {row.backbone for row in keras_hub_mixtures.MODELS}
    assert rows == set(hub_models.MIXTURES)

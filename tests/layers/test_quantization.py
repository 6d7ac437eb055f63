"""A mode works through files and engines, or nothing is changed at all."""

import keras
import models
import numpy as np
import pytest
from keras import layers, quantizers

import keras_upcycle as ku
from keras_upcycle import keras_internals

EXPERTS = 4
OTHER_LAYERS = r"^(?!expert_)"


def pairs_between_denses():
    """Keras's walk meets a `Dense` before the experts, from either end."""
    inputs = keras.Input((6, 8))
    x = layers.Dense(models.WIDTH, name="stem")(inputs)
    hidden = layers.Dense(models.HIDDEN, activation="relu")(x)
    x = layers.Dense(models.WIDTH)(hidden)
    model = keras.Model(inputs, layers.Dense(models.CLASSES, name="head")(x))
    return ku.upcycle_model(models.randomized(model), EXPERTS, layers=[0])


def a_model_of_ones_own():
    """Nothing in it was upcycled; a shared network."""
    inputs = keras.Input((6, 8))
    x = layers.Dense(models.WIDTH)(inputs)
    x = ku.MoEFeedForward(
        EXPERTS,
        models.HIDDEN,
        gated=True,
        shared_intermediate_dim=8,
    )(x)
    inner = keras.Model(inputs, layers.Dense(models.CLASSES)(x))
    return keras.Sequential([keras.Input((6, 8)), inner, layers.Dense(2)])


def t5():
    return ku.upcycle_model(models.t5_backbone(), EXPERTS)


def vit():
    # Called once: a preprocessor's layers are built then.
    model = ku.upcycle_model(models.vit_classifier(), EXPERTS)
    model.predict(models.images(), verbose=0)
    return model


BUILDS = {
    "pairs": (pairs_between_denses, lambda: models.tokens(3, 6, 8)),
    "own": (a_model_of_ones_own, lambda: models.tokens(3, 6, 8)),
    "t5": (t5, models.t5_inputs),
    "vit": (vit, models.images),
}


def gptq():
    return quantizers.GPTQConfig(
        dataset=["some words"],
        tokenizer=lambda text: np.arange(8),
        quantization_layer_structure={
            "pre_block_layers": [],
            "sequential_blocks": [],
        },
    )


def awq():
    return quantizers.AWQConfig(
        dataset=["some words"],
        tokenizer=lambda text: np.arange(8),
        quantization_layer_structure={
            "pre_block_layers": [],
            "sequential_blocks": [],
        },
    )


REFUSED = {
    "int4": lambda: {"mode": "int4"},
    "float8": lambda: {"mode": "float8"},
    "grouped_int4": lambda: {
        "config": quantizers.Int4QuantizationConfig(block_size=8)
    },
    "int4_by_channel": lambda: {
        "config": quantizers.Int4QuantizationConfig(block_size=None)
    },
    "config_by_name": lambda: {"config": "int4"},
    "gptq": lambda: {"mode": "gptq", "config": gptq()},
    "awq": lambda: {"config": awq()},
    "weight_quantizer": lambda: {
        "config": quantizers.Int8QuantizationConfig(
            weight_quantizer=quantizers.AbsMaxQuantizer(axis=0)
        )
    },
}


def state(model):
    """All that `quantize` may change."""
    return [
        (layer.dtype_policy.name, [id(v) for v in layer.weights])
        for layer in keras_internals.all_layers(model)
    ]


def assert_refused(call, model, arguments, match):
    before, values = state(model), models.weights(model)
    with pytest.raises(ValueError, match=match):
        call(**arguments)
    assert state(model) == before
    for found, value in zip(models.weights(model), values, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.one_backend
@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("build", ["pairs", "own"])
def test_a_mode_is_refused_before_a_layer_is_changed(build, refused):
    make, inputs = BUILDS[build]
    model, arguments = make(), REFUSED[refused]()
    mode = "weight_quantizer=|mode='(int4|float8|gptq|awq)'"
    expected = models.output(model, inputs())
    assert_refused(
        model.quantize, model, arguments, rf"({mode})[\s\S]*filters="
    )
    np.testing.assert_array_equal(models.output(model, inputs()), expected)


@pytest.mark.one_backend
@pytest.mark.parametrize("build", ["t5", "vit"])
def test_kerashubs_models_refuse_it_too(build):
    model = BUILDS[build][0]()
    match = r"mode='int4' for .*expert_[\s\S]*quantize\(\"int8\"\)"
    assert_refused(model.quantize, model, {"mode": "int4"}, match)


@pytest.mark.one_backend
@pytest.mark.parametrize("refused", ["int4", "float8", "weight_quantizer"])
def test_a_layer_refuses_it_by_itself(refused):
    layer = ku.MoEFeedForward(EXPERTS, 8, shared_intermediate_dim=4)
    layer.build((None, 6))
    for part in (layer, layer.experts):
        assert_refused(
            part.quantize, layer, REFUSED[refused](), "Nothing was changed"
        )


@pytest.mark.one_backend
def test_what_is_quantized_is_not_quantized_again():
    model = pairs_between_denses()
    model.quantize("int8", filters="expert_up")
    assert_refused(
        model.quantize, model, {"mode": "int8"}, "expert_up, which has mode"
    )
    model.quantize("int8", filters="^(?!expert_up)")
    (layer,) = models.mixtures(model)
    assert layer.experts.expert_down.quantization_mode == "int8"


@pytest.mark.thinned
@pytest.mark.parametrize("mode", ["int4", "float8"])
def test_another_mode_serves_all_layers_but_the_experts(mode, tmp_path):
    model, x = pairs_between_denses(), models.tokens(3, 6, 8)
    before = models.output(model, x)
    model.quantize(mode, filters=OTHER_LAYERS)
    assert model.get_layer("head").quantization_mode == mode
    after = models.output(model, x)
    assert models.relative_gap(after, before) < 0.25
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(models.output(again, x), after, atol=1e-6)


@pytest.mark.thinned("dispatch")
@pytest.mark.parametrize("dispatch", ["auto", "capacity", "dropless", "dense"])
@pytest.mark.parametrize("build", ["model", "layer"])
def test_int8_works_in_every_engine_and_through_files(
    dispatch, build, tmp_path
):
    inputs = keras.Input((40, models.WIDTH))
    layer = ku.MoEFeedForward(
        EXPERTS,
        models.HIDDEN,
        gated=True,
        shared_intermediate_dim=8,
        dispatch=dispatch,
    )
    model = keras.Model(inputs, layer(inputs))
    model = models.fixed(model)
    x = models.tokens(4, 40, models.WIDTH)
    before = models.output(model, x)
    (model if build == "model" else layer).quantize("int8")
    after = models.output(model, x)
    assert 0 < models.relative_gap(after, before) < 0.03
    np.testing.assert_allclose(model.predict(x, verbose=0), after, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(models.output(again, x), after, atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("build", ["own", "t5"])
def test_a_file_keeps_a_config_of_ones_own(build, tmp_path):
    """Weights alone are int8: what is multiplied is not rounded.

    The file of a KerasHub backbone has no such config of stock layers, so
    experts alone are compared there.
    """
    make, inputs = BUILDS[build]
    model, x = make(), inputs()
    model.quantize(
        config=quantizers.Int8QuantizationConfig(activation_quantizer=None)
    )
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    tokens = models.tokens(6, models.WIDTH)
    pairs = zip(models.mixtures(model), models.mixtures(again), strict=True)
    for mixture, loaded in pairs:
        for own, read in zip(mixture.networks, loaded.networks, strict=True):
            for projection in read.projections.values():
                assert projection.inputs_quantizer is None
            slots = np.stack([tokens] * own.num_experts)
            np.testing.assert_allclose(
                models.array(read.apply_slots(slots)),
                models.array(own.apply_slots(slots)),
                atol=1e-6,
            )
    if build == "own":
        np.testing.assert_allclose(
            models.output(again, x), models.output(model, x), atol=1e-6
        )


@pytest.mark.one_backend
def test_a_layer_is_not_made_under_a_policy_that_quantizes():
    for policy in (
        "int8_from_float32",
        "int4/32_from_mixed_bfloat16",
        keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"),
    ):
        with pytest.raises(ValueError, match=r"float policy[\s\S]*_from_"):
            ku.MoEFeedForward(EXPERTS, 8, dtype=policy)
    layer = ku.MoEFeedForward(EXPERTS, 8)
    layer.build((None, 6))
    with pytest.raises(ValueError, match=r'quantize\("int8"\)'):
        layer.dtype_policy = "int8_from_float32"
    assert layer.dtype_policy.name == "float32"
    layer.dtype_policy = "bfloat16"
    assert layer.dtype_policy.name == "bfloat16"

"""Sparse models as KerasHub's own mixtures: the same function, all weights."""

import re
import warnings

import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import moe_layers_in, named_mixtures

SOURCES = {
    "LlamaBackbone": "mixtral",
    "Llama3Backbone": "mixtral",
    "MistralBackbone": "mixtral",
    "Qwen3Backbone": "qwen3_moe",
}
KINDS = {"mixtral": "MixtralBackbone", "qwen3_moe": "Qwen3MoeBackbone"}


def real(model, inputs):
    outputs = models.array(model(inputs, training=False))
    return outputs[inputs["padding_mask"].astype(bool)]


def trained(moe):
    """As if it had trained: experts differ."""
    rng = np.random.default_rng(5)
    for layer in moe_layers_in(moe):
        for projection in layer.experts.projections.values():
            shape = projection.kernel.shape
            more = rng.normal(scale=0.1, size=shape).astype("float32")
            projection.kernel.assign(projection.kernel + more)
    return moe


@pytest.mark.thinned
@pytest.mark.parametrize("name", list(hub_models.MIXTURES))
def test_what_was_adopted_goes_back_to_the_last_bit(name):
    stock = hub_models.mixture(name)
    again = ku.export_model(ku.adopt_model(stock), "keras_hub")
    assert type(again) is type(stock)
    assert again.get_config() == {
        **stock.get_config(),
        "name": again.name,
        "trainable": True,
    }
    assert len(again.weights) == len(stock.weights)
    for ours, theirs in zip(again.weights, stock.weights, strict=True):
        np.testing.assert_array_equal(models.array(ours), models.array(theirs))


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_dense_model_becomes_a_mixture_that_others_know(name):
    dense = hub_models.MODELS[name]()
    moe = trained(ku.upcycle_model(dense, 4, target=SOURCES[name]))
    assert ku.can_export(moe, "keras_hub")
    if name == "Qwen3Backbone":
        with pytest.warns(UserWarning, match="epsilon of 1e-05 here and of"):
            stock = ku.export_model(moe, "keras_hub")
        tolerance = 2e-5
    else:
        stock = ku.export_model(moe, "keras_hub")
        tolerance = 2e-6
    assert type(stock).__name__ == KINDS[SOURCES[name]]
    inputs = hub_models.inputs_of(dense)
    expected = real(moe, inputs)
    found = real(stock, inputs)
    scale = np.abs(expected).max()
    assert np.abs(expected - real(dense, inputs)).max() > 1e-3 * scale
    np.testing.assert_allclose(found, expected, atol=tolerance * scale)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", list(hub_models.MIXTURES))
def test_a_temperature_is_divided_into_what_makes_logits(name):
    stock = hub_models.mixture(name)
    moe = ku.adopt_model(stock)
    inputs = hub_models.inputs_of(moe)
    before = real(moe, inputs)
    for layer in moe_layers_in(moe):
        layer.router.temperature = 0.25
    expected = real(moe, inputs)
    scale = np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-5 * scale
    found = real(ku.export_model(moe, "keras_hub"), inputs)
    np.testing.assert_allclose(found, expected, atol=2e-6 * scale)


@pytest.mark.one_backend
def test_a_temperature_by_schedule_is_what_it_is_now(tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(4.0, 10, 1.0)
    dense = hub_models.dense("LlamaBackbone")
    router = ku.TopKRouter(2, temperature=schedule)
    moe = trained(ku.upcycle_model(dense, 4, router=router, layers="all"))
    for layer in moe_layers_in(moe):
        layer.router.kernel.assign(50.0 * layer.router.kernel.value)
        layer.router.training_step.assign(6)
    inputs = hub_models.inputs_of(dense)
    expected = real(moe, inputs)
    stock = ku.export_model(moe, "keras_hub")
    np.testing.assert_allclose(
        real(stock, inputs), expected, atol=2e-6 * np.abs(expected).max()
    )
    load_file = pytest.importorskip("safetensors.numpy").load_file
    ku.export_model(moe, "hugging_face", tmp_path / "folder")
    written = load_file(tmp_path / "folder" / "model.safetensors")
    for number, layer in enumerate(moe_layers_in(moe)):
        name = f"model.layers.{number}.block_sparse_moe.gate.weight"
        np.testing.assert_allclose(
            written[name], models.array(layer.router.kernel).T / 2.2, rtol=1e-6
        )


@pytest.mark.one_backend
def test_a_qwen3_may_keep_dense_blocks():
    dense = hub_models.MODELS["Qwen3Backbone"]()
    moe = ku.upcycle_model(dense, 4, target="qwen3_moe")
    assert len(moe_layers_in(moe)) == 1
    with pytest.warns(UserWarning, match="epsilon"):
        stock = ku.export_model(moe, "keras_hub")
    assert stock.mlp_only_layers == [0]
    assert stock.tie_word_embeddings == dense.tie_word_embeddings


@pytest.mark.one_backend
def test_fewer_experts_go_back_as_fewer():
    moe = ku.adopt_model(hub_models.mixture("MixtralBackbone"))
    inputs = hub_models.inputs_of(moe)
    smaller, _ = ku.prune_experts(moe, inputs, num_experts=3)
    stock = ku.export_model(smaller, "keras_hub")
    assert stock.num_experts == 3
    expected = real(smaller, inputs)
    np.testing.assert_allclose(
        real(stock, inputs), expected, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.one_backend
def test_tied_embeddings_are_written_twice_when_asked():
    dense = hub_models.MODELS["LlamaBackbone, tied"]()
    moe = trained(ku.upcycle_model(dense, 4, target="mixtral"))
    check = ku.can_export(moe, "keras_hub")
    assert not check
    assert "untie_embeddings=True" in str(check)
    with pytest.raises(ku.UpcycleError, match="untie_embeddings=True"):
        ku.export_model(moe, "keras_hub")
    stock = ku.export_model(moe, "keras_hub", untie_embeddings=True)
    hidden = models.tokens(2, 3, dense.hidden_dim)
    np.testing.assert_allclose(
        models.array(stock.token_embedding(hidden, reverse=True)),
        models.array(moe.token_embedding(hidden, reverse=True)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.one_backend
def test_a_task_keeps_its_tokenizer_and_its_words():
    backbone = hub_models.MODELS["LlamaBackbone"]()
    preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(
        keras_hub.models.LlamaTokenizer(hub_models.proto()), sequence_length=12
    )
    dense = keras_hub.models.LlamaCausalLM(
        backbone=backbone, preprocessor=preprocessor
    )
    moe = ku.upcycle_model(dense, 4, target="mixtral")
    trained(moe)
    stock = ku.export_model(moe, "keras_hub")
    assert type(stock) is keras_hub.models.MixtralCausalLM
    assert type(stock.preprocessor.tokenizer).__name__ == "MixtralTokenizer"
    assert stock.preprocessor.sequence_length == 12
    said = []
    for model in (moe, stock):
        model.compile(sampler="greedy")
        said.append(model.generate("the quick", max_length=10))
    assert said[0] == said[1]


@pytest.mark.one_backend
def test_frozen_parts_stay_frozen():
    stock = hub_models.MIXTURES["MixtralBackbone"]()
    stock.transformer_layers[0]._sparse_moe_block.expert_bank.trainable = False
    moe = ku.adopt_model(stock)
    again = ku.export_model(moe, "keras_hub")
    assert len(again.trainable_variables) == len(stock.trainable_variables)


def _gpt2():
    return ku.upcycle_model(hub_models.dense("GPT2Backbone"), 4)


def _llama(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first block
        return ku.upcycle_model(
            hub_models.dense("LlamaBackbone"), 4, **settings
        )


def _unequal():
    moe = _llama(target="mixtral")
    first, _ = named_mixtures(moe)
    smaller, _ = ku.prune_experts(moe, keep={first: [0, 1, 2]})
    return smaller


def _int8():
    moe = _llama(target="mixtral")
    moe.quantize("int8")
    return moe


def _lora():
    moe = _llama(target="mixtral")
    moe.enable_lora(2)
    return moe


REASONS = {
    "gpt2": (_gpt2, "GPT2Backbone is not what any target"),
    "plain": (
        lambda: ku.upcycle_model(models.sequential(), 2),
        "no model of KerasHub's",
    ),
    "dense": (
        lambda: hub_models.dense("LlamaBackbone"),
        "holds no MoE layer. Use upcycle_model first",
    ),
    "some blocks": (
        lambda: _llama(router=ku.TopKRouter(2)),
        '1 of its 2 blocks are dense.*layers="all"',
    ),
    "raw weights": (
        lambda: _llama(router=ku.TopKRouter(2, normalize=False), layers=[0, 1]),
        "normalize=False.*TopKRouter\\(normalize=True\\)",
    ),
    "drops": (
        lambda: _llama(
            router=ku.TopKRouter(2, eval_capacity_factor=1.0),
            layers=[0, 1],
        ),
        "eval_capacity_factor=1.0",
    ),
    "another router": (
        lambda: _llama(router=ku.DSMoERouter("top_k", top_k=2), layers=[0, 1]),
        "router is a DSMoERouter",
    ),
    "shared": (
        lambda: _llama(expert_init="shared_experts", layers=[0, 1]),
        "shared_intermediate_dim=",
    ),
    "balanced by a bias": (
        lambda: _llama(
            router=ku.TopKRouter(2, bias_update_rate=0.001),
            layers=[0, 1],
        ),
        "bias_update_rate=0.001",
    ),
    "unequal": (_unequal, "MoE layers differ: num_experts is \\[3, 4\\]"),
    "int8": (_int8, "quantized to 'int8'"),
    "lora": (_lora, "LoRA adapters"),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("why", list(REASONS))
def test_what_cannot_be_said_is_refused_with_what_would_allow_it(why):
    make, message = REASONS[why]
    model = make()
    check = ku.can_export(model, "keras_hub")
    assert not check
    text = str(check).replace("\n", " ")
    assert re.search(message, text), text
    with pytest.raises(ku.UpcycleError, match=r"(?s)cannot be exported"):
        ku.export_model(model, "keras_hub")


@pytest.mark.one_backend
def test_default_moe_is_top_k_when_it_is_served():
    router = ku.DefaultMoERouter(2, eval_capacity_factor=None)
    moe = _llama(router=router, layers=[0, 1])
    assert ku.can_export(moe, "keras_hub")
    router = ku.DefaultMoERouter(2, default_forward="paper")
    moe = _llama(router=router, layers=[0, 1])
    assert not ku.can_export(moe, "keras_hub")


@pytest.mark.one_backend
def test_a_scaled_rotary_embedding_is_refused():
    dense = hub_models.MODELS["Llama3Backbone"](
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=64,
    )
    with pytest.raises(ku.UpcycleError, match="scaled by frequencies"):
        ku.upcycle_model(dense, 4, target="mixtral")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "qwen3_moe"}, "is made from.*Qwen3Backbone"),
        (
            {"target": "mixtral", "router": "expert_choice"},
            "causal|no plain Top-K",
        ),
        ({"target": "mixtral", "layers": [1]}, "blocks are dense"),
        (
            {"target": "mixtral", "router": ku.TopKRouter(1, normalize=False)},
            "normalize=False",
        ),
        ({"target": "mixtral", "recipe": "ds_moe"}, "(?s)is no plain|slices"),
    ],
    ids=["other model", "expert choice", "one block", "raw", "recipe"],
)
def test_a_target_refuses_what_it_could_not_say(settings, message):
    dense = hub_models.dense("LlamaBackbone")
    before = models.weights(dense)
    with pytest.raises(ValueError, match=message):
        ku.upcycle_model(dense, 4, **settings)
    models.assert_same_weights(dense, before)


@pytest.mark.one_backend
@pytest.mark.parametrize("value", ["qwen2_moe", "nonsense", 3, ["mixtral"]])
def test_a_target_must_be_one(value):
    with pytest.raises((TypeError, ValueError), match="`target`"):
        ku.upcycle_model(hub_models.dense("LlamaBackbone"), 4, target=value)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["folder", "dtype"])
def test_settings_of_files_are_for_files(name):
    moe = _llama(target="mixtral")
    with pytest.raises(ValueError, match=f"`{name}` is for"):
        ku.export_model(moe, "keras_hub", **{name: "float32"})

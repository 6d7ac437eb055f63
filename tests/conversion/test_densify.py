"""The way back to dense: exact at first, an average or an expert later."""

import gradients
import keras
import keras_hub
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku

KERAS_HUB = {
    "vit": (models.vit_backbone, models.images),
    "vit_classifier": (models.vit_classifier_with_intermediate, models.images),
    "t5": (models.t5_backbone, models.t5_inputs),
    "t5_plain_lm": (models.t5_lm, models.t5_inputs),
    "transfer": (models.transfer_model, models.images),
}
PAIRS = {
    "pairs": (models.dense_pairs, lambda: models.tokens(3, models.WIDTH)),
    "row": (models.sequential, lambda: models.tokens(3, models.WIDTH)),
}
EVERY = {**KERAS_HUB, **PAIRS}


def upcycled(dense, num_experts=3):
    return ku.upcycle_model(dense, num_experts)


def apart(moe):
    """Moves every weight, so that experts differ."""
    return models.randomized(moe, seed=5)


def back(name, moe, dense, *args):
    if name in PAIRS:
        return ku.densify_model(moe, *args, dense=dense)
    return ku.densify_model(moe, *args)


@pytest.mark.thinned
@pytest.mark.parametrize("name", EVERY)
def test_right_after_upcycling_it_is_the_dense_model(name):
    build, inputs = EVERY[name]
    dense = build()
    found = back(name, upcycled(dense), dense)
    assert type(found) is type(dense)
    assert found.name == dense.name
    assert [v.path for v in found.weights if "norm" not in v.path] == [
        v.path for v in dense.weights if "norm" not in v.path
    ]
    models.assert_same_weights(found, dense)
    x = inputs()
    for a, b in zip(
        np.atleast_1d(models.output(found, x)),
        np.atleast_1d(models.output(dense, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["vit", "t5", "pairs"])
def test_it_averages_or_picks_after_training(name):
    build, _ = EVERY[name]
    dense = build()
    moe = apart(upcycled(dense))
    before = models.weights(moe)
    expected = {
        "average": lambda v: v.mean(axis=0),
        1: lambda v: v[1],
    }
    for how, reduced in expected.items():
        found = back(name, moe, dense, how)
        sites = ku.find_feed_forwards(found)
        numbers = [
            n
            for n, layer in enumerate(_places(dense, moe))
            if isinstance(layer, ku.MoEFeedForward)
        ]
        assert numbers
        for n, layer in zip(numbers, models.mixtures(moe), strict=True):
            for role, expert in (
                ("up", layer.experts.expert_up),
                ("down", layer.experts.expert_down),
            ):
                kernel = sites[n].kernels[f"{role}_kernel"]
                np.testing.assert_allclose(
                    models.array(kernel.value),
                    reduced(models.array(expert.kernel.value)),
                    atol=1e-6,
                )
    models.assert_same_weights(moe, before)


def _places(dense, moe):
    from keras_upcycle import families

    sites = ku.find_feed_forwards(dense)
    return families.family_of(moe).current_layers(moe, sites)


@pytest.mark.one_backend
def test_a_function_decides_and_knows_the_weight_and_the_layer():
    moe = apart(upcycled(models.vit_backbone()))
    seen = []

    def last(values, name, layer):
        seen.append((name, layer.num_experts))
        return values[-1]

    found = ku.densify_model(moe, last)
    roles = ("up_kernel", "up_bias", "down_kernel", "down_bias")
    assert sorted(seen) == sorted((role, 3) for role in roles)
    site = ku.find_feed_forwards(found)[1]
    expected = models.mixtures(moe)[0].experts.expert_up.bias.value[-1]
    np.testing.assert_array_equal(
        models.array(site.kernels["up_bias"].value),
        models.array(expected).reshape(-1),
    )


@pytest.mark.one_backend
def test_a_loaded_model_goes_back_to_a_stock_task(tmp_path):
    dense = models.t5_lm(preprocessor=models.t5_preprocessor())
    upcycled(dense).save(tmp_path / "moe.keras")
    found = ku.densify_model(keras.saving.load_model(tmp_path / "moe.keras"))
    stock = keras_hub.models.T5Seq2SeqLMPreprocessor
    assert type(found.preprocessor) is stock
    assert (
        type(found.preprocessor.tokenizer) is keras_hub.tokenizers.T5Tokenizer
    )
    assert found.preprocessor.encoder_sequence_length == 8
    models.assert_same_weights(found, dense)
    found.save_to_preset(str(tmp_path / "preset"))
    again = keras_hub.models.Seq2SeqLM.from_preset(str(tmp_path / "preset"))
    assert type(again) is keras_hub.models.T5Seq2SeqLM
    models.assert_same_weights(again, dense)


@pytest.mark.one_backend
def test_a_classifier_goes_back_with_its_preprocessor_and_trains():
    dense = models.vit_classifier()
    found = ku.densify_model(upcycled(dense))
    stock = keras_hub.models.ViTImageClassifierPreprocessor
    assert type(found.preprocessor) is stock
    x = models.images(scale=255.0)
    np.testing.assert_allclose(
        found.predict(x, verbose=0), dense.predict(x, verbose=0), atol=1e-6
    )
    found.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    before = models.weights(dense)
    found.fit(x, models.labels(), verbose=0)
    models.assert_same_weights(dense, before)


@pytest.mark.one_backend
def test_frozen_layers_stay_frozen():
    dense = models.vit_backbone()
    dense.get_layer("vit_patching_and_embedding").trainable = False
    found = ku.densify_model(upcycled(dense))
    assert [v.trainable for v in found.weights] == [
        v.trainable for v in dense.weights
    ]


@pytest.mark.one_backend
def test_frozen_statistics_stay_frozen():
    def build():
        inputs = keras.Input((models.WIDTH,))
        x = keras.layers.Dense(models.HIDDEN, "gelu", name="up")(inputs)
        x = keras.layers.Dense(models.WIDTH, name="down")(x)
        return keras.Model(
            inputs, keras.layers.BatchNormalization(name="norm")(x)
        )

    frozen = build()
    frozen.get_layer("norm").trainable = False
    moe = upcycled(frozen)
    found = ku.densify_model(moe, dense=build())
    x = models.tokens(4, models.WIDTH)
    found.compile("sgd", "mse")
    found.fit(x, x, verbose=0)
    models.assert_same_weights(
        found.get_layer("norm"), models.weights(moe.get_layer("norm"))
    )
    # Of the dense model given only the structure is read.
    moe.get_layer("norm").trainable = True
    found = ku.densify_model(moe, dense=frozen)
    assert found.get_layer("norm").trainable


@pytest.mark.one_backend
def test_what_cannot_be_is_said():
    moe = upcycled(models.vit_backbone())
    with pytest.raises(ValueError, match=r"from 0 to 2.*experts=3 for.*moe'"):
        ku.densify_model(moe, 3)
    with pytest.raises(ValueError, match=r"list 1 numbers.*\[0, 1\]"):
        ku.densify_model(moe, [0, 1])
    with pytest.raises(ValueError, match=r"block_2'.*\{'moe': 0\}"):
        ku.densify_model(moe, {"moe": 0})
    with pytest.raises(TypeError, match=r"integers.*experts=1\.0 of"):
        ku.densify_model(moe, [1.0])
    with pytest.raises(TypeError, match="must be 'average'"):
        ku.densify_model(moe, "best")
    with pytest.raises(TypeError, match="passed as `dense=`"):
        ku.densify_model(moe, models.vit_backbone())
    with pytest.raises(ku.UpcycleError, match="at least one MoE layer"):
        ku.densify_model(models.vit_backbone())
    pairs = upcycled(models.dense_pairs())
    with pytest.raises(ku.UpcycleError, match="Pass `dense`"):
        ku.densify_model(pairs)


def test_equal_experts_average_to_themselves_to_the_last_bit():
    dense = models.dense_pairs()
    for variable in dense.weights:
        variable.assign(ops.ones(variable.shape) / 3.0)
    moe = upcycled(dense, 7)
    models.assert_same_weights(ku.densify_model(moe, dense=dense), dense)


# Adapters and int8.


@pytest.mark.one_backend
def test_what_a_copy_would_lose_is_refused():
    moe = upcycled(models.dense_pairs())
    models.mixtures(moe)[0].experts.expert_down.enable_lora(2)
    with pytest.raises(ku.UpcycleError, match=r"expert_down.*Merge them first"):
        ku.densify_model(moe, dense=models.dense_pairs())
    moe = upcycled(models.dense_pairs())
    moe.quantize("int8")
    with pytest.raises(ku.UpcycleError, match="Densify the model before it"):
        ku.densify_model(moe, dense=models.dense_pairs())


@pytest.mark.one_backend
def test_merging_adapters_as_the_message_says_works(tmp_path):
    dense = models.dense_pairs()
    moe, x = apart(upcycled(dense)), models.tokens(3, models.WIDTH)
    experts = models.mixtures(moe)[0].experts
    for projection in experts.projections.values():
        projection.enable_lora(2)
        shape = projection.lora_kernel_b.shape
        projection.lora_kernel_b.assign(models.tokens(*shape))
    moe.save_weights(tmp_path / "merged.weights.h5")
    fresh = upcycled(dense)
    fresh.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(
        models.output(fresh, x), models.output(moe, x), rtol=1e-4, atol=1e-5
    )
    found = ku.densify_model(fresh, 1, dense=dense)
    kernel = ku.find_feed_forwards(found)[1].kernels["up_kernel"]
    np.testing.assert_allclose(
        models.array(kernel),
        models.array(experts.expert_up.kernel)[1],
        rtol=1e-5,
        atol=1e-6,
    )


# One expert.


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["list", "mapping"])
def test_a_model_of_one_expert_from_each_block(kind):
    moe = apart(upcycled(models.t5_backbone()))
    blocks = ["transformer_encoder_layer_1", "transformer_decoder_layer_1"]
    numbers = np.array([2, 0])  # as an `argmax` gives them
    chosen = dict(zip(blocks, numbers, strict=True))
    before = models.weights(moe)
    found = ku.extract_expert(moe, list(numbers) if kind == "list" else chosen)
    assert type(found) is keras_hub.models.T5Backbone
    sites = ku.find_feed_forwards(found)
    for number, site, layer in zip(
        numbers, (sites[1], sites[3]), models.mixtures(moe), strict=True
    ):
        for role, projection in layer.experts.projections.items():
            np.testing.assert_array_equal(
                models.array(site.kernels[f"{role}_kernel"]),
                models.array(projection.kernel)[number],
            )
    models.assert_same_weights(moe, before)


SETTINGS = (
    {},
    {"gated": True, "use_bias": False, "activation": "relu"},
    {"gated": True, "dropout": 0.5, "output_dropout": 0.5},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "gated", "drops"])
def test_one_layers_expert_is_a_small_model(settings, tmp_path):
    layer = ku.MoEFeedForward(3, models.HIDDEN, name="moe", **settings)
    layer.build((None, None, models.WIDTH))
    models.randomized(layer)
    x = models.tokens(2, 5, models.WIDTH)
    weights = gradients.weights_of(layer)
    activation = settings.get("activation", "gelu")
    for number in range(3):
        found = ku.extract_expert(layer, number)
        assert found.name == f"moe_expert_{number}"
        expected = [
            [
                reference.expert(token, weights, number, activation)
                for token in row
            ]
            for row in x.astype("float64")
        ]
        np.testing.assert_allclose(
            models.output(found, x), expected, rtol=1e-4, atol=1e-5
        )
    # Stock layers only, dropouts as the mixture has them.
    found.save(tmp_path / "expert.keras")
    loaded = keras.saving.load_model(tmp_path / "expert.keras")
    assert {type(each).__module__.split(".")[0] for each in loaded.layers} == {
        "keras"
    }
    rates = [each.rate for each in loaded.layers if hasattr(each, "rate")]
    assert rates == [0.5] * (2 if "dropout" in settings else 0)
    before = models.weights(layer)
    found.compile("sgd", "mse")
    found.fit(x, x, verbose=0)
    models.assert_same_weights(layer, before)


def test_an_expert_alone_gives_what_its_layer_gives_its_tokens():
    dense = models.vit_backbone()
    moe = apart(ku.upcycle_model(dense, 1, router="top_k"))
    (layer,) = models.mixtures(moe)
    x = models.tokens(2, 7, models.WIDTH)
    np.testing.assert_allclose(
        models.output(ku.extract_expert(layer, 0), x),
        models.array(layer(x)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.one_backend
def test_an_expert_that_cannot_be_taken_out_is_said():
    layer = ku.MoEFeedForward(3, 8, name="moe")
    with pytest.raises(ValueError, match=r"must be built.*'moe', not built"):
        ku.extract_expert(layer, 0)
    layer.build((None, models.WIDTH))
    for wrong, error in ((3, ValueError), (-1, ValueError), ("a", TypeError)):
        with pytest.raises(error, match=f"expert={wrong!r} "):
            ku.extract_expert(layer, wrong)
    moe = upcycled(models.vit_backbone())
    for wrong in ("average", lambda values, name, layer: values[0]):
        with pytest.raises(TypeError, match=r"`expert`.*`densify_model` also"):
            ku.extract_expert(moe, wrong)
    layer.experts.expert_up.enable_lora(2)
    with pytest.raises(ku.UpcycleError, match=r"expert_up.*Merge them first"):
        ku.extract_expert(layer, 0)

"""What is exported predicts the same, with the default dispatch."""

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle as ku

no_torch = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="KerasHub's dense ViT cannot be exported on torch either",
)
litert = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="Keras exports to LiteRT from TensorFlow, and from torch with a "
    "package that is not installed",
)


@pytest.mark.thinned
@no_torch
@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_a_saved_model_serves_any_batch_size(router, tmp_path):
    import tensorflow as tf

    moe = models.fixed(
        ku.upcycle_model(models.vit_classifier(), 4, router=router)
    )
    path = str(tmp_path / "served")
    moe.export(path, format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(path)
    for batch in (1, 3):
        images = models.images(batch)
        received = np.asarray(served.serve(images))
        expected = models.output(moe, images)
        assert received.shape == (batch, models.CLASSES)
        np.testing.assert_allclose(received, expected, atol=1e-5, rtol=1e-5)


def pairs(shape, **kwargs):
    inputs = keras.Input(shape)
    hidden = layers.Dense(models.HIDDEN, activation="gelu")(inputs)
    dense = keras.Model(inputs, layers.Dense(models.WIDTH)(hidden))
    sizes = [size or 7 for size in shape]
    return (
        ku.upcycle_model(dense, 4, layers=[0], **kwargs),
        lambda batch: models.tokens(batch, *sizes),
    )


def decoder():
    """Causal, with padding."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(30, models.WIDTH, mask_zero=True)(inputs)
    attention = layers.MultiHeadAttention(2, 8)
    x = x + attention(x, x, use_causal_mask=True)
    hidden = layers.Dense(models.HIDDEN, activation="gelu")(x)
    x = x + layers.Dense(models.WIDTH)(hidden)
    dense = keras.Model(inputs, layers.Dense(30)(x))

    def ids(batch):
        found = np.random.default_rng(0).integers(1, 30, (batch, 6))
        found[-1, 4:] = 0
        return found.astype("int32")

    return ku.upcycle_model(dense, 4, layers=[0]), ids


def vit(router):
    model = ku.upcycle_model(models.vit_classifier(), 4, router=router)
    return model, models.images


EXPORTED = {
    "top_k": lambda: pairs((5, models.WIDTH)),
    "rank_2": lambda: pairs((models.WIDTH,)),
    "any_length": lambda: pairs((None, models.WIDTH)),
    "many_tokens": lambda: pairs((300, models.WIDTH)),
    "expert_choice": lambda: pairs((5, models.WIDTH), router="expert_choice"),
    "expert_choice_any_length": lambda: pairs(
        (None, models.WIDTH), router="expert_choice"
    ),
    "buffers": lambda: pairs((5, models.WIDTH), dispatch="capacity"),
    "dense": lambda: pairs((5, models.WIDTH), dispatch="dense"),
    "default_moe": lambda: pairs((5, models.WIDTH), router="default_moe"),
    "ds_moe": lambda: pairs((5, models.WIDTH), router="ds_moe"),
    "shared": lambda: pairs((5, models.WIDTH), expert_init="shared_experts"),
    "decoder": decoder,
    "vit_top_k": lambda: vit("top_k"),
    "vit_expert_choice": lambda: vit("expert_choice"),
}


@litert
@pytest.mark.parametrize("kind", EXPORTED)
def test_litert_predicts_the_same(kind, tmp_path):
    import tensorflow as tf

    moe, inputs = EXPORTED[kind]()
    models.fixed(moe)
    path = str(tmp_path / "model.tflite")
    moe.export(path, format="litert", verbose=False)
    served = tf.lite.Interpreter(path).get_signature_runner()
    (name,) = served.get_input_details()
    for batch in (1, 2):
        x = inputs(batch)
        (received,) = served(**{name: x}).values()
        np.testing.assert_allclose(
            received, models.output(moe, x), atol=1e-5, rtol=1e-5
        )


RECORDED = {
    name: EXPORTED[name]
    for name in (
        "top_k",
        "rank_2",
        "many_tokens",
        "expert_choice",
        "buffers",
        "dense",
        "default_moe",
        "shared",
        "decoder",
    )
}


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="only torch writes a model down from one example",
)
@pytest.mark.parametrize("kind", RECORDED)
def test_what_torch_recorded_serves_other_routings(kind):
    """As for ONNX, whose packages are not needed for it."""
    import torch

    moe, inputs = RECORDED[kind]()
    models.fixed(moe).eval()
    first, second = (torch.as_tensor(x) for x in _two_batches(inputs))
    with torch.no_grad():
        recorded = torch.jit.trace(moe, (first,), check_trace=False)
        received = models.array(recorded(second))
    np.testing.assert_allclose(
        received, models.output(moe, second), atol=1e-5, rtol=1e-5
    )


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="only torch writes a model down from one example",
)
def test_an_engine_that_cannot_be_recorded_says_which_can():
    import torch

    moe, inputs = pairs((5, models.WIDTH), dispatch="dropless")
    x = torch.as_tensor(inputs(2))
    with pytest.raises(ValueError, match=r'dispatch="dropless"[\s\S]*"dense"'):
        torch.jit.trace(moe.eval(), (x,), check_trace=False)


def _two_batches(inputs):
    """Of one shape, and of other routings."""
    x = inputs(6)
    return x[:3], x[3:]

"""Tiny dense models of every family, inputs that fit them, and their weights.

Builders, not fixtures: a test that trains a model must get its own.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
from keras import layers, ops

from keras_upcycle import MoEFeedForward, keras_internals

WIDTH = 16
HIDDEN = 32
CLASSES = 3
IMAGE = (16, 16, 3)


def vit_backbone(num_layers=2, **kwargs):
    """17 tokens: a class token and 4 x 4 patches."""
    settings = {
        "image_shape": IMAGE,
        "patch_size": 4,
        "num_layers": num_layers,
        "num_heads": 2,
        "hidden_dim": WIDTH,
        "mlp_dim": HIDDEN,
        **kwargs,
    }
    return randomized(keras_hub.models.ViTBackbone(**settings))


def vit_classifier(backbone=None, **kwargs):
    """With a preprocessor that rescales."""
    converter = keras_hub.layers.ViTImageConverter(
        image_size=IMAGE[:2], scale=1 / 255
    )
    settings = {
        "backbone": backbone or vit_backbone(),
        "num_classes": CLASSES,
        "preprocessor": keras_hub.models.ViTImageClassifierPreprocessor(
            image_converter=converter
        ),
        **kwargs,
    }
    return randomized(keras_hub.models.ViTImageClassifier(**settings))


def vit_classifier_with_intermediate():
    return vit_classifier(
        intermediate_dim=8,
        pooling="gap",
        dropout=0.1,
        activation="softmax",
        name="my_classifier",
    )


def transfer_model(num_layers=2):
    """Augmentation, a backbone as a layer, a slice, a head."""
    augmentation = keras.Sequential(
        [layers.Rescaling(1 / 255), layers.RandomFlip("horizontal", seed=1)],
        name="augmentation",
    )
    inputs = keras.Input(IMAGE, name="pixels")
    x = vit_backbone(num_layers, name="trunk")(augmentation(inputs))
    outputs = layers.Dense(CLASSES, name="head")(x[:, 0])
    return randomized(keras.Model(inputs, outputs, name="transfer"))


def dense_pairs(shape=(WIDTH,), blocks=2, name="pairs"):
    """Residual feed-forward blocks in a functional model, then a head."""
    x = inputs = keras.Input(shape, name="features")
    for block in range(blocks):
        hidden = layers.Dense(HIDDEN, activation="gelu", name=f"up_{block}")(x)
        x = layers.add([x, layers.Dense(WIDTH, name=f"down_{block}")(hidden)])
    outputs = layers.Dense(CLASSES, name="head")(x)
    return randomized(keras.Model(inputs, outputs, name=name))


def sequence_dense_pairs():
    return dense_pairs((6, WIDTH), name="sequence_pairs")


def sequential():
    """Two blocks, one of them with activation and dropout between."""
    return randomized(
        keras.Sequential(
            [
                keras.Input((WIDTH,)),
                layers.Dense(HIDDEN, activation="relu"),
                layers.Dense(WIDTH),
                layers.Dense(HIDDEN),
                layers.Activation("gelu"),
                layers.Dropout(0.1),
                layers.Dense(WIDTH),
                layers.Dense(CLASSES),
            ],
            name="row",
        )
    )


def fixed(model, seed=0):
    """Weights from NumPy: the same on every backend, experts all different."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            value = rng.normal(scale=0.3, size=variable.shape)
            if variable.name == "gamma":
                value = value + 1.0
            variable.assign(value.astype("float32"))
    return set_routers(model, seed, scale=0.25)


def images(batch=4, seed=0, scale=1.0):
    """Float images in `[0, scale)`."""
    values = np.random.default_rng(seed).random((batch, *IMAGE))
    return (scale * values).astype("float32")


def tokens(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype("float32")


def labels(batch=4):
    return np.arange(batch) % CLASSES


class Case(NamedTuple):
    """A row of the contract table.

    `converted` are the blocks that upcycling chooses by itself, `router` the
    name of the router that they get.
    """

    name: str
    build: Callable[[], keras.Model]
    inputs: Callable[[], Any]
    blocks: int
    converted: tuple[int, ...]
    router: str


CASES = (
    Case("vit_backbone", vit_backbone, images, 2, (1,), "ExpertChoiceRouter"),
    Case(
        "vit_backbone_4_blocks",
        lambda: vit_backbone(4),
        images,
        4,
        (2, 3),
        "ExpertChoiceRouter",
    ),
    Case(
        "vit_backbone_without_biases",
        lambda: vit_backbone(use_mlp_bias=False),
        images,
        2,
        (1,),
        "ExpertChoiceRouter",
    ),
    Case(
        "vit_classifier", vit_classifier, images, 2, (1,), "ExpertChoiceRouter"
    ),
    Case(
        "vit_classifier_with_intermediate",
        vit_classifier_with_intermediate,
        images,
        2,
        (1,),
        "ExpertChoiceRouter",
    ),
    Case(
        "transfer_model",
        transfer_model,
        lambda: images(scale=255.0),
        2,
        (1,),
        "ExpertChoiceRouter",
    ),
    Case(
        "dense_pairs",
        dense_pairs,
        lambda: tokens(5, WIDTH),
        2,
        (1,),
        "TopKRouter",
    ),
    Case(
        "sequence_dense_pairs",
        sequence_dense_pairs,
        lambda: tokens(3, 6, WIDTH),
        2,
        (1,),
        "TopKRouter",
    ),
    Case(
        "sequential",
        sequential,
        lambda: tokens(5, WIDTH),
        2,
        (1,),
        "TopKRouter",
    ),
)


def randomized(model, seed=0):
    """Moves every weight, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            noise = rng.normal(scale=0.1, size=variable.shape)
            variable.assign_add(ops.cast(noise, variable.dtype))
    return model


def mixtures(model):
    """Every `MoEFeedForward` of a model, inputs first."""
    if isinstance(model, MoEFeedForward):
        return [model]
    below = [
        found
        for layer in keras_internals.sublayers(model)
        for found in mixtures(layer)
    ]
    return list({id(layer): layer for layer in below}.values())


def set_routers(model, seed=0, scale=1.0):
    """Router kernels from NumPy: the same on every backend."""
    rng = np.random.default_rng(seed)
    for layer in mixtures(model):
        kernel = layer.router.kernel
        kernel.assign(scale * rng.normal(size=kernel.shape).astype("float32"))
    return model


def quantize(model):
    """To int8.

    Keras collects garbage after every layer: without the frameworks' own
    objects, which are frozen meanwhile, that takes no time.
    """
    gc.freeze()
    model.quantize("int8")
    gc.unfreeze()


def array(tensor):
    """A float tensor of any width as a float32 array."""
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def output(model, inputs):
    """What the model predicts, as an array, or a list of them."""
    predicted = model(inputs, training=False)
    if isinstance(predicted, (dict, list, tuple)):
        return [array(x) for x in keras.tree.flatten(predicted)]
    return array(predicted)


def weights(model):
    """Copies of all weights, random states included."""
    return [ops.convert_to_numpy(v.value).copy() for v in model.weights]


def assert_same_weights(model, expected):
    """Bit for bit; `expected` is a model or what `weights` gave for one."""
    if isinstance(expected, keras.Model):
        expected = weights(expected)
    for got, wanted in zip(weights(model), expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def relative_gap(received, expected):
    """Largest absolute difference over the largest absolute expected value."""
    return float(np.max(np.abs(received - expected)) / np.max(np.abs(expected)))

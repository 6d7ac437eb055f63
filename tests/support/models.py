"""Tiny dense models of every family, inputs that fit them, and their weights.

Builders, not fixtures: a test that trains a model must get its own.
"""

import functools
import io
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
VOCABULARY = 40
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


def t5_backbone(num_layers=2, **kwargs):
    """T5 1.1's shape: gated, embeddings of its own for the logits."""
    settings = {
        "vocabulary_size": VOCABULARY,
        "num_layers": num_layers,
        "num_heads": 2,
        "hidden_dim": WIDTH,
        "intermediate_dim": HIDDEN,
        "key_value_dim": 6,
        "activation": "gelu",
        "use_gated_activation": True,
        "tie_embedding_weights": False,
        **kwargs,
    }
    return randomized(keras_hub.models.T5Backbone(**settings))


def t5_lm(backbone=None, **kwargs):
    """The first T5's shape: ReLU, not gated, tied embeddings."""
    if backbone is None:
        backbone = t5_backbone(
            activation="relu",
            use_gated_activation=False,
            tie_embedding_weights=True,
        )
    return keras_hub.models.T5Seq2SeqLM(backbone, **kwargs)


def t5_inputs(batch=3, source=6, target=5, seed=0, lengths=None):
    """Ids and masks; `lengths` are `(source, target)` of each example."""
    rng = np.random.default_rng(seed)
    lengths = lengths or [(source, target)] * batch
    inputs = {}
    for place, (stack, size) in enumerate(
        (("encoder", source), ("decoder", target))
    ):
        ids = rng.integers(3, VOCABULARY, size=(len(lengths), size))
        real = np.array([length[place] for length in lengths])
        mask = np.arange(size) < real[:, None]
        inputs[f"{stack}_token_ids"] = ids.astype("int32")
        inputs[f"{stack}_padding_mask"] = mask.astype("int32")
    return inputs


# A dense model and inputs for it, of each kind whose MoE layers are replaced.
EVERY_KIND = {
    "vit_classifier": (
        lambda: vit_classifier(vit_backbone(3)),
        lambda: images(),
    ),
    "t5_lm": (lambda: t5_lm(t5_backbone()), t5_inputs),
    "transfer": (transfer_model, lambda: images()),
    "pairs": (sequence_dense_pairs, lambda: tokens(3, 6, WIDTH)),
    "row": (sequential, lambda: tokens(5, WIDTH)),
}


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
    name of the router that they get, or of each of them. `stacks` is `None`
    for a model of one stack, which takes lists of blocks as they are.
    """

    name: str
    build: Callable[[], keras.Model]
    inputs: Callable[[], Any]
    blocks: int
    converted: tuple[int, ...]
    router: str | tuple[str, ...]
    stacks: tuple[str, ...] | None = None

    @property
    def everything(self):
        """`layers=` for all blocks, the first ones too."""
        if self.stacks is None:
            return range(self.blocks)
        each = list(range(self.blocks // len(self.stacks)))
        return dict.fromkeys(self.stacks, each)


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
    Case(
        "t5_backbone",
        t5_backbone,
        t5_inputs,
        4,
        (1, 3),
        ("ExpertChoiceRouter", "TopKRouter"),
        ("encoder", "decoder"),
    ),
    Case(
        "t5_lm",
        t5_lm,
        t5_inputs,
        4,
        (1, 3),
        ("ExpertChoiceRouter", "TopKRouter"),
        ("encoder", "decoder"),
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


def array(tensor):
    """A float tensor of any width as a float32 array."""
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def output(model, inputs):
    """What the model predicts, as an array, or a list of them.

    Sequences of several stacks come as one, one after the other.
    """
    predicted = model(inputs, training=False)
    if (
        isinstance(predicted, dict)
        and len({x.ndim for x in predicted.values()}) == 1
    ):
        return np.concatenate([array(x) for x in predicted.values()], axis=1)
    if isinstance(predicted, (dict, list, tuple)):
        return [array(x) for x in keras.tree.flatten(predicted)]
    return array(predicted)


def weights(model):
    """Copies of all weights, random states included."""
    return [ops.convert_to_numpy(v).copy() for v in model.weights]


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


@functools.cache
def t5_proto():
    """A SentencePiece model of a few words, as T5 numbers its pieces."""
    import sentencepiece

    text = [
        "the quick brown fox jumped over the lazy dog",
        "airplane at airport",
    ]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 10),
        model_writer=written,
        vocab_size=VOCABULARY - 2,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


def t5_preprocessor(source=8, target=6):
    return keras_hub.models.T5Seq2SeqLMPreprocessor(
        keras_hub.tokenizers.T5Tokenizer(proto=t5_proto()),
        encoder_sequence_length=source,
        decoder_sequence_length=target,
    )

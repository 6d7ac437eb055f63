"""The copy of a model: same graph, same state, nothing shared."""

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle
from keras_upcycle import UpcycleError
from keras_upcycle.families import surgery


def copied(model, replace=lambda layer: None):
    return surgery.copy_model(model, replace)


def test_a_copy_computes_the_same_and_shares_no_weight():
    model, x = models.dense_pairs(), models.tokens(3, models.WIDTH)
    new = copied(model)
    np.testing.assert_array_equal(
        models.output(new, x), models.output(model, x)
    )
    models.assert_same_weights(new, model)
    assert not {id(v) for v in new.weights} & {id(v) for v in model.weights}


@pytest.mark.one_backend
def test_a_copied_sequential_stays_one():
    model, x = models.sequential(), models.tokens(3, models.WIDTH)
    new = copied(model)
    assert type(new) is keras.Sequential
    assert [layer.name for layer in new.layers] == [
        layer.name for layer in model.layers
    ]
    np.testing.assert_array_equal(
        models.output(new, x), models.output(model, x)
    )


@pytest.mark.one_backend
def test_shared_layers_stay_shared_and_outputs_keep_their_structure():
    shared = layers.Dense(models.WIDTH, name="shared")
    a, b = (keras.Input((models.WIDTH,), name=name) for name in "ab")
    x = ops.split(shared(a), 2, axis=-1)
    y = ops.sum(shared(b), axis=-1, keepdims=True)
    outputs = {"left": x[0] * y, "right": [x[1], layers.ReLU()(y)]}
    model = models.randomized(keras.Model([a, b], outputs))
    new = copied(model)
    assert len(new.weights) == len(model.weights) == 2
    inputs = [models.tokens(3, models.WIDTH, seed=seed) for seed in (1, 2)]
    received, expected = new(inputs), model(inputs)
    keras.tree.assert_same_structure(received, expected)
    for got, wanted in zip(
        keras.tree.flatten(received), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_array_equal(models.array(got), models.array(wanted))


def test_nested_models_are_copied_with_their_random_state():
    inner = keras.Sequential(
        [
            keras.Input((models.WIDTH,)),
            layers.GaussianNoise(1.0, seed=3),
            layers.Dense(models.WIDTH),
        ],
        name="inner",
    )
    inputs = keras.Input((models.WIDTH,))
    model = keras.Model(inputs, layers.Dense(2)(inner(inputs)))
    x = models.tokens(3, models.WIDTH)
    model(x, training=True)  # moves the noise's seed on
    new = copied(model)
    first = models.array(model(x, training=True))
    assert np.any(first != models.array(model(x, training=True)))
    np.testing.assert_array_equal(first, models.array(new(x, training=True)))


def test_batch_statistics_are_copied():
    model = keras.Sequential(
        [keras.Input((models.WIDTH,)), layers.BatchNormalization()]
    )
    model(models.tokens(8, models.WIDTH) + 3.0, training=True)
    new = copied(model)
    assert np.any(models.weights(model)[2] != 0.0)
    models.assert_same_weights(new, model)


@pytest.mark.one_backend
def test_trainable_flags_are_copied_at_every_depth():
    backbone = models.vit_backbone()
    blocks = backbone.get_layer("vit_encoder").encoder_layers
    blocks[0].trainable = False
    blocks[1].mha.trainable = False
    new = type(backbone).from_config(backbone.get_config())
    surgery.copy_state(backbone, new)
    assert [v.trainable for v in new.weights] == [
        v.trainable for v in backbone.weights
    ]
    models.assert_same_weights(new, backbone)


@pytest.mark.one_backend
def test_a_frozen_model_is_copied_frozen():
    model = models.dense_pairs()
    model.trainable = False
    assert not copied(model).trainable_weights


@pytest.mark.one_backend
def test_replacing_a_layer_and_removing_another():
    model, x = models.dense_pairs(blocks=1), models.tokens(3, models.WIDTH)
    up, down = model.get_layer("up_0"), model.get_layer("down_0")
    marker = layers.Rescaling(2.0, name="twice")
    answers = {id(up): marker, id(down): surgery.REMOVED}
    new = copied(model, lambda layer: answers.get(id(layer)))
    names = [layer.name for layer in new.layers]
    assert "twice" in names
    assert "up_0" not in names
    assert not any("down_0" in name for name in names)
    head = model.get_layer("head")
    expected = models.array(head(3.0 * x))  # x + 2 x
    np.testing.assert_allclose(models.output(new, x), expected, rtol=1e-5)


@pytest.mark.one_backend
def test_removing_a_layer_of_a_sequential():
    model, x = models.sequential(), models.tokens(3, models.WIDTH)
    gone = model.layers[:2]
    new = copied(
        model, lambda layer: surgery.REMOVED if layer in gone else None
    )
    expected = x
    for layer in model.layers[2:]:
        expected = layer(expected)
    np.testing.assert_allclose(
        models.output(new, x), models.array(expected), rtol=1e-6
    )


@pytest.mark.one_backend
def test_the_copy_of_a_compiled_model_is_not_compiled():
    """Compiling it would build optimizer slots that nobody asked for."""
    model = models.dense_pairs()
    model.compile("adam", "mse")
    assert not copied(model).compiled
    assert model.compiled


class Forgetful(layers.Layer):
    """Its config leaves out what its constructor needs."""

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, x):
        return x * self.scale

    def get_config(self):
        return {"name": self.name}


@pytest.mark.one_backend
def test_a_layer_with_an_incomplete_config_is_named():
    inputs = keras.Input((models.WIDTH,))
    outputs = Forgetful(2.0, name="forgetful")(inputs)
    with pytest.raises(
        UpcycleError, match=r"(?s)'forgetful' \(Forgetful\).*complete its"
    ):
        copied(keras.Model(inputs, outputs))


@pytest.mark.one_backend
def test_copy_state_names_layers_that_do_not_match():
    a = layers.Dense(3, name="narrow")
    b = layers.Dense(4, name="wide")
    for layer in (a, b):
        layer.build((None, 2))
    with pytest.raises(UpcycleError, match=r"'narrow'.*'wide'.*shape"):
        surgery.copy_state(a, b)
    with pytest.raises(UpcycleError, match="types differ"):
        surgery.copy_state(a, layers.ReLU())
    pair = [models.dense_pairs(blocks=blocks) for blocks in (1, 2)]
    with pytest.raises(UpcycleError, match="sub-layers"):
        surgery.copy_state(*pair)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (models.dense_pairs, True),
        (models.sequential, True),
        (models.vit_backbone, False),
        (models.vit_classifier, False),
        (lambda: layers.Dense(3), False),
    ],
    ids=["functional", "sequential", "backbone", "task", "layer"],
)
def test_only_unsubclassed_models_are_plain(make, plain):
    assert surgery.is_plain_model(make()) is plain


def test_weights_that_are_frozen_alone_stay_so():
    model = models.dense_pairs()
    model.get_layer("up_0").bias.trainable = False
    assert [v.path for v in copied(model).trainable_weights] == [
        v.path for v in model.trainable_weights
    ]


@pytest.mark.one_backend
def test_a_frozen_layer_is_frozen_as_a_layer():
    """Frozen weights are not enough: the averages would go on moving."""
    x = inputs = keras.Input((8,))
    x = keras.layers.BatchNormalization(name="norm", trainable=False)(x)
    hidden = keras.layers.Dense(16, activation="relu")(x)
    outputs = keras.layers.Dense(8)(hidden)
    dense = models.randomized(keras.Model(inputs, outputs))
    moe = keras_upcycle.upcycle_model(dense, 2)
    norm = moe.get_layer("norm")
    assert not norm.trainable
    before = models.array(norm.moving_mean)
    moe.compile("sgd", "mse")
    data = models.tokens(16, 8)
    moe.fit(data, data, verbose=0)
    np.testing.assert_array_equal(models.array(norm.moving_mean), before)

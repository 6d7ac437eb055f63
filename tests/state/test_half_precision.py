"""Weights of half precision: the warning is where and only where it is due."""

import warnings

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku

D = 6


def pair(policy, rest=None, **compiled):
    x = keras.Input((D,), dtype="float32")
    hidden = keras.layers.Dense(16, activation="relu", dtype=policy)(x)
    hidden = keras.layers.Dense(D, dtype=policy)(hidden)
    model = keras.Model(x, keras.layers.Dense(D, dtype=rest or policy)(hidden))
    if compiled:
        model.compile(**compiled)
    return model


def told(make, *args, **kwargs):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = make(*args, **kwargs)
    lines = [str(w.message) for w in seen if w.filename == __file__]
    return result, [line for line in lines if "mixed_bfloat16" in line]


def convert(model, **kwargs):
    return ku.upcycle_model(model, 2, router="top_k", layers="all", **kwargs)


@pytest.mark.one_backend
@pytest.mark.parametrize("compiled", [{}, {"optimizer": "adam", "loss": "mse"}])
@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_told_once_at_the_users_line(policy, compiled):
    _, lines = told(convert, pair(policy, **compiled))
    (line,) = lines
    assert "6 of 6 trainable weights of 'functional" in line
    assert f"are {policy}" in line
    assert 'dtype="mixed_bfloat16"' in line
    assert "\n" not in line


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "policy", ["float32", "mixed_bfloat16", "mixed_float16"]
)
def test_not_told_where_weights_are_float32(policy):
    assert not told(convert, pair(policy, optimizer="adam", loss="mse"))[1]


@pytest.mark.one_backend
def test_single_layers_are_counted():
    _, (line,) = told(convert, pair("bfloat16", rest="float32"))
    assert "4 of 6 trainable weights" in line


@pytest.mark.one_backend
def test_frozen_weights_need_no_precision():
    dense = pair("bfloat16", rest="float32")
    for layer in dense.layers[1:3]:
        layer.trainable = False
    assert not told(convert, dense)[1]


@pytest.mark.one_backend
def test_the_way_back_is_told_only_where_it_goes_on_training():
    dense = pair("bfloat16", optimizer="sgd", loss="mse")
    moe = convert(dense)
    keep = {layer.name: [0, 1] for layer in models.mixtures(moe)}

    def smaller():
        return told(ku.prune_experts, moe, keep=keep)[1]

    def again():
        return told(ku.densify_model, moe, dense=dense)[1]

    assert not smaller()
    assert not again()
    x = np.ones((4, D), "float32")
    moe.fit(x, x, verbose=0)
    assert len(smaller()) == 1
    assert len(again()) == 1


OPTIMIZERS = keras.optimizers
STILL = ["Adam", "AdamW", "Lamb"]
TRAIN = {
    "SGD": {"learning_rate": 0.1},
    "RMSprop": {"learning_rate": 0.01},
    "Adamax": {"learning_rate": 0.01},
    "Adafactor": {"learning_rate": 0.01},
    "Lion": {"learning_rate": 0.01},
    "Adam": {"learning_rate": 0.01, "beta_2": 0.99},
}


def share_moved(optimizer, policy):
    """Of the weights, after a few steps of a regression."""
    keras.utils.set_random_seed(0)
    model = pair(policy, optimizer=optimizer, loss="mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(64, D)).astype("float32")
    before = [_float(v) for v in model.trainable_variables]
    model.fit(x, np.tanh(x), epochs=2, verbose=0)
    after = [_float(v) for v in model.trainable_variables]
    moved = [np.mean(a != b) for a, b in zip(before, after, strict=True)]
    assert all(np.all(np.isfinite(a)) for a in after)
    return np.mean(moved)


def _float(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable.value, "float32")))


@pytest.mark.thinned
@pytest.mark.parametrize("name", STILL)
def test_what_the_warning_says_of_optimizers_that_move_nothing(name):
    make = getattr(OPTIMIZERS, name)
    assert share_moved(make(0.01), "bfloat16") == 0.0
    assert share_moved(make(0.01), "mixed_bfloat16") > 0.9


@pytest.mark.thinned
@pytest.mark.parametrize("name", TRAIN)
def test_what_the_warning_says_of_optimizers_that_train(name):
    make = getattr(OPTIMIZERS, name)
    assert share_moved(make(**TRAIN[name]), "bfloat16") > 0.5

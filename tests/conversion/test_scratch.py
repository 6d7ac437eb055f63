"""A mixture from scratch: of the same shape, and nothing of the dense one."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

BUILD = {
    "vit": models.vit_backbone,
    "vit task": models.vit_classifier,
    "t5": models.t5_backbone,
    "t5 task": models.t5_lm,
    "transfer": models.transfer_model,
    "pairs": models.dense_pairs,
    "sequential": models.sequential,
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", BUILD)
def test_its_shape_is_that_of_the_upcycled_model_and_its_values_are_new(name):
    dense = models.randomized(BUILD[name]())
    before = models.weights(dense)
    arguments = {"router": "top_k", "layers": [1]}
    if name.startswith("t5"):
        arguments["layers"] = {"encoder": [1], "decoder": [1]}
    moe = ku.upcycle_model(dense, 3, **arguments)
    scratch = ku.mixture_from_scratch(dense, 3, **arguments)
    assert type(scratch) is type(moe)
    shapes = [[v.shape for v in m.weights] for m in (moe, scratch)]
    assert shapes[0] == shapes[1]
    models.assert_same_weights(dense, before)
    drawn = 0
    for a, b in zip(
        moe.trainable_variables, scratch.trainable_variables, strict=True
    ):
        # `randomized` leaves no dense weight as it was initialised.
        assert np.any(models.array(a.value) != models.array(b.value)), a.path
        drawn += 1
    assert drawn > 8
    for layer in models.mixtures(scratch):
        kernels = models.array(layer.experts.expert_up.kernel)
        assert np.any(kernels[0] != kernels[1])


def test_draws_follow_keras_global_seed():
    dense = models.dense_pairs()

    def draw(seed):
        keras.utils.set_random_seed(seed)
        return ku.mixture_from_scratch(dense, 2)

    models.assert_same_weights(draw(1), draw(1))
    one, two = draw(1), draw(2)
    assert np.any(models.weights(one)[0] != models.weights(two)[0])


@pytest.mark.one_backend
def test_what_was_adapted_to_the_data_stays():
    x = np.random.default_rng(0).normal(50.0, 20.0, (64, 8)).astype("float32")
    norm = keras.layers.Normalization()
    norm.adapt(x)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(16, activation="relu")(norm(inputs))
    dense = keras.Model(inputs, keras.layers.Dense(8)(hidden))
    scratch = ku.mixture_from_scratch(dense, 2, layers=[0])
    found = next(
        layer for layer in scratch.layers if hasattr(layer, "input_mean")
    )
    np.testing.assert_allclose(
        models.array(found(x)), models.array(norm(x)), rtol=1e-5
    )


def test_it_trains_and_is_compiled_as_the_dense_model():
    dense = models.dense_pairs()
    dense.compile(keras.optimizers.SGD(0.01), "mse")
    scratch = ku.mixture_from_scratch(dense, 2)
    before = models.weights(scratch)
    x = models.array(models.tokens(8, models.WIDTH))
    outputs = models.array(dense(x))
    scratch.fit(x, np.ones_like(outputs), verbose=0)
    assert any(
        np.any(a != b)
        for a, b in zip(before, models.weights(scratch), strict=True)
    )
    assert isinstance(scratch.optimizer, keras.optimizers.SGD)


@pytest.mark.one_backend
def test_frozen_weights_are_refused_by_name():
    dense = models.dense_pairs()
    layer = next(each for each in dense.layers if each.trainable_variables)
    layer.trainable = False
    with pytest.raises(
        ku.UpcycleError, match=f"'{layer.name}'.*trainable = True"
    ):
        ku.mixture_from_scratch(dense, 2)

"""Files keep where noise and dropout stand; those that do not still load."""

import keras
import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import keras_internals
from keras_upcycle.state import random_state

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")

NOISY = {"noise_stddev": 0.5, "load_balance_loss": 0.0, "capacity_factor": None}


def layer_model(dropout=0.5, output_dropout=0.5, **settings):
    """A mixture with noise and two dropouts, all seeded from outside."""
    layer = ku.MoEFeedForward(
        4,
        models.HIDDEN,
        ku.TopKRouter(2, **{**NOISY, **settings}),
        dropout=dropout,
        output_dropout=output_dropout,
        name="moe",
    )
    model = keras.Sequential([keras.Input((6, models.WIDTH)), layer])
    return models.fixed(model)


def states(model):
    found = keras_internals.seed_states(model)
    return np.stack([keras.ops.convert_to_numpy(s.value) for s in found])


def run(model, inputs):
    return models.array(model(inputs, training=True))


@pytest.mark.parametrize("name", ["moe.keras", "moe.weights.h5"])
def test_noise_and_dropout_go_on_after_loading(name, tmp_path):
    model, inputs = layer_model(), models.tokens(2, 6, models.WIDTH)
    first = run(model, inputs)
    if name == "moe.keras":
        model.save(tmp_path / name)
        again = keras.saving.load_model(tmp_path / name)
    else:
        model.save_weights(tmp_path / name)
        again = layer_model()
        assert np.any(states(again) != states(model))
        again.load_weights(tmp_path / name)
    np.testing.assert_array_equal(states(again), states(model))
    second = run(model, inputs)
    assert np.abs(second - first).max() > 1e-3
    if keras.backend.backend() != "torch":  # whose dropout has its own state
        np.testing.assert_array_equal(run(again, inputs), second)


def test_router_noise_goes_on_after_loading(tmp_path):
    model = layer_model(dropout=0.0, output_dropout=0.0)
    inputs = models.tokens(2, 6, models.WIDTH)
    first = run(model, inputs)
    model.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    second = run(model, inputs)
    assert np.abs(second - first).max() > 1e-3
    np.testing.assert_array_equal(run(again, inputs), second)


def noisy(dense):
    return ku.upcycle_model(dense, 2, router=ku.TopKRouter(1, **NOISY))


@pytest.mark.thinned
@pytest.mark.parametrize(
    "build",
    [
        lambda: models.vit_classifier(
            models.vit_backbone(dropout_rate=0.1), dropout=0.1
        ),
        lambda: models.t5_lm(),
    ],
    ids=["vit", "t5"],
)
def test_all_seeds_of_kerashubs_models_are_kept(build, tmp_path):
    moe = noisy(build())
    for number, state in enumerate(keras_internals.seed_states(moe)):
        state.assign(np.array([number + 7, number]).astype(state.dtype))
    assert len(states(moe)) > 5
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(states(again), states(moe))


def test_presets_keep_seeds(tmp_path):
    moe = noisy(models.vit_backbone(dropout_rate=0.1))
    moe.save_to_preset(str(tmp_path / "preset"))
    again = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(states(again), states(moe))


def test_a_file_without_states_loads_and_leaves_the_seeds(
    tmp_path, monkeypatch
):
    """As all files were once."""
    path = tmp_path / "old.weights.h5"
    with monkeypatch.context() as patch:
        patch.delattr(random_state.KeepsRandomState, "save_own_variables")
        layer_model().save_weights(path)
    model, other = layer_model(), layer_model()
    before = states(other)
    other.load_weights(path)
    np.testing.assert_array_equal(states(other), before)
    models.assert_same_weights(other, models.weights(model))


def test_states_of_another_number_of_seeds_are_left_alone(tmp_path):
    path = tmp_path / "moe.weights.h5"
    layer_model().save_weights(path)
    for other in (layer_model(dropout=0.0), layer_model(noise_stddev=0.0)):
        before = states(other)
        other.load_weights(path)
        np.testing.assert_array_equal(states(other), before)


def test_a_model_without_random_numbers_saves_nothing_more():
    model = layer_model(0.0, 0.0, noise_stddev=0.0)
    store = {}
    model.layers[0].save_own_variables(store)
    assert store == {}


def test_states_of_every_backend_fit_every_other():
    """uint32 on JAX, int64 on TensorFlow, int32 on torch."""
    layer = layer_model(0.0, 0.0).layers[0]
    (state,) = keras_internals.seed_states(layer)
    layer.load_own_variables({"seeds": np.array([[2**32 - 5, 3]])})
    value = keras.ops.convert_to_numpy(state.value)
    np.testing.assert_array_equal(value.astype("uint32"), [2**32 - 5, 3])
    store = {}
    layer.save_own_variables(store)
    assert store["seeds"].dtype == "int64"
    layer.load_own_variables({"seeds": store["seeds"]})
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(state.value), value
    )


@pytest.mark.one_backend
def test_weights_that_do_not_fit_are_still_refused():
    layer = layer_model(0.0, 0.0).layers[0]
    with pytest.raises(ValueError, match="variables"):
        layer.load_own_variables({"0": np.zeros(3), "seeds": np.ones((1, 2))})

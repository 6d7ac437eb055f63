"""Files of adapters hold what trained with them."""

import warnings

import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku

ADAPTED = ["expert_up", "expert_gate", "expert_down"]
BUILDS = {
    "vit": (models.vit_backbone, models.images),
    "t5": (models.t5_backbone, models.t5_inputs),
}


def two_of(build):
    dense = BUILDS[build][0]()
    return [ku.upcycle_model(dense, 4, seed=0) for _ in "ab"]


def trained(model):
    """As if it had been: all that trains has moved."""
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        value = models.array(variable)
        variable.assign(value + rng.normal(size=value.shape))
    return model


@pytest.mark.thinned
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "fresh"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_fresh_model_becomes_the_trained_one(build, enabled, tmp_path):
    first, second = two_of(build)
    first.enable_lora(2, ADAPTED)
    trained(first)
    path = str(tmp_path / "adapters.lora.h5")
    if enabled:
        second.enable_lora(2, ADAPTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first.save_lora_weights(path)
        second.load_lora_weights(path)
    models.assert_same_weights(second, first)
    x = BUILDS[build][1]()
    np.testing.assert_array_equal(
        models.output(second, x), models.output(first, x)
    )


def test_a_file_of_kerashubs_own_is_read_and_its_lack_is_said(tmp_path):
    first, second = two_of("vit")
    for model in (first, second):
        model.enable_lora(2, ADAPTED)
    trained(first)
    path = str(tmp_path / "adapters.lora.h5")
    keras_hub.models.Backbone.save_lora_weights(first, path)
    with pytest.warns(UserWarning, match=r"expert_\w+/bias'[\s\S]*as they"):
        second.load_lora_weights(path)
    for a, b in zip(
        models.mixtures(first), models.mixtures(second), strict=True
    ):
        for role, projection in a.experts.projections.items():
            np.testing.assert_array_equal(
                models.array(projection.lora_kernel_b),
                models.array(b.experts.projections[role].lora_kernel_b),
            )


@pytest.mark.one_backend
def test_stock_readers_read_our_file(tmp_path):
    first, second = two_of("vit")
    for model in (first, second):
        model.enable_lora(2, ADAPTED)
    trained(first)
    path = str(tmp_path / "adapters.lora.h5")
    first.save_lora_weights(path)
    keras_hub.models.Backbone.load_lora_weights(second, path)


@pytest.mark.one_backend
def test_what_else_trains_is_named(tmp_path):
    (model, _) = two_of("vit")
    model.enable_lora(2, ADAPTED)
    for layer in models.mixtures(model):
        layer.router.trainable = True
    path = str(tmp_path / "adapters.lora.h5")
    with pytest.warns(UserWarning, match=r"router[\s\S]*`save_weights`"):
        model.save_lora_weights(path)


@pytest.mark.one_backend
def test_kerashubs_refusals_are_as_they_were(tmp_path):
    (model, _) = two_of("vit")
    with pytest.raises(ValueError, match="enable_lora"):
        model.save_lora_weights(str(tmp_path / "adapters.lora.h5"))
    model.enable_lora(2, ADAPTED)
    with pytest.raises(ValueError, match=r"\.lora\.h5"):
        model.save_lora_weights(str(tmp_path / "adapters.h5"))

"""`verify_upcycle`: what it measures, and what it says about it."""

import dataclasses

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle
from keras_upcycle import UpcycleError, verify_upcycle

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")

EXPERTS = 4


def pair(router=None, **kwargs):
    dense = models.sequence_dense_pairs()
    router = router or keras_upcycle.TopKRouter(capacity_factor=None)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=router, **kwargs)
    return dense, models.set_routers(moe), models.tokens(3, 6, models.WIDTH)


def test_equal_models_are_reported_equal():
    dense, moe, x = pair(layers="all")
    report = verify_upcycle(dense, moe, x)
    assert [layer.path for layer in report.layers] == [
        "up_0 -> down_0",
        "up_1 -> down_1",
    ]
    assert report.relative_difference <= 1e-5
    assert "computes what the dense one does" in str(report)


def test_the_difference_is_measured_on_the_output():
    dense, moe, x = pair()
    bias = moe.get_layer("head").bias
    bias.assign(models.array(bias) + np.float32([0.0, -0.5, 0.25]))
    report = verify_upcycle(dense, moe, x)
    scale = np.max(np.abs(models.output(dense, x)))
    assert report.max_difference == pytest.approx(0.5, rel=1e-4)
    assert report.relative_difference == pytest.approx(0.5 / scale, rel=1e-4)
    assert report.layers[0].relative_difference <= 1e-5
    assert "not once trained" in str(report)


def test_a_moved_expert_is_found_in_its_block_only():
    dense, moe, x = pair(layers="all")
    second = models.mixtures(moe)[1]
    bias = second.experts.expert_down.bias
    bias.assign(models.array(bias) + 1.0)
    report = verify_upcycle(dense, moe, x)
    assert report.layers[0].relative_difference <= 1e-5
    assert report.layers[1].max_difference == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("which", ["all", "last"])
def test_what_is_not_a_number_is_no_small_difference(which):
    """Python's `max` would pass over it."""
    dense, moe, x = pair(layers="all")
    bias = models.mixtures(moe)[1].experts.expert_down.bias
    value = models.array(bias)
    value[..., slice(None) if which == "all" else -1] = np.nan
    bias.assign(value)
    report = verify_upcycle(dense, moe, x)
    assert report.layers[0].relative_difference <= 1e-5
    for number in (report.max_difference, report.relative_difference):
        assert np.isnan(number)
    assert np.isnan(report.layers[1].max_difference)
    assert "not a finite number" in str(report)


def test_raw_weights_show_as_a_mean_weight_below_1():
    router = keras_upcycle.TopKRouter(
        top_k=1, normalize=False, capacity_factor=None
    )
    dense, moe, x = pair(router)
    (layer,) = verify_upcycle(dense, moe, x).layers
    (mixture,) = models.mixtures(moe)
    block = keras_upcycle.find_feed_forwards(dense)[1]
    inner = keras.Model(dense.input, block.layers[0].input)
    logits = models.output(inner, x) @ models.array(mixture.router.kernel)
    powers = np.exp(logits)
    expected = np.mean(np.max(powers, -1) / np.sum(powers, -1))
    assert layer.mean_combine_weight == pytest.approx(expected, rel=1e-4)
    assert layer.unrouted_fraction == 0.0
    assert "combine weights sum to" in str(verify_upcycle(dense, moe, x))


def test_dropped_tokens_are_counted_and_explained():
    router = keras_upcycle.TopKRouter(
        top_k=1, eval_capacity_factor=0.5, group="example"
    )
    dense, moe, x = pair(router)
    # All tokens of an example want the same expert: 1 slot for 6 tokens.
    (mixture,) = models.mixtures(moe)
    mixture.router.kernel.assign(np.zeros(mixture.router.kernel.shape))
    report = verify_upcycle(dense, moe, x)
    assert report.layers[0].unrouted_fraction == pytest.approx(5 / 6)
    assert report.layers[0].mean_combine_weight == pytest.approx(1 / 6)
    assert report.layers[0].relative_difference <= 1e-5
    assert "meet no expert" in str(report)
    assert "83.3%" in str(report)


def test_padding_is_left_out():
    inputs = keras.Input((6, models.WIDTH))
    x = layers.Masking()(inputs)
    x = layers.Dense(models.HIDDEN, activation="gelu")(x)
    dense = keras.Model(inputs, layers.Dense(models.WIDTH)(x))
    moe = keras_upcycle.upcycle_model(
        models.randomized(dense),
        EXPERTS,
        router=keras_upcycle.TopKRouter(capacity_factor=None),
    )
    x = models.tokens(3, 6, models.WIDTH)
    x[:, 4:] = 0.0
    (layer,) = verify_upcycle(dense, moe, x).layers
    assert layer.unrouted_fraction == 0.0
    assert layer.mean_combine_weight == pytest.approx(1.0)
    assert layer.relative_difference <= 1e-5


def test_a_report_is_frozen_and_prints_each_block():
    dense, moe, x = pair(layers="all")
    report = verify_upcycle(dense, moe, x)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.max_difference = 0.0
    lines = str(report).splitlines()
    for layer in report.layers:
        (row,) = [line for line in lines if line.startswith(layer.path)]
        assert f"{layer.relative_difference:.1e}" in row
        assert "0.0%" in row
        assert "1.000" in row


def test_neither_model_is_changed():
    dense, moe, x = pair()
    before = models.weights(dense), models.weights(moe)
    verify_upcycle(dense, moe, x)
    models.assert_same_weights(dense, before[0])
    models.assert_same_weights(moe, before[1])


def test_a_reloaded_model_is_verified(tmp_path):
    dense, moe, x = pair()
    moe.save(tmp_path / "moe.keras")
    moe = keras.saving.load_model(tmp_path / "moe.keras")
    assert verify_upcycle(dense, moe, x).relative_difference <= 1e-5


def test_two_dense_models_are_refused():
    dense, _, x = pair()
    with pytest.raises(UpcycleError, match="upcycled one second"):
        verify_upcycle(dense, dense, x)


def test_an_unrelated_model_is_refused():
    dense, _, x = pair()
    other = keras_upcycle.upcycle_model(models.sequential(), EXPERTS)
    with pytest.raises(
        UpcycleError, match="what `upcycle_model` made of `dense`"
    ):
        verify_upcycle(dense, other, x)
    with pytest.raises(
        UpcycleError, match="what `upcycle_model` made of `dense`"
    ):
        verify_upcycle(
            models.vit_backbone(2),
            keras_upcycle.upcycle_model(models.vit_backbone(4), EXPERTS),
            models.images(),
        )

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
    verdict = str(report).splitlines()[1]
    assert "'head'" in verdict
    assert "expert" not in verdict


def verdict(dense, moe, x):
    return str(verify_upcycle(dense, moe, x)).splitlines()[1]


@pytest.mark.one_backend
def test_only_what_was_measured_is_a_cause():
    """One thing is changed at a time, and is the only one that is named."""
    dense, moe, x = pair(layers="all")
    words = {
        "head": "weights outside the blocks",
        "moved": "other weights than the dense block",
        "unrouted": "meet no expert",
        "weights": "combine weights",
    }

    def only(name, text):
        assert {key for key in words if words[key] in text} == {name}, text

    kernel = moe.get_layer("head").kernel
    before = models.array(kernel)
    kernel.assign(before * 1.5)
    only("head", verdict(dense, moe, x))
    kernel.assign(before)
    expert = models.mixtures(moe)[0].experts.expert_up.kernel
    before = models.array(expert)
    expert.assign(before * 1.5)
    text = verdict(dense, moe, x)
    only("moved", text)
    assert "1 block" in text
    assert "5.0e-01" in text
    assert "'up_0 -> down_0'" in text
    expert.assign(before)
    assert "computes what the dense one does" in verdict(dense, moe, x)
    for name, settings in {
        "unrouted": {"top_k": 1, "eval_capacity_factor": 0.3},
        "weights": {
            "top_k": 1,
            "normalize": False,
            "capacity_factor": None,
        },
    }.items():
        dense, moe, x = pair(keras_upcycle.TopKRouter(**settings))
        only(name, verdict(dense, moe, x))


@pytest.mark.one_backend
def test_a_block_that_differs_without_its_weights_is_said_to():
    dense, moe, x = pair()
    (mixture,) = models.mixtures(moe)
    mixture.experts.activation = keras.activations.tanh
    text = verdict(dense, moe, x)
    assert "1 block of itself differs" in text
    assert "with the dense block's weights in all its experts" in text


@pytest.mark.one_backend
def test_no_cause_is_made_up_where_nothing_was_measured():
    dense, moe, x = pair()
    moe.get_layer("head").activation = keras.activations.tanh
    text = verdict(dense, moe, x)
    assert "head" in text or "nothing that was measured tells why" in text
    assert "expert" not in text
    assert "dtype" not in text


@pytest.mark.one_backend
def test_other_state_than_weights_is_named():
    norm = layers.Normalization(name="norm")
    norm.adapt(models.tokens(30, models.WIDTH) + 2.0)
    inputs = keras.Input((models.WIDTH,))
    hidden = layers.Dense(models.HIDDEN, activation="relu")(norm(inputs))
    dense = keras.Model(inputs, layers.Dense(models.WIDTH)(hidden))
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    (new,) = [
        layer for layer in moe.layers if type(layer) is layers.Normalization
    ]
    new.mean = new.mean + 1.0
    text = verdict(dense, moe, models.tokens(5, models.WIDTH))
    assert "hold something else: 'norm' (mean)" in text


@keras.saving.register_keras_serializable("test_verify")
class AlwaysNoisy(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


@pytest.mark.one_backend
def test_a_dense_model_that_is_random_is_run_again():
    inputs = keras.Input((models.WIDTH,))
    hidden = layers.Dense(models.HIDDEN, activation="relu")(inputs)
    outputs = AlwaysNoisy()(layers.Dense(models.WIDTH)(hidden))
    dense = keras.Model(inputs, outputs)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    dense(models.tokens(5, models.WIDTH))
    text = verdict(dense, moe, models.tokens(5, models.WIDTH))
    assert "itself gives another output when it runs again" in text


def test_what_is_not_finite_is_named():
    dense, moe, x = pair()
    text = verdict(dense, moe, np.where(np.arange(6)[:, None] == 2, np.inf, x))
    assert "the inputs have such values" in text
    moe.get_layer("head").bias.assign([0.0, np.nan, 0.0])
    text = verdict(dense, moe, x)
    assert "the dense model's output is finite" in text
    assert "weights of the sparse model have: 'head/bias'" in text
    dense, moe, x = pair()
    for model in (dense, moe):
        kernel = model.get_layer("head").kernel
        kernel.assign(models.array(kernel) * 1e38)
    text = verdict(dense, moe, x * 1e10)
    assert "both models' outputs" in text
    assert "inputs and weights are finite" in text


@pytest.mark.one_backend
def test_a_block_that_no_token_reaches_has_no_weights_to_blame():
    inputs = keras.Input((6, models.WIDTH))
    x = layers.Masking()(inputs)
    x = layers.Dense(models.HIDDEN, activation="gelu")(x)
    dense = keras.Model(inputs, layers.Dense(3)(layers.Dense(models.WIDTH)(x)))
    moe = keras_upcycle.upcycle_model(models.randomized(dense), EXPERTS)
    report = verify_upcycle(
        dense, moe, np.zeros((2, 6, models.WIDTH), "float32")
    )
    assert report.layers[0].tokens == 0
    assert "combine weights" not in str(report).splitlines()[1]
    assert "no token reached the block" in str(report).splitlines()[1]


@pytest.mark.one_backend
def test_a_moved_expert_is_found_in_its_block_only():
    dense, moe, x = pair(layers="all")
    second = models.mixtures(moe)[1]
    bias = second.experts.expert_down.bias
    bias.assign(models.array(bias) + 1.0)
    report = verify_upcycle(dense, moe, x)
    assert report.layers[0].relative_difference <= 1e-5
    assert report.layers[1].max_difference == pytest.approx(1.0, rel=1e-3)


@pytest.mark.one_backend
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


@pytest.mark.one_backend
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


@pytest.mark.one_backend
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


@pytest.mark.one_backend
def test_neither_model_is_changed():
    dense, moe, x = pair()
    before = models.weights(dense), models.weights(moe)
    verify_upcycle(dense, moe, x)
    models.assert_same_weights(dense, before[0])
    models.assert_same_weights(moe, before[1])


@pytest.mark.one_backend
def test_a_reloaded_model_is_verified(tmp_path):
    dense, moe, x = pair()
    moe.save(tmp_path / "moe.keras")
    moe = keras.saving.load_model(tmp_path / "moe.keras")
    assert verify_upcycle(dense, moe, x).relative_difference <= 1e-5


@pytest.mark.one_backend
def test_two_dense_models_are_refused():
    dense, _, x = pair()
    with pytest.raises(UpcycleError, match="upcycled one second"):
        verify_upcycle(dense, dense, x)


@pytest.mark.one_backend
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


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize(
    "build", [models.vit_classifier, models.t5_lm, models.vit_backbone]
)
def test_nothing_outside_the_blocks_is_said_to_differ_where_nothing_does(build):
    """Initializers draw their own seeds, and have done with a built layer."""
    dense = build()
    x = models.t5_inputs() if build is models.t5_lm else models.images()
    for router in ("top_k", "expert_choice"):
        moe = keras_upcycle.upcycle_model(
            dense,
            EXPERTS,
            router={"encoder": router} if build is models.t5_lm else router,
        )
        report = verify_upcycle(dense, moe, x)
        assert report.changed == ()
        assert "outside" not in str(report)

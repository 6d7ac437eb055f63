"""`set_dropout`, `expert_dropout`: rates, what drops, and what files hold."""

import gradients
import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import UpcycleError
from keras_upcycle.layers import dispatch as engines

DIM, HIDDEN, LENGTH, EXPERTS = 4, 32, 6, 3


def sparse(dispatch="dense", dropout=0.0, **settings):
    """One mixture in a graph, with a `Dropout` of rate 0 after it."""
    inputs = keras.Input((LENGTH, DIM))
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        ku.TopKRouter(EXPERTS, capacity_factor=None, load_balance_loss=0.0),
        activation="relu",
        dropout=dropout,
        dispatch=dispatch,
        name="moe",
        **settings,
    )
    outputs = keras.layers.Dropout(0.0, name="drop")(layer(inputs))
    return keras.Model(inputs, outputs)


def batch(examples=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, LENGTH, DIM)).astype("float32")


@pytest.mark.thinned
@pytest.mark.parametrize("dispatch", engines.ENGINES)
def test_a_rate_from_0_drops_that_share_of_hidden_units(dispatch):
    """With kernels of ones the output counts the units that are left."""
    model = sparse(dispatch)
    layer = model.get_layer("moe")
    for projection in layer.experts.projections.values():
        projection.kernel.assign(np.ones(projection.kernel.shape))
    # All experts weigh the same.
    layer.router.kernel.assign(np.zeros(layer.router.kernel.shape))
    x = np.full((2, LENGTH, DIM), 1 / DIM, "float32")  # every unit is 1
    np.testing.assert_allclose(
        gradients.as_float(model(x, training=True)), HIDDEN, rtol=1e-5
    )
    ku.set_dropout(model, experts=0.25)
    found = gradients.as_float(model(x, training=True))
    # Kept units are scaled to 1 / 0.75; K experts average.
    kept = found[..., 0] * EXPERTS * 0.75
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    share = kept.sum() / (kept.size * EXPERTS * HIDDEN)
    assert 0.68 < share < 0.82
    np.testing.assert_allclose(
        gradients.as_float(model(x, training=False)), HIDDEN, rtol=1e-5
    )
    again = gradients.as_float(model(x, training=True))
    assert np.abs(again - found).max() > 0.1  # new draws each time
    ku.set_dropout(model, experts=0)
    np.testing.assert_allclose(
        gradients.as_float(model(x, training=True)), HIDDEN, rtol=1e-5
    )


def test_dense_leaves_experts_and_experts_leave_dense():
    model = sparse(dropout=0.5)
    layer = model.get_layer("moe")
    report = ku.set_dropout(model, dense=0.2)
    assert report.dense == {"drop": (0.0, 0.2)}
    assert not report.experts
    assert (layer.dropout, layer.output_dropout) == (0.5, 0.0)
    report = ku.set_dropout(model, experts=0.3)
    assert report.experts == {"moe": (0.5, 0.3)}
    assert layer.experts.dropout == layer.experts.hidden_dropout.rate == 0.3
    assert model.get_layer("drop").rate == 0.2
    assert "0.5" in str(report)
    assert "0.3" in str(report)


def test_shared_networks_drop_too_and_so_does_an_output_that_did():
    model = sparse(shared_intermediate_dim=5, output_dropout=0.1)
    layer = model.get_layer("moe")
    ku.set_dropout(model, dense=0.4, experts=0.3)
    assert layer.shared.dropout == layer.shared.hidden_dropout.rate == 0.3
    assert layer.output_drop.rate == layer.output_dropout == 0.4


@pytest.mark.thinned
@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_files_and_clones_hold_the_rates(start, rate, tmp_path):
    model = sparse(dropout=start)
    ku.set_dropout(model, dense=rate, experts=rate)
    model.save(tmp_path / "model.keras")
    for again in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras.models.clone_model(model),
    ):
        layer = again.get_layer("moe")
        assert layer.dropout == layer.experts.dropout == rate
        assert again.get_layer("drop").rate == rate
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        *(gradients.as_float(m(batch())) for m in (model, again))
    )


def test_a_compiled_step_takes_the_new_rate_and_the_optimizer_goes_on():
    keras.utils.set_random_seed(0)
    model = sparse()
    model.compile(keras.optimizers.Adam(1e-9), "mse")
    x = batch()

    def losses():
        return model.fit(x, x, epochs=2, verbose=0).history["loss"]

    first = losses()
    np.testing.assert_allclose(first[0], first[1], rtol=1e-5)
    model.predict(x, verbose=0)
    ku.set_dropout(model, dense=0.5, experts=0.5)
    second = losses()
    assert np.abs(np.array(second) / first[0] - 1).max() > 1e-3
    assert int(model.optimizer.iterations) == 4
    ku.set_dropout(model, dense=0.0, experts=0.0)
    np.testing.assert_allclose(losses(), first[0], rtol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_vit_at_one_rate_is_one_built_with_it(rate, tmp_path):
    start = {"dropout_rate": 0.1 - rate, "attention_dropout": 0.0}
    dense = models.vit_backbone(**start)
    moe = ku.upcycle_model(dense, 2)
    x = models.images()
    expected = gradients.as_float(moe(x))
    report = ku.set_dropout(moe, dense=rate, experts=0.3)
    assert any("output" in path for path in report.dense)
    layers = models.mixtures(moe)
    assert {m.dropout for m in layers} == {0.3}
    assert {m.output_dropout for m in layers} == {rate}
    assert moe.get_config()["dropout_rate"] == rate
    assert moe.get_config()["attention_dropout"] == rate
    np.testing.assert_allclose(
        gradients.as_float(moe(x)), expected, rtol=1e-6, atol=1e-6
    )
    moe.save_to_preset(str(tmp_path / "preset"))
    again = type(moe).from_preset(str(tmp_path / "preset"))
    assert rates(again) == rates(moe)
    assert {m.dropout for m in models.mixtures(again)} == {0.3}
    assert ku.set_dropout(ku.densify_model(moe), dense=0.2).dense
    dropped = gradients.as_float(again(x, training=True))
    assert np.abs(dropped - expected).max() > 1e-3


def rates(model):
    return [
        layer.rate
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dropout)
        and not any(
            layer in list(m._flatten_layers()) for m in models.mixtures(model)
        )
    ]


@pytest.mark.one_backend
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_t5_at_one_rate_is_one_built_with_it(rate, tmp_path):
    dense = models.t5_backbone(dropout=0.25 - rate)
    moe = ku.upcycle_model(dense, 2, seed=0)
    inputs = models.t5_inputs()
    expected = models.output(moe, inputs)
    ku.set_dropout(moe, dense=rate, experts=0.3)
    twin = ku.upcycle_model(models.t5_backbone(dropout=rate), 2)
    assert rates(moe) == rates(twin)
    assert moe.get_config()["dropout"] == rate
    for layer in models.mixtures(moe):
        assert (layer.dropout, layer.output_dropout) == (0.3, rate)
    np.testing.assert_allclose(models.output(moe, inputs), expected, atol=1e-6)
    moe.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert rates(again) == rates(moe)
    assert {m.dropout for m in models.mixtures(again)} == {0.3}


def test_attention_weights_drop():
    """All weights of a row are equal, so what is dropped can be counted."""
    inputs = keras.Input((LENGTH, DIM))
    keras_layers = keras.layers
    found = {
        "mha": keras_layers.MultiHeadAttention(2, 8, name="mha"),
        "gqa": keras_layers.GroupQueryAttention(8, 2, 1, name="gqa"),
        "plain": keras_layers.Attention(name="plain"),
    }
    outputs = [
        found["mha"](inputs, inputs),
        found["gqa"](inputs, inputs),
        found["plain"]([inputs, inputs]),
    ]
    model = keras.Model(inputs, outputs)
    x = batch()
    before = [gradients.as_float(y) for y in model(x, training=True)]
    report = ku.set_dropout(model, dense=0.5)
    assert report.dense
    assert not report.left
    after = [gradients.as_float(y) for y in model(x, training=True)]
    same = [gradients.as_float(y) for y in model(x, training=False)]
    for a, b, c in zip(before, after, same, strict=True):
        assert np.abs(a - b).max() > 1e-3
        np.testing.assert_allclose(a, c, atol=1e-6)
    again = keras.models.clone_model(model)
    for name in found:
        config = again.get_layer(name).get_config()
        assert config["dropout"] == 0.5


@pytest.mark.one_backend
def test_others_that_drop_are_named():
    model = keras.Sequential(
        [
            keras.Input((LENGTH, DIM)),
            keras.layers.SpatialDropout1D(0.0, name="whole"),
            keras.layers.GaussianDropout(0.2, name="noisy"),
            keras.layers.LSTM(3, dropout=0.1, name="recurrent"),
        ],
        name="net",
    )
    with pytest.warns(
        UserWarning, match=r"left as they are: noisy, net/recurrent"
    ):
        report = ku.set_dropout(model, dense=0.5)
    assert report.dense == {"whole": (0.0, 0.5)}
    assert report.left == ("noisy", "net/recurrent")
    found = gradients.as_float(
        model.layers[0](np.ones((4, 9, 8)), training=True)
    )
    assert all(
        len(np.unique(row)) == 1
        for row in found.transpose(0, 2, 1).reshape(-1, 9)
    )


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drop = keras.layers.Dropout(0.1)

    def call(self, x, training=None):
        return self.drop(x, training=training)


@pytest.mark.one_backend
def test_a_layer_of_ones_own_that_files_make_anew_is_named():
    model = keras.Sequential([keras.Input((DIM,)), Block()])
    with pytest.warns(UserWarning, match=r"config.*Block.*set_dropout.*again"):
        report = ku.set_dropout(model, dense=0.5)
    assert report.forgotten == ("Block",)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({}, ValueError, "At least one of `dense` and `experts`"),
        ({"dense": 1.0}, ValueError, r"rate in \[0, 1\).*dense=1.0"),
        ({"dense": -0.1}, ValueError, "dense=-0.1"),
        ({"experts": float("nan")}, ValueError, "experts=nan"),
        ({"experts": "0.1"}, TypeError, "experts='0.1'"),
        ({"dense": True}, TypeError, "dense=True"),
    ],
)
def test_nonsense_is_refused(settings, kind, message):
    model = sparse(dropout=0.5)
    with pytest.raises(kind, match=message):
        ku.set_dropout(
            model, **{"experts": 0.1, **settings} if settings else {}
        )
    assert model.get_layer("moe").dropout == 0.5


@pytest.mark.one_backend
def test_what_is_not_there_is_refused():
    dense = models.dense_pairs()
    with pytest.raises(UpcycleError, match=r"with none.*`dense` alone"):
        ku.set_dropout(dense, experts=0.1)
    with pytest.raises(UpcycleError, match=r"no `Dropout` layer.*rate 0"):
        ku.set_dropout(dense, dense=0.1)
    assert not ku.set_dropout(dense, dense=0.0).dense
    with pytest.raises(TypeError, match="model='vit'"):
        ku.set_dropout("vit", dense=0.1)
    with pytest.raises(ValueError, match="not built"):
        ku.set_dropout(keras.Sequential([keras.layers.Dense(2)]), dense=0.1)


@pytest.mark.one_backend
def test_numpy_rates_are_numbers(tmp_path):
    model = sparse()
    ku.set_dropout(model, experts=np.float32(0.25), dense=np.int64(0))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("moe").dropout == 0.25


def test_noise_of_a_later_rate_goes_on_in_a_file(tmp_path):
    model = sparse()
    ku.set_dropout(model, experts=0.5)
    x = batch()
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    found = [gradients.as_float(m(x, training=True)) for m in (model, again)]
    if keras.backend.backend() != "torch":  # which draws from its own generator
        np.testing.assert_array_equal(*found)


# `upcycle_model(expert_dropout=)`.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("given", "expected"), [(None, 0.1), (0.3, 0.3), (0, 0)]
)
def test_experts_have_a_rate_of_their_own(given, expected):
    dense = models.t5_backbone(dropout=0.1)
    moe = ku.upcycle_model(dense, 2, expert_dropout=given)
    for layer in models.mixtures(moe):
        assert layer.dropout == expected
        assert layer.output_dropout == 0.1
    assert moe.get_config()["dropout"] == 0.1
    report = ku.verify_upcycle(dense, moe, models.t5_inputs())
    assert all(layer.relative_difference < 1e-4 for layer in report.layers)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("rate", "kind"), [(1.0, ValueError), ("0.1", TypeError), (True, TypeError)]
)
def test_expert_dropout_must_be_a_rate(rate, kind):
    with pytest.raises(kind, match="expert_dropout="):
        ku.upcycle_model(models.dense_pairs(), 2, expert_dropout=rate)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "rates", [{"hidden": 1.0}, {"hidden": 0.1, "output": 2}]
)
def test_a_layers_own_rates_are_checked_before_it_changes(rates):
    layer = ku.MoEFeedForward(2, 8, dropout=0.2)
    with pytest.raises(ValueError, match=r"`(hidden|output)`"):
        layer.set_dropout(**rates)
    assert layer.dropout == layer.experts.dropout == 0.2

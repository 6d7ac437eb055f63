"""Dense pairs in models inside a model: converted as in a flat one."""

import functools

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle
from keras_upcycle import UpcycleError, families
from keras_upcycle.layers import moe_layers

pytestmark = pytest.mark.thinned

WIDTH = 6
EXPERTS = 2


def block(name, activation="gelu"):
    x = inputs = keras.Input((WIDTH,))
    hidden = layers.Dense(12, activation=activation, name="up")(x)
    x = layers.add([x, layers.Dense(WIDTH, name="down")(hidden)])
    return keras.Model(inputs, x, name=name)


def row(name, with_input=True):
    first = [keras.Input((WIDTH,))] if with_input else []
    return keras.Sequential(
        [
            *first,
            layers.Dense(12, activation="relu", name="up"),
            layers.Dropout(0.1),
            layers.Dense(WIDTH, name="down"),
        ],
        name=name,
    )


def around(*inner):
    x = inputs = keras.Input((WIDTH,))
    for each in inner:
        x = each(x)
    return models.randomized(keras.Model(inputs, layers.Dense(3)(x)))


def shared():
    inner = block("twice")
    return around(inner, inner)


def deep():
    inputs = keras.Input((WIDTH,))
    outputs = block("inner")(row("row")(inputs))
    return around(keras.Model(inputs, outputs, name="deep"), block("last"))


def rows_in_a_row():
    outer = keras.Sequential(
        [keras.Input((WIDTH,)), row("inner"), layers.LayerNormalization()],
        name="outer",
    )
    return models.randomized(
        keras.Sequential(
            [keras.Input((WIDTH,)), row("first"), outer, layers.Dense(3)]
        )
    )


def several_inputs():
    a, b = keras.Input((WIDTH,)), keras.Input((WIDTH,))
    x = layers.concatenate([a, b])
    hidden = layers.Dense(20, activation="relu", name="up")(x)
    outputs = {"y": layers.Dense(2 * WIDTH, name="down")(hidden)}
    inner = keras.Model([a, b], outputs, name="two")
    inputs = keras.Input((WIDTH,))
    x = inner([inputs, layers.Dense(WIDTH)(inputs)])["y"]
    return models.randomized(keras.Model(inputs, layers.Dense(3)(x)))


CASES = {
    "functional": (lambda: around(block("a")), ["a/up -> down"]),
    "sequential": (lambda: around(row("a")), ["a/up -> down"]),
    "built late": (lambda: around(row("a", False)), ["a/up -> down"]),
    "equal names": (
        lambda: around(block("a"), block("b"), row("c")),
        ["a/up -> down", "b/up -> down", "c/up -> down"],
    ),
    "called twice": (shared, ["twice/up -> down"]),
    "deep": (
        deep,
        ["deep/row/up -> down", "deep/inner/up -> down", "last/up -> down"],
    ),
    "rows": (rows_in_a_row, ["first/up -> down", "outer/inner/up -> down"]),
    "several inputs": (several_inputs, ["two/up -> down"]),
}


@functools.cache
def dense_of(case):
    return CASES[case][0]()


@functools.cache
def moe_of(case):
    return convert(dense_of(case), layers="all")


def convert(model, **kwargs):
    router = keras_upcycle.TopKRouter(capacity_factor=None)
    return keras_upcycle.upcycle_model(model, EXPERTS, router=router, **kwargs)


def inputs():
    return models.tokens(5, WIDTH)


def gap(model, dense):
    return models.relative_gap(
        models.output(model, inputs()), models.output(dense, inputs())
    )


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.mark.one_backend
def test_blocks_are_found_inputs_first(case):
    sites = keras_upcycle.find_feed_forwards(dense_of(case))
    assert [site.path for site in sites] == CASES[case][1]
    assert [site.index for site in sites] == list(range(len(sites)))


def test_the_sparse_model_predicts_as_the_dense_one(case):
    dense, moe = dense_of(case), moe_of(case)
    assert len(models.mixtures(moe)) == len(CASES[case][1])
    assert gap(moe, dense) <= 1e-5
    report = keras_upcycle.verify_upcycle(dense, moe, inputs())
    assert [layer.path for layer in report.layers] == CASES[case][1]
    assert all(layer.tokens for layer in report.layers)
    assert "computes what the dense one does" in str(report)


def test_the_way_back(case):
    dense, moe = dense_of(case), moe_of(case)
    back = keras_upcycle.densify_model(moe, dense=dense)
    models.assert_same_weights(back, dense)
    one = keras_upcycle.extract_expert(moe, 1, dense=dense)
    models.assert_same_weights(one, dense)


def test_experts_are_removed(case):
    dense, moe = dense_of(case), moe_of(case)
    router = keras_upcycle.TopKRouter(1, capacity_factor=None)
    single = keras_upcycle.upcycle_model(
        dense, EXPERTS, router=router, layers="all"
    )
    keep = {name: [1] for name in moe_layers.named_mixtures(single)}
    smaller, report = keras_upcycle.prune_experts(single, keep=keep)
    assert {len(layer.kept) for layer in report.layers} == {1}
    assert {m.num_experts for m in models.mixtures(smaller)} == {1}
    assert gap(smaller, dense) <= 1e-5
    same, _ = keras_upcycle.prune_experts(moe, inputs(), num_experts=EXPERTS)
    assert gap(same, dense) <= 1e-5


def test_files(case, tmp_path):
    moe_of(case).save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    assert gap(loaded, moe_of(case)) <= 1e-6
    report = keras_upcycle.verify_upcycle(dense_of(case), loaded, inputs())
    assert report.relative_difference <= 1e-5
    back = keras_upcycle.densify_model(loaded, dense=dense_of(case))
    models.assert_same_weights(back, dense_of(case))


@pytest.mark.one_backend
def test_the_estimate_is_exact(case):
    estimate = keras_upcycle.estimate_upcycle(
        dense_of(case), EXPERTS, router="top_k", layers="all"
    )
    assert estimate.total_params == moe_of(case).count_params()
    assert [layer.path for layer in estimate.layers] == CASES[case][1]


@pytest.mark.one_backend
def test_places_are_the_blocks(case):
    dense = dense_of(case)
    family = families.family_of(dense)
    sites = family.find(dense).sites
    for site, place in zip(
        sites, family.current_layers(dense, sites), strict=True
    ):
        assert place is site.layers[0]
    assert family.current_layers(moe_of(case), sites) == models.mixtures(
        moe_of(case)
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_one_block_of_several(chosen):
    dense = dense_of("equal names")
    moe = convert(dense, layers=[chosen])
    (layer,) = keras_upcycle.verify_upcycle(dense, moe, inputs()).layers
    assert layer.path == CASES["equal names"][1][chosen]
    assert gap(moe, dense) <= 1e-5
    back = keras_upcycle.densify_model(moe, dense=dense)
    models.assert_same_weights(back, dense)


@pytest.mark.one_backend
def test_frozen_models_stay_frozen_alone():
    dense = around(block("a"), block("b"))
    dense.get_layer("a").trainable = False
    moe = convert(dense, layers="all")
    flags = [layer.trainable for layer in models.mixtures(moe)]
    assert flags == [False, True]
    assert not moe.get_layer("a").trainable
    assert moe.get_layer("b").trainable
    back = keras_upcycle.densify_model(moe, dense=dense)
    for model in (dense, back):
        assert not model.get_layer("a").trainable_weights
        assert len(model.trainable_weights) == 6


@pytest.mark.one_backend
def test_a_model_thawed_inside_a_frozen_one_stays_so():
    dense = around(block("a"), block("b"))
    dense.trainable = False
    dense.get_layer("a").trainable = True
    moe = convert(dense, layers="all")
    assert not moe.trainable
    assert not moe.trainable_weights
    assert moe.get_layer("a").trainable_weights
    assert not moe.get_layer("b").trainable_weights


def test_they_train_and_the_dense_model_does_not_notice():
    dense = shared()
    before = models.weights(dense)
    moe = convert(dense, layers="all")
    moe.compile("adam", "mse")
    moe.fit(inputs(), np.ones((5, 3), "float32"), epochs=2, verbose=0)
    models.assert_same_weights(dense, before)
    assert gap(moe, dense) > 1e-4


# What is not entered, or would break.


@keras.saving.register_keras_serializable("test_nested_models")
class Subclass(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = layers.Dense(12, activation="relu")
        self.down = layers.Dense(WIDTH)

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build((None, 12))
        self.built = True

    def call(self, x):
        return self.down(self.up(x))

    def get_config(self):
        return {"name": self.name}


@pytest.mark.one_backend
def test_a_users_class_is_named_and_copied(capsys):
    dense = around(Subclass(name="mine"))
    assert keras_upcycle.find_feed_forwards(dense, explain=True) == []
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "mine" in line
    ]
    assert "Subclass" in line
    assert "register_family" in line
    with pytest.raises(UpcycleError, match="No feed-forward block found"):
        convert(dense)
    dense = around(block("a"), Subclass(name="mine"))
    moe = convert(dense, layers="all")
    assert len(models.mixtures(moe)) == 1
    assert gap(moe, dense) <= 1e-5


@pytest.mark.one_backend
def test_a_layer_in_two_models_is_no_block():
    """The other model needs the hidden layer that experts would take away."""
    inner = block("whole")
    part = keras.Model(inner.input, inner.get_layer("up").output, name="part")
    inputs = keras.Input((WIDTH,))
    dense = keras.Model(inputs, [inner(inputs), part(inputs)])
    findings = families.family_of(dense).find(dense)
    assert findings.sites == []
    (reason,) = [why for place, why in findings.rejected if "/up" in place]
    assert reason.startswith("'up' is called more than once")


@pytest.mark.one_backend
def test_one_causal_layer_anywhere_makes_all_blocks_causal():
    inputs = keras.Input((4, WIDTH))
    attended = layers.MultiHeadAttention(1, 4)(
        inputs, inputs, use_causal_mask=True
    )
    attention = keras.Model(inputs, attended, name="attention")
    hidden = layers.Dense(12, activation="relu", name="up")(inputs)
    outputs = layers.Dense(WIDTH, name="down")(hidden)
    network = keras.Model(inputs, outputs, name="network")
    dense = keras.Sequential([inputs, attention, network])
    (site,) = keras_upcycle.find_feed_forwards(dense)
    assert site.causal


# Beside a known backbone.


def transfer():
    pixels = keras.Input(models.IMAGE)
    trunks = [
        keras.Sequential(
            [keras.Input(models.IMAGE), models.vit_backbone(2, name="trunk")],
            name=name,
        )
        for name in ("left", "right")
    ]
    x = layers.add([trunk(pixels)[:, 0] for trunk in trunks])
    head = keras.Sequential(
        [
            keras.Input((models.WIDTH,)),
            layers.Dense(20, activation="relu", name="up"),
            layers.Dense(models.WIDTH, name="down"),
        ],
        name="head",
    )
    return models.randomized(keras.Model(pixels, layers.Dense(3)(head(x))))


@pytest.mark.one_backend
def test_backbones_of_one_name_in_different_models():
    dense = transfer()
    sites = keras_upcycle.find_feed_forwards(dense)
    assert [site.stack for site in sites] == [
        "left/trunk/encoder",
        "left/trunk/encoder",
        "right/trunk/encoder",
        "right/trunk/encoder",
    ]
    moe = convert(dense, layers={"right/trunk/encoder": [1]})
    assert len(models.mixtures(moe)) == 2  # the left one by default
    moe = convert(
        dense,
        layers={"left/trunk/encoder": None, "right/trunk/encoder": [1]},
    )
    x = models.images()
    (layer,) = keras_upcycle.verify_upcycle(dense, moe, x).layers
    assert layer.path.startswith("right/trunk/")
    assert (
        models.relative_gap(models.output(moe, x), models.output(dense, x))
        <= 1e-5
    )
    back = keras_upcycle.densify_model(moe)
    models.assert_same_weights(back, dense)
    smaller, _ = keras_upcycle.prune_experts(moe, x, num_experts=EXPERTS)
    assert (
        models.relative_gap(models.output(smaller, x), models.output(dense, x))
        <= 1e-5
    )
    estimate = keras_upcycle.estimate_upcycle(
        dense, EXPERTS, sequence_length=17
    )
    assert estimate.flops_per_example > estimate.dense_flops_per_example


@pytest.mark.one_backend
def test_pairs_beside_a_backbone_are_named():
    dense = transfer()
    rejected = dict(families.family_of(dense).find(dense).rejected)
    assert "known backbone" in rejected["head/up"]

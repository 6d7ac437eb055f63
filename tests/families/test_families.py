"""The contract that every family keeps: a table of builders by properties."""

import functools
import re

import keras
import keras_hub
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle
from keras_upcycle import families

pytestmark = pytest.mark.thinned

EXPERTS = 4


@pytest.fixture(params=models.CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@functools.cache
def dense_of(case):
    """Shared by tests that change nothing."""
    return case.build()


@functools.cache
def moe_of(case):
    return keras_upcycle.upcycle_model(
        dense_of(case), EXPERTS, router="top_k", seed=0
    )


def has_biases(case):
    return "without_biases" not in case.name and not case.name.startswith("t5")


def feed_forward(site, x):
    """The block as its kernels say, in NumPy but for the activation."""
    kernels = {name: models.array(v) for name, v in site.kernels.items()}
    activation = keras.activations.get(site.activation)
    hidden = x @ kernels["up_kernel"] + kernels.get("up_bias", 0.0)
    if site.gated:
        gate = x @ kernels["gate_kernel"]
        hidden = models.array(activation(gate)) * hidden
    else:
        hidden = models.array(activation(hidden))
    return hidden @ kernels["down_kernel"] + kernels.get("down_bias", 0.0)


# The contract.


@pytest.mark.one_backend
def test_every_block_is_found_inputs_first(case):
    sites = keras_upcycle.find_feed_forwards(dense_of(case))
    assert [site.index for site in sites] == list(range(case.blocks))
    assert len({site.path for site in sites}) == case.blocks
    for site in sites:
        assert (site.hidden_dim, site.intermediate_dim) == (
            models.WIDTH,
            models.HIDDEN,
        )


def test_a_sites_kernels_are_the_models_own(case):
    dense = dense_of(case)
    owned = {id(variable) for variable in dense.weights}
    for site in keras_upcycle.find_feed_forwards(dense):
        assert site.use_bias == has_biases(case)
        assert site.gated == (case.name == "t5_backbone")
        assert {id(v) for v in site.kernels.values()} <= owned


def test_a_sites_layers_compute_what_its_kernels_say(case):
    x = models.tokens(3, models.WIDTH)
    for site in keras_upcycle.find_feed_forwards(dense_of(case)):
        np.testing.assert_allclose(
            models.array(site(x)), feed_forward(site, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.one_backend
def test_only_the_default_blocks_become_mixtures(case):
    dense, moe = dense_of(case), moe_of(case)
    family = families.family_of(dense)
    sites = family.find(dense).sites
    places = families.family_of(moe).current_layers(moe, sites)
    converted = tuple(
        site.index
        for site, layer in zip(sites, places, strict=True)
        if isinstance(layer, keras_upcycle.MoEFeedForward)
    )
    assert converted == case.converted
    assert len(models.mixtures(moe)) == len(case.converted)


def test_places_of_the_dense_model_are_its_own_blocks(case):
    dense = dense_of(case)
    family = families.family_of(dense)
    sites = family.find(dense).sites
    places = family.current_layers(dense, sites)
    assert all(
        layer is site.layers[0]
        for site, layer in zip(sites, places, strict=True)
    )


@pytest.mark.one_backend
def test_default_router_is_the_familys(case):
    moe = keras_upcycle.upcycle_model(dense_of(case), EXPERTS)
    kinds = {type(layer.router).__name__ for layer in models.mixtures(moe)}
    expected = {case.router} if case.stacks is None else set(case.router)
    assert kinds == expected


def test_experts_start_as_copies_of_the_dense_block(case):
    sites = keras_upcycle.find_feed_forwards(dense_of(case))
    chosen = [sites[index] for index in case.converted]
    for site, layer in zip(chosen, models.mixtures(moe_of(case)), strict=True):
        for role in ("up", "gate", "down") if site.gated else ("up", "down"):
            kernel = getattr(layer.experts, f"expert_{role}")
            expected = models.array(site.kernels[f"{role}_kernel"])
            for expert in models.array(kernel.kernel):
                np.testing.assert_array_equal(expert, expected)
            if site.use_bias:
                expected = models.array(site.kernels[f"{role}_bias"])
                for expert in models.array(kernel.bias):
                    np.testing.assert_array_equal(expert[0], expected)


@pytest.mark.one_backend
def test_parameters_grow_by_the_formula(case):
    dense, moe = dense_of(case), moe_of(case)
    width, hidden = models.WIDTH, models.HIDDEN
    block = (3 if case.name == "t5_backbone" else 2) * width * hidden
    if has_biases(case):
        block += width + hidden
    grown = len(case.converted) * (
        (EXPERTS - 1) * block + models.WIDTH * EXPERTS
    )
    assert moe.count_params() - dense.count_params() == grown


@pytest.mark.thinned
def test_the_sparse_model_predicts_as_the_dense_one(case):
    expected = models.output(dense_of(case), case.inputs())
    received = models.output(moe_of(case), case.inputs())
    assert models.relative_gap(received, expected) <= 1e-5


@pytest.mark.one_backend
def test_it_stays_the_kind_of_model_that_it_was(case):
    dense, moe = dense_of(case), moe_of(case)
    assert isinstance(moe, type(dense))
    assert moe.name == dense.name
    assert moe.input_shape == dense.input_shape
    assert moe.output_shape == dense.output_shape


@pytest.mark.one_backend
def test_layer_names_are_kept(case):
    replaced = {
        layer.name
        for site in keras_upcycle.find_feed_forwards(dense_of(case))
        if site.index in case.converted
        for layer in site.layers
    }
    names = [layer.name for layer in moe_of(case).layers]
    kept = [
        layer.name
        for layer in dense_of(case).layers
        if layer.name not in replaced
    ]
    assert [name for name in names if name in kept] == kept
    new = [name for name in names if name not in kept]
    if case.name in ("dense_pairs", "sequence_dense_pairs", "sequential"):
        assert "down_1_removed" not in names
        assert all(name.endswith("_moe") for name in new), new
    else:
        assert new == []


def test_no_weight_is_shared_with_the_dense_model(case):
    dense = {id(variable) for variable in dense_of(case).weights}
    assert not dense & {id(variable) for variable in moe_of(case).weights}


def test_the_dense_model_is_not_changed(case):
    dense = case.build()
    before = models.weights(dense)
    flags = [variable.trainable for variable in dense.weights]
    layers_before = [layer.name for layer in dense.layers]
    keras_upcycle.upcycle_model(dense, EXPERTS)
    models.assert_same_weights(dense, before)
    assert [v.trainable for v in dense.weights] == flags
    assert [layer.name for layer in dense.layers] == layers_before
    assert models.mixtures(dense) == []


def test_every_block_can_be_converted(case):
    dense = dense_of(case)
    chosen = case.everything
    if "ExpertChoiceRouter" in case.router:
        with pytest.warns(UserWarning, match="first block"):
            moe = keras_upcycle.upcycle_model(
                dense, EXPERTS, router="top_k", layers=chosen
            )
    else:
        moe = keras_upcycle.upcycle_model(dense, EXPERTS, layers=chosen)
    assert len(models.mixtures(moe)) == case.blocks
    expected = models.output(dense, case.inputs())
    received = models.output(moe, case.inputs())
    assert models.relative_gap(received, expected) <= 1e-5


# What `find_feed_forwards` says.


@pytest.mark.one_backend
def test_explain_prints_each_block_and_its_widths(case, capsys):
    sites = keras_upcycle.find_feed_forwards(dense_of(case), explain=True)
    text = capsys.readouterr().out
    assert f"{case.blocks} blocks found" in text
    for site in sites:
        (line,) = [row for row in text.splitlines() if f" {site.path} " in row]
        assert f"{models.WIDTH} -> {models.HIDDEN} -> {models.WIDTH}" in line


@pytest.mark.one_backend
def test_without_explain_nothing_is_printed(capsys):
    keras_upcycle.find_feed_forwards(models.sequential())
    assert capsys.readouterr().out == ""


def rejected_pair(name):
    """A functional model with one pair that cannot be experts, by reason."""
    x = inputs = keras.Input((models.WIDTH,))
    up = layers.Dense(models.HIDDEN, name="up")
    down = layers.Dense(models.WIDTH, name="down")
    if name == "width":
        down = layers.Dense(models.WIDTH + 1, name="down")
    elif name == "two activations":
        up = layers.Dense(models.HIDDEN, activation="relu", name="up")
    elif name == "down activation":
        down = layers.Dense(models.WIDTH, activation="relu", name="down")
    elif name == "one bias":
        down = layers.Dense(models.WIDTH, use_bias=False, name="down")
    elif name == "dtypes":
        down = layers.Dense(models.WIDTH, dtype="mixed_bfloat16", name="down")
    elif name == "regularizer":
        down = layers.Dense(models.WIDTH, kernel_regularizer="l2", name="down")
    elif name == "constraint":
        up = layers.Dense(models.HIDDEN, bias_constraint="non_neg", name="up")
    elif name == "activity":
        up = layers.Dense(models.HIDDEN, activity_regularizer="l2", name="up")
    hidden = up(x)
    if name == "two activations":
        hidden = layers.Activation("gelu")(hidden)
    elif name == "three activations":
        hidden = layers.Activation("gelu")(layers.ReLU()(hidden))
    elif name == "two dropouts":
        hidden = layers.Dropout(0.1)(layers.Dropout(0.1)(hidden))
    elif name == "dropout first":
        hidden = layers.ReLU()(layers.Dropout(0.1)(hidden))
    elif name == "norm":
        hidden = layers.LayerNormalization()(hidden)
    y = down(hidden)
    outputs = [y]
    if name == "hidden is an output":
        outputs = [y, hidden]
    elif name == "two consumers":
        outputs = [layers.concatenate([y, layers.ReLU()(hidden)])]
    elif name == "up called twice":
        outputs = [layers.add([y, layers.Dense(models.WIDTH)(up(y))])]
    elif name == "down called twice":
        outputs = [layers.add([y, down(layers.Dense(models.HIDDEN)(x))])]
    return keras.Model(inputs, outputs)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("width", "gives width 17, not the input's 16"),
        ("two activations", "'up' has an activation and another one follows"),
        ("three activations", "more than one activation"),
        ("two dropouts", "more than one Dropout"),
        ("dropout first", "Dropout stands before the activation"),
        ("norm", "LayerNormalization.*neither a Dense"),
        ("down activation", "'down' has an activation"),
        ("one bias", "one of the two has a bias"),
        ("dtypes", "different dtype policies"),
        ("regularizer", "'down' has a kernel_regularizer"),
        ("constraint", "'up' has a bias_constraint"),
        ("activity", "'up' has an activity_regularizer"),
        ("hidden is an output", "output of the model"),
        ("two consumers", "2 consumers"),
        ("up called twice", "'up' is called more than once"),
        ("down called twice", "'down' is called more than once"),
    ],
    ids=lambda value: "" if "'" in value or "." in value else None,
)
def test_a_pair_that_experts_cannot_be_is_turned_down(name, reason):
    findings = families.family_of(rejected_pair(name)).find(rejected_pair(name))
    assert findings.sites == []
    assert any(
        path == "up" and re.search(reason, why)
        for path, why in findings.rejected
    ), findings.rejected


@pytest.mark.one_backend
def test_the_pair_of_the_rejection_table_is_fine_by_itself():
    sites = keras_upcycle.find_feed_forwards(rejected_pair("nothing wrong"))
    assert [site.path for site in sites] == ["up -> down"]


def test_activation_and_dropout_between_are_the_sites():
    sites = keras_upcycle.find_feed_forwards(models.sequential())
    assert sites[0].activation is keras.activations.relu
    assert sites[0].dropout == 0.0
    assert sites[1].activation is keras.activations.gelu
    assert sites[1].dropout == 0.1


def test_a_vit_sites_dropout_is_the_mlps():
    backbone = models.vit_backbone(dropout_rate=0.25)
    (site, _) = keras_upcycle.find_feed_forwards(backbone)
    assert (site.dropout, site.output_dropout) == (0.25, 0.25)


# Registering families.


class TwoLayers(keras.Model):
    """A subclassed model that no family knows until one is registered."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = layers.Dense(models.HIDDEN, activation="gelu", name="up")
        self.down = layers.Dense(models.WIDTH, name="down")
        self.moe = None

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], models.HIDDEN))
        self.built = True

    def call(self, x):
        if self.moe is not None:
            return x + self.moe(x)
        return x + self.down(self.up(x))


class TwoLayersFamily(keras_upcycle.Family):
    name = "TwoLayers"

    def find(self, model):
        if model.moe is not None:
            return families.Findings()
        site = keras_upcycle.FeedForwardSite(
            index=0,
            path="up -> down",
            stack="encoder",
            layers=(model.up, model.down),
            kernels=self.kernels(model),
            activation="gelu",
            protects_first=False,
        )
        return families.Findings([site])

    def kernels(self, model):
        return {
            "up_kernel": model.up.kernel,
            "up_bias": model.up.bias,
            "down_kernel": model.down.kernel,
            "down_bias": model.down.bias,
        }

    def rebuild(self, model, sites, replacements):
        new = type(model)(name=model.name)
        del new.up, new.down
        new.moe = replacements[0]
        new.moe.build((None, models.WIDTH))
        new.built = True
        return new

    def current_layers(self, model, sites):
        return [model.up if model.moe is None else model.moe]


@pytest.fixture
def forget(monkeypatch):
    """Registrations of the test are undone after it."""
    known = dict(families.registry._FAMILIES)
    monkeypatch.setattr(families.registry, "_FAMILIES", known)


@pytest.mark.one_backend
@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("by", ["class", "path"])
def test_a_registered_family_is_used(by):
    path = f"{TwoLayers.__module__}.{TwoLayers.__qualname__}"
    known = TwoLayers if by == "class" else path
    keras_upcycle.register_family(known, TwoLayersFamily())
    dense = TwoLayers()
    dense.build((None, models.WIDTH))
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    x = models.tokens(5, models.WIDTH)
    assert isinstance(moe, TwoLayers)
    report = keras_upcycle.verify_upcycle(dense, moe, x)
    assert report.relative_difference <= 1e-5
    assert report.layers[0].path == "up -> down"


@pytest.mark.one_backend
@pytest.mark.usefixtures("forget")
def test_a_registered_class_does_not_speak_for_its_subclasses():
    class Derived(TwoLayers):
        pass

    keras_upcycle.register_family(TwoLayers, TwoLayersFamily())
    model = Derived()
    model.build((None, models.WIDTH))
    with pytest.raises(keras_upcycle.UpcycleError, match="is a Derived"):
        keras_upcycle.upcycle_model(model, EXPERTS)


@pytest.mark.one_backend
@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(
    "known",
    [
        keras_hub.models.ViTBackbone,
        "keras_hub.src.models.vit.vit_backbone.ViTBackbone",
    ],
    ids=["class", "path"],
)
def test_a_class_gets_one_family_only(known):
    with pytest.raises(ValueError, match=r"ViTBackbone.*has a family already"):
        keras_upcycle.register_family(known, TwoLayersFamily())


@pytest.mark.one_backend
@pytest.mark.usefixtures("forget")
def test_register_family_refuses_what_is_no_class():
    with pytest.raises(TypeError, match=r"model_class.*Received.*=3"):
        keras_upcycle.register_family(3, TwoLayersFamily())


@pytest.mark.one_backend
@pytest.mark.usefixtures("forget")
def test_register_family_refuses_a_class_for_an_object():
    with pytest.raises(TypeError, match="Pass an object, not a class"):
        keras_upcycle.register_family(TwoLayers, TwoLayersFamily)


@pytest.mark.one_backend
@pytest.mark.parametrize("method", ["find", "rebuild", "current_layers"])
def test_an_unfinished_family_says_what_it_must_define(method):
    arguments = {"find": 1, "rebuild": 3, "current_layers": 2}[method]
    with pytest.raises(NotImplementedError, match=f"must define `{method}`"):
        getattr(keras_upcycle.Family(), method)(*[None] * arguments)

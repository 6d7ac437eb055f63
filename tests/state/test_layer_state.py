"""Whatever a layer holds arrives in every model that is made of its model."""

import pathlib
import threading

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle
from keras_upcycle import UpcycleError, keras_internals
from keras_upcycle.families import surgery
from keras_upcycle.state import values

WIDTH = 6
BACKEND = keras.backend.backend()
DATA = np.random.default_rng(0).normal(5.0, 3.0, (32, WIDTH)).astype("float32")


def register(layer_class):
    return keras.saving.register_keras_serializable("test_layer_state")(
        layer_class
    )


def around(layer, change=None, shape=(WIDTH,), dtype="float32"):
    """A model with the layer in front of a block; changed when it is built."""
    inputs = keras.Input(shape, dtype=dtype)
    x = layers.Dense(WIDTH)(ops.cast(layer(inputs), "float32"))
    hidden = layers.Dense(12, activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(WIDTH)(hidden))
    if change is not None:
        change(layer)
    return model


def made_of(model, inputs):
    """Every function that makes a model of a model, by name."""
    moe = keras_upcycle.upcycle_model(
        model,
        2,
        router=keras_upcycle.TopKRouter(capacity_factor=None),
        layers="all",
    )
    return {
        "upcycle": moe,
        "densify": keras_upcycle.densify_model(moe, dense=model),
        "extract": keras_upcycle.extract_expert(moe, 1, dense=model),
        "prune": keras_upcycle.prune_experts(moe, inputs, num_experts=2)[0],
        "branch_train_mix": keras_upcycle.upcycle_model(
            model,
            2,
            router=keras_upcycle.TopKRouter(capacity_factor=None),
            layers="all",
            expert_init=keras_upcycle.BranchTrainMix([model, model]),
        ),
    }


def assert_arrives(model, inputs=DATA):
    expected = models.output(model, inputs)
    for name, made in made_of(model, inputs).items():
        gap = models.relative_gap(models.output(made, inputs), expected)
        assert gap <= 1e-5, (name, gap)


# Keras's own layers.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"axis": None},
        {"invert": True},
        {"mean": 3.0, "variance": 2.0},
        {"mean": np.arange(WIDTH), "variance": np.arange(WIDTH) + 1.0},
    ],
    ids=["axis", "no axis", "inverted", "given", "given for each"],
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_normalization(arguments, late):
    norm = layers.Normalization(**arguments)
    if "mean" in arguments:
        assert_arrives(around(norm))
        return
    if not late:
        norm.adapt(DATA)
    model = around(norm)
    if late:
        norm.adapt(DATA)
    made = keras_upcycle.upcycle_model(model, 2, layers="all")
    (new,) = [
        layer for layer in made.layers if type(layer) is layers.Normalization
    ]
    # The numbers themselves: an oracle that no model stands between.
    wanted = DATA.mean() if arguments.get("axis", 0) is None else DATA.mean(0)
    np.testing.assert_allclose(
        np.ravel(models.array(new.mean)), np.ravel(wanted), rtol=1e-4
    )
    assert_arrives(model)


def test_a_mean_that_donors_share_in_is_used_as_well():
    """Their average is written into variables that others are made of."""
    donors = []
    for shift in (0.0, 8.0):
        norm = layers.Normalization()
        norm.adapt(DATA + shift)
        donors.append(around(norm))
    moe = keras_upcycle.upcycle_model(
        donors[0], 2, expert_init=keras_upcycle.BranchTrainMix(donors)
    )
    (norm,) = [
        layer for layer in moe.layers if type(layer) is layers.Normalization
    ]
    np.testing.assert_allclose(
        models.array(norm.mean)[0], DATA.mean(0) + 4.0, rtol=1e-4
    )


@pytest.mark.one_backend
def test_donors_must_hold_the_same_assets():
    """Rows of an embedding that belong to different words have no mean."""
    base, donor = (
        around(
            OwnAssets(name="words"), lambda layer, value=value: layer.set(value)
        )
        for value in (2.0, 3.0)
    )
    with pytest.raises(UpcycleError, match=r"Donor 0 must read.*'words'"):
        keras_upcycle.upcycle_model(
            base, 2, expert_init=keras_upcycle.BranchTrainMix([donor])
        )


def test_densify_takes_what_the_sparse_model_holds_now():
    norm = layers.Normalization()
    norm.adapt(DATA)
    model = around(norm)
    moe = keras_upcycle.upcycle_model(
        model,
        2,
        router=keras_upcycle.TopKRouter(capacity_factor=None),
        layers="all",
    )
    for layer in moe.layers:
        if type(layer) is layers.Normalization:
            layer.adapt(DATA * 2.0 + 1.0)
    back = keras_upcycle.densify_model(moe, dense=model)
    gap = models.relative_gap(
        models.output(back, DATA), models.output(moe, DATA)
    )
    assert gap <= 1e-5
    assert (
        models.relative_gap(
            models.output(back, DATA), models.output(model, DATA)
        )
        > 1e-2
    )


def test_discretization():
    bins = layers.Discretization(num_bins=4, output_mode="int")
    bins.adapt(DATA)
    assert_arrives(around(bins))


def test_batch_statistics():
    norm = layers.BatchNormalization()
    model = around(norm)
    model(DATA, training=True)
    assert np.any(models.array(norm.moving_mean) != 0.0)
    assert_arrives(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.CategoryEncoding(num_tokens=9, output_mode="multi_hot"),
        lambda: layers.Hashing(num_bins=7),
    ],
    ids=["category", "hashing"],
)
def test_what_the_config_tells(make):
    ids = np.random.default_rng(0).integers(0, 9, (32, WIDTH)).astype("int32")
    assert_arrives(around(make(), dtype="int32"), ids)


def test_a_lambda_keeps_what_it_uses():
    """From its config alone Keras makes a function without these names."""
    scale = np.arange(WIDTH, dtype="float32")
    assert_arrives(around(layers.Lambda(lambda x: ops.tanh(x) * scale)))


def test_a_wrapped_layer_and_a_nested_one():
    norm = layers.Normalization()
    inner = keras.Sequential(
        [keras.Input((WIDTH,)), norm, layers.Dropout(0.1)], name="inner"
    )
    assert_arrives(around(inner, lambda _: norm.adapt(DATA)))
    rows = DATA.reshape(8, 4, WIDTH)
    spread = layers.TimeDistributed(layers.Normalization())
    model = around(
        spread, lambda each: each.layer.adapt(DATA), shape=(4, WIDTH)
    )
    assert_arrives(model, rows)


WORDS = np.random.default_rng(0).choice(["ash", "elm", "oak", "yew"], (32, 4))
LOOKUPS = {
    "string": (lambda: layers.StringLookup(), WORDS),
    "two unknown": (lambda: layers.StringLookup(num_oov_indices=2), WORDS),
    "multi-hot": (lambda: layers.StringLookup(output_mode="multi_hot"), WORDS),
    "tf-idf": (lambda: layers.StringLookup(output_mode="tf_idf"), WORDS),
    "integer": (
        lambda: layers.IntegerLookup(),
        np.random.default_rng(1).integers(10, 20, (32, 4)),
    ),
    "text": (
        lambda: layers.TextVectorization(output_sequence_length=4),
        np.array([[" ".join(row)] for row in WORDS]),
    ),
    "text, tf-idf": (
        lambda: layers.TextVectorization(output_mode="tf_idf"),
        np.array([[" ".join(row)] for row in WORDS]),
    ),
}
needs_strings = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras looks words up in TensorFlow alone"
)


@needs_strings
@pytest.mark.parametrize("case", LOOKUPS)
def test_vocabularies(case):
    make, data = LOOKUPS[case]
    data = ops.convert_to_tensor(data)
    lookup = make()
    lookup.adapt(data)
    dtype = "int64" if case == "integer" else "string"
    assert_arrives(around(lookup, shape=data.shape[1:], dtype=dtype), data)


@needs_strings
def test_a_vocabulary_that_its_file_cannot_hold_is_refused():
    words = ops.convert_to_tensor(np.where(WORDS == "elm", "e\nlm", WORDS))
    lookup = layers.StringLookup(name="words")
    lookup.adapt(words)
    model = around(lookup, shape=(4,), dtype="string")
    with pytest.raises(UpcycleError, match=r"'words' \(StringLookup\).*sav"):
        keras_upcycle.upcycle_model(model, 2, layers="all")


@needs_strings
def test_a_lookup_without_a_vocabulary_can_still_be_adapted():
    lookup = layers.StringLookup()
    model = around(lookup, shape=(4,), dtype="string")
    moe = keras_upcycle.upcycle_model(model, 2, layers="all")
    (new,) = [
        layer for layer in moe.layers if type(layer) is layers.StringLookup
    ]
    new.adapt(ops.convert_to_tensor(WORDS))
    assert len(new.get_vocabulary()) == 5


# A user's layers.


@register
class Adapted(layers.Layer):
    """Holds a plain array, and one more attribute, from `adapt` on."""

    def adapt(self, x):
        self.mean = x.mean(0)

    def call(self, x):
        return x - getattr(self, "mean", 0.0)


@register
class AdaptedVariable(Adapted):
    """Its config tells nothing of the variable that `adapt` makes."""

    def adapt(self, x):
        self.mean = keras.Variable(x.mean(0), trainable=False, name="mean")


@register
class Settings(layers.Layer):
    """Its config tells none of its attributes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = 1.0
        self.shift = np.zeros(WIDTH, "float32")
        self.table = {"times": 1.0, "list": [1.0, 2.0]}
        self.function = ops.relu

    def build(self, input_shape):
        self.tensor = ops.ones((WIDTH,))
        self.built = True

    def call(self, x):
        x = self.function(self.scale * x + self.shift) * self.tensor
        return x * self.table["times"] + self.table["list"][1]


@register
class OwnVariables(layers.Layer):
    """Saves a state that no variable holds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.secret = lambda: 1.0

    def set(self, value):
        self.secret = lambda layer=self: value

    def call(self, x):
        return x * self.secret()

    def save_own_variables(self, store):
        store["secret"] = self.secret()

    def load_own_variables(self, store):
        self.set(float(np.array(store["secret"])))


@register
class OwnAssets(OwnVariables):
    """The same in a file of its own."""

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass

    def save_assets(self, folder):
        pathlib.Path(folder, "secret.txt").write_text(str(self.secret()))

    def load_assets(self, folder):
        self.set(float(pathlib.Path(folder, "secret.txt").read_text()))


@register
class LosesAssets(OwnAssets):
    """What it saves it does not load."""

    def load_assets(self, folder):
        pass


@register
class Measured(layers.Layer):
    """Its metric is a part of what it computes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metric = keras.metrics.Mean(name="metric")

    def call(self, x):
        return x + self.metric.result()


def change_settings(layer):
    layer.scale = 2.5
    layer.shift[:] = np.arange(WIDTH)
    layer.table["times"] = 3.0
    layer.table["list"][1] = -4.0
    layer.function = ops.tanh
    layer.tensor = ops.convert_to_tensor(np.arange(WIDTH, dtype="float32"))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Adapted, lambda layer: layer.adapt(DATA)),
        (Settings, change_settings),
        (OwnVariables, lambda layer: layer.set(3.0)),
        (OwnAssets, lambda layer: layer.set(3.0)),
        (Measured, lambda layer: layer.metric.update_state(7.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_users_layer(make, change):
    assert_arrives(around(make(), change))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Adapted, lambda layer: layer.adapt(DATA)),
        (Settings, change_settings),
        (OwnVariables, lambda layer: layer.set(3.0)),
        (OwnAssets, lambda layer: layer.set(3.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mixture_from_scratch_draws_weights_and_keeps_the_rest(make, change):
    layer = make(name="mine")
    model = around(layer, change)
    moe = keras_upcycle.mixture_from_scratch(model, 2, layers="all")
    np.testing.assert_allclose(
        models.array(moe.get_layer("mine")(DATA)),
        models.array(layer(DATA)),
        rtol=1e-6,
    )


@pytest.mark.one_backend
def test_a_deeper_model_does_not_lose_a_setting_of_a_block():
    backbone = models.vit_backbone()
    block = backbone.get_layer("vit_encoder").encoder_layers[0]
    block.dropout.rate = 0.5
    with pytest.raises(UpcycleError, match=r"rate=0\.5.*rate=0\.0"):
        keras_upcycle.tile_depth(backbone, 2)


def test_a_variable_made_after_construction():
    layer = AdaptedVariable()
    layer.adapt(DATA)
    model = around(layer)
    assert_arrives(model)
    moe = keras_upcycle.upcycle_model(model, 2, layers="all")
    assert not {id(v) for v in moe.variables} & {id(v) for v in model.variables}


def test_nothing_is_shared():
    layer = Settings()
    model = around(layer, change_settings)
    new = surgery.copy_model(model, lambda _: None)
    (copied,) = [each for each in new.layers if type(each) is Settings]
    before = models.output(model, DATA)
    copied.shift[:] = 9.0
    copied.table["times"] = 9.0
    np.testing.assert_array_equal(models.output(model, DATA), before)


def test_both_models_train_apart():
    norm = layers.Normalization()
    norm.adapt(DATA)
    model = around(norm)
    expected = models.output(model, DATA)
    moe = keras_upcycle.upcycle_model(model, 2, layers="all")
    moe.compile("sgd", "mse")
    moe.fit(DATA, DATA, epochs=2, verbose=0)
    np.testing.assert_array_equal(models.output(model, DATA), expected)


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own registrations")
def test_torchs_buffers_and_parameters_arrive():
    import torch

    @register
    class Registered(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_buffer("shift", torch.zeros(WIDTH))
            self.scale = torch.nn.Parameter(torch.ones(WIDTH))

        def call(self, x):
            return x * self.scale + self.shift

    def change(layer):
        layer.shift += torch.arange(WIDTH)
        layer.scale.data *= 3.0

    assert_arrives(around(Registered(), change))


# What cannot be carried over is refused by name, before anything is changed.


@register
class LateLayer(layers.Layer):
    """`adapt` makes a sub-layer that no config tells."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = None

    def adapt(self, x):
        self.inner = layers.Dense(WIDTH)
        self.inner.build(x.shape)

    def call(self, x):
        return x if self.inner is None else self.inner(x)


@register
class Doubles(layers.Layer):
    """Another layer each time it is made from its config."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units * 2

    def call(self, x):
        return x[:, :1] * ops.ones((1, self.units))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@register
class NeedsMore(layers.Layer):
    """Cannot be called with what its config tells."""

    def call(self, x):
        return x * self.given_later


def set_given(layer):
    layer.given_later = 2.0


@pytest.mark.parametrize(
    ("make", "before", "after", "reason"),
    [
        (LosesAssets, None, lambda layer: layer.set(3.0), "after loading it"),
        (LateLayer, lambda layer: layer.adapt(DATA), None, "sub-layers"),
        (Doubles, None, None, r"shape \(None, 12\).*gives \(None, 6\)"),
        (NeedsMore, set_given, None, "when it is called"),
    ],
    ids=["assets", "sub-layer", "another width", "uncallable"],
)
def test_what_cannot_be_carried_over_is_named(make, before, after, reason):
    layer = make(name="culprit")
    if before is not None:
        before(layer)
    model = around(layer, after)
    weights = models.weights(model)
    expected = models.output(model, DATA)
    with pytest.raises(UpcycleError, match=f"(?s)'culprit'.*{reason}"):
        keras_upcycle.upcycle_model(model, 2, layers="all")
    models.assert_same_weights(model, weights)
    np.testing.assert_array_equal(models.output(model, DATA), expected)


@pytest.mark.one_backend
def test_same_says_what_it_knows():
    same = values.same
    nan = np.float32(np.nan)
    assert same(nan, np.float32(np.nan))
    assert same(np.arange(3), np.arange(3))
    assert not same(np.arange(3), np.arange(3.0))
    assert same({"a": [1, (2, 3)]}, {"a": [1, (2, 3)]})
    assert same(True, 1) is False
    assert same(layers.Dense(1), layers.Dense(1)) is None


# A model without its values.


def lost():
    """A model as a failed `predict` leaves it on JAX."""
    model = models.dense_pairs()
    try:
        model.predict(models.tokens(3, models.WIDTH + 1), verbose=0)
    except ValueError:
        return model
    raise AssertionError("Keras takes inputs of any width now")


@pytest.mark.skipif(BACKEND != "jax", reason="other backends keep the values")
def test_a_failed_predict_is_what_the_refusal_speaks_of():
    moe = keras_upcycle.upcycle_model(models.dense_pairs(), 2)
    x = models.tokens(3, models.WIDTH)
    for use in (
        lambda model: keras_upcycle.upcycle_model(model, 2),
        lambda model: keras_upcycle.estimate_upcycle(model, 2),
        keras_upcycle.find_feed_forwards,
        lambda model: keras_upcycle.verify_upcycle(model, moe, x),
        lambda model: keras_upcycle.densify_model(moe, dense=model),
        lambda model: keras_upcycle.upcycle_model(
            models.dense_pairs(),
            2,
            expert_init=keras_upcycle.BranchTrainMix([model]),
        ),
        lambda model: keras_upcycle.prune_experts(model, x),
        lambda model: keras_upcycle.extract_expert(model, 0),
    ):
        with pytest.raises(
            UpcycleError,
            match=r"(?s)weights of 'pairs'.*10 of 10.*`predict`.*load_weights",
        ):
            use(lost())


@pytest.mark.skipif(BACKEND != "jax", reason="other backends keep the values")
def test_a_sparse_model_without_values_is_refused_too():
    dense, x = models.dense_pairs(), models.tokens(3, models.WIDTH)
    moe = keras_upcycle.upcycle_model(dense, 2)
    for variable in moe.variables:
        variable._value = None  # what Keras does, see `lost`
    (mixture,) = models.mixtures(moe)
    for use in (
        lambda: keras_upcycle.verify_upcycle(dense, moe, x),
        lambda: keras_upcycle.densify_model(moe, dense=dense),
        lambda: keras_upcycle.prune_experts(moe, x),
        lambda: keras_upcycle.extract_expert(mixture, 0),
    ):
        with pytest.raises(UpcycleError, match="must have values"):
            use()


def test_a_model_of_shapes_alone_has_lost_nothing():
    with keras_internals.without_values():
        model = models.keras_hub.models.ViTBackbone(
            image_shape=models.IMAGE,
            patch_size=4,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=16,
        )
    assert keras_internals.lost_variables(model) == []


# What is put on a model itself.


def labelled(model):
    model.labels = ["cat", "dog"]
    model.threshold = 0.3
    model.table = np.arange(3.0)
    return model


def assert_labelled(model, of):
    assert model.labels == ["cat", "dog"]
    assert model.labels is not of.labels
    assert model.threshold == 0.3
    np.testing.assert_array_equal(model.table, np.arange(3.0))


def test_attributes_of_plain_models_arrive():
    inner = labelled(around(layers.Identity()))
    x = keras.Input((WIDTH,))
    model = labelled(keras.Model(x, layers.LayerNormalization()(inner(x))))
    for made in made_of(model, DATA).values():
        assert_labelled(made, model)
        (inside,) = [x for x in made.layers if isinstance(x, keras.Model)]
        assert_labelled(inside, inner)


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["vit", "t5", "task"])
def test_attributes_of_keras_hub_models_arrive(kind):
    dense = labelled(
        {
            "t5": models.t5_backbone,
            "vit": models.vit_backbone,
            "task": models.vit_classifier,
        }[kind]()
    )
    x = models.t5_inputs() if kind == "t5" else models.images()
    moe = keras_upcycle.upcycle_model(dense, 3, router="top_k")
    pruned, _ = keras_upcycle.prune_experts(moe, x, num_experts=2)
    for made in (moe, keras_upcycle.densify_model(moe), pruned):
        assert_labelled(made, dense)


@pytest.mark.one_backend
def test_an_attribute_of_a_model_that_cannot_be_copied_is_named():
    model = around(layers.Identity())
    model.lock = threading.Lock()
    with pytest.raises(UpcycleError, match=r"functional.*'lock'.*copied"):
        keras_upcycle.upcycle_model(model, 2, layers="all")

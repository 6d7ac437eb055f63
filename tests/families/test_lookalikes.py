"""Layers that only look like those that experts take the place of.

Each is reproduced to the last of what it does, or keeps its pair dense, with a
reason that names it; and what is left dense is copied whole.
"""

import re

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle
from keras_upcycle import UpcycleError, families, keras_internals
from keras_upcycle.keras_internals.layers import unlocked

WIDTH, HIDDEN = models.WIDTH, models.HIDDEN
SEQUENCE = (4, WIDTH)


@keras.saving.register_keras_serializable("test_lookalikes")
class MyConvolution(layers.Conv1D):
    pass


@keras.saving.register_keras_serializable("test_lookalikes")
class MyDense(layers.Dense):
    def call(self, inputs, training=None):
        return 2.0 * super().call(inputs)


@keras.saving.register_keras_serializable("test_lookalikes")
class MyDropout(layers.Dropout):
    def call(self, inputs, training=False):
        return inputs + 1.0


@keras.saving.register_keras_serializable("test_lookalikes")
class MyActivation(layers.Activation):
    def call(self, inputs):
        return 3.0 * super().call(inputs)


@keras.saving.register_keras_serializable("test_lookalikes")
class MyReLU(layers.ReLU):
    def call(self, inputs):
        return -super().call(inputs)


@keras.saving.register_keras_serializable("test_lookalikes")
class Holder(layers.Layer):
    """A layer of a user's that computes with two `Dense` inside."""

    def build(self, input_shape):
        self.wide = layers.Dense(HIDDEN, name="wide")
        self.narrow = layers.Dense(WIDTH, name="narrow")
        self.wide.build(input_shape)
        self.narrow.build((*input_shape[:-1], HIDDEN))

    def call(self, x):
        return self.narrow(ops.relu(self.wide(x)))


@keras.saving.register_keras_serializable("test_lookalikes")
def centred(x):
    """Not of single tokens: takes away the mean over the positions."""
    return x - ops.mean(x, axis=1, keepdims=True)


@keras.saving.register_keras_serializable("test_lookalikes")
def squared(x):
    return ops.square(ops.relu(x))


def pair(*between, up=None, down=None, shape=SEQUENCE, call=None):
    """`up -> between -> down` around a residual connection."""
    inputs = keras.Input(shape)
    up = up or layers.Dense(HIDDEN, name="up")
    down = down or layers.Dense(WIDTH, name="down")
    x = up(inputs)
    for layer in between:
        x = layer(x, **(call or {}))
    return models.randomized(
        keras.Model(inputs, layers.Add()([inputs, down(x)]))
    )


def reasons(model):
    return dict(families.family_of(model).find(model).rejected)


def dense_by(kind):
    """A model whose pair has to stay dense, by what is the matter."""
    relu = layers.Activation("relu", name="act")
    if kind in BETWEEN:
        return pair(relu, BETWEEN[kind][0](), shape=(4, WIDTH))
    if kind in ACTIVATIONS:
        return pair(ACTIVATIONS[kind][0]())
    if kind in OF_DENSE:
        return pair(up=layers.Dense(HIDDEN, name="up", **OF_DENSE[kind][0]))
    raise ValueError(kind)


BETWEEN = {
    "spatial": (
        lambda: layers.SpatialDropout1D(0.5, name="odd"),
        "SpatialDropout1D.*whole channels",
    ),
    "gaussian": (
        lambda: layers.GaussianDropout(0.5, name="odd"),
        r"GaussianDropout.*another kind than a Dropout's",
    ),
    "alpha": (
        lambda: layers.AlphaDropout(0.5, name="odd"),
        r"AlphaDropout.*another kind than a Dropout's",
    ),
    "noise": (
        lambda: layers.GaussianNoise(0.5, name="odd"),
        r"GaussianNoise.*another kind than a Dropout's",
    ),
    "subclass": (
        lambda: MyDropout(0.5, name="odd"),
        r"MyDropout.*subclass of Dropout.*`keras.layers.Dropout` itself",
    ),
    "noise_shape": (
        lambda: layers.Dropout(0.5, noise_shape=(None, 1, None), name="odd"),
        r"Dropout 'odd' has noise_shape=\(None, 1, None\)",
    ),
    "rate of 1": (
        lambda: layers.Dropout(1.0, name="odd"),
        r"Dropout 'odd' has rate=1.0.*\[0, 1\)",
    ),
    "regularized": (
        lambda: layers.Dropout(0.5, activity_regularizer="l2", name="odd"),
        "Dropout 'odd' has an activity_regularizer",
    ),
    "half dropout": (
        lambda: layers.Dropout(0.5, dtype="bfloat16", name="odd"),
        "Dropout 'odd' and Dense 'up' have different dtype policies.*bfloat16",
    ),
}
ACTIVATIONS = {
    "subclass of Activation": (
        lambda: MyActivation("relu", name="odd"),
        "MyActivation.*subclass of Activation",
    ),
    "subclass of ReLU": (
        lambda: MyReLU(name="odd"),
        "MyReLU.*subclass of ReLU",
    ),
    "PReLU": (lambda: layers.PReLU(name="odd"), "PReLU.*weights of its own"),
    "Softmax": (
        lambda: layers.Softmax(axis=1, name="odd"),
        "Softmax.*normalises over the hidden layer",
    ),
    "activity": (
        lambda: layers.Activation("relu", activity_regularizer="l2", name="o"),
        "Activation 'o' has an activity_regularizer",
    ),
    "a layer in it": (
        lambda: layers.Activation(layers.LeakyReLU(0.2, name="leaky")),
        "activation is a layer, LeakyReLU 'leaky'",
    ),
    "over positions": (
        lambda: layers.Activation(centred),
        "'centred' gives a token other values in other company",
    ),
    "half": (
        lambda: layers.Activation("relu", dtype="bfloat16", name="odd"),
        "Activation 'odd' and Dense 'up' have different dtype policies",
    ),
}
OF_DENSE = {
    "PReLU inside": (
        {"activation": layers.PReLU},
        "activation is a layer, PReLU",
    ),
    "kernel_constraint": (
        {"kernel_constraint": "non_neg"},
        "Dense 'up' has a kernel_constraint",
    ),
    "bias_regularizer": (
        {"bias_regularizer": "l2"},
        "Dense 'up' has a bias_regularizer",
    ),
    "activity_regularizer": (
        {"activity_regularizer": "l2"},
        "Dense 'up' has an activity_regularizer",
    ),
    "no autocast": (
        {"autocast": False},
        "Dense 'up' has autocast=False",
    ),
}
KINDS = {**BETWEEN, **ACTIVATIONS, **OF_DENSE}


@pytest.fixture(params=KINDS)
def kind(request):
    settings = OF_DENSE.get(request.param, ({}, ""))[0]
    if isinstance(settings.get("activation"), type):
        settings["activation"] = settings["activation"]()
    return request.param


@pytest.mark.one_backend
def test_a_lookalike_keeps_the_pair_dense_and_is_named(kind, capsys):
    model = dense_by(kind)
    assert keras_upcycle.find_feed_forwards(model, explain=True) == []
    assert re.search(KINDS[kind][1], capsys.readouterr().out)
    with pytest.raises(UpcycleError, match=KINDS[kind][1]):
        keras_upcycle.upcycle_model(model, 2)


def test_a_pair_left_dense_computes_and_trains_as_it_did():
    """Beside one that is converted: values, dropped channels, losses."""
    x = inputs = keras.Input(SEQUENCE)
    hidden = layers.Dense(HIDDEN, activation="relu", name="up_0")(x)
    hidden = layers.SpatialDropout1D(0.5, seed=1)(hidden)
    x = layers.Add()([x, layers.Dense(WIDTH, name="down_0")(hidden)])
    hidden = layers.Dense(HIDDEN, name="up_1", activity_regularizer="l2")(x)
    x = layers.Add()([x, layers.Dense(WIDTH, name="down_1")(hidden)])
    hidden = layers.Dense(HIDDEN, activation="relu", name="up_2")(x)
    x = layers.Add()([x, layers.Dense(WIDTH, name="down_2")(hidden)])
    dense = models.randomized(keras.Model(inputs, x))
    router = keras_upcycle.TopKRouter(load_balance_loss=0.0)
    moe = keras_upcycle.upcycle_model(dense, 2, router=router, layers="all")
    assert [m.name for m in models.mixtures(moe)] == ["up_2_moe"]
    data = models.tokens(3, *SEQUENCE)
    np.testing.assert_allclose(
        models.output(moe, data), models.output(dense, data), 1e-4, 1e-5
    )
    # The same random state: the same channels drop.
    np.testing.assert_allclose(
        models.array(moe(data, training=True)),
        models.array(dense(data, training=True)),
        1e-4,
        1e-4,
    )
    expected = float(sum(dense.losses))
    assert expected > 0
    assert float(sum(moe.losses)) == pytest.approx(expected, rel=1e-4)


# Calls.


@pytest.mark.one_backend
def test_dropout_that_always_drops_keeps_the_pair_dense():
    model = pair(layers.Dropout(0.5, name="odd"), call={"training": True})
    assert "Dropout 'odd' is called with more" in reasons(model)["up"]
    assert "training=True" in reasons(model)["up"]


@pytest.mark.one_backend
def test_dropout_called_as_keras_calls_it_is_fine():
    for call in ({}, {"training": None}, {"training": False}):
        model = pair(layers.Dropout(0.5), call=call)
        assert len(keras_upcycle.find_feed_forwards(model)) == 1


# What was changed on the object.


def doubled(layer):
    call = layer.call
    layer.call = lambda *args, **kwargs: 2.0 * call(*args, **kwargs)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["up", "down", "odd"])
def test_a_call_put_on_the_object_is_not_lost_without_a_word(name):
    model = pair(layers.Dropout(0.5, name="odd"))
    doubled(model.get_layer(name))
    message = f"'{name}' has a `call` of its own"
    assert message in reasons(model)["up"]
    with pytest.raises(UpcycleError, match="has a `call` of its own"):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
def test_a_call_put_on_another_layer_is_refused():
    model = models.dense_pairs()
    doubled(model.get_layer("head"))
    with pytest.raises(UpcycleError, match=r"'head' \(Dense\) has a `call`"):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
@pytest.mark.parametrize("build", [models.dense_pairs, models.vit_classifier])
def test_a_train_step_put_on_the_model_is_refused(build):
    model = build()
    model.train_step = lambda *args: {}
    with pytest.raises(UpcycleError, match="has a `train_step` of its own"):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
def test_a_model_that_was_trained_has_no_methods_of_its_own():
    model = models.dense_pairs()
    model.compile("sgd", "mse")
    x = models.tokens(4, WIDTH)
    model.fit(x, np.zeros((4, models.CLASSES)), verbose=0)
    model.predict(x, verbose=0)
    for layer in keras_internals.all_layers(model):
        assert keras_internals.own_methods(layer) == []


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="hooks are torch's"
)
def test_a_hook_on_a_module_is_not_lost_without_a_word():
    model = pair()
    model.get_layer("up").register_forward_hook(lambda *args: None)
    assert "has a `_forward_hooks` of its own" in reasons(model)["up"]


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["regularizer", "constraint"])
@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_what_was_put_on_a_variable_is_seen_and_copied(part, kind):
    value = {
        "regularizer": keras.regularizers.L2(0.1),
        "constraint": keras.constraints.NonNeg(),
    }[kind]
    model = models.dense_pairs()
    for name in ("down_0", "head"):
        setattr(getattr(model.get_layer(name), part), kind, value)
    assert f"Dense 'down_0' has a {part}_{kind}" in reasons(model)["up_0"]
    router = keras_upcycle.TopKRouter(load_balance_loss=0.0)
    moe = keras_upcycle.upcycle_model(model, 2, router=router)
    for name in ("down_0", "head"):
        assert getattr(getattr(moe.get_layer(name), part), kind) is value
    if kind == "regularizer":
        assert float(sum(moe.losses)) == pytest.approx(
            float(sum(model.losses)), rel=1e-5
        )


@pytest.mark.one_backend
def test_a_mask_that_ends_in_the_pair_keeps_it_dense():
    model = pair(layers.ReLU(name="odd"))
    model.get_layer("odd").supports_masking = False
    assert "ReLU 'odd' has supports_masking=False" in reasons(model)["up"]


# Shared weights and layers.


@keras.saving.register_keras_serializable("test_lookalikes")
class Tied(layers.Layer):
    """Multiplies with another layer's kernel."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def call(self, x):
        return ops.matmul(x, self.other.kernel)


@pytest.mark.one_backend
def test_a_layer_inside_another_one_keeps_the_pair_dense():
    inputs = keras.Input((WIDTH,))
    up = layers.Dense(HIDDEN, name="up")
    x = layers.Dense(WIDTH, name="down")(up(inputs))
    model = keras.Model(inputs, Tied(up, name="tied")(x))
    assert "Dense 'up' is also inside Tied 'tied'" in reasons(model)["up"]


@pytest.mark.one_backend
def test_a_kernel_of_two_layers_keeps_the_pair_dense():
    model = pair(up=layers.Dense(WIDTH, name="up"))
    up, down = model.get_layer("up"), model.get_layer("down")
    with unlocked(down) as tracker:
        tracker.untrack(down._kernel)
        down._kernel = up._kernel
    assert "shares its kernel with Dense" in reasons(model)["up"]


# Quantised and adapted pairs.


@pytest.mark.one_backend
def test_a_quantized_pair_is_named():
    model = pair()
    model.quantize("int8")
    assert "Dense 'up' is quantized to 'int8'" in reasons(model)["up"]
    with pytest.raises(UpcycleError, match=r"quantized to 'int8'.*before"):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
def test_a_pair_with_adapters_is_named():
    model = pair()
    model.get_layer("down").enable_lora(2)
    assert "Dense 'down' has LoRA adapters" in reasons(model)["up"]
    with pytest.raises(UpcycleError, match="Merge them"):
        keras_upcycle.upcycle_model(model, 2)


# What is reproduced.


@pytest.mark.one_backend
def test_a_registered_function_is_the_experts_too(tmp_path):
    dense = pair(layers.Activation(squared))
    moe = keras_upcycle.upcycle_model(dense, 2, layers="all", router="top_k")
    x = models.tokens(3, *SEQUENCE)
    expected = models.output(dense, x)
    np.testing.assert_allclose(models.output(moe, x), expected, 1e-4, 1e-5)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_allclose(models.output(loaded, x), expected, 1e-4, 1e-5)


def test_dropout_goes_on_with_the_layers_random_numbers():
    dense = pair(layers.Dropout(0.5, seed=7, name="drop"))
    dense(models.tokens(2, *SEQUENCE), training=True)
    states = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        moe = keras_upcycle.upcycle_model(dense, 2, seed=0)
        (mixture,) = models.mixtures(moe)
        seed = keras_internals.seed_of(mixture.experts.hidden_dropout)
        states.append(ops.convert_to_numpy(seed.value))
    expected = keras_internals.seed_of(dense.get_layer("drop")).value
    for state in states:
        np.testing.assert_array_equal(state, ops.convert_to_numpy(expected))


def trained(model):
    """Ends of the paths of what trains in the experts."""
    (mixture,) = models.mixtures(model)
    return {
        v.path.split("experts/")[-1]
        for v in model.trainable_variables
        if any(v is w for w in mixture.experts.variables)
    }


UP = {"expert_up/kernel", "expert_up/bias"}
DOWN = {"expert_down/kernel", "expert_down/bias"}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (lambda up, down: setattr(up, "trainable", False), DOWN),
        (lambda up, down: setattr(down, "trainable", False), UP),
        (
            lambda up, down: setattr(up.bias, "trainable", False),
            (UP | DOWN) - {"expert_up/bias"},
        ),
        (
            lambda up, down: setattr(down.kernel, "trainable", False),
            (UP | DOWN) - {"expert_down/kernel"},
        ),
    ],
    ids=["up", "down", "up bias", "down kernel"],
)
def test_each_variable_of_experts_is_frozen_where_the_dense_one_is(
    freeze, expected
):
    dense = pair()
    freeze(dense.get_layer("up"), dense.get_layer("down"))
    assert trained(keras_upcycle.upcycle_model(dense, 2)) == expected


@pytest.mark.one_backend
def test_a_variable_that_its_frozen_layer_does_not_train_stays_so():
    dense = pair()
    dense.get_layer("up").trainable = False
    dense.get_layer("up").kernel.trainable = True
    assert trained(keras_upcycle.upcycle_model(dense, 2)) == DOWN


@pytest.mark.one_backend
def test_a_file_keeps_what_is_frozen_in_a_pair(tmp_path):
    dense = pair()
    dense.get_layer("up").trainable = False
    moe = keras_upcycle.upcycle_model(dense, 2)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    assert trained(loaded) == trained(moe) == DOWN
    assert trained(keras.models.clone_model(moe)) == DOWN
    keras_upcycle.unfreeze(loaded, "experts")
    assert trained(loaded) == UP | DOWN
    loaded.save(tmp_path / "thawed.keras")
    thawed = keras.saving.load_model(tmp_path / "thawed.keras")
    assert trained(thawed) == UP | DOWN


@pytest.mark.one_backend
def test_frozen_projections_are_roles():
    with pytest.raises(ValueError, match=r"frozen_projections.*'gate'"):
        keras_upcycle.MoEFeedForward(2, 8, frozen_projections=("gate",))


@pytest.mark.one_backend
def test_one_policy_of_the_pair_is_the_experts():
    policy = {"dtype": "mixed_bfloat16"}
    dense = pair(
        layers.ReLU(**policy),
        layers.Dropout(0.1, **policy),
        up=layers.Dense(HIDDEN, name="up", **policy),
        down=layers.Dense(WIDTH, name="down", **policy),
    )
    moe = keras_upcycle.upcycle_model(dense, 2, router="top_k")
    (mixture,) = models.mixtures(moe)
    assert mixture.compute_dtype == "bfloat16"
    x = models.tokens(3, *SEQUENCE)
    expected = models.output(dense, x)
    assert models.relative_gap(models.output(moe, x), expected) <= 2**-7


@pytest.mark.one_backend
def test_a_policy_by_path_keeps_the_pair_dense():
    policy = keras.dtype_policies.DTypePolicyMap("float32")
    policy["up"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    policy["down"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model = pair(
        up=layers.Dense(HIDDEN, name="up", dtype=policy),
        down=layers.Dense(WIDTH, name="down", dtype=policy),
    )
    assert "has a DTypePolicyMap" in reasons(model)["up"]


@pytest.mark.one_backend
def test_a_copy_keeps_a_policy_that_a_config_leaves_out():
    """`SpatialDropout1D` writes down no more than its variables' dtype."""
    inputs = keras.Input(SEQUENCE)
    x = layers.Dense(HIDDEN, activation="relu", name="up")(inputs)
    x = layers.Dense(WIDTH, name="down")(x)
    x = layers.SpatialDropout1D(0.5, dtype="mixed_bfloat16", name="odd")(x)
    moe = keras_upcycle.upcycle_model(keras.Model(inputs, x), 2)
    assert moe.get_layer("odd").compute_dtype == "bfloat16"
    assert keras.backend.standardize_dtype(moe.output.dtype) == "bfloat16"


# What leads on.


@keras.saving.register_keras_serializable("test_lookalikes")
class OwnModel(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.wide = layers.Dense(HIDDEN, name="wide")
        self.narrow = layers.Dense(WIDTH, name="narrow")

    def call(self, x):
        return self.narrow(self.wide(x))


def network(width):
    return keras.Sequential(
        [keras.Input((WIDTH,)), layers.Dense(HIDDEN), layers.Dense(width)]
    )


SEEN = {
    "TimeDistributed model": (
        lambda: layers.TimeDistributed(network(WIDTH), name="odd"),
        "TimeDistributed around Sequential.*call them without it",
    ),
    "Conv1D, channels first": (
        lambda: layers.Conv1D(
            WIDTH, 1, data_format="channels_first", name="odd"
        ),
        "Conv1D with kernel_size=1 and data_format='channels_first'.*`Dense`",
    ),
    "subclass of Conv1D": (
        lambda: MyConvolution(WIDTH, 1, name="odd"),
        "MyConvolution, a subclass of Conv1D.*`keras.layers.Conv1D` itself",
    ),
    "wide Conv1D": (
        lambda: layers.Conv1D(WIDTH, 3, padding="same", name="odd"),
        r"Conv1D with kernel_size=\(3,\), which mixes",
    ),
    "EinsumDense over heads": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, WIDTH), name="odd"
        ),
        "not a product over the last axis",
    ),
    "subclass": (
        lambda: MyDense(WIDTH, name="odd"),
        "MyDense, a subclass of Dense.*`keras.layers.Dense` itself",
    ),
    "layer": (
        lambda: Holder(name="odd"),
        "Holder and holds Dense 'wide', Dense 'narrow'.*register_family",
    ),
    "model": (
        lambda: OwnModel(name="odd"),
        "OwnModel.*holds Dense 'wide'.*functional or `Sequential` model",
    ),
    "wrapper": (
        lambda: layers.SpectralNormalization(layers.Dense(WIDTH), name="odd"),
        "SpectralNormalization around Dense.*without the wrapper",
    ),
    "recurrent": (
        lambda: layers.Bidirectional(
            layers.GRU(8, return_sequences=True), name="odd"
        ),
        "Bidirectional.*position",
    ),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("name", SEEN)
def test_what_was_seen_is_said_where_nothing_is_found(name, capsys):
    make, expected = SEEN[name]
    inputs = keras.Input(SEQUENCE)
    model = keras.Model(inputs, make()(inputs))
    assert keras_upcycle.find_feed_forwards(model, explain=True) == []
    (line,) = [
        row for row in capsys.readouterr().out.splitlines() if " odd:" in row
    ]
    assert re.search(expected, line), line
    with pytest.raises(UpcycleError, match=expected):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
def test_attention_is_named_where_nothing_is_found(capsys):
    inputs = keras.Input(SEQUENCE)
    attention = layers.MultiHeadAttention(2, 4, name="odd")
    model = keras.Model(inputs, attention(inputs, inputs))
    keras_upcycle.find_feed_forwards(model, explain=True)
    assert "odd: is a MultiHeadAttention" in capsys.readouterr().out


@pytest.mark.one_backend
def test_what_is_no_candidate_is_not_listed_beside_blocks():
    inputs = keras.Input(SEQUENCE)
    x = layers.MultiHeadAttention(2, 4, name="odd")(inputs, inputs)
    x = layers.Dense(WIDTH, name="down")(layers.Dense(HIDDEN, name="up")(x))
    x = layers.Conv1D(WIDTH, 3, name="wide")(x)
    assert reasons(keras.Model(inputs, x)) == {}


@pytest.mark.one_backend
def test_an_operation_between_the_two_has_a_remedy():
    inputs = keras.Input(SEQUENCE)
    hidden = keras.ops.square(layers.Dense(HIDDEN, name="up")(inputs))
    model = keras.Model(inputs, layers.Dense(WIDTH)(hidden))
    assert re.search("operation.*`activation=`", reasons(model)["up"])


@pytest.mark.one_backend
def test_consumers_are_named():
    inputs = keras.Input(SEQUENCE)
    hidden = layers.Dense(HIDDEN, name="up")(inputs)
    outputs = [layers.Dense(WIDTH)(hidden), layers.ReLU(name="other")(hidden)]
    model = keras.Model(inputs, outputs)
    assert re.search("2 consumers: .*Dense 'dense", reasons(model)["up"])
    assert "ReLU 'other'" in reasons(model)["up"]


# Inside KerasHub's blocks.


def changed_vit(change):
    backbone = models.vit_backbone()
    blocks = backbone.get_layer("vit_encoder").encoder_layers
    change(blocks[1])
    return backbone


def replace(attribute, make):
    def change(network):
        new = make()
        old = getattr(network, attribute)
        new.build((None, None, old.kernel.shape[0]))
        keras_internals.replace_sublayer(network, attribute, new)

    return change


# From what is changed in the last block to how the block is turned down, and
# what `upcycle_model` says, for the block can be neither experts nor a copy.
OF_NETWORK = {
    "subclass": (
        lambda up, down, drop: None,
        "MyDense, a subclass of Dense",
        "Undo the change",
    ),
    "lora": (
        lambda up, down, drop: down.enable_lora(2),
        "has LoRA adapters",
        "Merge them first",
    ),
    "quantized": (
        lambda up, down, drop: up.quantize("int8"),
        "quantized to 'int8'",
        "before it is quantized",
    ),
    "regularizer": (
        lambda up, down, drop: setattr(
            up.kernel, "regularizer", keras.regularizers.L2()
        ),
        "has a kernel_regularizer",
        None,
    ),
    "activity": (
        lambda up, down, drop: setattr(
            up, "activity_regularizer", keras.regularizers.L2()
        ),
        "has an activity_regularizer",
        "activity_regularizer=True",
    ),
    "dtype": (
        lambda up, down, drop: setattr(down, "dtype_policy", "mixed_bfloat16"),
        "have different dtype policies",
        "compute_dtype='bfloat16'",
    ),
    "call": (
        lambda up, down, drop: doubled(up),
        "has a `call` of its own",
        "has a `call` of its own",
    ),
    "noise shape": (
        lambda up, down, drop: setattr(drop, "noise_shape", (None, 1, None)),
        "has noise_shape",
        "has noise_shape",
    ),
    "activation": (
        lambda up, down, drop: setattr(
            down, "activation", keras.activations.relu
        ),
        "has an activation",
        "has activation=",
    ),
}


def parts_of(family, model):
    """The owner of the last block's network, and its layers."""
    if family == "vit":
        owner = model.get_layer("vit_encoder").encoder_layers[1].mlp
        return owner, "dense_1", (owner.dense_1, owner.dense_2, owner.dropout)
    owner = model.encoder_transformer_layers[1]
    return (
        owner,
        "input_projector",
        (owner.input_projector, owner.output_projector, owner.dropout_layer),
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("family", ["vit", "t5"])
@pytest.mark.parametrize("change", OF_NETWORK)
def test_a_changed_network_is_refused_by_name(family, change):
    build = models.vit_backbone if family == "vit" else models.t5_backbone
    model = build()
    make, expected, message = OF_NETWORK[change]
    owner, first, parts = parts_of(family, model)
    if change == "subclass":
        bias = parts[0].bias is not None
        replace(
            first,
            lambda: MyDense(
                HIDDEN,
                use_bias=bias,
                activation=parts[0].activation,
                name=first,
            ),
        )(owner)
    else:
        make(*parts)
    (rejected,) = reasons(model).values()
    assert re.search(expected, rejected), rejected
    before = models.weights(model)
    if change == "regularizer":
        # The block stays as it is, in a copy.
        moe = keras_upcycle.upcycle_model(model, 2, layers="all")
        kernels = [v for v in moe.weights if v.regularizer is not None]
        assert len(kernels) == 1
    else:
        with pytest.raises(UpcycleError, match=re.escape(message)):
            keras_upcycle.upcycle_model(model, 2, layers="all")
    models.assert_same_weights(model, before)


@pytest.mark.one_backend
@pytest.mark.parametrize("family", ["vit", "t5"])
def test_a_setting_changed_inside_a_backbone_is_not_lost(family):
    """A backbone is made from its own config, which knows nothing of it."""
    if family == "vit":
        model = models.vit_backbone()
        block = model.get_layer("vit_encoder").encoder_layers[0]
        block.layer_norm_1.epsilon = 0.5
        name = "epsilon=0.5"
    else:
        model = models.t5_backbone()
        block = model.decoder_transformer_layers[0]
        block.cross_attention_dropout.rate = 0.5
        name = "rate=0.5"
    with pytest.raises(UpcycleError, match=f"{name}.*Undo the change"):
        keras_upcycle.upcycle_model(model, 2)


@pytest.mark.one_backend
def test_a_rate_changed_in_a_vit_block_is_the_experts():
    model = models.vit_backbone(dropout_rate=0.1)
    block = model.get_layer("vit_encoder").encoder_layers[1]
    block.mlp.dropout.rate = 0.4
    (*_, site) = keras_upcycle.find_feed_forwards(model)
    assert site.dropout == site.output_dropout == 0.4


@pytest.mark.one_backend
def test_part_of_a_backbones_network_stays_frozen():
    model = models.t5_backbone()
    block = model.encoder_transformer_layers[1]
    block.gate_projector.trainable = False
    moe = keras_upcycle.upcycle_model(model, 2, layers={"decoder": None})
    flags = {
        v.path.split("experts/")[-1]: v.trainable
        for v in models.mixtures(moe)[0].experts.weights
    }
    assert sorted(flags.values()) == [False, True, True]


def sums_up(x):
    return x / (1.0 + ops.sum(ops.abs(x), axis=-1, keepdims=True))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "activation",
    ["softmax", "log_softmax", "sparsemax", sums_up],
    ids=["softmax", "log_softmax", "sparsemax", "function"],
)
def test_a_hidden_layer_that_is_one_is_not_cut(activation):
    """Slices of a softmax are not slices of the hidden layer."""
    dense = pair(
        up=layers.Dense(HIDDEN, activation=activation, name="up"),
        down=layers.Dense(WIDTH, name="down"),
    )
    x = models.tokens(2, *SEQUENCE)
    before = models.array(dense(x))
    cut = [
        keras_upcycle.FeedForwardSlices(exact=False),
        keras_upcycle.VirtualGroups(2, exact=False),
        keras_upcycle.ReplicateShuffleCut(),
        keras_upcycle.SharedExperts(),
    ]
    for init in cut:
        with pytest.raises(
            UpcycleError, match=r"by itself.*'up -> down'.*copy"
        ):
            keras_upcycle.upcycle_model(
                dense, 2, router="top_k", expert_init=init, layers="all"
            )
    whole = [
        keras_upcycle.VirtualGroups(1),
        keras_upcycle.ReplicateShuffleCut(
            intermediate_dim=HIDDEN, ratio=0.0, rescale=False
        ),
        "copy",
    ]
    for init in whole:
        moe = keras_upcycle.upcycle_model(
            dense, 2, router="top_k", expert_init=init, layers="all"
        )
        np.testing.assert_allclose(models.array(moe(x)), before, atol=1e-5)

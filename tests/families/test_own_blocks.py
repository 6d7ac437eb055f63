"""Blocks of KerasHub, and blocks that people write, in models of their own."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import moe_layers_in, named_mixtures

pytestmark = pytest.mark.thinned
EXPERTS, WIDTH, HIDDEN, WORDS, LENGTH = 4, 16, 20, 30, 8


# As in keras.io's "Text classification with Transformer", written anew.
@keras.saving.register_keras_serializable("own_blocks")
class TransformerBlock(layers.Layer):
    def __init__(self, width=WIDTH, heads=2, hidden=HIDDEN, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.settings = {
            "width": width,
            "heads": heads,
            "hidden": hidden,
            "rate": rate,
        }
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.ffn1 = layers.Dense(hidden, activation="relu", name="ffn1")
        self.ffn2 = layers.Dense(width, name="ffn2")
        self.norm1 = layers.LayerNormalization()
        self.norm2 = layers.LayerNormalization()
        self.dropout = layers.Dropout(rate)

    def call(self, inputs, training=None):
        x = self.norm1(inputs + self.attention(inputs, inputs))
        x = x + self.dropout(self.ffn2(self.ffn1(x)), training=training)
        return self.norm2(x)

    def get_config(self):
        return {**super().get_config(), **self.settings}


# As in "Text generation with a miniature GPT": the network is a `Sequential`.
@keras.saving.register_keras_serializable("own_blocks")
class CausalBlock(layers.Layer):
    def __init__(self, width=WIDTH, heads=2, hidden=HIDDEN, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"width": width, "heads": heads, "hidden": hidden}
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.ffn = keras.Sequential(
            [
                layers.Dense(hidden, activation="gelu"),
                layers.Dropout(0.1),
                layers.Dense(width),
            ]
        )
        self.norm = layers.LayerNormalization()

    def call(self, inputs):
        x = inputs + self.attention(inputs, inputs, use_causal_mask=True)
        return x + self.ffn(self.norm(x))

    def get_config(self):
        return {**super().get_config(), **self.settings}


# Gated, with the activation and the product in its own `call`.
@keras.saving.register_keras_serializable("own_blocks")
class GatedBlock(layers.Layer):
    def __init__(self, width=WIDTH, hidden=HIDDEN, **kwargs):
        super().__init__(**kwargs)
        self.width, self.hidden = width, hidden

    def build(self, input_shape):
        self.gate = layers.Dense(self.hidden, use_bias=False)
        self.value = layers.Dense(self.hidden, use_bias=False)
        self.out = layers.Dense(self.width, use_bias=False)
        for layer in (self.gate, self.value):
            layer.build(input_shape)
        self.out.build((*input_shape[:-1], self.hidden))
        super().build(input_shape)

    def call(self, inputs, real=None):
        hidden = keras.activations.silu(self.gate(inputs)) * self.value(inputs)
        return inputs + self.out(hidden)

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "hidden": self.hidden,
        }


# As in "Timeseries classification with a Transformer model".
@keras.saving.register_keras_serializable("own_blocks")
class ConvolutionBlock(layers.Layer):
    def __init__(self, width=WIDTH, hidden=HIDDEN, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"width": width, "hidden": hidden}
        self.wide = layers.Conv1D(hidden, kernel_size=1, activation="relu")
        self.narrow = layers.Conv1D(width, kernel_size=1)
        self.norm = layers.LayerNormalization()

    def call(self, inputs):
        return inputs + self.narrow(self.wide(self.norm(inputs)))

    def get_config(self):
        return {**super().get_config(), **self.settings}


@keras.saving.register_keras_serializable("own_blocks")
class Classifier(keras.Model):
    """A subclassed model with a `train_step` of its own."""

    def __init__(self, blocks=3, classes=3, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"blocks": blocks, "classes": classes}
        self.embedding = layers.Embedding(WORDS, WIDTH)
        self.blocks = [TransformerBlock(name=f"b{n}") for n in range(blocks)]
        self.head = layers.Dense(classes)
        self.steps = 0

    def call(self, ids, training=None):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(ops.mean(x, axis=1))

    def train_step(self, *args, **kwargs):
        self.steps += 1
        return super().train_step(*args, **kwargs)

    def get_config(self):
        return {**super().get_config(), **self.settings}


ku.register_block(
    TransformerBlock,
    up="ffn1",
    down="ffn2",
    output_dropout="dropout",
    models=[Classifier],
)
ku.register_block(CausalBlock, network="ffn", causal=True)
ku.register_block(ConvolutionBlock, up="wide", down="narrow")
ku.register_block(
    GatedBlock, gate="gate", up="value", down="out", activation="silu"
)


def functional(make, count=3):
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(ids)
    for number in range(count):
        x = make(number)(x)
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))
    return randomized(keras.Model(ids, x))


def randomized(model):
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.3, tuple(variable.shape)))
    return model


def subclassed():
    model = Classifier()
    model(ids())
    return randomized(model)


def ids():
    return np.random.default_rng(1).integers(1, WORDS, (3, LENGTH))


def hub_encoder(number):
    return keras_hub.layers.TransformerEncoder(HIDDEN, 2, name=f"e{number}")


def hub_decoder(number):
    return keras_hub.layers.TransformerDecoder(HIDDEN, 2, name=f"d{number}")


def inside_a_model(number):
    """A block in a model in the model."""
    inner = keras.Input((None, WIDTH))
    block = TransformerBlock(name="deep")
    return keras.Model(inner, block(inner), name=f"inner{number}")


MODELS = {
    "subclassed": subclassed,
    "TransformerBlock": lambda: functional(
        lambda n: TransformerBlock(name=f"b{n}")
    ),
    "CausalBlock": lambda: functional(lambda n: CausalBlock(name=f"c{n}")),
    "GatedBlock": lambda: functional(lambda n: GatedBlock(name=f"g{n}")),
    "ConvolutionBlock": lambda: functional(
        lambda n: ConvolutionBlock(name=f"v{n}")
    ),
    "keras_hub encoder": lambda: functional(hub_encoder),
    "keras_hub decoder": lambda: functional(hub_decoder),
    "FNet": lambda: functional(
        lambda n: keras_hub.layers.FNetEncoder(HIDDEN, name=f"f{n}")
    ),
    "nested": lambda: functional(inside_a_model),
    "Sequential": lambda: randomized(
        keras.Sequential(
            [
                keras.Input((LENGTH,), dtype="int32"),
                layers.Embedding(WORDS, WIDTH),
                *(TransformerBlock(name=f"b{n}") for n in range(2)),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3),
            ]
        )
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def dense(request):
    return MODELS[request.param]()


def converted(dense):
    router = ku.TopKRouter(2, capacity_factor=None)
    return ku.upcycle_model(dense, EXPERTS, router=router, layers="all")


@pytest.fixture(scope="module")
def moe(dense):
    return converted(dense)


def outputs(model):
    return ops.convert_to_numpy(model(ids(), training=False))


def test_it_starts_as_the_dense_model(dense, moe):
    np.testing.assert_allclose(outputs(moe), outputs(dense), 1e-5, 5e-6)
    assert len(moe_layers_in(moe)) == len(ku.find_feed_forwards(dense)) > 1
    assert isinstance(moe, type(dense))


def test_changed_experts_change_the_output(dense, moe):
    other = converted(dense)
    for layer in moe_layers_in(other):
        kernel = layer.experts.expert_down.kernel
        kernel.assign(kernel.value * 1.5)
    assert np.abs(outputs(other) - outputs(moe)).max() > 1e-3


def test_a_file_gives_the_same_model(moe, tmp_path):
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    assert type(loaded) is type(moe)
    np.testing.assert_array_equal(outputs(loaded), outputs(moe))
    assert len(moe_layers_in(loaded)) == len(moe_layers_in(moe))


def test_the_way_back_is_exact(dense, moe):
    again = ku.densify_model(moe)
    assert type(again) is type(dense)
    np.testing.assert_array_equal(outputs(again), outputs(dense))


def test_experts_are_removed(moe):
    keep = {name: [1, 2] for name in named_mixtures(moe)}
    small, _ = ku.prune_experts(moe, keep=keep)
    assert {layer.num_experts for layer in moe_layers_in(small)} == {2}
    np.testing.assert_allclose(outputs(small), outputs(moe), 1e-5, 5e-6)


def test_it_trains_and_keeps_its_own_step(dense):
    moe = ku.upcycle_model(dense, EXPERTS, layers="all_but_first")
    before = [
        ops.convert_to_numpy(ops.copy(layer.experts.expert_up.kernel.value))
        for layer in moe_layers_in(moe)
    ]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    moe.compile(keras.optimizers.SGD(0.1), loss)
    moe.fit(ids(), np.array([0, 1, 2]), verbose=0)
    for layer, old in zip(moe_layers_in(moe), before, strict=True):
        kernel = ops.convert_to_numpy(layer.experts.expert_up.kernel)
        assert (kernel != old).any()
    if isinstance(dense, Classifier):
        assert moe.steps > 0


def test_the_estimate_counts_what_is_built(dense, moe):
    estimate = ku.estimate_upcycle(
        dense, EXPERTS, router="top_k", layers="all", sequence_length=LENGTH
    )
    assert estimate.total_params == moe.count_params()
    assert estimate.flops_per_token > estimate.dense_flops_per_token > 0


def test_a_single_block_is_converted_unasked():
    dense = functional(lambda n: TransformerBlock(name="only"), count=1)
    assert len(moe_layers_in(ku.upcycle_model(dense, EXPERTS))) == 1


def test_experts_choose_in_no_causal_block():
    dense = MODELS["CausalBlock"]()
    with pytest.raises(ValueError, match="causal"):
        ku.upcycle_model(dense, EXPERTS, router="expert_choice", layers=[1])
    moe = ku.upcycle_model(dense, EXPERTS)
    assert {type(m.router) for m in moe_layers_in(moe)} == {ku.TopKRouter}


def test_a_later_token_changes_no_earlier_one():
    """Step 0 would hide it: the experts are made unlike first."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(inputs)
    for number in range(2):
        x = CausalBlock(name=f"c{number}")(x)
    moe = ku.upcycle_model(randomized(keras.Model(inputs, x)), EXPERTS)
    for layer in moe_layers_in(moe):
        kernel = layer.experts.expert_down.kernel
        noise = np.random.default_rng(0).normal(0, 1, tuple(kernel.shape))
        kernel.assign(ops.convert_to_numpy(kernel) + noise)
    some = ids()
    others = some.copy()
    others[:, -1] = (others[:, -1] + 1) % WORDS
    one, other = (
        ops.convert_to_numpy(moe(each, training=False))
        for each in (some, others)
    )
    np.testing.assert_allclose(one[:, :-1], other[:, :-1], 1e-5, 1e-5)
    assert np.abs(one[:, -1] - other[:, -1]).max() > 1e-3


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"up": "ffn1"}, ValueError, "must name the block's projections"),
        ({"up": 1, "down": "b"}, TypeError, "`up` must be the name"),
        ({"network": "ffn", "up": "a"}, ValueError, "nothing else"),
        (
            {"up": "a", "down": "b", "mask": "nothing"},
            ValueError,
            "must be an argument of",
        ),
        (
            {"up": "a", "down": "b", "models": [3]},
            TypeError,
            "must list classes",
        ),
        ({"up": "a", "down": "b", "causal": 1}, TypeError, "causal"),
    ],
)
def test_a_registration_is_refused_by_name(arguments, error, words):
    class Unknown(layers.Layer):
        def call(self, inputs):
            return inputs

    with pytest.raises(error, match=words):
        ku.register_block(Unknown, **arguments)


@pytest.mark.one_backend
def test_what_is_no_class_or_known_already_is_refused():
    with pytest.raises(TypeError, match="Pass the class"):
        ku.register_block(TransformerBlock(), up="ffn1", down="ffn2")
    with pytest.raises(ValueError, match="registered already"):
        ku.register_block(TransformerBlock, up="ffn1", down="ffn2")


@pytest.mark.one_backend
def test_a_block_that_names_what_it_has_not_is_turned_down(capsys):
    @keras.saving.register_keras_serializable("own_blocks")
    class Misnamed(TransformerBlock):
        pass

    ku.register_block(Misnamed, up="fnn1", down="ffn2")
    dense = functional(lambda n: Misnamed(name=f"m{n}"))
    assert ku.find_feed_forwards(dense, explain=True) == []
    assert "has no layer 'fnn1'" in capsys.readouterr().out
    with pytest.raises(ku.UpcycleError, match="has no layer 'fnn1'"):
        ku.upcycle_model(dense, EXPERTS)


@pytest.mark.one_backend
def test_an_unregistered_model_is_told_of_register_block():
    class Other(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Other()
    model(np.ones((2, 3), "float32"))
    with pytest.raises(ku.UpcycleError, match="register_block"):
        ku.upcycle_model(model, EXPERTS)

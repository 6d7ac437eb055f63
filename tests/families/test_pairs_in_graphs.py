"""Networks of plain models in the forms in which people write them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import moe_layers_in

pytestmark = pytest.mark.thinned
WIDTH, HIDDEN, LENGTH, EXPERTS = 8, 12, 5, 4
Dense = layers.Dense


def einsum(units, **kwargs):
    return layers.EinsumDense(
        "...d,df->...f", output_shape=units, bias_axes="f", **kwargs
    )


def up(**kwargs):
    return Dense(HIDDEN, name="first", **kwargs)


def gated(multiply, activation, behind=None, turned=False):
    """`activation` is a function of a tensor, or `None` for one in the gate."""

    def network(x):
        own = "silu" if activation is None else None
        gate = Dense(HIDDEN, activation=own, name="gate")(x)
        if activation is not None:
            gate = activation(gate)
        other = Dense(HIDDEN, name="other")(x)
        pair = (other, gate) if turned else (gate, other)
        hidden = multiply(*pair)
        if behind is not None:
            hidden = behind(hidden)
        return Dense(WIDTH)(hidden)

    return network


def by_layer(a, b):
    return layers.Multiply()([a, b])


def by_operator(a, b):
    return a * b


NETWORKS = {
    "gated, Conv1D": lambda x: layers.Conv1D(WIDTH, 1)(
        layers.Conv1D(HIDDEN, 1, activation="silu")(x)
        * layers.Conv1D(HIDDEN, 1)(x)
    ),
    "gated by a layer": gated(by_layer, None),
    "gated by an operator": gated(by_operator, None),
    "gated by ops": gated(ops.multiply, None),
    "gated, turned round": gated(by_layer, None, turned=True),
    "gated, turned round, by an operator": gated(
        by_operator, ops.silu, turned=True
    ),
    "gated, activation layer": gated(by_layer, layers.Activation("gelu")),
    "gated, a call of ops": gated(by_operator, ops.gelu),
    "gated, a leaky layer": gated(by_layer, layers.LeakyReLU(0.2)),
    "gated, dropout": gated(by_layer, ops.silu, layers.Dropout(0.2)),
    "bilinear": gated(by_layer, keras.activations.linear),
    "LeakyReLU": lambda x: Dense(WIDTH)(layers.LeakyReLU(0.3)(up()(x))),
    "ELU": lambda x: Dense(WIDTH)(layers.ELU(0.7)(up()(x))),
    "ReLU6": lambda x: Dense(WIDTH)(layers.ReLU(max_value=0.5)(up()(x))),
    "ops.gelu": lambda x: Dense(WIDTH)(ops.gelu(up()(x))),
    "exact gelu": lambda x: Dense(WIDTH)(keras.activations.gelu(up()(x))),
    "ops.leaky_relu": lambda x: Dense(WIDTH)(ops.leaky_relu(up()(x), 0.4)),
    "ops.elu": lambda x: Dense(WIDTH)(ops.elu(up()(x), 0.6)),
    "ops.tanh": lambda x: Dense(WIDTH)(ops.tanh(up()(x))),
    "EinsumDense": lambda x: einsum(WIDTH)(
        einsum(HIDDEN, activation="relu")(x)
    ),
    "EinsumDense, Dense": lambda x: Dense(WIDTH)(ops.silu(einsum(HIDDEN)(x))),
    "Conv1D": lambda x: layers.Conv1D(WIDTH, 1)(
        layers.Conv1D(HIDDEN, 1, activation="relu")(x)
    ),
    "Conv1D, Dense": lambda x: Dense(WIDTH)(
        ops.silu(layers.Conv1D(HIDDEN, 1, padding="causal")(x))
    ),
    "TimeDistributed": lambda x: layers.TimeDistributed(Dense(WIDTH))(
        layers.TimeDistributed(Dense(HIDDEN, activation="relu"))(x)
    ),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def dense(request):
    inputs = keras.Input((LENGTH, WIDTH))
    x = layers.LayerNormalization()(inputs)
    x = inputs + NETWORKS[request.param](x)
    model = keras.Model(inputs, Dense(3, name="head")(x))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.5, tuple(variable.shape)))
    return model


@pytest.fixture(scope="module")
def moe(dense):
    return ku.upcycle_model(dense, EXPERTS)


def outputs(model):
    x = np.random.default_rng(1).normal(size=(3, LENGTH, WIDTH))
    return ops.convert_to_numpy(model(x.astype("float32"), training=False))


def test_it_starts_as_the_dense_model(dense, moe, request):
    (site,) = ku.find_feed_forwards(dense)
    name = request.node.callspec.params["dense"]
    assert site.gated == ("gated" in name or name == "bilinear")
    assert len(moe_layers_in(moe)) == 1
    np.testing.assert_allclose(outputs(moe), outputs(dense), 1e-5, 5e-6)


def test_the_site_computes_what_the_layers_do(dense):
    """The kernels are those of their roles: gate and up are not exchanged."""
    (site,) = ku.find_feed_forwards(dense)
    x = np.random.default_rng(2).normal(size=(2, LENGTH, WIDTH))
    x = x.astype("float32")
    first, last = site.layers[0], site.layers[-1]
    (entry,) = {id(first.input): first.input}.values()
    inner = keras.Model(entry, last.output)
    np.testing.assert_allclose(
        ops.convert_to_numpy(site(x)),
        ops.convert_to_numpy(inner(x, training=False)),
        1e-4,
        1e-5,
    )


def test_changed_experts_change_the_output(dense, moe):
    other = ku.upcycle_model(dense, EXPERTS)
    (layer,) = moe_layers_in(other)
    kernel = layer.experts.expert_down.kernel
    kernel.assign(kernel.value * 1.5)
    assert np.abs(outputs(other) - outputs(moe)).max() > 1e-3


def test_a_file_gives_the_same_model(moe, tmp_path):
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(moe))


def test_the_way_back_is_exact(dense, moe):
    again = ku.densify_model(moe, dense=dense)
    np.testing.assert_array_equal(outputs(again), outputs(dense))


def _shared(x):
    gate = Dense(HIDDEN, activation="silu", name="gate")(x)
    return Dense(WIDTH)(by_layer(gate, gate))


def _another_tensor(x):
    gate = Dense(HIDDEN, activation="silu", name="gate")(x)
    return Dense(WIDTH)(by_layer(gate, Dense(HIDDEN)(ops.flip(x, 1))))


def _three(x):
    return Dense(WIDTH)(
        layers.Multiply()([Dense(HIDDEN, name=f"p{n}")(x) for n in range(3)])
    )


def _both_activated(x):
    return Dense(WIDTH)(
        by_layer(
            Dense(HIDDEN, activation="silu", name="gate")(x),
            Dense(HIDDEN, activation="tanh")(x),
        )
    )


def _dropout_before(x):
    gate = Dense(HIDDEN, activation="silu", name="gate")(x)
    return Dense(WIDTH)(by_layer(layers.Dropout(0.1)(gate), Dense(HIDDEN)(x)))


def _no_bias_of_one(x):
    gate = Dense(HIDDEN, activation="silu", name="gate")(x)
    return Dense(WIDTH)(by_layer(gate, Dense(HIDDEN, use_bias=False)(x)))


def _scaled(x):
    return Dense(WIDTH)(2.0 * Dense(HIDDEN, name="gate")(x))


REFUSED = {
    "itself": (_shared, "with itself|consumers"),
    "another tensor": (_another_tensor, "projects another tensor"),
    "three": (_three, "multiplies 3 tensors"),
    "both activated": (_both_activated, "both projections"),
    "dropout before": (_dropout_before, "Dropout stands before"),
    "a bias in one": (_no_bias_of_one, "have a bias and others"),
    "scaled": (_scaled, "multiplies 1 tensors|operation"),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gated_unit_is_turned_down(name, capsys):
    network, words = REFUSED[name]
    inputs = keras.Input((LENGTH, WIDTH))
    model = keras.Model(inputs, inputs + network(inputs))
    assert ku.find_feed_forwards(model, explain=True) == []
    import re

    assert re.search(words, capsys.readouterr().out)


@pytest.mark.one_backend
def test_an_einsum_that_ends_a_mask_is_turned_down(capsys):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(9, WIDTH, mask_zero=True)(inputs)
    model = keras.Model(inputs, x + NETWORKS["EinsumDense"](x))
    assert ku.find_feed_forwards(model, explain=True) == []
    assert "lets no mask pass" in capsys.readouterr().out


def convolutional():
    """An image model: its feed-forward networks are convolutions of 1 x 1."""
    inputs = keras.Input((4, 6, WIDTH))
    x = layers.Conv2D(WIDTH, 3, padding="same", name="wide")(inputs)
    y = layers.Conv2D(HIDDEN, 1, activation="gelu", name="up")(x)
    y = layers.Dropout(0.1, seed=1)(y)
    y = layers.Conv2D(WIDTH, (1, 1), name="down")(y)
    x = layers.GlobalAveragePooling2D()(x + y)
    model = keras.Model(inputs, Dense(3)(x))
    model.compile("adamw", "mse")
    return model


def images(count=6):
    rng = np.random.default_rng(3)
    return (
        rng.normal(size=(count, 4, 6, WIDTH)).astype("float32"),
        rng.normal(size=(count, 3)).astype("float32"),
    )


def seen(model):
    return ops.convert_to_numpy(model(images()[0], training=False))


METHODS = {
    "copy": {},
    "drop_upcycling": {},
    "random_noise": {},
    "shared_experts": {},
    "virtual_groups": {"expert_init": ku.VirtualGroups(2)},
    "feed_forward_slices": {"router": "ds_moe"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_convolutions_of_one_position(name):
    dense = convolutional()
    options = {"expert_init": name, **METHODS[name]}
    moe = ku.upcycle_model(dense, EXPERTS, **options, seed=0)
    (layer,) = moe_layers_in(moe)
    assert np.isfinite(seen(moe)).all()
    if name == "copy":
        np.testing.assert_allclose(seen(moe), seen(dense), 1e-5, 1e-5)
        assert ku.verify_upcycle(dense, moe, images()[0]).max_difference < 1e-5
        up = ops.convert_to_numpy(layer.experts.expert_up.kernel)
        own = ops.convert_to_numpy(dense.get_layer("up").kernel)[0, 0]
        np.testing.assert_array_equal(up, np.stack([own] * EXPERTS))


def test_convolutions_train_and_go_back_to_be_convolutions(tmp_path):
    dense = convolutional()
    dense.fit(*images(), batch_size=6, epochs=3, verbose=0)
    dense.get_layer("up").kernel.trainable = False
    moe = ku.upcycle_model(dense, EXPERTS)
    (layer,) = moe_layers_in(moe)
    assert not layer.experts.expert_up.kernel.trainable
    assert layer.experts.expert_up.bias.trainable
    dense.get_layer("up").kernel.trainable = True
    moe = ku.upcycle_model(dense, EXPERTS)
    (layer,) = moe_layers_in(moe)
    assert (
        ku.estimate_upcycle(dense, EXPERTS).total_params == moe.count_params()
    )

    optimizer = ku.upcycle_optimizer(
        dense.optimizer, dense, moe, rescale_moments=False
    )
    slots = {
        id(variable): optimizer._momentums[number]
        for number, variable in enumerate(moe.trainable_variables)
    }
    number = [v.path for v in dense.trainable_variables].index(
        dense.get_layer("up").kernel.path
    )
    old = ops.convert_to_numpy(dense.optimizer._momentums[number])[0, 0]
    new = ops.convert_to_numpy(slots[id(layer.experts.expert_up.kernel)])
    assert np.abs(old).max() > 0
    np.testing.assert_array_equal(new, np.stack([old] * EXPERTS))

    weights = ku.ExpertWeights.from_model(dense)
    assert weights.blocks[0]["up_kernel"].shape == (WIDTH, HIDDEN)
    again = ku.densify_model(moe, dense=dense)
    assert type(again.get_layer("up")) is layers.Conv2D
    np.testing.assert_allclose(seen(again), seen(dense), 1e-6, 1e-6)

    moe.compile(optimizer, "mse")
    before = ops.convert_to_numpy(layer.experts.expert_down.kernel)
    moe.fit(*images(), batch_size=6, epochs=1, verbose=0)
    moved = ops.convert_to_numpy(layer.experts.expert_down.kernel) - before
    assert np.abs(moved).max() > 0
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(seen(loaded), seen(moe))

"""The output bias of slices: once and whole, whatever number of them runs."""

import gradients
import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers import dispatch

DIM, HIDDEN, LENGTH, EXPERTS = 6, 16, 5, 4
OPEN = {"load_balance_loss": 0.0, "capacity_factor": None}


def normal(stddev, seed):
    """The same values each time, and in files."""
    return keras.initializers.RandomNormal(stddev=stddev, seed=seed)


def dense_model(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((LENGTH, DIM))
    hidden = keras.layers.Dense(
        HIDDEN,
        activation="relu",
        bias_initializer=normal(0.5, 1),
        name="a",
    )(inputs)
    outputs = keras.layers.Dense(
        DIM, bias_initializer=normal(0.5, 2), name="b"
    )(hidden)
    return keras.Model(inputs, outputs)


def inputs_of(seed=0, batch=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, LENGTH, DIM)).astype("float32")


# What slices the hidden layer, with routers that do and do not sum to 1.
METHODS = {
    "ds_moe": (ku.FeedForwardSlices(), "ds_moe", EXPERTS),
    "llama_moe": (
        ku.FeedForwardSlices("random", exact=False),
        ku.TopKRouter(2, False, **OPEN),
        EXPERTS,
    ),
    "cluster": (
        ku.FeedForwardSlices("cluster", exact=False),
        ku.ExpertChoiceRouter(1.0, normalize=False),
        EXPERTS,
    ),
    "virtual_group": (ku.VirtualGroups(2), ku.TopKRouter(2, **OPEN), 2),
    "virtual_group_published": (
        ku.VirtualGroups(2, "published"),
        ku.TopKRouter(3, False, **OPEN),
        2,
    ),
    "qwen2_moe": (
        ku.ReplicateShuffleCut(4, rescale=True),
        ku.TopKRouter(3, False, **OPEN),
        6,
    ),
    "shared_slices": (
        ku.SharedExperts(8, routed=ku.FeedForwardSlices(exact=False)),
        ku.TopKRouter(2, False, **OPEN),
        EXPERTS,
    ),
}
methods = pytest.mark.parametrize("method", METHODS)


def upcycled(method, dense=None, **settings):
    init, router, count = METHODS[method]
    return ku.upcycle_model(
        dense or dense_model(),
        count,
        expert_init=init,
        router=router,
        layers=[0],
        seed=0,
        **settings,
    )


def mixture(model):
    (found,) = [
        layer for layer in model.layers if isinstance(layer, ku.MoEFeedForward)
    ]
    return found


pytestmark = pytest.mark.filterwarnings("ignore:The first block")


@pytest.mark.thinned
@methods
@pytest.mark.parametrize("engine", dispatch.ENGINES)
def test_a_silent_hidden_layer_leaves_the_bias(method, engine):
    """Whatever experts a token meets, none too, and in training."""
    dense = dense_model()
    moe = upcycled(method, dense, dispatch=engine)
    layer = mixture(moe)
    for networks in layer.networks:
        down = networks.projections["down"]
        down.kernel.assign(ops.zeros(down.kernel.shape))
        assert down.bias is None
    bias = ops.convert_to_numpy(dense.get_layer("b").bias)
    for training in (False, True):
        found = gradients.as_float(moe(inputs_of(), training=training))
        np.testing.assert_allclose(
            found, np.broadcast_to(bias, found.shape), atol=1e-6
        )


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_ds_moe_with_some_slices_equals_the_sum_by_hand(top_k):
    """`b + sum of the likeliest S_i N W_i relu(...)`, in NumPy."""
    dense = dense_model()
    moe = upcycled("ds_moe", dense)
    router = mixture(moe).router
    kernel = np.random.default_rng(3).normal(size=(DIM, EXPERTS))
    router.kernel.assign(kernel)
    ku.set_active_experts(moe, top_k=top_k)
    x = inputs_of()
    a, a_bias, b, b_bias = (
        gradients.as_float(w).astype("float64") for w in dense.weights
    )
    logits = x @ kernel
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hidden = np.maximum(x @ a + a_bias, 0)
    expected = np.zeros(x.shape)
    width = HIDDEN // EXPERTS
    for place in np.ndindex(x.shape[:2]):
        expected[place] = b_bias
        for e in np.argsort(-scores[place])[:top_k]:
            own = slice(e * width, (e + 1) * width)
            part = hidden[place][own] @ b[own]
            expected[place] += scores[place][e] * EXPERTS * part
    np.testing.assert_allclose(gradients.as_float(moe(x)), expected, atol=2e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("engine", dispatch.ENGINES)
def test_layer_equals_itself_without_biases_plus_one(engine, gated):
    """Padding stays 0."""
    settings = {
        "gated": gated,
        "dispatch": engine,
        "kernel_initializer": normal(0.5, 1),
        "bias_initializer": normal(0.5, 2),
        "shared_intermediate_dim": 3,
    }
    router = {"normalize": False, "kernel_initializer": "zeros", **OPEN}
    layer = ku.MoEFeedForward(
        EXPERTS, 4, ku.TopKRouter(2, **router), output_bias=True, **settings
    )
    plain = ku.MoEFeedForward(
        EXPERTS, 4, ku.TopKRouter(2, **router), **settings
    )
    for each in (layer, plain):
        each.build((None, None, DIM))
    for ours, its in zip(layer.networks, plain.networks, strict=True):
        for role, projection in its.projections.items():
            own = ours.projections[role]
            own.kernel.assign(ops.copy(projection.kernel.value))
            if own.bias is not None:
                own.bias.assign(ops.copy(projection.bias.value))
            else:
                projection.bias.assign(ops.zeros(projection.bias.shape))
    mask = np.arange(LENGTH) < np.array([[5], [2], [3]])
    x = inputs_of()
    bias = gradients.as_float(layer.output_bias.bias)
    assert np.abs(bias).max() > 0.1
    found = gradients.as_float(layer(x, mask=mask))
    expected = gradients.as_float(plain(x, mask=mask)) + bias * mask[..., None]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not found[~mask].any()


def by_variables(model, x, target):
    """Gradients of the squared error by all trained variables, by path."""
    variables = model.trainable_variables
    target = ops.convert_to_tensor(target)

    def loss(*values):
        found, _ = model.stateless_call(
            list(values),
            [ops.copy(v.value) for v in model.non_trainable_variables],
            x,
            training=True,
        )
        return ops.sum(ops.square(found - target))

    _, _, found = gradients.pull_back(
        loss, *[ops.convert_to_numpy(v) for v in variables]
    )
    return {v.path: g for v, g in zip(variables, found, strict=True)}


def test_gradient_by_the_bias_is_the_dense_one_with_all_slices_on():
    dense = dense_model()
    moe = upcycled("ds_moe", dense)
    x = inputs_of()
    target = inputs_of(7)
    expected = by_variables(dense, x, target)["b/bias"]
    found = by_variables(moe, x, target)
    (own,) = [g for path, g in found.items() if "output_bias" in path]
    np.testing.assert_allclose(own, expected, atol=1e-4)


@pytest.mark.one_backend
@methods
def test_sizes_are_those_that_were_estimated(method):
    init, router, count = METHODS[method]
    dense = dense_model()
    moe = upcycled(method, dense)
    told = ku.estimate_upcycle(
        dense, count, router=router, expert_init=init, layers=[0]
    )
    assert told.total_params == moe.count_params()
    size = sum(ops.size(v) * 4 for v in moe.weights if "seed" not in v.path)
    assert told.weight_bytes == int(size)
    trained = sum(int(ops.size(v)) for v in moe.trainable_variables)
    assert told.adam_bytes == 2 * 4 * trained


@pytest.mark.one_backend
def test_slices_have_as_many_parameters_as_the_dense_model():
    dense = dense_model()
    moe = upcycled("ds_moe", dense)
    assert moe.count_params() == dense.count_params() + DIM * EXPERTS


@methods
def test_files_and_clones_hold_it(method, tmp_path):
    moe = upcycled(method)
    x = inputs_of()
    mixture(moe).output_bias.bias.assign(np.arange(DIM))
    expected = gradients.as_float(moe(x))
    moe.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(gradients.as_float(again(x)), expected)
    cloned = keras.models.clone_model(moe)
    cloned.set_weights(moe.get_weights())
    np.testing.assert_allclose(
        gradients.as_float(cloned(x)), expected, atol=1e-6
    )


@pytest.mark.one_backend
def test_a_config_of_before_has_the_bias_inside():
    config = ku.MoEFeedForward(2, 4).get_config()
    del config["output_bias"]
    layer = ku.MoEFeedForward.from_config(config)
    layer.build((None, None, DIM))
    assert layer.output_bias is None
    assert layer.experts.projections["down"].bias is not None


@pytest.mark.one_backend
def test_one_slice_goes_back_and_brings_the_optimizer_along():
    """One expert of the whole width: nothing may differ from dense training."""
    dense = dense_model()
    x, y = inputs_of(), inputs_of(1)
    dense.compile(keras.optimizers.Adam(0.01), "mse")
    dense.fit(x, y, epochs=2, verbose=0)
    moe = ku.upcycle_model(
        dense, 1, recipe="ds_moe", layers=[0], expert_init="feed_forward_slices"
    )
    mixture(moe).router.mutual_information_loss = 0.0
    adam = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    moe.compile(adam, "mse")
    again = ku.densify_model(moe, dense=dense)
    for a, b in zip(dense.weights, again.weights, strict=True):
        np.testing.assert_array_equal(*map(gradients.as_float, (a, b)))
    for model in (dense, moe):
        model.fit(x, y, epochs=3, verbose=0, shuffle=False)
    np.testing.assert_allclose(
        gradients.as_float(mixture(moe).output_bias.bias),
        gradients.as_float(dense.get_layer("b").bias),
        atol=1e-6,
    )
    again = ku.densify_model(moe, dense=dense)
    np.testing.assert_allclose(
        gradients.as_float(again(x)), gradients.as_float(moe(x)), atol=1e-5
    )


def test_pruned_and_extracted_experts_keep_it():
    moe = upcycled("llama_moe")
    layer = mixture(moe)
    x = inputs_of()
    smaller, _ = ku.prune_experts(moe, keep={layer.name: [0, 2]})
    np.testing.assert_array_equal(
        gradients.as_float(mixture(smaller).output_bias.bias),
        gradients.as_float(layer.output_bias.bias),
    )
    number = 2
    expert = ku.extract_expert(layer, number)
    own = {r: p for r, p in layer.experts.projections.items()}
    up = gradients.as_float(own["up"].kernel[number])
    hidden = np.maximum(x @ up + gradients.as_float(own["up"].bias[number]), 0)
    expected = hidden @ gradients.as_float(own["down"].kernel[number])
    expected = expected + gradients.as_float(layer.output_bias.bias)
    np.testing.assert_allclose(
        gradients.as_float(expert(x)), expected, atol=1e-5
    )


@pytest.mark.one_backend
def test_it_freezes_with_the_experts():
    moe = upcycled("ds_moe")
    ku.freeze(moe, "experts")
    (left,) = moe.trainable_variables
    assert "router" in left.path
    again = keras.models.clone_model(moe)
    assert [v.path for v in again.trainable_variables] == [left.path]
    ku.unfreeze(moe, "experts")
    assert mixture(moe).output_bias.bias.trainable
    ku.freeze(moe, "router")
    assert mixture(moe).output_bias.bias.trainable


@pytest.mark.one_backend
@pytest.mark.parametrize("part", ["a", "b"])
def test_a_frozen_dense_layer_stays_frozen(part):
    dense = dense_model()
    dense.get_layer(part).trainable = False
    layer = mixture(upcycled("ds_moe", dense))
    assert layer.output_bias.bias.trainable == (part != "b")


@pytest.mark.one_backend
def test_what_was_excluded_from_weight_decay_stays_so():
    dense = dense_model()
    adam = keras.optimizers.AdamW(weight_decay=0.1)
    adam.exclude_from_weight_decay(var_list=[dense.get_layer("b").bias])
    dense.compile(adam, "mse")
    moe = upcycled("ds_moe", dense)
    moe.optimizer.build(moe.trainable_variables)
    bias = mixture(moe).output_bias.bias
    assert not moe.optimizer._use_weight_decay(bias)
    kernel = mixture(moe).experts.expert_down.kernel
    assert moe.optimizer._use_weight_decay(kernel)


@pytest.mark.one_backend
def test_it_needs_biases():
    with pytest.raises(ValueError, match=r"needs `use_bias=True`.*=False"):
        ku.MoEFeedForward(2, 4, use_bias=False, output_bias=True)


def test_a_vit_starts_as_the_dense_one_and_a_preset_holds_it(tmp_path):
    dense = models.vit_backbone()
    moe = ku.upcycle_model(dense, 2, recipe="ds_moe")
    x = models.images()
    report = ku.verify_upcycle(dense, moe, x)
    assert report.relative_difference < 1e-5
    moe.save_to_preset(str(tmp_path / "preset"))
    again = type(moe).from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(
        gradients.as_float(again(x)), gradients.as_float(moe(x)), atol=1e-6
    )

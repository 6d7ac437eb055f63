"""Groups of a number of examples, also where it does not divide the batch."""

import gradients
import keras
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.analysis.assignments import expert_assignments
from keras_upcycle.layers import dispatch
from keras_upcycle.routing.token_groups import grouped, ungrouped

BATCH, LENGTH, DIM, HIDDEN, EXPERTS = 5, 3, 4, 6, 4


def normal(stddev, seed):
    """The same values each time, and in files."""
    return keras.initializers.RandomNormal(stddev=stddev, seed=seed)


ROUTERS = {
    "top_k": lambda **kw: ku.TopKRouter(
        2,
        eval_capacity_factor=0.75,
        load_balance_loss=0.0,
        kernel_initializer=normal(1.0, 0),
        **kw,
    ),
    "expert_choice": lambda **kw: ku.ExpertChoiceRouter(
        1.5, kernel_initializer=normal(1.0, 0), **kw
    ),
}


def layer_of(router, group, dispatch="auto", **settings):
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        ROUTERS[router](group=group),
        dispatch=dispatch,
        kernel_initializer=normal(0.5, 1),
        bias_initializer=normal(0.5, 2),
        name="moe",
        **settings,
    )
    layer.build((None, None, DIM))
    return layer


def batch_of(examples=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, LENGTH, DIM)).astype("float32")


def expected(layer, inputs, examples, mask=None):
    """The oracle on each run of `examples`, one group after the other."""
    weights = gradients.weights_of(layer)

    def route(logits, real):
        if isinstance(layer.router, ku.TopKRouter):
            return reference.top_k(logits, 2, capacity_factor=0.75, mask=real)
        return reference.expert_choice(logits, 1.5, mask=real)

    parts = []
    for start in range(0, len(inputs), examples):
        part = slice(start, start + examples)
        own = None if mask is None else mask[part]
        parts.append(reference.moe(inputs[part], weights, route, "batch", own))
    return np.concatenate(parts)


@pytest.mark.thinned("engine", "router", "examples")
@pytest.mark.parametrize("engine", dispatch.ENGINES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("examples", [1, 2, 5, 7])
def test_groups_equal_the_oracle(router, examples, engine):
    layer = layer_of(router, examples, engine)
    inputs = batch_of()
    mask = np.arange(LENGTH) < np.array([3, 1, 2, 3, 1])[:, None]
    for real in (None, mask):
        found = layer(inputs, mask=real)
        np.testing.assert_allclose(
            ops.convert_to_numpy(ops.stop_gradient(found)),
            expected(layer, inputs, examples, real),
            atol=2e-5,
        )


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_a_group_that_is_not_full(router):
    layer = layer_of(router, 2)
    alone = layer_of(router, "batch")
    inputs = batch_of()

    def scalar(layer):
        return lambda x: ops.sum(ops.square(layer(x)))

    _, _, (found,) = gradients.pull_back(scalar(layer), inputs)
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        _, _, (own,) = gradients.pull_back(scalar(alone), inputs[part])
        np.testing.assert_allclose(found[part], own, atol=2e-5)


def test_one_and_a_whole_batch_are_the_named_groups():
    inputs = batch_of()
    for number, name in ((1, "example"), (BATCH, "batch"), (99, "batch")):
        a, b = (layer_of("expert_choice", g)(inputs) for g in (number, name))
        both = [ops.convert_to_numpy(ops.stop_gradient(x)) for x in (a, b)]
        np.testing.assert_allclose(*both, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_unknown_batch_in_fit_predict_and_files(router, tmp_path):
    """The last batch is not full, and on TensorFlow its size not known."""
    inputs = keras.Input((LENGTH, DIM))
    layer = layer_of(router, 2)
    model = keras.Model(inputs, layer(inputs))
    x = batch_of(7)
    want = np.concatenate(
        [expected(layer, x[:5], 2), expected(layer, x[5:], 2)]
    )
    found = model.predict(x, batch_size=5, verbose=0)
    np.testing.assert_allclose(found, want, atol=2e-5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("moe").router.group == 2
    np.testing.assert_array_equal(
        again.predict(x, batch_size=5, verbose=0), found
    )
    model.compile("sgd", "mse")
    monitor = ku.RouterMonitor()
    history = model.fit(
        x, x, batch_size=5, epochs=1, verbose=0, callbacks=[monitor]
    )
    assert np.isfinite(history.history["loss"]).all()


def test_readings_leave_out_what_is_nobodys():
    dense = keras.Sequential(
        [
            keras.Input((LENGTH, DIM)),
            keras.layers.Dense(HIDDEN, activation="relu"),
            keras.layers.Dense(DIM),
        ]
    )
    router = ku.ExpertChoiceRouter(float(EXPERTS), group=2)
    moe = ku.upcycle_model(dense, EXPERTS, router=router)
    x = ops.convert_to_tensor(batch_of())
    report = ku.verify_upcycle(dense, moe, x)
    assert report.relative_difference < 1e-5
    assert report.layers[0].unrouted_fraction == 0.0
    assert report.layers[0].mean_combine_weight == pytest.approx(1.0)
    counted = ku.measure_active_experts(moe, x).layers[0]
    assert counted.tokens == BATCH * LENGTH
    assert counted.experts_per_token == EXPERTS
    shares = expert_assignments(moe, x, np.arange(BATCH) % 2)
    (share,) = shares.values()
    np.testing.assert_allclose(share, 1 / EXPERTS)


def test_there_and_back():
    inputs = batch_of()
    for group in ("example", "batch", 1, 2, 3, 5, 9):
        tokens, mask = grouped(ops.convert_to_tensor(inputs), None, group)
        back = ungrouped(tokens, inputs.shape)
        np.testing.assert_array_equal(ops.convert_to_numpy(back), inputs)
        assert (mask is None) == (group not in (2, 3))


@pytest.mark.one_backend
@pytest.mark.parametrize("group", [0, -1, True, 2.0, "token", None, [2]])
def test_other_groups_are_refused(group):
    with pytest.raises(ValueError, match=r"number of examples.*group="):
        ku.ExpertChoiceRouter(group=group)


@pytest.mark.one_backend
def test_numpy_numbers_are_numbers():
    router = ku.ExpertChoiceRouter(group=np.int64(4))
    assert router.get_config()["group"] == 4
    assert type(router.get_config()["group"]) is int


@pytest.mark.one_backend
def test_cost_of_an_example_follows_the_group():
    router = ku.ExpertChoiceRouter(1.0, group=4)
    # ceil(1.0 * 4 * 3 / 5) = 3 slots of each of 5 experts for 12 tokens.
    assert router.average_experts_per_token(5, length=3) == 15 / 12

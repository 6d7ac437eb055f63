"""What `RouterMonitor` counts, against the oracle; what it leaves alone."""

import math
import warnings

import keras
import models
import numpy as np
import pytest
import reference

import keras_upcycle as ku
from keras_upcycle.analysis import router_log
from keras_upcycle.analysis.similarity import expert_distance
from keras_upcycle.routing.router import clone

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")

WIDTH, LENGTH, EXPERTS = 8, 6, 4


@pytest.fixture(autouse=True)
def _quiet():
    """Tiny runs drop and starve; tests of warnings ask for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sparse(router=None, learning_rate=0.0, **settings):
    """One mixture of which every token's input is known."""
    keras.utils.set_random_seed(0)
    layer = ku.MoEFeedForward(
        EXPERTS, 16, router=router or ku.TopKRouter(2), name="moe", **settings
    )
    inputs = keras.Input((LENGTH, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    scale = np.random.default_rng(1).normal(size=(WIDTH, EXPERTS))
    layer.router.kernel.assign(scale.astype("float32"))
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    return model, layer


def data(count=16):
    x = models.tokens(count, LENGTH, WIDTH)
    return x, np.zeros_like(x)


def fit(model, monitor, count=16, batch_size=4, **settings):
    settings = {"epochs": 1, "verbose": 0, "shuffle": False, **settings}
    return model.fit(
        *data(count), batch_size=batch_size, callbacks=[monitor], **settings
    )


def expected(layer, batches, decide):
    """Shares and means of all batches from the oracle, token by token."""
    kernel = np.asarray(models.array(layer.router.kernel), "float64")
    load, requested, per_token = np.zeros(EXPERTS), 0, []
    for x in batches:
        logits = np.asarray(x, "float64") @ kernel
        for group, decision in decide(logits):
            load += decision.processed.sum(0)
            requested += decision.requested.sum()
            for token, processed, weights in zip(
                group, decision.processed, decision.weights, strict=True
            ):
                p = reference.softmax(token)
                entropy = -sum(q * math.log(q) for q in p) / math.log(EXPERTS)
                per_token.append(
                    (not processed.any(), entropy, p.max(), weights.sum())
                )
    means = np.mean(per_token, axis=0)
    return {
        "tokens": len(per_token),
        "load": load / load.sum(),
        "dropped": 1 - load.sum() / requested,
        "unrouted": means[0],
        "entropy": means[1],
        "confidence": means[2],
        "weight": means[3],
    }


def top_k(logits):
    flat = logits.reshape(-1, EXPERTS)
    yield flat, reference.top_k(flat, 2, capacity_factor=1.25)


def expert_choice(logits):
    for group in logits:
        decision = reference.expert_choice(group, 1.0)
        yield group, decision._replace(requested=decision.processed)


@pytest.mark.parametrize(
    ("router", "decide"),
    [
        (ku.TopKRouter(2, capacity_factor=1.25), top_k),
        (ku.ExpertChoiceRouter(1.0), expert_choice),
    ],
    ids=["top_k", "expert_choice"],
)
def test_it_counts_what_the_oracle_counts(router, decide):
    model, layer = sparse(clone(router))
    monitor = ku.RouterMonitor(every=2)
    fit(model, monitor)
    batches = np.split(data()[0], 4)
    for reading, part in zip(
        monitor.readings, (batches[:2], batches[2:]), strict=True
    ):
        assert reading.steps == 2
        for name, value in expected(layer, part, decide).items():
            np.testing.assert_allclose(
                getattr(reading, name), value, atol=1e-5, err_msg=name
            )


def test_losses_are_shown_one_by_one_and_add_up_to_what_fit_added():
    model, _ = sparse(  # dropless, so that `predict` computes the same
        ku.TopKRouter(
            2, z_loss=0.1, load_balance_loss=0.5, capacity_factor=None
        )
    )
    log = fit(model, ku.RouterMonitor()).history
    plain = np.mean(np.square(model.predict(data()[0], verbose=0)))
    added = log["loss"][0] - plain
    assert log["moe_loss"][0] == pytest.approx(
        0.1 * log["moe_z_loss"][0] + 0.5 * log["moe_load_balance"][0], rel=1e-5
    )
    assert log["moe_loss"][0] == pytest.approx(added, rel=1e-4)


def test_padding_is_not_counted_whatever_it_holds():
    layer = ku.MoEFeedForward(EXPERTS, 16, router=ku.TopKRouter(2))
    x = models.tokens(2, LENGTH, WIDTH)
    mask = np.array([[1] * 4 + [0] * 2, [1] * 6], bool)
    layer.build(x.shape)
    layer.router.watch()
    sums = []
    for fill in (0.0, np.nan):
        padded = np.where(mask[..., None], x, fill).astype("float32")
        layer(padded, mask=mask, training=True)
        sums.append(layer.router.statistics.read())
    np.testing.assert_array_equal(*sums)
    assert np.isfinite(sums[0]).all()
    reading = layer.router.statistics.reading(sums[0], step=1, layer="a")
    assert reading.tokens == 10


def test_training_is_the_same_with_it_and_files_hold_nothing_of_it(tmp_path):
    plain, _ = sparse(learning_rate=0.1)
    plain.fit(*data(), batch_size=4, verbose=0, shuffle=False)
    model, layer = sparse(learning_rate=0.1)
    fit(model, ku.RouterMonitor(every=1))
    assert len(model.weights) == len(plain.weights)
    assert model.count_params() == plain.count_params()
    models.assert_same_weights(model, models.weights(plain))
    model.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, models.weights(model))
    assert loaded.get_layer("moe").router.statistics is None
    assert layer.router.statistics is not None


def test_a_model_that_was_fit_before_is_counted_too():
    model, _ = sparse()
    model.fit(*data(), batch_size=4, verbose=0)
    monitor = ku.RouterMonitor(every=2)
    for fits in (1, 2):  # the second finds the routers watched
        fit(model, monitor)
        assert sum(reading.steps for reading in monitor.readings) == 4 * fits


@pytest.mark.one_backend
def test_every_step_is_read_once_with_its_number():
    model, _ = sparse()
    monitor = ku.RouterMonitor(every=3)
    fit(model, monitor, count=32, epochs=2)
    assert [r.step for r in monitor.readings] == [3, 6, 8, 11, 14, 16]
    assert [r.steps for r in monitor.readings] == [3, 3, 2] * 2


@pytest.mark.one_backend
def test_the_logs_get_few_numbers_and_all_on_request():
    model, _ = sparse(learning_rate=0.01)
    brief = fit(model, ku.RouterMonitor()).history
    assert set(brief) == {
        "loss",
        "moe_dead_experts",
        "moe_dropped",
        "moe_entropy",
        "moe_expert_distance",
        "moe_load_balance",
        "moe_loss",
        "moe_max_load",
        "moe_unrouted",
    }
    full = fit(model, ku.RouterMonitor(detail=True)).history
    assert full["moe_dropped/moe"] == full["moe_dropped"]
    assert set(brief) < set(full)


@pytest.mark.one_backend
def test_callbacks_after_it_see_its_numbers(tmp_path):
    model, _ = sparse()
    csv = tmp_path / "log.csv"
    model.fit(
        *data(),
        verbose=0,
        callbacks=[ku.RouterMonitor(), keras.callbacks.CSVLogger(csv)],
    )
    assert "moe_max_load" in csv.read_text().splitlines()[0]


@pytest.mark.one_backend
def test_blocks_are_named_in_order():
    dense = models.vit_classifier(models.vit_backbone(num_layers=4))
    moe = ku.upcycle_model(dense, 2, layers=[1, 2, 3])
    moe.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    monitor = ku.RouterMonitor()
    moe.fit(models.images(), models.labels(), verbose=0, callbacks=[monitor])
    names = [reading.layer for reading in monitor.readings]
    assert names == [f"transformer_block_{n}" for n in (2, 3, 4)]
    assert "transformer_block_2" in str(monitor)
    # Expert Choice is balanced by design.
    assert [r.max_load for r in monitor.readings] == pytest.approx([1, 1, 1])


def test_the_difference_at_step_0_is_taken_before_the_first_step():
    dense = models.dense_pairs()
    dense.compile("sgd", "mse")
    moe = ku.upcycle_model(dense, 2)
    moe.compile(keras.optimizers.SGD(10.0), "mse")
    x = models.tokens(8, models.WIDTH)
    monitor = ku.RouterMonitor(dense=dense, inputs=x)
    y = np.ones((8, models.CLASSES), "float32")
    moe.fit(x, y, verbose=0, callbacks=[monitor])
    assert monitor.step_0.relative_difference < 1e-5
    after = ku.verify_upcycle(dense, moe, x)
    assert after.relative_difference > 1e-2


# Warnings.


@pytest.mark.one_backend
def test_dead_experts_are_named():
    model, layer = sparse(ku.TopKRouter(1, capacity_factor=None))
    kernel = np.array(models.array(layer.router.kernel))
    kernel[:, 2] = kernel[:, 1]  # ties go to the lowest
    layer.router.kernel.assign(kernel)
    with pytest.warns(UserWarning, match=r"Experts \[2\] of 'moe'.*no token"):
        fit(model, ku.RouterMonitor(), count=64)


@pytest.mark.one_backend
def test_many_drops_are_told_once():
    model, _ = sparse(ku.TopKRouter(2, capacity_factor=0.25))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, ku.RouterMonitor(every=1), epochs=2)
    told = [
        str(w.message)
        for w in caught
        if "found their expert full" in str(w.message)
    ]
    assert len(told) == 1
    assert "max_dropped=20%" in told[0]
    assert "`capacity_factor`" in told[0]


@pytest.mark.one_backend
def test_experts_that_do_not_separate_are_told():
    dense = models.sequential()
    moe = ku.upcycle_model(dense, 2)
    moe.compile(keras.optimizers.SGD(0.0), "mse")
    x = models.tokens(100, *dense.input_shape[1:])
    y = np.zeros((100, *dense.output_shape[1:]), "float32")
    with pytest.warns(UserWarning, match="do not separate: after 100 steps"):
        moe.fit(x, y, batch_size=1, verbose=0, callbacks=[ku.RouterMonitor()])


def test_the_distance_of_experts_against_numpy():
    _, layer = sparse(gated=True)
    kernels = [
        np.asarray(models.array(p.kernel), "float64")
        for p in layer.experts.projections.values()
    ]
    flat = np.concatenate([k.reshape(EXPERTS, -1) for k in kernels], axis=1)
    mean = flat.mean(0)
    gaps = np.linalg.norm(flat - mean, axis=1) / np.linalg.norm(mean)
    assert expert_distance(layer) == pytest.approx(gaps.mean(), rel=1e-5)


# The log.


@pytest.mark.one_backend
def test_a_log_reads_as_it_was_written(tmp_path):
    model, _ = sparse(ku.TopKRouter(2, z_loss=0.1))
    path = tmp_path / "router.csv"
    monitor = ku.RouterMonitor(every=2, log=path)
    fit(model, monitor)
    read = router_log.read(path)
    assert len(read) == len(monitor.readings) == 2
    for a, b in zip(read, monitor.readings, strict=True):
        assert (a.step, a.layer, a.steps, a.tokens) == (
            b.step,
            b.layer,
            b.steps,
            b.tokens,
        )
        np.testing.assert_allclose(a.load, b.load, rtol=1e-5)
        assert a.losses == pytest.approx(b.losses)
        assert a.entropy == pytest.approx(b.entropy)
        assert a.weighted_loss == pytest.approx(b.weighted_loss)


@pytest.mark.one_backend
def test_a_run_that_goes_on_goes_on_in_its_log(tmp_path):
    path = tmp_path / "router.csv"
    model, _ = sparse()
    fit(model, ku.RouterMonitor(every=2, log=path))
    fit(model, ku.RouterMonitor(every=2, log=path))
    assert [r.step for r in router_log.read(path)] == [2, 4, 6, 8]
    model.optimizer.iterations.assign(4)  # restored from a backup
    fit(model, ku.RouterMonitor(every=4, log=path))
    assert [r.step for r in router_log.read(path)] == [2, 4, 8]
    model.optimizer.iterations.assign(0)
    fit(model, ku.RouterMonitor(every=4, log=path))
    assert [r.step for r in router_log.read(path)] == [4]


@pytest.mark.one_backend
def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "router.csv"
    model, _ = sparse()
    fit(model, ku.RouterMonitor(every=2, log=path))
    whole = path.read_text()
    path.write_text(whole[:-20].rstrip("0123456789."))
    assert [r.step for r in router_log.read(path)] == [2]
    path.write_text(whole.replace("moe,2,", "moe,,", 1))
    with pytest.raises(ValueError, match="line 2 of"):
        router_log.read(path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="columns"):
        router_log.read(path)


# Bad input.


@pytest.mark.one_backend
def test_a_model_without_a_mixture_is_told():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    x = np.zeros((2, 4), "float32")
    with pytest.raises(ValueError, match="holds none"):
        model.fit(x, x, verbose=0, callbacks=[ku.RouterMonitor()])


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 0.5}, TypeError, "every=0.5"),
        ({"max_dropped": -1}, ValueError, "max_dropped=-1"),
        ({"inputs": [1]}, ValueError, "Pass both or neither"),
    ],
)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text):
        ku.RouterMonitor(**settings)

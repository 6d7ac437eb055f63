"""Readings in TensorBoard's files and in a run of Weights & Biases."""

import sys
import types

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import named_mixtures

pytestmark = pytest.mark.one_backend


def fitted(*writers, epochs=2, router=None):
    dense = models.sequence_dense_pairs()
    moe = models.set_routers(ku.upcycle_model(dense, 4, router=router))
    moe.compile(keras.optimizers.SGD(0.1), "mse")
    x = models.tokens(12, 6, models.WIDTH)
    monitor = ku.RouterMonitor(every=1, writers=writers)
    moe.fit(
        x,
        models.output(moe, x) + 1.0,
        batch_size=4,
        epochs=epochs,
        verbose=0,
        callbacks=[monitor],
    )
    return moe, monitor


def test_tensorboard_shows_every_reading_with_a_bar_an_expert(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    folder = tmp_path / "logs" / "routers"
    moe, monitor = fitted(ku.TensorBoardWriter(folder))
    found = event_accumulator.EventAccumulator(
        str(folder), size_guidance={"histograms": 0, "scalars": 0}
    )
    found.Reload()
    blocks = list(named_mixtures(moe))
    assert set(found.Tags()["histograms"]) == {
        f"moe_load/{name}" for name in blocks
    }
    for name in blocks:
        readings = [r for r in monitor.readings if r.layer == name]
        assert len(readings) == 6
        events = found.Histograms(f"moe_load/{name}")
        assert [event.step for event in events] == [r.step for r in readings]
        for event, reading in zip(events, readings, strict=True):
            first, *bars = event.histogram_value.bucket
            assert first == 0
            np.testing.assert_allclose(bars, reading.load, rtol=1e-6)
            assert list(event.histogram_value.bucket_limit) == [0, 1, 2, 3, 4]
        scalars = found.Scalars(f"moe_dropped/{name}")
        np.testing.assert_allclose(
            [event.value for event in scalars], [r.dropped for r in readings]
        )
        assert found.Scalars(f"moe_loss/load_balance/{name}")


def test_tensorboard_shows_what_schedules_give(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    schedule = keras.optimizers.schedules.PolynomialDecay(2.0, 6, 0.5)
    moe, _ = fitted(
        ku.TensorBoardWriter(tmp_path),
        router=ku.TopKRouter(temperature=schedule),
    )
    found = event_accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    for name in named_mixtures(moe):
        shown = found.Scalars(f"moe_temperature/{name}")
        assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(
            [event.value for event in shown],
            [2 - 0.25 * n for n in range(1, 7)],
        )
    assert "moe_noise_stddev" not in str(found.Tags())


class Run:
    """What a writer asks of a run."""

    def __init__(self):
        self.rows, self.metrics = [], {}

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, row):
        self.rows.append(row)


@pytest.fixture
def wandb(monkeypatch):
    """Its names that a writer uses: histograms are what they were made of."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.run = None
    module.Histogram = lambda np_histogram: np_histogram
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_gets_histograms_over_the_optimizers_steps(wandb):
    run = Run()
    _, monitor = fitted(ku.WandbWriter(run))
    assert run.metrics == {"moe_step": None, "moe_*": "moe_step"}
    assert len(run.rows) == len(monitor.readings) > 0
    for row, reading in zip(run.rows, monitor.readings, strict=True):
        assert row["moe_step"] == reading.step
        bars, edges = row[f"moe_load/{reading.layer}"]
        np.testing.assert_allclose(bars, reading.load)
        np.testing.assert_array_equal(edges, np.arange(5))
        assert row[f"moe_entropy/{reading.layer}"] == reading.entropy


def test_the_active_run_is_taken_where_none_is_given(wandb):
    with pytest.raises(RuntimeError, match=r"wandb\.init"):
        fitted(ku.WandbWriter())
    wandb.run = Run()
    fitted(ku.WandbWriter(), epochs=1)
    assert wandb.run.rows


def test_a_function_of_ones_own_gets_every_reading():
    seen = []
    _, monitor = fitted(seen.append)
    assert seen == monitor.readings


@pytest.mark.parametrize("writers", [3, "logs", ["logs"], [None]])
def test_writers_are_functions(writers):
    with pytest.raises(TypeError, match="`writers` must be a list"):
        ku.RouterMonitor(writers=writers)


@pytest.mark.parametrize("log_dir", [3, None, ["logs"]])
def test_a_folder_is_a_path(log_dir):
    with pytest.raises(TypeError, match="`log_dir`"):
        ku.TensorBoardWriter(log_dir)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    make = {
        "tensorboard": lambda: ku.TensorBoardWriter("logs"),
        "wandb": ku.WandbWriter,
    }[name]
    with pytest.raises(ImportError, match=rf"extra `\[{name}\]`"):
        make()

"""The demo, the example, and the comparison that they share."""

import dataclasses
import importlib.util
import json
import sys

import keras
import numpy as np
import pytest
from places import ROOT

from keras_upcycle import cli
from keras_upcycle.demo import comparison, summary
from keras_upcycle.demo import images as demo
from keras_upcycle.demo.batches import (
    Data,
    TestBatches,
    TrainBatches,
    WarmUpAndCoolDown,
)
from keras_upcycle.demo.results import (
    CONTINUED,
    DENSE,
    UPCYCLED,
    Result,
    Stage,
)

pytestmark = pytest.mark.one_backend

TINY = demo.Settings(
    seeds=2,
    dense_rounds=1,
    more_rounds=2,
    epochs_a_round=1,
    width=8,
    intermediate=8,
    blocks=2,
    experts=4,
)


def few(data, count):
    return dataclasses.replace(
        data,
        train=tuple(part[:count] for part in data.train),
        test=tuple(part[:count] for part in data.test),
    )


def result(name, seed, loss, accuracy):
    last = {
        "train_loss": loss,
        "test_loss": loss,
        "test_accuracy": accuracy,
        "seconds": 1.0,
    }
    return Result(
        name=name,
        seed=seed,
        steps=10,
        step_cost=1.0,
        batch_size=4,
        seconds=2.0,
        parameters=100,
        active_parameters=50,
        start={"test_loss": 2.0, "test_accuracy": 0.1},
        rounds=[last, last],
    )


def pairs(*ends):
    """Results of one seed for each `(dense loss, acc, sparse loss, acc)`."""
    return [
        each
        for seed, (loss, accuracy, sparse_loss, sparse_accuracy) in enumerate(
            ends
        )
        for each in (
            result(DENSE, seed, 1.0, 0.5),
            result(CONTINUED, seed, loss, accuracy),
            result(UPCYCLED, seed, sparse_loss, sparse_accuracy),
        )
    ]


# The demo, once for all of its tests.


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    small = few(demo.digits(), 300)
    patch.setattr(demo, "Settings", lambda: TINY)
    patch.setattr(demo, "digits", lambda: small)
    with patch.context():
        lines = []
        patch.setattr(
            "keras_upcycle.training.progress.Reporter.line",
            lambda self, text="": lines.append(text),
        )
        code = cli.main(["demo", "--images", "--output", str(output)])
    patch.undo()
    return code, output, "\n".join(lines), small


@pytest.mark.slow
def test_demo_prints_report_table_and_verdict(demo_run):
    code, _, printed, _ = demo_run
    assert code == 0
    assert "converted block" in printed
    for name in (DENSE, CONTINUED, UPCYCLED):
        assert f"| {name} | " in printed
    assert "at equal compute" in printed
    assert "largest difference of the logits 0.0e+00" in printed


@pytest.mark.slow
def test_demo_writes_figures_of_equal_compute(demo_run):
    _, output, _, _ = demo_run
    written = json.loads((output / "results.json").read_text())
    assert written["made_on"]["backend"] == keras.backend.backend()
    results = written["results"]
    assert [(r["name"], r["seed"]) for r in results] == [
        (name, seed)
        for seed in range(2)
        for name in (DENSE, CONTINUED, UPCYCLED)
    ]
    first, more, sparse = results[:3]
    assert more["steps"] > sparse["steps"]
    assert more["steps"] == pytest.approx(
        sparse["steps"] * sparse["step_cost"], rel=0.3
    )
    assert sparse["parameters"] > more["parameters"]
    assert more["start"]["test_loss"] == pytest.approx(
        first["rounds"][-1]["test_loss"], rel=1e-4
    )
    assert results[3]["rounds"] != first["rounds"]  # another seed
    assert len(written["reports"]) == 2


@pytest.mark.slow
def test_demo_draws_and_saves(demo_run):
    _, output, _, small = demo_run
    assert (output / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loaded = keras.models.load_model(output / "upcycled.keras", compile=False)
    written = json.loads((output / "results.json").read_text())
    logits = keras.ops.convert_to_numpy(loaded(small.test_inputs()))
    assert np.mean(logits.argmax(-1) == small.test[1]) == pytest.approx(
        written["results"][-1]["rounds"][-1]["test_accuracy"], abs=1e-6
    )


# What the two share.


def test_batches_depend_on_seed_and_round_alone():
    data = few(demo.digits(), 50)
    stage = Stage(rounds=4, steps=3, batch_size=16)
    a = TrainBatches(data, stage, seed=1)
    b = TrainBatches(data, stage, seed=1)
    list(a)
    a.round = b.round = 2
    for (x, y), (other_x, other_y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)
    c = TrainBatches(data, stage, seed=2)
    assert not np.array_equal(c[0][1], b[0][1])


def numbers(**options):
    """Twelve examples of one part, and batches with what was random."""
    return Data(
        train=(np.arange(12.0),),
        test=(np.arange(12.0),),
        batch=lambda rows, rng, training: (rows[0], rng.random(), training),
        **options,
    )


def test_an_epoch_shows_every_example_once():
    stage = Stage(rounds=2, steps=6, batch_size=4)
    batches = TrainBatches(numbers(), stage, seed=0)
    seen = np.concatenate([x for x, _, training in batches if training])
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))


def test_test_batches_are_the_same_every_time():
    tests = [list(TestBatches(numbers(test_batch_size=5))) for _ in range(2)]
    x, drawn, training = zip(*tests[0], strict=True)
    assert np.concatenate(x).tolist() == list(range(12))
    assert not any(training)
    assert len(set(drawn)) == 3
    assert drawn == tuple(each[1] for each in tests[1])


def test_what_has_no_weight_does_not_count():
    """Two places, the second with the weight 0: as if it were not there."""
    keras.utils.set_random_seed(1)
    inputs = {"tokens": keras.Input((2, 3), name="tokens")}
    outputs = keras.layers.Dense(4)(inputs["tokens"])
    stage = Stage(rounds=1, steps=1, batch_size=8)
    model = comparison.trainer(keras.Model(inputs, outputs), stage)
    tokens = np.random.default_rng(0).normal(size=(8, 2, 3)).astype("float32")
    labels = np.arange(16).reshape(8, 2) % 4
    weights = np.array([[1.0, 0.0]] * 7 + [[0.0, 0.0]], "float32")
    figures = model.evaluate(
        {"tokens": tokens}, labels, 3, 0, weights, return_dict=True
    )
    logits = model.predict({"tokens": tokens}, verbose=0)[:7, 0]
    chosen = logits[np.arange(7), labels[:7, 0]]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    assert figures["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(
        np.mean(logits.argmax(-1) == labels[:7, 0])
    )


def test_large_gradients_are_clipped():
    stage = Stage(rounds=1, steps=1, batch_size=8, clip_norm=0.5)
    assert small_classifier(stage).optimizer.global_clipnorm == 0.5


def test_the_rate_rises_stays_and_falls():
    schedule = WarmUpAndCoolDown(1.0, 100, warm_up=10, cool_down=0.3)
    rates = [float(schedule(step)) for step in (0, 9, 50, 70, 85, 100, 200)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0, 0])
    again = WarmUpAndCoolDown.from_config(schedule.get_config())
    assert float(again(85)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(1, 0.5, 0.8, 0.6), (1, 0.5, 0.81, 0.61)], "upcycled model came out"),
        ([(0.8, 0.6, 1, 0.5), (0.81, 0.6, 1, 0.5)], "dense model came out"),
        ([(1, 0.5, 1.1, 0.6), (1.1, 0.6, 1, 0.5)], "Neither came out ahead"),
        ([(1, 0.5, 1.1, 0.6), (1, 0.5, 1.1, 0.61)], "disagree"),
        ([(1, 0.5, 0.9, 0.4), (1, 0.5, 0.91, 0.6)], "ahead in loss; the acc"),
        ([(1, 0.5, 0.9, 0.6)], "one seed: no spread"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(ends, said):
    assert said in summary.verdict(pairs(*ends))


def test_the_table_has_means_and_spreads():
    table = summary.rows(pairs((1.0, 0.5, 0.9, 0.6), (1.0, 0.5, 0.7, 0.7)))
    assert [row[0] for row in table] == [DENSE, CONTINUED, UPCYCLED]
    assert table[2][1:3] == ("65.00 ± 7.07 %", "0.8000 ± 0.1414")


def small_classifier(stage):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(inputs)
    task = keras.Model(inputs, keras.layers.Dense(10)(x))
    return comparison.trainer(task, stage)


class Interrupt(keras.callbacks.Callback):
    """As if the process were killed."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(epoch, torn, tmp_path):
    """`torn`: killed while the latest backup was being written."""
    data = few(demo.digits(), 64)
    stage = Stage(rounds=3, steps=4, batch_size=16)
    kind = {"name": DENSE, "seed": 0}
    expected = comparison.train(small_classifier(stage), data, stage, **kind)
    backup = tmp_path / "backup"
    backup.mkdir()
    with pytest.raises(KeyboardInterrupt):
        comparison.train(
            small_classifier(stage),
            data,
            stage,
            **kind,
            callbacks=[Interrupt(epoch)],
            backup=backup,
        )
    if torn:
        (backup / "state" / "latest.weights.h5").write_bytes(b"half of it")
        if epoch == 1:  # it was the first: nothing has been completed yet
            (backup / "complete").unlink()
    received = comparison.train(
        small_classifier(stage), data, stage, **kind, backup=backup
    )
    assert len(received.rounds) == 3
    for one, other in zip(expected.rounds, received.rounds, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)


def test_an_optimizer_can_start_again():
    data = few(demo.digits(), 64)
    stage = Stage(rounds=2, steps=4, batch_size=16)
    model = small_classifier(stage)
    weights = model.get_weights()
    runs = []
    for _ in range(2):
        model.set_weights(weights)
        comparison.restart_optimizer(model)
        runs.append(comparison.train(model, data, stage, name=DENSE, seed=0))
    assert runs[1].final("test_loss") == pytest.approx(
        runs[0].final("test_loss"), rel=1e-5
    )


# The example, on images made up here.


@pytest.fixture(scope="module")
def example():
    path = ROOT / "examples" / "vit_cifar10.py"
    spec = importlib.util.spec_from_file_location("vit_cifar10", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made_up(data_dir, limit=None):
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(256, size=(48, 32, 32, 3), dtype="uint8"),
            rng.integers(10, size=48, dtype="int32"),
        )
        for _ in range(2)
    ]


@pytest.mark.slow
def test_example_goes_on_where_it_was_interrupted(
    example, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(example, "load_cifar10", made_up)
    small = (
        "--epochs 2 --more-epochs 2 --batch-size 16 --width 8 "
        "--intermediate 8 --blocks 2 --patch 16 --experts 2"
    ).split()

    def interrupting(self, title):
        return Interrupt(1 if title.startswith("upcycled") else None)

    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        patch.setattr(
            "keras_upcycle.training.progress.Reporter.callback", interrupting
        )
        with pytest.raises(KeyboardInterrupt):
            example.main([*small, "--output", str(output)])
    stages = {path.name for path in (output / "stages").iterdir()}
    assert {"dense.json", "upcycled-0.unfinished"} <= stages
    capsys.readouterr()
    assert example.main([*small, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "dense, round" not in printed
    assert "upcycled-0, round 1/2" not in printed
    assert "upcycled-0, round 2/2" in printed

    written = json.loads((output / "results.json").read_text())
    assert [len(each["rounds"]) for each in written["results"]] == [2, 2, 2]
    assert (output / "curves.png").exists()
    assert (output / "upcycled.keras").exists()

    assert example.main([*small, "--output", str(output), "--width", "16"]) == 2
    assert "'width': 8" in capsys.readouterr().err


def test_example_crops_and_flips(example):
    images = np.arange(4 * 32 * 32 * 3, dtype="uint16").reshape(4, 32, 32, 3)
    first, second = (
        example.crop_and_flip(images, np.random.default_rng(0))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert not np.array_equal(first, images)


def test_example_says_that_the_data_are_missing(example, tmp_path, capsys):
    code = example.main(
        ["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    )
    assert code == 2
    assert "no folder `cifar10`" in capsys.readouterr().err


def test_example_says_that_tfds_is_missing(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install tensorflow-datasets"):
        example.load_cifar10(None)

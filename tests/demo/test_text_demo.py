"""The demo on text: its checkpoint, its split, and what it prints."""

import json

import keras
import numpy as np
import pytest

from keras_upcycle import cli, estimate_upcycle, upcycle_model
from keras_upcycle.demo import language_model, sources, text, training
from keras_upcycle.demo.results import Result
from keras_upcycle.demo.store import read_json

SHAPE = language_model.Shape(
    hidden_dim=8, intermediate_dim=16, length=8, vocabulary_size=16
)


def tokens(count=5000, seed=0):
    return np.random.default_rng(seed).integers(16, size=count).astype("uint8")


# The text.


@pytest.mark.one_backend
def test_files_are_held_out_whole_and_by_name(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.txt").write_bytes(b"%03d" % number * 400)
    found = sources.folder(tmp_path)
    parts = {
        name: set(getattr(found, name).tobytes().decode().split("\0"))
        for name in ("train", "validation", "test")
    }
    assert found.files == 200 == sum(len(part) for part in parts.values())
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & (parts["test"] | parts["train"])
    # One file more moves no other from its part.
    (tmp_path / "200.txt").write_bytes(b"more" * 400)
    again = sources.folder(tmp_path)
    for name, part in parts.items():
        now = set(getattr(again, name).tobytes().decode().split("\0"))
        assert part <= now


@pytest.mark.one_backend
def test_what_is_not_ascii_is_one_token(tmp_path):
    (tmp_path / "a").write_text("é" * 5000)
    file = tmp_path / "long.txt"
    file.write_text(("é" * 1000 + "a" * 1000) * 1000)
    found = sources.folder(file)
    expected = {ord("a"), sources.OTHER, sources.END}
    assert set(np.unique(found.train)) == expected
    with pytest.raises(FileNotFoundError, match="4 KiB of text"):
        sources.folder(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="which has none"):
        sources.folder(tmp_path / "nothing")


@pytest.mark.one_backend
def test_the_standard_library_is_found():
    found = sources.standard_library()
    assert found.files > 300
    assert len(found.train) > 5 * len(found.test) > 0
    assert found.train.max() < sources.VOCABULARY


# Training.


@pytest.mark.one_backend
def test_rates_rise_hold_and_fall_to_zero():
    rate = training.rates(2.0, 100, warm_up=20, cool_down=0.3)
    assert rate.shape == (10,)
    np.testing.assert_allclose(rate[:2], [0.5, 1.5])
    np.testing.assert_allclose(rate[2:7], 2.0)
    np.testing.assert_allclose(rate[7:], [2 * 25 / 30, 2 * 15 / 30, 2 * 5 / 30])


def test_pieces_of_a_run_are_the_run():
    """The same batches and rates, wherever the run is cut."""
    ends = []
    for cuts in ([4], [1, 3]):
        keras.utils.set_random_seed(0)
        model = language_model.build(SHAPE)
        training.compile_for(model, language_model.adam(1e-2))
        done = 0
        rate = training.rates(1e-2, 40, cool_down=0.5)
        for part in np.split(rate, np.cumsum(cuts)[:-1]):
            training.train(
                model, tokens(), part, seed=3, start=done, batch_size=4
            )
            done += len(part) * training.STRETCH
        ends.append(training.get_state(model))
    for one, other in zip(*ends, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_model_goes_on_from_the_state_that_was_put_back():
    keras.utils.set_random_seed(0)
    model = language_model.build(SHAPE)
    training.compile_for(model, language_model.adam(1e-2))
    start = training.get_state(model)
    losses = []
    for _ in range(2):
        training.set_state(model, start)
        losses.append(
            training.train(
                model, tokens(), np.full(2, 1e-2), seed=0, batch_size=4
            ).losses
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.one_backend
def test_no_batch_looks_at_what_it_is_to_tell():
    """A causal model: later tokens change no earlier logits."""
    model = language_model.build(SHAPE)
    row = np.arange(8)[None] % 16
    other = row.copy()
    other[0, 5:] = 1
    moe = upcycle_model(model, 4, seed=0)
    for each in (model, moe):
        one, two = (
            keras.ops.convert_to_numpy(each(x, training=False))
            for x in (row, other)
        )
        np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-5)


@pytest.mark.one_backend
def test_operations_have_attention_in():
    """Against the products of both models, written out by hand."""
    estimate = estimate_upcycle(
        lambda: language_model.build(SHAPE), 4, sequence_length=8
    )
    d, f, length, vocabulary = 8, 16, 8, 16
    block = 4 * d * d + 2 * d * f + 2 * length * d
    dense = 2 * length * (2 * block + d * vocabulary)
    slots = 5 * 4  # ceil(1.25 * 2 * 8 / 4) for each expert, of 8 tokens
    sparse = dense + 2 * (slots - length) * 2 * d * f + 2 * length * d * 4
    ratio = language_model.operations_ratio(estimate, SHAPE.attention_flops())
    assert ratio == pytest.approx(sparse / dense)


# The demo.


@pytest.mark.one_backend
def test_the_checkpoint_is_the_one_of_its_record():
    """Its loss on this machine's library is about what the record says."""
    record = read_json(text.RECORD)
    dense = Result(**record["results"][0])
    model = text.dense_checkpoint()
    assert int(model.optimizer.iterations) == dense.steps
    assert model.count_params() == dense.parameters
    library = sources.standard_library()
    loss = training.held_out(model, library.test)["cross_entropy"]
    assert loss == pytest.approx(dense.final("test_loss"), rel=0.1)


@pytest.mark.one_backend
@pytest.mark.slow
def test_the_demo_compares_at_equal_operations(tmp_path, monkeypatch):
    settings = text.Settings(seeds=1, steps=60, worth=2, points=2)
    monkeypatch.setattr(text, "QUICK", settings)
    lines = []
    monkeypatch.setattr(
        "keras_upcycle.training.progress.Reporter.line",
        lambda self, text="": lines.append(text),
    )
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    printed = "\n".join(lines)
    for words in (
        "computes what the dense one does",
        "| dense continued |",
        "| upcycled |",
        "at equal compute",
        "Worth: ",
        "largest difference of the logits 0.0e+00",
    ):
        assert words in printed
    written = json.loads((tmp_path / "results.json").read_text())
    _, dense, sparse = written["results"]
    assert dense["steps"] == 60
    assert dense["steps"] - 14 < sparse["steps"] * sparse["step_cost"] <= 60
    # Both start where the checkpoint stands.
    assert sparse["start"]["test_loss"] == pytest.approx(
        dense["start"]["test_loss"], abs=1e-5
    )
    assert written["long_dense"]["steps"] == 120
    for name in ("curves.png", "upcycled.keras"):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.one_backend
def test_worth_is_read_between_the_two_runs():
    between = text.worth(1.5, (100, 2.0), (400, 1.0))
    assert "about 200 steps" in between
    assert "50% of that is saved" in between
    assert "more than 400 steps" in text.worth(0.9, (100, 2.0), (400, 1.0))
    assert "nothing here" in text.worth(2.1, (100, 2.0), (400, 1.0))

"""`keras-upcycle verify`: the library's report, and its exit code."""

import dataclasses
import json

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import cli
from keras_upcycle.cli import example_inputs

pytestmark = pytest.mark.one_backend


def verify(*given):
    return cli.main(["verify", *map(str, given)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`dense.keras` and sparse models made of it, trained and diverged ones."""
    folder = tmp_path_factory.mktemp("verify")
    dense = models.dense_pairs()
    dense.save(folder / "dense.keras")
    moe = ku.upcycle_model(dense, 4, seed=0)
    moe.save(folder / "moe.keras")
    for name, value in (("trained", 1.0), ("diverged", float("nan"))):
        (layer,) = models.mixtures(moe)
        kernel = layer.experts.expert_up.kernel
        kernel.assign(keras.ops.full(kernel.shape, value))
        moe.save(folder / f"{name}.keras")
    return folder


def test_right_after_upcycling_it_passes(folder, capsys):
    assert verify(folder / "dense.keras", folder / "moe.keras") == 0
    text = capsys.readouterr().out
    assert "computes what the dense one does" in text
    assert "Within the tolerance of 0.0001." in text


def test_the_report_is_the_librarys(folder, tmp_path, capsys):
    x = models.tokens(7, models.WIDTH)
    np.savez(tmp_path / "x.npz", features=x)
    both = (folder / "dense.keras", folder / "trained.keras")
    given = (*both, "--inputs", tmp_path / "x.npz", "--json")
    assert verify(*given) == 1
    found = json.loads(capsys.readouterr().out)
    dense, moe = map(keras.models.load_model, both)
    report = ku.verify_upcycle(dense, moe, x)
    assert found["report"] == json.loads(json.dumps(dataclasses.asdict(report)))
    assert found["passed"] is False
    worst = report.relative_difference
    assert verify(*given, "--tolerance", worst) == 0
    assert verify(*given, "--tolerance", 0.99 * worst) == 1


def test_what_is_not_a_number_is_within_no_tolerance(folder, capsys):
    given = (folder / "dense.keras", folder / "diverged.keras")
    assert verify(*given, "--tolerance", 1e30) == 1
    text = capsys.readouterr().out
    assert "not a finite number" in text
    assert "Beyond the tolerance" in text
    assert verify(*given, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["relative_difference"] is None


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        ("dense", "dense", "upcycled one second"),
        ("moe", "dense", "keras-upcycle verify: error"),
        ("dense", "gone", "where there is nothing"),
        ("gone", "moe", "where there is nothing"),
    ],
)
def test_what_cannot_be_compared_is_exit_code_2(
    dense, sparse, message, folder, capsys
):
    given = (folder / f"{dense}.keras", folder / f"{sparse}.keras")
    assert verify(*given) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("error") == 1
    assert printed.out == ""


# Inputs.


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_inputs_are_made_up_for_every_kind_of_model(case):
    model = case.build()
    inputs = example_inputs.get(model, None)
    assert all(
        np.all(np.isfinite(x))
        for x in keras.tree.flatten(models.output(model, inputs))
    )
    again = example_inputs.make(model)
    for a, b in zip(*map(keras.tree.flatten, (inputs, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_token_ids_are_known_and_end_in_padding():
    inputs = example_inputs.make(models.t5_backbone())
    for stack in ("encoder", "decoder"):
        ids = inputs[f"{stack}_token_ids"]
        mask = inputs[f"{stack}_padding_mask"]
        assert ids.shape == mask.shape
        assert ids.max() < models.VOCABULARY
        np.testing.assert_array_equal(ids > 0, mask == 1)
        real = mask.sum(axis=1)
        assert real.max() == ids.shape[1]
        assert 0 < real.min() < ids.shape[1]
        # Padding is a tail: no real token after it.
        assert np.all(np.diff(mask, axis=1) <= 0)


def test_the_smallest_embedding_limits_ids_of_a_plain_model():
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.add(
        [keras.layers.Embedding(size, 3)(tokens) for size in (9, 4)]
    )
    ids = example_inputs.make(keras.Model(tokens, x))
    assert ids.shape == (example_inputs.BATCH, 5)
    assert ids.max() == 3


@pytest.mark.parametrize("dtype", ["int32", "string"])
def test_what_cannot_be_guessed_asks_for_a_file(dtype):
    tokens = keras.Input((5,), dtype=dtype, name="tokens")
    model = keras.Model(tokens, keras.layers.Identity()(tokens))
    with pytest.raises(ValueError, match=r"'tokens'.*--inputs"):
        example_inputs.make(model)


def test_several_inputs_are_told_apart_by_name(tmp_path):
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, b], keras.layers.Concatenate()([a, b]))
    arrays = {"b": np.ones((4, 3)), "a": np.zeros((4, 2))}
    np.savez(tmp_path / "x.npz", **arrays)
    first, second = example_inputs.read(model, str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(first, arrays["a"])
    np.testing.assert_array_equal(second, arrays["b"])
    np.savez(tmp_path / "y.npz", a=arrays["a"], c=arrays["b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['a', 'c'\]"):
        example_inputs.read(model, str(tmp_path / "y.npz"))


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "x.npz").write_text("no arrays")
    with pytest.raises(ValueError, match="cannot be read"):
        example_inputs.read(models.dense_pairs(), str(tmp_path / "x.npz"))


def test_inputs_that_the_model_cannot_take():
    """Nothing says that an axis of any size must hold a multiple of 5."""
    x = keras.Input((None,), name="x")
    model = keras.Model(x, keras.layers.Reshape((5, -1))(x))
    with pytest.raises(ValueError, match=r"(?s)cannot be run.*--inputs"):
        example_inputs.get(model, None)


def test_ids_past_the_vocabulary_are_found(tmp_path):
    inputs = models.t5_inputs()
    inputs["encoder_token_ids"][0, 0] = models.VOCABULARY
    np.savez(tmp_path / "x.npz", **inputs)
    with pytest.raises(ValueError, match="the model's vocabulary"):
        example_inputs.get(models.t5_backbone(), str(tmp_path / "x.npz"))

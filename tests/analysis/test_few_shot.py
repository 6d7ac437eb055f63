"""The linear probe, against NumPy's own least squares."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.analysis.few_shot import ridge


@pytest.mark.parametrize("count", [4, 30])
def test_ridge_is_least_squares_of_the_augmented_system(count):
    """Fewer examples than features, and more: both systems say the same."""
    rng = np.random.default_rng(count)
    x, y = rng.normal(size=(count, 9)), rng.normal(size=(count, 3))
    rows = np.concatenate([x, np.sqrt(7.0) * np.eye(9)])
    signs = np.concatenate([y, np.zeros((9, 3))])
    expected, *_ = np.linalg.lstsq(rows, signs, rcond=None)
    np.testing.assert_allclose(ridge(x, y, 7.0), expected, atol=1e-9)


def gaussians(per_class=20, classes=3, width=6, distance=6.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(per_class * classes) % classes
    means = distance * np.eye(classes, width)
    return rng.normal(size=(len(labels), width)) + means[labels], labels


def test_one_draw_is_what_the_released_code_computes():
    """All examples drawn, so that nothing is random: by hand."""
    x, labels = gaussians(per_class=4, distance=1.0)
    x_test, test_labels = gaussians(per_class=30, distance=1.0, seed=1)
    found = ku.few_shot_probe(
        (x, labels), (x_test, test_labels), shots=4, l2=3.0, draws=2
    )
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    rows, test_rows = (
        np.concatenate([(v - mean) / std, np.full((len(v), 1), 100.0)], axis=1)
        for v in (x, x_test)
    )
    signs = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    eigenvalues, vectors = np.linalg.eigh(rows.T @ rows)
    weights = vectors @ ((vectors.T @ rows.T @ signs).T / (eigenvalues + 3.0)).T
    guessed = np.argmax(test_rows @ weights, axis=1)
    expected = np.mean(guessed == test_labels)
    assert 0.4 < expected < 1.0
    assert found.accuracies == (expected, expected)
    assert (found.mean, found.std) == (expected, 0.0)


def test_draws_differ_and_follow_from_the_seed():
    train, test = gaussians(distance=1.0), gaussians(distance=1.0, seed=1)
    one = ku.few_shot_probe(train, test, shots=2, seed=3)
    assert len(one.accuracies) == 5
    assert len(set(one.accuracies)) > 1
    assert one == ku.few_shot_probe(train, test, shots=2, seed=np.int64(3))
    assert one != ku.few_shot_probe(train, test, shots=2, seed=4)
    assert one.mean == pytest.approx(np.mean(one.accuracies))
    assert one.std == pytest.approx(np.std(one.accuracies, ddof=1))


def test_a_models_positions_are_averaged():
    backbone = models.vit_backbone()
    images, labels = models.images(12), np.arange(12) % 2
    pooled = models.array(backbone(images)).mean(axis=1)
    found = ku.few_shot_probe(
        (images, labels), (images, labels), model=backbone, shots=3
    )
    assert found == ku.few_shot_probe(
        (pooled, labels), (pooled, labels), shots=3
    )


@pytest.mark.one_backend
def test_labels_may_be_any_integers():
    x, labels = gaussians()
    names = np.array([7, -1, 40])[labels]
    assert ku.few_shot_probe((x, names), (x, names)).mean == 1.0


X, LABELS = gaussians()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shots": 0}, ValueError, "`shots`.*shots=0"),
        ({"shots": 2.5}, TypeError, "`shots`.*2.5"),
        ({"shots": 21}, ValueError, "21 examples of each class.*Lower `shots`"),
        ({"draws": 0}, ValueError, "`draws`"),
        ({"l2": 0}, ValueError, "`l2` must be positive"),
        ({"l2": float("nan")}, ValueError, "`l2`"),
        ({"train": X}, TypeError, r"`train` must be a pair"),
        ({"train": (X, LABELS * 1.0)}, TypeError, "integer labels.*float64"),
        ({"train": (X, np.eye(3)[LABELS])}, TypeError, "argmax"),
        ({"train": (X[:-1], LABELS)}, ValueError, "59 examples and 60 labels"),
        ({"train": (X[:, :, None], LABELS)}, ValueError, r"\(60, 6, 1\)"),
        ({"train": (X * np.nan, LABELS)}, ValueError, "finite features"),
        ({"test": (X[:, :4], LABELS)}, ValueError, "6 and 4"),
        ({"test": (X, LABELS + 1)}, ValueError, "1 others, such as 3"),
        ({"test": (X[:0], LABELS[:0])}, ValueError, "`test`.*empty"),
    ],
)
def test_bad_input(changes, error, message):
    given = {"train": (X, LABELS), "test": (X, LABELS), **changes}
    with pytest.raises(error, match=message):
        ku.few_shot_probe(given.pop("train"), given.pop("test"), **given)


@pytest.mark.one_backend
def test_a_model_of_several_outputs_is_refused():
    i = keras.Input((6,))
    model = keras.Model(i, {"a": i + 1.0, "b": i + 2.0}, name="two")
    with pytest.raises(ValueError, match=r"'two'.*Wrap the one output"):
        ku.few_shot_probe((X, LABELS), (X, LABELS), model=model)

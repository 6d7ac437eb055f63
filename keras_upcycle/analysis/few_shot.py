"""How good features are: least squares on a few examples of each class."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.layers import expert_init

# The column that stands for a bias: so large that L2 hardly holds it back.
_BIAS = 100.0
_EPSILON = 1e-5


class FewShotResult(NamedTuple):
    """What `few_shot_probe` found.

    Attributes:
        accuracies: A float for each draw of training examples, in `[0, 1]`.
        mean: Their mean: the figure that the paper reports.
        std: Their standard deviation (`ddof=1`); 0.0 for one draw.

    Example:
        >>> labels = np.arange(60) % 3
        >>> train = (np.eye(3)[labels], labels)
        >>> few_shot_probe(train, train, draws=2).accuracies
        (1.0, 1.0)
    """

    accuracies: tuple[float, ...]
    mean: float
    std: float


def few_shot_probe(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    model: keras.Model | None = None,
    shots: int = 10,
    l2: float = 1024.0,
    draws: int = 5,
    seed: int | None = 0,
    batch_size: int = 32,
) -> FewShotResult:
    """Accuracy of a linear model on frozen features of a few examples.

    The upstream measure of Sparse Upcycling for vision, there on ImageNet:
    `shots` random training examples of each class, ridge regression from
    their features to `+1` for the class and `-1` for the others, and the mean
    accuracy on all test examples over five draws. Features are scaled to mean
    0 and standard deviation 1 over the training examples, and a constant 100
    is added as one more feature. Nothing is trained by gradients.

    References: Sparse Upcycling (arXiv 2212.05055), section 4.1 and appendix
    A (10 shots, `l2 = 1024`, 5 draws); the released V-MoE code,
    `vmoe/evaluate/fewshot.py`, whose choices these are.

    Args:
        train: Tuple `(examples, labels)`: without a `model`, float features
            `(N, D)`, else what the model takes; integer labels `(N,)`.
        test: Tuple `(examples, labels)`, the same, of the examples to be
            judged.
        model: A Keras model whose output is the features: `(B, D)`, or
            `(B, ..., D)`, of which the mean over all positions is taken (global
            average pooling), as of a ViT backbone. It is not trained. Defaults
            to `None`: the examples are features.
        shots: Integer, at least 1: examples of each class. Defaults to 10.
        l2: Float above 0, the weight of the squared norm. Defaults to 1024.
        draws: Integer, at least 1: how often training examples are drawn.
            Defaults to 5.
        seed: Integer or `None`, the seed from which all draws follow. `None`
            draws one, from what `keras.utils.set_random_seed` seeds. Defaults
            to 0.
        batch_size: Integer, at least 1: the batch size of the model's
            `predict`. Defaults to 32.

    Returns:
        A `FewShotResult`.

    Raises:
        TypeError: For labels that are no integers, features and settings that
            are no numbers, and a model that is none.
        ValueError: If a class has fewer than `shots` training examples, a
            test label is no class of the training set, the numbers of
            examples and labels or of features differ, a feature is not
            finite, or the model cannot predict on the examples.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(60) % 3
        >>> features = rng.normal(size=(60, 8)) + 5 * np.eye(3, 8)[labels]
        >>> few_shot_probe((features, labels), (features, labels)).mean > 0.95
        True
    """
    shots = checks.check_count("shots", shots)
    draws = checks.check_count("draws", draws)
    # At 0 few examples would leave the weights open.
    l2 = checks.check_factor("l2", l2)
    batch_size = checks.check_count("batch_size", batch_size)
    seed = checks.check_seed("seed", seed)
    if model is not None:
        checks.check_instance("model", model, keras.Model, "a Keras model")
    labels = _labels("train", train)
    test_labels = _labels("test", test)
    classes, labels = np.unique(labels, return_inverse=True)
    rare = classes[np.bincount(labels, minlength=len(classes)) < shots]
    if len(rare):
        raise ValueError(
            f"`train` must have {shots} examples of each class. Received: "
            f"fewer of {len(rare)} classes, such as {rare[0]}. Lower `shots` "
            "or leave these classes out."
        )
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise ValueError(
            "`test` must hold classes of the training set only. Received: "
            f"{len(unknown)} others, such as {unknown[0]}. Leave them out, or "
            "add examples of them to `train`."
        )
    test_labels = np.searchsorted(classes, test_labels)
    features = _features("train", train, model, batch_size)
    test_features = _features("test", test, model, batch_size)
    if features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "`train` and `test` must have features of one width. Received: "
            f"{features.shape[1]} and {test_features.shape[1]}. Make both the "
            "same way."
        )
    rngs = expert_init.generator(seed).spawn(draws)
    found = []
    for rng in rngs:
        chosen = _draw(labels, len(classes), shots, rng)
        x, x_test = _prepared(features[chosen], test_features)
        signs = 2.0 * np.eye(len(classes))[labels[chosen]] - 1.0
        scores = x_test @ ridge(x, signs, l2)
        found.append(float(np.mean(scores.argmax(axis=1) == test_labels)))
    spread = float(np.std(found, ddof=1)) if draws > 1 else 0.0
    return FewShotResult(tuple(found), float(np.mean(found)), spread)


def ridge(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    """The weights `w` with the least `|x w - y|^2 + l2 |w|^2`.

    Args:
        x: float64 `(N, D)`.
        y: float64 `(N, C)`.
        l2: Positive.

    Returns:
        float64 `(D, C)`. The smaller of the two systems of equations is
        solved, of `D` or of `N` unknowns; they say the same.

    Example:
        >>> ridge(np.eye(2), np.eye(2), 1.0).diagonal().tolist()
        [0.5, 0.5]
    """
    count, width = x.shape
    if count >= width:
        return np.linalg.solve(x.T @ x + l2 * np.eye(width), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(count), y)


def _draw(labels, num_classes, shots, rng):
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == c), shots, replace=False)
            for c in range(num_classes)
        ]
    )


def _prepared(x, x_test):
    """Both scaled as the training examples ask, with the constant."""
    mean, std = x.mean(axis=0), x.std(axis=0) + _EPSILON
    return [
        np.pad((each - mean) / std, ((0, 0), (0, 1)), constant_values=_BIAS)
        for each in (x, x_test)
    ]


def _labels(name, data):
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(
            f"`{name}` must be a pair (examples, labels). Received: "
            f"{type(data).__name__}. Pass a tuple of two."
        )
    labels = checks.array_of(data[1])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"`{name}` must have integer labels of the shape (N,). Received: "
            f"{labels.dtype} of the shape {labels.shape}. Take the argmax of "
            "one-hot labels."
        )
    if not len(labels):
        raise ValueError(
            f"`{name}` must not be empty. Received: 0 labels. Pass examples of "
            "each class."
        )
    return labels


def _features(name, data, model, batch_size):
    examples = data[0]
    if model is not None:
        found = _predicted(name, model, examples, batch_size)
        if not isinstance(found, np.ndarray) or found.ndim < 2:
            raise ValueError(
                "`model` must put out one array of features, (B, D) or (B, "
                f"..., D). Received: {model.name!r} with another output. Wrap "
                "the one output that you mean in a `keras.Model`."
            )
        examples = found.reshape(len(found), -1, found.shape[-1]).mean(axis=1)
    features = checks.array_of(examples)
    if features.dtype.kind not in "fiub":
        # bfloat16 is a kind of its own to NumPy, or none.
        kind = checks.dtype_name(examples)
        if "float" not in kind or isinstance(examples, keras.Layer):
            raise TypeError(
                f"`{name}` must have features that are numbers. Received: "
                f"{type(examples).__name__} of dtype {kind}. Pass an array "
                "(N, D), or a `model` that makes features of the examples."
            )
        features = ops.convert_to_numpy(ops.cast(examples, "float32"))
    features = features.astype("float64")
    if features.ndim != 2:
        raise ValueError(
            f"`{name}` must have features of the shape (N, D) where no "
            f"`model` makes them. Received: shape {features.shape}. Flatten "
            "them, or pass a `model`."
        )
    if len(features) != len(data[1]):
        raise ValueError(
            f"`{name}` must have a label for each example. Received: "
            f"{len(features)} examples and {len(data[1])} labels. Pass as "
            "many of each."
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"`{name}` must have finite features. Received: NaN or infinity. "
            "Leave such examples out, or look for what made them."
        )
    return features


def _predicted(name, model, examples, batch_size):
    parts = keras.tree.flatten(examples)
    if any(0 in tuple(getattr(part, "shape", ())) for part in parts):
        raise ValueError(
            f"`{name}` must not be empty. Received: 0 examples. Pass examples "
            "of each class."
        )
    # On JAX a `predict` that fails leaves a model without weights.
    with keras_internals.values_kept(model):
        try:
            return model.predict(examples, batch_size=batch_size, verbose=0)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(
                f"`{name}` must have examples that `model` predicts on. "
                f"Received: {type(examples).__name__} for {model.name!r}, "
                f"which says: {error} Pass what `model.predict` takes."
            ) from error

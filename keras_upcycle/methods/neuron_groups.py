"""Which hidden neurons are shared, and which make an expert."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_upcycle.methods.activation_patterns import Patterns
from keras_upcycle.methods.clusters import balanced_clusters

ACTIVATIONS, WEIGHTS, RANDOM = "activations", "weights", "random"
GROUPINGS = (ACTIVATIONS, WEIGHTS, RANDOM)


class Cut(NamedTuple):
    """Where the hidden neurons of a block go.

    Attributes:
        shared: int `(S,)`, those of the shared expert, ascending.
        routed: int `(E, F)`, those of each expert, ascending.
        representatives: int `(E,)`, by which experts are chosen.
    """

    shared: np.ndarray
    routed: np.ndarray
    representatives: np.ndarray


def cut_of(
    patterns: Patterns,
    shared: int,
    num_experts: int,
    *,
    grouping: str = ACTIVATIONS,
    kernel: Any = None,
    drawn: np.random.Generator | None = None,
) -> Cut:
    """Where neurons go, by what they did.

    Args:
        patterns: Of the block.
        shared: How many neurons are shared.
        num_experts: A divisor of how many others there are.
        grouping: Of `Carving`.
        kernel: `(D, F)`, what is activated, for `"weights"`.
        drawn: For `"weights"` and `"random"`. Defaults to `None`: seed 0.

    Returns:
        A `Cut`; experts stand in the order of their rates, the most active
        first: whom a tie is for.

    Example:
        >>> marks = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]], bool)
        >>> found = cut_of(Patterns(2, marks.mean(axis=0), marks), 1, 2)
        >>> found.shared.tolist(), found.routed.tolist()
        ([0], [[1, 2], [3, 4]])
    """
    drawn = drawn or np.random.default_rng(0)
    order = np.argsort(-patterns.rates, kind="stable")
    rest = np.sort(order[shared:])
    marks = patterns.marks[:, rest].T.astype("float64")
    rates = patterns.rates[rest]
    if grouping == RANDOM:
        labels = np.arange(len(rest)) % num_experts
        labels = drawn.permutation(labels)
    elif grouping == WEIGHTS:
        points = ops.convert_to_numpy(ops.cast(kernel, "float32")).T[rest]
        labels = balanced_clusters(points, num_experts, drawn)
    else:
        first = np.argsort(-rates, kind="stable")[:num_experts]
        labels = balanced_clusters(marks, num_experts, first=first)
    groups = [np.flatnonzero(labels == n) for n in range(num_experts)]
    groups.sort(key=lambda group: -rates[group].sum())
    return Cut(
        np.sort(order[:shared]),
        np.stack([rest[group] for group in groups]),
        np.array([rest[group[_nearest(marks[group])]] for group in groups]),
    )


def _nearest(points: np.ndarray) -> int:
    """Which point is nearest to the mean of all."""
    away = points - points.mean(axis=0)
    return int(np.argmin((away**2).sum(axis=1)))

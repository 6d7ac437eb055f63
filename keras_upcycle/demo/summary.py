"""The comparison in words and tables, from its results."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_upcycle import tables
from keras_upcycle.demo.results import CONTINUED, DENSE, UPCYCLED, Result

NAMES = (DENSE, CONTINUED, UPCYCLED)
HEADER = (
    "",
    "test accuracy",
    "test loss",
    "train loss",
    "steps",
    "seconds",
    "parameters",
    "active",
)


def rows(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    """One row for each kind of model: mean, and spread over seeds.

    The spread is the standard deviation; a single run has none.
    """
    found: list[tuple[Any, ...]] = []
    for name in NAMES:
        own = [result for result in results if result.name == name]
        if not own:
            continue
        found.append(
            (
                name,
                _spread([r.final("test_accuracy") for r in own], percent=True),
                _spread([r.final("test_loss") for r in own]),
                _spread([r.final("train_loss") for r in own]),
                f"{own[0].steps:,}",
                f"{np.mean([r.seconds for r in own]):.0f}",
                tables.count(own[0].parameters),
                tables.count(own[0].active_parameters),
            )
        )
    return found


def differences(results: Sequence[Result], key: str) -> np.ndarray:
    """Upcycled less dense continued, for each seed, at the end."""
    ends = {(result.name, result.seed): result.final(key) for result in results}
    seeds = sorted({seed for name, seed in ends if name == UPCYCLED})
    return np.array(
        [ends[UPCYCLED, seed] - ends[CONTINUED, seed] for seed in seeds]
    )


def verdict(results: Sequence[Result]) -> str:
    """What the numbers say, whatever they say.

    A difference counts where its mean over seeds is larger than its standard
    deviation.
    """
    accuracy = 100 * differences(results, "test_accuracy")
    loss = differences(results, "test_loss")
    train = differences(results, "train_loss")
    count = len(accuracy)
    if count == 1:
        measured = (
            f"test accuracy {accuracy[0]:+.2f} points, test loss "
            f"{loss[0]:+.4f}, train loss {train[0]:+.4f} (one seed: no spread "
            "is known)"
        )
    else:
        measured = (
            f"test accuracy {tables.spread(accuracy, 2, sign=True)} points, "
            f"test loss {tables.spread(loss, 4, sign=True)}, "
            f"train loss {tables.spread(train, 4, sign=True)} (mean and "
            f"standard deviation of the difference over {count} seeds)"
        )
    return (
        "Upcycled less dense continued, at equal compute: "
        f"{measured}. {_reading(accuracy, loss)}"
    )


def _reading(accuracy, loss):
    better_accuracy = _sign(accuracy)
    better_loss = _sign(-loss)
    advice = (
        "Added capacity pays once the dense model is near its plateau and "
        "there is data to fill it."
    )
    if better_accuracy * better_loss < 0:
        return f"Accuracy and loss disagree: no clear winner. {advice}"
    if better_accuracy == better_loss == 0:
        return f"Neither came out ahead: the spread is larger. {advice}"
    ahead = better_accuracy + better_loss > 0
    text = f"The {'upcycled' if ahead else 'dense'} model came out ahead"
    if better_accuracy == 0:
        text += " in loss; the accuracies are within the spread"
    elif better_loss == 0:
        text += " in accuracy; the losses are within the spread"
    return f"{text}." if ahead else f"{text}. {advice}"


def _sign(values):
    """1, -1, or 0 where the mean is within the spread."""
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return int(np.sign(mean)) if abs(mean) > spread else 0


def _spread(values, percent=False):
    if percent:
        return f"{tables.spread([100 * v for v in values], 2)} %"
    return tables.spread(values, 4)


def compute_for(
    loss: float, less: tuple[float, float], more: tuple[float, float]
) -> float:
    """The compute that comes to a loss between those of two runs.

    The loss is taken to fall with the logarithm of the compute.

    Args:
        loss: From `more`'s to `less`'s.
        less: Compute and loss of a run.
        more: The same of a longer one.

    Example:
        >>> compute_for(1.5, (100, 2.0), (400, 1.0))
        200.0
    """
    (low, first), (high, last) = less, more
    return low * (high / low) ** ((first - loss) / (first - last))

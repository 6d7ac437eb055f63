"""What a study compares, and the figures that follow from its rows."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from keras_upcycle.demo import summary
from studies.arms import DENSE, OPERATIONS, SCRATCH, TIME, UPCYCLED
from studies.plans import Plan

HELD_OUT = "held_out"
Row = dict[str, Any]
NAMES = {
    DENSE: "dense, trained on",
    UPCYCLED: "upcycled",
    SCRATCH: "mixture from scratch",
}
# What the headline compares, and what is equal there.
COMPARED = (
    (DENSE, OPERATIONS),
    (UPCYCLED, OPERATIONS),
    (UPCYCLED, TIME),
    (SCRATCH, OPERATIONS),
)


def best_dense(found: Sequence[Row], plan: Plan, budget: float) -> list[Row]:
    """The dense rows at the rate that is best for them, by validation."""
    rate = plan.best_rate(found, DENSE, budget)
    return plan.own(found, DENSE, learning_rate=rate, extra_compute=budget)


def at_best(found: Sequence[Row], plan: Plan) -> dict[str, list[Row]]:
    """Each kind of arm that was run, at its best rate."""
    return {
        kind: plan.own(found, kind, learning_rate=plan.best_rate(found, kind))
        for kind in NAMES
        if plan.own(found, kind)
    }


def differences(
    ours: Sequence[Row],
    others: Sequence[Row],
    key: str = HELD_OUT,
    factor: float = 1,
) -> list[float]:
    """Held-out loss of one less the other's, seed by seed."""
    first, second = (
        {row["seed"]: factor * row[key] for row in group if key in row}
        for group in (ours, others)
    )
    return [
        first[seed] - second[seed] for seed in sorted(first) if seed in second
    ]


def worth(found: Sequence[Row], plan: Plan, loss: float) -> float | None:
    """Extra compute with which the dense model comes to a mean loss.

    Between the budgets that were run the loss is taken to fall with the
    logarithm of the compute. `None` beyond the last.
    """
    points = curve(at_best(found, plan)[DENSE])
    for less, more in itertools.pairwise(points):
        if more[1] <= loss <= less[1]:
            return summary.compute_for(loss, less, more)
    return None


def curve(found: Sequence[Row]) -> list[tuple[float, float]]:
    """Extra compute and mean loss, of the seeds that all budgets have."""
    budgets = sorted({row["extra_compute"] for row in found})
    seeds = set.intersection(
        *(
            {r["seed"] for r in found if r["extra_compute"] == budget}
            for budget in budgets
        )
    )
    return [
        (
            budget,
            statistics.mean(
                row[HELD_OUT]
                for row in found
                if row["extra_compute"] == budget and row["seed"] in seeds
            ),
        )
        for budget in budgets
    ]


def starts(
    found: Sequence[Row], plan: Plan
) -> dict[int, tuple[list[Row], list[Row]]]:
    """Dense and upcycled rows, by the steps of the checkpoint."""
    found_pairs = {}
    for steps in sorted((*plan.starts, plan.checkpoint)):
        pair = tuple(
            plan.own(
                found,
                kind,
                learning_rate=plan.best_rate(found, kind),
                checkpoint=steps,
                extra_compute=plan.start_steps / steps,
            )
            for kind in (DENSE, UPCYCLED)
        )
        if all(pair):
            found_pairs[steps] = pair
    return found_pairs

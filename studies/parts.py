"""What is run: the parts of a study, each some arms of its plan."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from studies.arms import DENSE, SCRATCH, TIME, UPCYCLED
from studies.plans import FEW

RESULTS = (
    pathlib.Path(__file__).parent.parent / "benchmarks/results/study.jsonl"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a study.

    Attributes:
        name: On the command line.
        about: What it shows.
        run: Function of a `runs.Study` and of seeds, or `None` for its own.
    """

    name: str
    about: str
    run: Callable[[Any, Sequence[int] | None], None]


def checkpoint(study, seeds):
    """The dense run's own learning rate."""
    plan = study.plan
    for rate in plan.checkpoint_rates:
        arm = plan.arm(DENSE, rate, checkpoint_rate=rate)
        study.run(arm, seeds or range(2), [plan.headline])


def rates(study, seeds):
    """The headline's compute, each arm at a grid of learning rates."""
    plan = study.plan
    for kind in (DENSE, UPCYCLED):
        for rate in plan.rates[kind]:
            study.run(
                plan.arm(kind, rate),
                seeds or range(plan.seeds),
                [plan.headline],
                headline=True,
            )


def headline(study, seeds):
    """The same, and the upcycled arm with as much time instead."""
    rates(study, seeds)
    plan = study.plan
    rate = plan.best_rate(study.rows.all, UPCYCLED)
    arm = plan.arm(UPCYCLED, rate, equal=TIME)
    study.run(arm, seeds or range(plan.seeds), [plan.headline], headline=True)


def curves(study, seeds):
    """More and more extra compute, dense and upcycled."""
    plan = study.plan
    for kind in (DENSE, UPCYCLED):
        rate = plan.best_rate(study.rows.all, kind)
        study.run(plan.arm(kind, rate), seeds or range(FEW), plan.budgets[kind])


def scratch(study, seeds):
    """A mixture from scratch: its rates, then its curve."""
    plan = study.plan
    for rate in plan.rates[SCRATCH]:
        study.run(
            plan.arm(SCRATCH, rate),
            seeds or range(plan.scratch_seeds),
            [plan.scratch_tuned],
        )
    study.run(
        plan.arm(SCRATCH, plan.best_rate(study.rows.all, SCRATCH)),
        seeds or range(FEW),
        plan.budgets.get(SCRATCH, [plan.headline]),
    )


def start(study, seeds):
    """Early and late checkpoints, at the extra compute of the headline."""
    plan = study.plan
    for steps in plan.starts:
        for kind in (DENSE, UPCYCLED):
            rate = plan.best_rate(study.rows.all, kind)
            study.run(
                plan.arm(kind, rate, checkpoint=steps),
                seeds or range(FEW),
                [plan.start_steps / steps],
            )


def tuning(study, seeds):
    """What comes after: the checkpoint and both continuations tuned on it."""
    plan = study.plan
    checkpoint = plan.arm(DENSE, plan.base["checkpoint_rate"])
    study.tune(checkpoint, seeds or range(plan.seeds), 0.0)
    for kind in (DENSE, UPCYCLED):
        arm = plan.arm(kind, plan.best_rate(study.rows.all, kind))
        study.tune(arm, seeds or range(plan.seeds), plan.headline)


def _sweep(name, about, many=False):
    def run(study, seeds):
        plan = study.plan
        rate = plan.best_rate(study.rows.all, UPCYCLED)
        for variant, changes in plan.sweeps[name].items():
            study.run(
                plan.arm(UPCYCLED, rate, variant=variant, **changes),
                seeds or range(plan.seeds if many else FEW),
                [plan.headline],
            )

    return Part(name, about, run)


PARTS = {
    part.name: part
    for part in (
        *(
            Part(function.__name__, function.__doc__.splitlines()[0], function)
            for function in (
                checkpoint,
                rates,
                headline,
                curves,
                scratch,
                start,
                tuning,
            )
        ),
        _sweep(
            "optimizer",
            "The optimizer's state carried, rescaled or new; noise.",
            many=True,
        ),
        _sweep("experts", "How many experts."),
        _sweep("layers", "Which layers."),
        _sweep(
            "routers",
            "Routers: experts a token, capacity, renormalised or not, noise.",
        ),
        _sweep(
            "methods", "The methods that followed, against copies.", many=True
        ),
        _sweep("newer", "Later methods, against copies.", many=True),
        _sweep("heads", "Heads of attention as experts, beside feed-forwards."),
    )
}

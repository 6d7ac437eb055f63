"""What is run: the parts of the study, each a list of arms."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from studies import arms, rows
from studies.arms import DENSE, SCRATCH, TIME, UPCYCLED, Arm

# The dense run's own best rate and the grids of the others, by the validation
# part: see the part `checkpoint`.
CHECKPOINT_RATE = 1e-2
RATES = {
    DENSE: (1.5e-3, 3e-3, 6e-3, 1e-2),
    UPCYCLED: (1.5e-3, 3e-3, 6e-3, 1e-2),
    SCRATCH: (6e-3, 1e-2, 2e-2),
}
RESULTS = (
    pathlib.Path(__file__).parent.parent / "benchmarks/results/study.jsonl"
)
HEADLINE = 0.25  # extra compute
BUDGETS = (0.1, 0.25, 0.5, 1.0, 1.5)
SCRATCH_BUDGETS = (*BUDGETS, 2.0, 2.5)
SCRATCH_TUNED = 0.5  # at which its learning rate is chosen
MANY, FEW = range(5), range(3)  # seeds


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study.

    Attributes:
        name: On the command line.
        about: What it shows.
        run: Function of the study and of seeds, or `None` for its own.
    """

    name: str
    about: str
    run: Callable[[Any, Sequence[int] | None], None]


def base(kind: str, learning_rate: float, **more: Any) -> Arm:
    """An arm with the study's own settings."""
    return Arm(
        kind,
        learning_rate=learning_rate,
        **{"checkpoint_rate": CHECKPOINT_RATE, **more},
    )


def best_rate(
    found: Sequence[dict], kind: str, budget: float | None = None
) -> float:
    """The rate with the least validation loss, mean over the seeds.

    Args:
        found: Rows.
        kind: Of arm.
        budget: At which extra compute; where it is tuned by default.
    """
    if budget is None:
        budget = SCRATCH_TUNED if kind == SCRATCH else HEADLINE
    means = {}
    for rate in RATES[kind]:
        own = rows.select(
            found,
            arm=kind,
            learning_rate=rate,
            extra_compute=budget,
            variant="",
            equal=arms.OPERATIONS,
            checkpoint=Arm.checkpoint,
            checkpoint_rate=CHECKPOINT_RATE,
        )
        if own:
            means[rate] = sum(row["validation"] for row in own) / len(own)
    if not means:
        raise ValueError(
            f"The best learning rate is read from rows of {kind!r} at "
            f"{budget:+.0%} compute. Received: none. Run the part "
            f"{'scratch' if kind == SCRATCH else 'rates'!r} first."
        )
    return min(means, key=means.get)


def checkpoint(study, seeds):
    """The dense run's own learning rate."""
    for rate in (3e-3, 6e-3, 1e-2, 2e-2):
        arm = Arm(DENSE, learning_rate=rate, checkpoint_rate=rate)
        study.run(arm, seeds or range(2), [HEADLINE])


def rates(study, seeds):
    """+25 %, five seeds, each arm at a grid of learning rates."""
    for kind in (DENSE, UPCYCLED):
        for rate in RATES[kind]:
            study.run(
                base(kind, rate),
                seeds or MANY,
                [HEADLINE],
                headline=True,
            )


def headline(study, seeds):
    """The same, and the upcycled arm with as much time instead."""
    rates(study, seeds)
    rate = best_rate(study.rows.all, UPCYCLED)
    arm = base(UPCYCLED, rate, equal=TIME)
    study.run(arm, seeds or MANY, [HEADLINE], headline=True)


def curves(study, seeds):
    """10 to 150 % of extra compute, dense and upcycled."""
    for kind in (DENSE, UPCYCLED):
        study.run(
            base(kind, best_rate(study.rows.all, kind)), seeds or FEW, BUDGETS
        )


def scratch(study, seeds):
    """A mixture from scratch: its rates, then up to 250 %."""
    for rate in RATES[SCRATCH]:
        study.run(base(SCRATCH, rate), seeds or FEW, [SCRATCH_TUNED])
    study.run(
        base(SCRATCH, best_rate(study.rows.all, SCRATCH)),
        seeds or FEW,
        SCRATCH_BUDGETS,
    )


def _sweep(study, seeds, variants):
    """Upcycled, with one setting changed."""
    rate = best_rate(study.rows.all, UPCYCLED)
    for name, changes in variants.items():
        study.run(
            base(UPCYCLED, rate, variant=name, **changes),
            seeds or FEW,
            [HEADLINE],
        )


EXPERTS = {f"{n} experts": {"experts": n} for n in (4, 8, 32, 64)}
EXPERTS["1 expert"] = {"experts": 1, "top_k": 1}


def experts(study, seeds):
    """How many experts."""
    _sweep(study, seeds, EXPERTS)


LAYERS = {
    "the first layer": {"layers": (0,)},
    "both layers": {"layers": (0, 1)},
}


def layers(study, seeds):
    """Which layers."""
    _sweep(study, seeds, LAYERS)


STARTS = (750, 1500, 6000)
START_STEPS = HEADLINE * Arm.checkpoint  # dense steps more, whatever before


def start(study, seeds):
    """Early and late checkpoints, at the extra compute of the headline."""
    for steps in STARTS:
        for kind in (DENSE, UPCYCLED):
            arm = base(kind, best_rate(study.rows.all, kind), checkpoint=steps)
            study.run(arm, seeds or FEW, [START_STEPS / steps])


ROUTERS = {
    "Top-1": {"top_k": 1, "normalize": False},
    "Top-4": {"top_k": 4},
    "Default MoE": {"router": "default_moe"},
    "not renormalised": {"normalize": False},
    "capacity 1": {"capacity_factor": 1.0},
    "capacity 2": {"capacity_factor": 2.0},
    "no token dropped": {"capacity_factor": None},
    "balance loss 0.001": {"load_balance_loss": 0.001},
    "no balance loss": {"load_balance_loss": 0.0},
    "router noise 1 / E": {"noise_stddev": 1 / 16},
    "router noise 1": {"noise_stddev": 1.0},
}


def routers(study, seeds):
    """Routers: experts a token, capacity, renormalised or not, noise."""
    _sweep(study, seeds, ROUTERS)


SLOTS = {
    "moments carried as they are": {"slots": "carried"},
    "new moments": {"slots": "new"},
    "a new Adam": {"slots": "fresh"},
    "noise on the experts": {"expert_init": "random_noise"},
}


def optimizer(study, seeds):
    """The optimizer's state carried, rescaled or new; noise on the experts."""
    _sweep(study, seeds or MANY, SLOTS)


METHODS = {
    "Drop-Upcycling": {"expert_init": "drop_upcycling"},
    "Default MoE, dropless": {
        "router": "default_moe",
        "capacity_factor": None,
    },
    "virtual groups": {
        "expert_init": "virtual_groups",
        "top_k": 8,
        "slots": "fresh",
    },
    "shared experts": {"expert_init": "shared_experts", "slots": "fresh"},
    "Branch-Train-MiX, 4 branches": {
        "expert_init": "branch_train_mix",
        "before": 360,
        "slots": "new",
    },
    "UpIT": {"expert_init": "upit", "before": 377, "slots": "new"},
    "DS-MoE, all of 16 slices": {
        "router": "ds_moe",
        "expert_init": "slices",
        "layers": (0, 1),
        "slots": "fresh",
    },
}


def methods(study, seeds):
    """The methods that followed, against copies."""
    _sweep(study, seeds or MANY, METHODS)


PARTS = {
    function.__name__: Part(
        function.__name__, function.__doc__.splitlines()[0], function
    )
    for function in (
        checkpoint,
        rates,
        headline,
        curves,
        scratch,
        optimizer,
        experts,
        layers,
        start,
        routers,
        methods,
    )
}

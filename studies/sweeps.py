"""Tables beside the headline: budgets, variants, starts, and tuning after."""

from collections.abc import Sequence

from keras_upcycle import tables
from studies import rows
from studies.arms import DENSE, UPCYCLED
from studies.comparisons import (
    HELD_OUT,
    NAMES,
    Row,
    at_best,
    best_dense,
    differences,
    starts,
)
from studies.plans import Plan


def curves(found: Sequence[Row], plan: Plan) -> str:
    """Loss at every budget, of the three arms."""
    groups = at_best(found, plan)
    budgets = sorted(
        {row["extra_compute"] for group in groups.values() for row in group}
    )
    lines = []
    for budget in budgets:
        cells = [f"{budget:.0%}"]
        for group in groups.values():
            values = [
                row[HELD_OUT] for row in group if row["extra_compute"] == budget
            ]
            cells.append(
                f"{tables.spread(values)} ({len(values)})" if values else ""
            )
        lines.append(cells)
    return tables.markdown(
        ("extra compute", *(NAMES[kind] for kind in groups)), lines
    )


def sweep(found: Sequence[Row], plan: Plan, names: Sequence[str]) -> str:
    """Variants at the headline's budget, less the best dense and the base."""
    budget = plan.headline
    rate = plan.best_rate(found, UPCYCLED)
    base = plan.own(found, UPCYCLED, learning_rate=rate, extra_compute=budget)
    reference = best_dense(found, plan, budget)
    lines = []
    for name in ("", *names):
        group = plan.own(
            found,
            UPCYCLED,
            learning_rate=rate,
            extra_compute=budget,
            variant=name,
        )
        if not group:
            continue
        lines.append(
            (
                name or plan.named,
                f"{group[0]['ratio']:.2f}",
                tables.spread(differences(group, reference), sign=True),
                ""
                if not name
                else tables.spread(differences(group, base), sign=True),
                f"{len(group)}",
            )
        )
    return tables.markdown(
        (
            "",
            "cost of a step",
            "less the best dense",
            "less the first row",
            "seeds",
        ),
        lines,
    )


def start(found: Sequence[Row], plan: Plan) -> str:
    """Checkpoints: the same extra compute after more or less dense training."""
    return tables.markdown(
        ("dense steps", "extra", "dense", "upcycled", "difference", "seeds"),
        [
            (
                f"{steps:,}",
                f"{plan.start_steps / steps:.0%}",
                *(
                    tables.spread([row[HELD_OUT] for row in group])
                    for group in pair
                ),
                tables.spread(differences(pair[1], pair[0]), sign=True),
                f"{len(pair[1])}",
            )
            for steps, pair in starts(found, plan).items()
        ],
    )


def tuning(found: Sequence[Row], plan: Plan) -> str:
    """After tuning: the checkpoint and its two continuations."""
    groups = {
        name: rows.select(
            list(found), study=plan.tuned_on, arm=kind, extra_compute=budget
        )
        for name, kind, budget in (
            ("dense checkpoint", DENSE, 0.0),
            (NAMES[DENSE], DENSE, plan.headline),
            (NAMES[UPCYCLED], UPCYCLED, plan.headline),
        )
    }
    reference = groups[NAMES[DENSE]]
    if not all(groups.values()):
        return "Not whole yet: run the part `tuning`."
    lines = []
    for name, group in groups.items():
        accuracy = [100 * row["accuracy"] for row in group]
        cells = ["", ""]
        if group is not reference:
            cells = [
                tables.spread(differences(group, reference), sign=True),
                tables.spread(
                    differences(group, reference, "accuracy", 100), 1, True
                ),
            ]
        lines.append(
            (
                name,
                tables.spread([row[HELD_OUT] for row in group]),
                cells[0],
                tables.spread(accuracy, 1),
                cells[1],
                f"{len(group)}",
            )
        )
    return tables.markdown(
        ("", "loss", "difference", "accuracy, %", "difference", "seeds"), lines
    )

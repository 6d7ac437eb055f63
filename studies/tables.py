"""Tables of the study, from its rows alone.

python -m studies.tables                # prints them
"""

import argparse
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from keras_upcycle import tables
from keras_upcycle.demo import summary
from studies import parts, plans, rows
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


def headline(found: Sequence[Row], plan: Plan) -> str:
    """+25 %: every rate of every arm, and the difference."""
    budget = plan.headline
    at = [row for row in found if row["extra_compute"] == budget]
    reference = best_dense(found, plan, budget)
    lines = []
    for kind, equal in COMPARED:
        for rate in plan.rates[kind]:
            group = plan.own(at, kind, learning_rate=rate, equal=equal)
            if not group:
                continue
            best = rate == plan.best_rate(found, kind)
            name = NAMES[kind] + (", equal time" if equal == TIME else "")
            lines.append(
                (
                    f"**{name}**" if best else name,
                    f"{rate:g}",
                    f"{group[0]['steps']}",
                    f"{statistics.mean(r['ratio'] for r in group):.2f}",
                    tables.spread([r[HELD_OUT] for r in group]),
                    ""
                    if kind == DENSE and best
                    else tables.spread(
                        differences(group, reference), 3, sign=True
                    ),
                    f"{statistics.mean(r['accuracy'] for r in group):.1%}",
                    f"{len(group)}",
                )
            )
    return tables.markdown(
        (
            "",
            "learning rate",
            "steps",
            "cost of a step",
            "held-out loss",
            "less the best dense",
            plan.right,
            "seeds",
        ),
        lines,
    )


def verdict(found: Sequence[Row], plan: Plan) -> str:
    """The headline in a sentence."""
    budget = plan.headline
    rate = plan.best_rate(found, UPCYCLED)
    ours = plan.own(found, UPCYCLED, learning_rate=rate, extra_compute=budget)
    gain = differences(ours, best_dense(found, plan, budget))
    text = (
        f"At {budget:+.0%} compute the upcycled model is "
        f"{tables.spread(gain, 4, sign=True)} {plan.unit} from the best dense "
        f"continuation ({len(gain)} seeds)"
    )
    needed = None
    if plan.budgets:
        last = plan.own(found, DENSE, extra_compute=plan.budgets[DENSE][-1])
        seeds = {row["seed"] for row in last}
        at = [row[HELD_OUT] for row in ours if row["seed"] in seeds]
        needed = worth(found, plan, statistics.mean(at)) if at else None
    if needed is not None:
        text += (
            f"; the dense model needs {needed:+.0%} for as much, so "
            f"{1 - budget / needed:.0%} of the extra compute is saved"
        )
    return text + "."


def in_short(found: Sequence[Row], plan: Plan) -> str:
    """The headline for a README: each arm at its best rate."""
    budget = plan.headline
    reference = best_dense(found, plan, budget)
    lines = []
    for kind, equal in COMPARED:
        if not plan.own(found, kind):
            continue
        group = plan.own(
            found,
            kind,
            learning_rate=plan.best_rate(found, kind),
            equal=equal,
            extra_compute=budget,
        )
        if not group:
            continue
        as_much = "as much time" if equal == TIME else "as many operations"
        lines.append(
            (
                NAMES[kind] + (f", {as_much}" if kind == UPCYCLED else ""),
                f"{group[0]['steps']}",
                f"{group[0]['parameters'] / 1000:.0f}k",
                tables.spread([row[HELD_OUT] for row in group]),
                ""
                if kind == DENSE
                else tables.spread(differences(group, reference), sign=True),
                f"{statistics.mean(r['accuracy'] for r in group):.1%}",
                f"{len(group)}",
            )
        )
    return tables.markdown(
        (
            f"{budget:+.0%} compute",
            "steps",
            "parameters",
            f"held-out loss, {plan.unit}",
            "difference, seed by seed",
            plan.right,
            "seeds",
        ),
        lines,
    )


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


TITLES = {
    "headline": "Each arm at its rates",
    "verdict": "In a sentence",
    "measures": "Besides the loss",
    "curves": "Extra compute",
    "start": "Where it starts",
    "experts": "How many experts",
    "layers": "Which layers",
    "routers": "Router",
    "optimizer": "Optimizer's state, noise",
    "methods": "Methods",
    "tuning": "What comes after",
}


def measures(found: Sequence[Row], plan: Plan) -> str:
    """Shares that were measured besides the loss, at the headline's compute."""
    budget = plan.headline
    reference = best_dense(found, plan, budget)
    lines = []
    for kind, group in at_best(found, plan).items():
        group = rows.select(group, extra_compute=budget)
        cells = [NAMES[kind]]
        for key in plan.measures:
            values = [100 * row[key] for row in group if key in row]
            more = differences(group, reference, key, 100)
            cells += [
                tables.spread(values, 1),
                "" if kind == DENSE else tables.spread(more, 1, sign=True),
            ]
        lines.append((*cells, f"{len(group)}"))
    heads = [
        head
        for name in plan.measures.values()
        for head in (f"{name}, %", "less the dense one's")
    ]
    return tables.markdown(("", *heads, "seeds"), lines)


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


def pieces(found: Sequence[Row], plan: Plan) -> dict[str, str]:
    """Every table and sentence of a study for which there are rows.

    Args:
        found: Rows, of other studies too.
        plan: Of the study.

    Returns:
        By name: `"headline"`, `"verdict"`, `"in_short"`, `"measures"`,
        `"curves"`, `"start"`, the plan's sweeps, `"tuning"`.
    """
    at = plan.headline
    if not all(
        plan.own(found, kind, extra_compute=at) for kind in (DENSE, UPCYCLED)
    ):
        return {}
    made = {
        "headline": headline(found, plan),
        "verdict": verdict(found, plan),
        "in_short": in_short(found, plan),
    }
    if plan.measures:
        made["measures"] = measures(found, plan)
    if plan.budgets:
        made["curves"] = curves(found, plan)
    if plan.starts and starts(found, plan):
        made["start"] = start(found, plan)
    base = {
        "learning_rate": plan.best_rate(found, UPCYCLED),
        "extra_compute": plan.headline,
    }
    for part, names in plan.sweeps.items():
        if any(plan.own(found, UPCYCLED, variant=n, **base) for n in names):
            made[part] = sweep(found, plan, list(names))
    if plan.tuned_on and rows.select(list(found), study=plan.tuned_on):
        made["tuning"] = tuning(found, plan)
    return made


def everything(found: Sequence[Row], plan: Plan) -> str:
    """`pieces`, each below its title."""
    made = pieces(found, plan)
    if not made:
        return "No table yet: run the part `rates` first."
    return "\n\n".join(
        f"## {TITLES[name]}\n\n{text}"
        for name, text in made.items()
        if name in TITLES
    )


def main() -> None:
    """Prints every table for which there are rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, default=parts.RESULTS)
    parser.add_argument("--study", choices=plans.PLANS, default="language")
    args = parser.parse_args()
    print(everything(rows.read(args.rows), plans.PLANS[args.study]()))


if __name__ == "__main__":
    main()

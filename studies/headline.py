"""Tables of the headline: the arms at one budget, each at its rates."""

import statistics
from collections.abc import Sequence

from keras_upcycle import tables
from studies import rows
from studies.arms import DENSE, TIME, UPCYCLED
from studies.comparisons import (
    COMPARED,
    HELD_OUT,
    NAMES,
    Row,
    at_best,
    best_dense,
    differences,
    worth,
)
from studies.plans import Plan


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

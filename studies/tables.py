"""Tables of the study, from its rows alone.

python -m studies.tables                # prints them
"""

import argparse
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from keras_upcycle import summary, tables
from studies import parts, rows
from studies.arms import DENSE, OPERATIONS, SCRATCH, TIME, UPCYCLED, Arm

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


def own(found: Sequence[Row], kind: str, **wanted: Any) -> list[Row]:
    """The rows of the study's own settings, with changes."""
    settings = {
        "arm": kind,
        "variant": "",
        "equal": OPERATIONS,
        "checkpoint": Arm.checkpoint,
        "checkpoint_rate": parts.CHECKPOINT_RATE,
        **wanted,
    }
    return rows.select(list(found), **settings)


def best_dense(found: Sequence[Row], budget: float) -> list[Row]:
    """The dense rows at the rate that is best for them, by validation."""
    rate = parts.best_rate(found, DENSE, budget)
    return own(found, DENSE, learning_rate=rate, extra_compute=budget)


def at_best(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Each kind of arm that was run, at its best rate."""
    return {
        kind: own(found, kind, learning_rate=parts.best_rate(found, kind))
        for kind in NAMES
        if own(found, kind)
    }


def differences(ours: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """Held-out loss of one less the other's, seed by seed."""
    first, second = (
        {row["seed"]: row[HELD_OUT] for row in group}
        for group in (ours, others)
    )
    return [
        first[seed] - second[seed] for seed in sorted(first) if seed in second
    ]


def worth(found: Sequence[Row], loss: float) -> float | None:
    """Extra compute with which the dense model comes to a mean loss.

    Between the budgets that were run the loss is taken to fall with the
    logarithm of the compute. `None` beyond the last.
    """
    points = curve(at_best(found)[DENSE])
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


def headline(found: Sequence[Row]) -> str:
    """+25 %: every rate of every arm, and the difference."""
    budget = parts.HEADLINE
    at = [row for row in found if row["extra_compute"] == budget]
    reference = best_dense(found, budget)
    lines = []
    for kind, equal in COMPARED:
        for rate in parts.RATES[kind]:
            group = own(at, kind, learning_rate=rate, equal=equal)
            if not group:
                continue
            best = rate == parts.best_rate(found, kind)
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
            "next byte right",
            "seeds",
        ),
        lines,
    )


def verdict(found: Sequence[Row]) -> str:
    """The headline in a sentence."""
    budget = parts.HEADLINE
    rate = parts.best_rate(found, UPCYCLED)
    ours = own(found, UPCYCLED, learning_rate=rate, extra_compute=budget)
    gain = differences(ours, best_dense(found, budget))
    text = (
        f"At {budget:+.0%} compute the upcycled model is "
        f"{tables.spread(gain, 4, sign=True)} nats a byte from the best dense "
        f"continuation ({len(gain)} seeds)"
    )
    curve_seeds = {
        row["seed"]
        for row in own(found, DENSE, extra_compute=parts.BUDGETS[-1])
    }
    at = [row[HELD_OUT] for row in ours if row["seed"] in curve_seeds]
    needed = worth(found, statistics.mean(at)) if at else None
    if needed is not None:
        text += (
            f"; the dense model needs {needed:+.0%} for as much, so "
            f"{1 - budget / needed:.0%} of the extra compute is saved"
        )
    return text + "."


def in_short(found: Sequence[Row]) -> str:
    """The headline for a README: each arm at its best rate."""
    budget = parts.HEADLINE
    reference = best_dense(found, budget)
    lines = []
    for kind, equal in COMPARED:
        if not own(found, kind):
            continue
        group = own(
            found,
            kind,
            learning_rate=parts.best_rate(found, kind),
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
            "held-out loss, nats a byte",
            "difference, seed by seed",
            "next byte right",
            "seeds",
        ),
        lines,
    )


def curves(found: Sequence[Row]) -> str:
    """Loss at every budget, of the three arms."""
    groups = at_best(found)
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


def sweep(found: Sequence[Row], names: Sequence[str]) -> str:
    """Variants at the headline's budget, less the best dense and the base."""
    budget = parts.HEADLINE
    rate = parts.best_rate(found, UPCYCLED)
    base = own(found, UPCYCLED, learning_rate=rate, extra_compute=budget)
    reference = best_dense(found, budget)
    lines = []
    for name in ("", *names):
        group = own(
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
                name or "16 experts in the last layer, Top-2",
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


def starts(found: Sequence[Row]) -> dict[int, tuple[list[Row], list[Row]]]:
    """Dense and upcycled rows, by the steps of the checkpoint."""
    found_pairs = {}
    for steps in sorted((*parts.STARTS, Arm.checkpoint)):
        pair = tuple(
            own(
                found,
                kind,
                learning_rate=parts.best_rate(found, kind),
                checkpoint=steps,
                extra_compute=parts.START_STEPS / steps,
            )
            for kind in (DENSE, UPCYCLED)
        )
        if all(pair):
            found_pairs[steps] = pair
    return found_pairs


def start(found: Sequence[Row]) -> str:
    """Checkpoints: the same extra compute after more or less dense training."""
    return tables.markdown(
        ("dense steps", "extra", "dense", "upcycled", "difference", "seeds"),
        [
            (
                f"{steps:,}",
                f"{parts.START_STEPS / steps:.0%}",
                *(
                    tables.spread([row[HELD_OUT] for row in group])
                    for group in pair
                ),
                tables.spread(differences(pair[1], pair[0]), sign=True),
                f"{len(pair[1])}",
            )
            for steps, pair in starts(found).items()
        ],
    )


SWEEPS = {
    "How many experts": parts.EXPERTS,
    "Which layers": parts.LAYERS,
    "Router": parts.ROUTERS,
    "Optimizer's state, noise": parts.SLOTS,
    "Methods": parts.METHODS,
}


def everything(found: Sequence[Row]) -> str:
    """Every table for which there are rows."""
    found = list(found)
    at_headline = rows.select(found, extra_compute=parts.HEADLINE)
    if not own(at_headline, DENSE):
        return "No table yet: run the part `rates` first."
    texts = [f"## +25 %\n\n{headline(found)}"]
    if own(at_headline, UPCYCLED):
        texts.append(verdict(found))
        texts.append(f"## Extra compute\n\n{curves(found)}")
        texts.append(f"## Where it starts\n\n{start(found)}")
        texts += [
            f"## {title}\n\n{sweep(found, list(names))}"
            for title, names in SWEEPS.items()
            if any(row["variant"] in names for row in found)
        ]
    return "\n\n".join(texts)


def main() -> None:
    """Prints every table for which there are rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, default=parts.RESULTS)
    print(everything(rows.read(parser.parse_args().rows)))


if __name__ == "__main__":
    main()

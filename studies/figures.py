"""Pictures of the study, from its rows alone.

python -m studies.figures               # examples/figures/study-*.png
"""

import argparse
import pathlib
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from keras_upcycle import atomic_files
from studies import comparisons, parts, plans, rows
from studies.arms import DENSE, SCRATCH, UPCYCLED
from studies.plans import Plan

FOLDER = pathlib.Path(__file__).parent.parent / "examples/figures"
# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {DENSE: "#0072B2", UPCYCLED: "#D55E00", SCRATCH: "#009E73"}
LOSS = "held-out loss (nats a byte)"


def main() -> None:
    """Draws every picture for which there are rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=pathlib.Path, default=parts.RESULTS)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    found = rows.read(args.rows)
    plan = plans.language()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        path = args.output / f"study-{name}.png"
        figure = draw(found, plan)
        if figure is None:
            print(f"{path}: too few rows, not drawn")
            continue
        atomic_files.replace(
            path, lambda draft, figure=figure: figure.savefig(draft, dpi=150)
        )
        print(path)


def curves(found: list[comparisons.Row], plan: Plan) -> Figure:
    """The paper's three curves, on both of its axes."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    figure.suptitle(
        "A trained language model goes on: dense, upcycled, or a mixture from "
        "scratch",
        fontsize=12,
    )
    groups = comparisons.at_best(found, plan)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title in (
        (left, "what a trained model costs is sunk:\nextra compute alone"),
        (right, "counted whole: the dense model's\ncompute is in"),
    ):
        sunk = axes is left
        for kind, group in groups.items():
            shift = 0 if sunk or kind == SCRATCH else 1
            _band(axes, group, COLOURS[kind], comparisons.NAMES[kind], shift)
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("compute, as a share of the dense run's")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0 if sunk else 0.2, 2.55)
        _plain(axes)
    left.set_ylabel(LOSS)
    losses = {
        kind: [row[comparisons.HELD_OUT] for row in group]
        for kind, group in groups.items()
    }
    lowest = min(min(each) for each in losses.values())
    left.set_ylim(lowest - 0.02, max(losses[DENSE]) + 0.12)
    left.legend(frameon=False, fontsize=9.5)
    return figure


def experts(found: list[comparisons.Row], plan: Plan) -> Figure | None:
    """Loss against the best dense continuation, by number of experts."""
    reference = comparisons.best_dense(found, plan, plan.headline)
    rate = plan.best_rate(found, UPCYCLED)
    points = {}
    for count in (1, 4, 8, 16, 32, 64):
        group = plan.own(
            found,
            UPCYCLED,
            learning_rate=rate,
            extra_compute=plan.headline,
            experts=count,
            variant=lambda name: name == "" or name in plans.EXPERTS,
        )
        if group:
            points[count] = comparisons.differences(group, reference)
    if len(points) < 2:
        return None
    figure, axes = _points(points)
    axes.set_xlabel("experts")
    axes.set_title(
        f"{plan.headline:+.0%} compute, by number of experts", fontsize=11
    )
    return figure


def start(found: list[comparisons.Row], plan: Plan) -> Figure | None:
    """Gain by how long the dense model was trained before."""
    points = {
        steps: comparisons.differences(upcycled, dense)
        for steps, (dense, upcycled) in comparisons.starts(found, plan).items()
    }
    if len(points) < 2:
        return None
    figure, axes = _points(points)
    axes.set_xlabel("steps of the dense checkpoint")
    axes.set_title(
        f"the compute of {plan.start_steps:.0f} more dense steps, by when it "
        "starts",
        fontsize=11,
    )
    return figure


def _points(points):
    """Differences of all seeds, evenly spaced, with their mean."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(points.values()):
        axes.plot(
            [place] * len(values), values, "o", color="#999999", markersize=4
        )
        axes.plot(
            place,
            statistics.mean(values),
            "_",
            color="#D55E00",
            markersize=26,
            markeredgewidth=2.5,
        )
    axes.axhline(0, color="#0072B2", linewidth=1.2)
    axes.set_xticks(range(len(points)), [f"{name:,}" for name in points])
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_ylabel("less the best dense (nats a byte)")
    _plain(axes)
    return figure, axes


def _band(axes, group, colour, name, shift):
    budgets = sorted({row["extra_compute"] for row in group})
    values = [
        [r[comparisons.HELD_OUT] for r in group if r["extra_compute"] == budget]
        for budget in budgets
    ]
    x = shift + np.array(budgets)
    axes.fill_between(
        x,
        [min(each) for each in values],
        [max(each) for each in values],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(
        x,
        [statistics.mean(each) for each in values],
        "o-",
        color=colour,
        linewidth=2,
        markersize=4,
        label=name,
    )


def _plain(axes):
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


PICTURES = {"curves": curves, "experts": experts, "start": start}


if __name__ == "__main__":
    main()

"""Tables of the study, from its rows alone.

python -m studies.tables                # prints them
"""

import argparse
import pathlib
from collections.abc import Sequence

from studies import headline, parts, plans, rows, sweeps
from studies.arms import DENSE, UPCYCLED
from studies.comparisons import Row, starts
from studies.plans import Plan

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
    "newer": "Later methods",
    "heads": "Heads of attention",
    "tuning": "What comes after",
}


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
        "headline": headline.headline(found, plan),
        "verdict": headline.verdict(found, plan),
        "in_short": headline.in_short(found, plan),
    }
    if plan.measures:
        made["measures"] = headline.measures(found, plan)
    if plan.budgets:
        made["curves"] = sweeps.curves(found, plan)
    if plan.starts and starts(found, plan):
        made["start"] = sweeps.start(found, plan)
    base = {
        "learning_rate": plan.best_rate(found, UPCYCLED),
        "extra_compute": plan.headline,
    }
    for part, names in plan.sweeps.items():
        if any(plan.own(found, UPCYCLED, variant=n, **base) for n in names):
            made[part] = sweeps.sweep(found, plan, list(names))
    if plan.tuned_on and rows.select(list(found), study=plan.tuned_on):
        made["tuning"] = sweeps.tuning(found, plan)
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

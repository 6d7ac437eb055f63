"""One table of all methods: what they change, cost, gain and where they fail.

Words are those of recipes, and of `OPTIONS` for what is no recipe; figures are
those of `receipts` and of the study's rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_upcycle import tables
from keras_upcycle.conversion.recipe import RECIPES
from studies import plans, receipts
from studies.arms import UPCYCLED
from studies.comparisons import Row, best_dense, differences


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        name: In the table.
        changes: What it changes.
        costs: What it costs beside copies.
        fails: Where a paper found it to fail.
        receipt: Its key in `receipts`, if it was measured.
        study: A plan's name and a variant in it, if it was studied.
    """

    name: str
    changes: str
    costs: str
    fails: str
    receipt: str | None = None
    study: tuple[str, str] | None = None


# Of recipes, in the study.
STUDIED = {
    "drop_upcycling": ("language", "Drop-Upcycling"),
    "default_moe": ("language", "Default MoE, dropless"),
    "virtual_group": ("language", "virtual groups"),
    "shared_experts": ("language", "shared experts"),
    "branch_train_mix": ("language", "Branch-Train-MiX, 4 branches"),
    "upit": ("language", "UpIT"),
    "ds_moe": ("language", "DS-MoE, all of 16 slices"),
    "skywork": ("newer", "Skywork-MoE"),
    "sparse_upcycling": ("language", "not renormalised"),
}
OPTIONS = (
    Entry(
        "copies, Top-2, the default",
        "experts are copies, a token's two weights sum to 1",
        "nothing",
        "gains fade as the extra budget nears the dense model's own",
        "copies, Top-2",
        ("language", ""),
    ),
    Entry(
        '`TopKRouter(router_gradient="dense_mixer")`',
        "the router learns from what all experts would put out",
        "every expert runs in training",
        "its authors tune finished mixtures; from copies all experts put out "
        "the same at first",
        "DenseMixer",
        ("newer", "DenseMixer"),
    ),
    Entry(
        "`temperature=` by a schedule, from 4 to 1",
        "routers are unsure at first",
        "nothing",
        "no paper known to us has tried it after upcycling",
        "temperature from 4 to 1",
        ("newer", "temperature from 4 to 1"),
    ),
    Entry(
        "`experts=LowRankExperts(8)`",
        "one frozen block for all, a low-rank difference for each expert",
        "little memory",
        "what a low rank cannot say, no expert learns",
        "low-rank experts",
        ("newer", "low-rank experts, rank 8"),
    ),
    Entry(
        '`expert_init="random_noise"`',
        "noise on a part of each expert's neurons",
        "a start off the dense model",
        "Sparse Upcycling (appendix B.5): little of it changes nothing, more "
        "does harm",
        "random noise",
        ("language", "noise on the experts"),
    ),
    Entry(
        "`attention=True`",
        "heads of attention are experts, all on",
        "a router for each attention layer",
        "DS-MoE runs it densely: with 60 % of the heads or more, skipping the "
        "others was slower",
        "attention heads",
        ("heads", "attention heads routed too"),
    ),
    Entry(
        "`attention=CopiedAttention(4)`",
        "each attention layer is several, of which all are used softly (BAM)",
        "every copy's queries, scores and outputs run",
        "BAM's authors found Top-K of attention experts inferior to all",
        "copied attention",
    ),
    Entry(
        "`attention=AttentionExperts(TopKRouter(...))`",
        "a token has a few of the heads, as in MoH",
        "the heads that are left out, at step 0",
        "MoH's authors keep 50 to 90 % of the heads, and train after it",
        "attention heads, half of them",
    ),
)


def entries() -> list[Entry]:
    """All methods: what is no recipe after the recipes."""
    found = [OPTIONS[0]]
    for name, recipe in RECIPES.items():
        found.append(
            Entry(
                f'`recipe="{name}"`',
                recipe.changes,
                recipe.costs,
                recipe.fails,
                name,
                STUDIED.get(name),
            )
        )
    return [*found, *OPTIONS[1:]]


def table(found: Sequence[Row]) -> str:
    """The table, in Markdown, from the study's rows and the receipts."""
    measured = json.loads(receipts.PATH.read_text())
    lines = []
    for entry in entries():
        one = measured.get(entry.receipt)
        cost, gain = _studied(found, entry.study)
        lines.append(
            (
                entry.name,
                entry.changes,
                "its checkpoints'" if one is None else receipts.change(one),
                "" if one is None else f"{one['size']:.1f}",
                entry.costs,
                cost,
                gain,
                entry.fails,
            )
        )
    return tables.markdown(
        (
            "method",
            "what it changes",
            "change at step 0",
            "size",
            "costs beside copies",
            "a step in the study",
            "less the best dense",
            "where it was found to fail",
        ),
        lines,
    )


def _studied(found, at: Any) -> tuple[str, str]:
    """What a step costs and what is gained, at equal compute."""
    if at is None:
        return "", ""
    study, variant = at
    plan = plans.chosen(study)
    rate = plan.best_rate(found, UPCYCLED)
    group = plan.own(
        found,
        UPCYCLED,
        learning_rate=rate,
        extra_compute=plan.headline,
        variant=variant,
    )
    if not group:
        return "", ""
    reference = best_dense(found, plan, plan.headline)
    gain = tables.spread(differences(group, reference), sign=True)
    return f"{group[0]['ratio']:.2f}", gain

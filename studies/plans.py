"""What each study runs: its arms' settings, grids, budgets and sweeps."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from studies import arms, rows
from studies.arms import DENSE, SCRATCH, UPCYCLED, Arm

MANY, FEW = 5, 3  # seeds

Variants = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        study: Its name in its rows.
        about: What is learned, in words.
        unit: Of the loss.
        right: What the accuracy is of.
        base: Settings of every arm that are not an `Arm`'s own.
        named: The upcycled arm, in words.
        width: Of the dense model.
        blocks: Of the dense model.
        rates: Learning rates of each kind of arm.
        checkpoint_rates: Learning rates of the dense run.
        headline: Extra compute at which arms are compared.
        budgets: Extra compute of each kind's curve.
        scratch_tuned: Extra compute at which its learning rate is chosen.
        scratch_seeds: Of that choice.
        seeds: Of the headline, the optimizer's state and the methods.
        starts: Steps of other checkpoints.
        sweeps: What else is changed, by part.
        tuned_on: What comes after, in rows; empty for nothing.
        measures: Further measures of a row: their key, in words.
        parts: What `python -m studies` runs.
    """

    study: str
    about: str
    unit: str
    right: str
    base: Mapping[str, Any]
    named: str
    width: int
    blocks: int
    rates: Mapping[str, Sequence[float]]
    checkpoint_rates: Sequence[float]
    headline: float = 0.25
    budgets: Mapping[str, Sequence[float]] = dataclasses.field(
        default_factory=dict
    )
    scratch_tuned: float = 0.25
    scratch_seeds: int = 1
    seeds: int = FEW
    starts: Sequence[int] = ()
    sweeps: Mapping[str, Variants] = dataclasses.field(default_factory=dict)
    tuned_on: str = ""
    measures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: Sequence[str] = ()

    @property
    def start_steps(self) -> float:
        """Dense steps' worth of extra compute, whichever checkpoint."""
        return self.headline * self.checkpoint

    @property
    def checkpoint(self) -> int:
        """Steps of the dense checkpoint."""
        return self.arm(DENSE, math.nan).checkpoint

    def arm(self, kind: str, learning_rate: float, **more: Any) -> Arm:
        """An arm with the study's own settings, and changes."""
        return Arm(kind, learning_rate=learning_rate, **{**self.base, **more})

    def own(
        self, found: Sequence[dict], kind: str, **wanted: Any
    ) -> list[dict]:
        """The rows of the study's own settings, with changes."""
        settings = {
            "study": self.study,
            "width": self.width,
            "blocks": self.blocks,
            "arm": kind,
            "variant": "",
            "equal": arms.OPERATIONS,
            "checkpoint": self.checkpoint,
            "checkpoint_rate": self.base["checkpoint_rate"],
            **wanted,
        }
        return rows.select(list(found), **settings)

    def best_rate(
        self, found: Sequence[dict], kind: str, budget: float | None = None
    ) -> float:
        """The rate with the least validation loss, mean over the seeds.

        Args:
            found: Rows.
            kind: Of arm.
            budget: At which extra compute; where it is tuned by default.

        Raises:
            ValueError: If it was not tuned yet.
        """
        if budget is None:
            budget = self.scratch_tuned if kind == SCRATCH else self.headline
        means = {}
        for rate in self.rates[kind]:
            own = self.own(
                found, kind, learning_rate=rate, extra_compute=budget
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


SLOTS = {
    "moments carried as they are": {"slots": "carried"},
    "new moments": {"slots": "new"},
}
EXPERTS = {f"{n} experts": {"experts": n} for n in (4, 8, 32, 64)}
EXPERTS["1 expert"] = {"experts": 1, "top_k": 1}
TOP_K = {
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
NEWER = {
    "DenseMixer": {"router": "dense_mixer"},
    "Skywork-MoE": {"router": "skywork"},
    "low-rank experts, rank 8": {"expert_init": "low_rank", "slots": "fresh"},
    "temperature from 4 to 1": {"router": "annealed"},
}


def language(width: int = 32, blocks: int = 2) -> Plan:
    """A causal language model: bytes of Python's own standard library."""
    last_half = tuple(range(blocks // 2, blocks))
    one = len(last_half) == 1
    return Plan(
        study="language",
        about="a causal language model on bytes of text",
        unit="nats a byte",
        right="next byte right",
        base={"checkpoint_rate": 1e-2, "layers": last_half},
        named="16 experts in the last "
        + ("layer" if one else f"{len(last_half)} layers")
        + ", Top-2",
        width=width,
        blocks=blocks,
        rates={
            DENSE: (1.5e-3, 3e-3, 6e-3, 1e-2),
            UPCYCLED: (1.5e-3, 3e-3, 6e-3, 1e-2),
            SCRATCH: (6e-3, 1e-2, 2e-2),
        },
        checkpoint_rates=(3e-3, 6e-3, 1e-2, 2e-2),
        budgets={
            DENSE: (0.1, 0.25, 0.5, 1.0, 1.5),
            UPCYCLED: (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5),
            SCRATCH: (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5),
        },
        scratch_tuned=0.5,
        scratch_seeds=FEW,
        seeds=MANY,
        starts=(750, 1500, 6000),
        sweeps={
            "optimizer": {
                **SLOTS,
                "a new Adam": {"slots": "fresh"},
                "noise on the experts": {"expert_init": "random_noise"},
            },
            "experts": EXPERTS,
            "layers": {
                "the first layer": {"layers": (0,)},
                "both layers" if one else "all layers": {
                    "layers": tuple(range(blocks))
                },
            },
            "routers": TOP_K,
            "methods": METHODS,
        },
        parts=(
            "checkpoint",
            "rates",
            "headline",
            "curves",
            "scratch",
            "optimizer",
            "experts",
            "layers",
            "start",
            "routers",
            "methods",
        ),
    )


def deeper(width: int = 32, blocks: int = 4) -> Plan:
    """The same with four blocks, at the rates that are best with two."""
    plan = language(width, blocks)
    return dataclasses.replace(
        plan,
        budgets={},
        starts=(),
        rates={
            DENSE: (3e-3,),
            UPCYCLED: (6e-3,),
            SCRATCH: (1e-2,),
        },
        sweeps={"optimizer": SLOTS},
        parts=("rates", "optimizer"),
    )


def newer(width: int = 32, blocks: int = 2) -> Plan:
    """Later methods, at the rates that are best for copies, on one machine."""
    plan = language(width, blocks)
    return dataclasses.replace(
        plan,
        study="newer",
        budgets={},
        starts=(),
        rates={DENSE: (3e-3,), UPCYCLED: (6e-3,), SCRATCH: (1e-2,)},
        sweeps={"newer": NEWER},
        parts=("rates", "newer"),
    )


def images(width: int = 32, blocks: int = 4) -> Plan:
    """A Vision Transformer: CIFAR-10, cropped and mirrored."""
    return Plan(
        study="images",
        about="a Vision Transformer on CIFAR-10, cropped and mirrored",
        unit="nats an image",
        right="images right",
        base={
            "checkpoint": 12000,
            "checkpoint_rate": 3e-3,
            "router": "expert_choice",
            "capacity_factor": 2.0,
            "layers": "last_half",
        },
        named="16 experts in the last half, Expert Choice, C = 2",
        width=width,
        blocks=blocks,
        rates={
            DENSE: (5e-4, 1e-3, 2e-3),
            UPCYCLED: (5e-4, 1e-3, 2e-3, 4e-3),
            SCRATCH: (2e-3, 3e-3, 6e-3),
        },
        checkpoint_rates=(1e-3, 3e-3, 6e-3),
        sweeps={
            "routers": {
                "Expert Choice, C = 1": {"capacity_factor": 1.0},
                "Top-2, no token dropped": {
                    "router": "top_k",
                    "capacity_factor": None,
                },
            },
        },
        measures={"ten_shot": "10-shot accuracy"},
        parts=("rates", "scratch", "routers"),
    )


def small_images(width: int = 16, blocks: int = 4) -> Plan:
    """The same, narrower and for longer: where capacity is what lacks."""
    plan = images(width, blocks)
    return dataclasses.replace(
        plan,
        headline=0.5,
        scratch_tuned=0.5,
        budgets={
            DENSE: (0.25, 0.5),
            UPCYCLED: (0.25, 0.5),
            SCRATCH: (0.25, 0.5),
        },
        rates={
            DENSE: (1e-3, 2e-3, 4e-3),
            UPCYCLED: (2e-3, 4e-3, 8e-3),
            SCRATCH: (3e-3, 6e-3, 1.2e-2),
        },
        parts=("rates", "curves", "scratch", "routers"),
    )


def spans(width: int = 32, blocks: int = 2) -> Plan:
    """A T5: spans of the same text dropped, then SST-2."""
    return Plan(
        study="spans",
        about="a T5 that fills holes in bytes of text",
        unit="nats a target",
        right="targets right",
        base={
            "checkpoint": 4000,
            "checkpoint_rate": 6e-3,
            "router": "family",
            "layers": "last_half",
        },
        named="16 experts in the last half of either stack",
        width=width,
        blocks=blocks,
        rates={
            DENSE: (1.5e-3, 3e-3, 6e-3, 1e-2),
            UPCYCLED: (1.5e-3, 3e-3, 6e-3, 1e-2),
            SCRATCH: (3e-3, 6e-3, 1e-2),
        },
        checkpoint_rates=(3e-3, 6e-3, 1e-2),
        budgets={DENSE: (0.25, 1.0), UPCYCLED: (0.25, 1.0), SCRATCH: (0.25,)},
        sweeps={
            "optimizer": SLOTS,
        },
        tuned_on="sst2",
        parts=("rates", "curves", "scratch", "optimizer", "tuning"),
    )


def llama(width: int = 32, blocks: int = 2) -> Plan:
    """The same text, learned by KerasHub's Llama with its default router."""
    plan = language(width, blocks)
    return dataclasses.replace(
        plan,
        study="llama",
        about="a KerasHub Llama on bytes of text",
        base={**plan.base, "checkpoint_rate": 1e-2, "router": "family"},
        budgets={DENSE: (0.25, 0.5, 1.0), UPCYCLED: (0.25, 0.5, 1.0)},
        scratch_tuned=0.25,
        scratch_seeds=1,
        seeds=FEW,
        starts=(),
        sweeps={},
        parts=("checkpoint", "rates", "curves", "scratch"),
    )


def heads(width: int = 32, blocks: int = 2) -> Plan:
    """KerasHub's Llama at its best rates, heads of attention experts too."""
    return dataclasses.replace(
        llama(width, blocks),
        study="heads",
        budgets={},
        rates={DENSE: (3e-3,), UPCYCLED: (1e-2,), SCRATCH: (1e-2,)},
        sweeps={"heads": {"attention heads routed too": {"attention": True}}},
        parts=("rates", "heads"),
    )


def gpt2(width: int = 32, blocks: int = 2) -> Plan:
    """The same text, learned by KerasHub's GPT-2 with its default router."""
    return dataclasses.replace(
        llama(width, blocks),
        study="gpt2",
        about="a KerasHub GPT-2 on bytes of text",
    )


PLANS = {
    plan.__name__: plan
    for plan in (
        *(language, deeper, newer, llama, heads, gpt2),
        *(images, small_images, spans),
    )
}


def chosen(
    study: str, width: int | None = None, blocks: int | None = None
) -> Plan:
    """A plan by name, of the study's own sizes or of others.

    Args:
        study: A key of `PLANS`.
        width: Of the dense model.
        blocks: Of the dense model.
    """
    sizes = {"width": width, "blocks": blocks}
    return PLANS[study](**{k: v for k, v in sizes.items() if v is not None})

"""Settings of a Top-K router: their names, and which do not go together."""

import warnings
from typing import Any

from keras_upcycle.routing import router_gradients
from keras_upcycle.routing.remade import is_remade

# What its config tells beside the base's; each is an attribute.
SETTINGS = (
    "top_k",
    "normalize",
    "capacity_factor",
    "eval_capacity_factor",
    "load_balance_loss",
    "importance_loss",
    "load_loss",
    "mutual_information_loss",
    "bias_update_rate",
    "softmax",
    "drop_policy",
    "expert_groups",
    "router_gradient",
    "balance_over",
)
BATCH, STEP = "batch", "step"
BALANCED_OVER = (BATCH, STEP)


def check_together(router: Any) -> None:
    """Raises `ValueError` for settings each right and together wrong."""
    if router.load_loss and not router.noise_stddev:
        raise ValueError(
            "`load_loss` is about how often noise changes a choice, so it "
            f"needs `noise_stddev > 0`. Received: load_loss={router.load_loss},"
            f" noise_stddev={router.noise_stddev}. Set `noise_stddev`, such as "
            "1 / num_experts, or `load_loss=0`."
        )
    if router.load_loss and "noise_stddev" in router.scheduled:
        raise ValueError(
            "`load_loss` divides by `noise_stddev`, which a schedule may bring "
            f"to 0. Received: load_loss={router.load_loss}, noise_stddev of "
            f"type {type(router.noise_stddev).__name__}. Pass a number for "
            "`noise_stddev`, or `load_loss=0`; `importance_loss` balances "
            "without noise."
        )
    if router.expert_groups is None:
        return
    if router.load_loss:
        raise ValueError(
            "`load_loss` is about the threshold among all experts, which "
            "groups do not have. Received: load_loss="
            f"{router.load_loss} with `expert_groups`. Leave one of them out."
        )
    if router.router_gradient == router_gradients.DENSE_MIXER:
        raise ValueError(
            "Of a group a token meets one expert, and its weight is the "
            "group's. Received: router_gradient='dense_mixer' with "
            "`expert_groups`. Leave one of them out."
        )


def warn_of_no_gradient(router: Any) -> None:
    """Says that the task teaches a router nothing, and what would."""
    # It would be said again for every block that gets a router like it.
    # A loss that makes tokens sure of an expert teaches the router.
    if is_remade() or router.mutual_information_loss:
        return
    cause = (
        "normalize=True" if router.normalize else f"softmax={router.softmax!r}"
    )
    warnings.warn(
        f"top_k=1 with {cause} gives the router no gradient from the task: "
        "its one combine weight is always 1. Pass `normalize=False` with "
        "`softmax='before_top_k'`, where the weight is the probability; "
        "`router_gradient='dense_mixer'` or `DefaultMoERouter(1)`, whose "
        "gradient is of all experts; a loss that teaches it, "
        "`mutual_information_loss`; or `top_k=2`.",
        stacklevel=3,
    )

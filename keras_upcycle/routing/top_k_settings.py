"""Settings of a Top-K router: their names, and which do not go together."""

from typing import Any

from keras_upcycle.routing import router_gradients

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
    "batches_per_step",
    "softmax",
    "drop_policy",
    "expert_groups",
    "router_gradient",
)


def check_together(router: Any) -> None:
    """Raises `ValueError` for settings each right and together wrong."""
    if router.load_loss and not router.noise_stddev:
        raise ValueError(
            "`load_loss` is about how often noise changes a choice, so it "
            f"needs `noise_stddev > 0`. Received: load_loss={router.load_loss},"
            f" noise_stddev={router.noise_stddev}. Set `noise_stddev`, such as "
            "1 / num_experts, or `load_loss=0`."
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

"""What of a sparse model a target's format cannot say, and what would do."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_upcycle.conversion.targets import (
    Target,
    get_target,
    settings_of,
)
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families.keras_hub_family import backbone_of
from keras_upcycle.layers.activations import ClippedSwiGLU, Float32Activation
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.rescaled_top_k_router import RescaledTopKRouter
from keras_upcycle.routing.router import Router


def check_plan(name: str, model: Any, blocks: Sequence[Any]) -> None:
    """Raises `UpcycleError` for a conversion that a target could not say.

    Args:
        name: Of the target.
        model: The dense model.
        blocks: The `BlockPlan`s.
    """
    target = get_target(name)
    backbone = backbone_of(model)
    kind = type(backbone).__name__
    reasons = [
        *target.why_not_backbone(kind, backbone),
        *why_not_all(
            target,
            [block.counted for block in blocks],
            len(backbone.transformer_layers),
        ),
    ]
    if reasons:
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise UpcycleError(
            f"What is made must be a {name}, as `target` says. Received: "
            f"settings by which it would not be:{lines}\nChange them, or leave "
            "`target` out."
        )


def why_not_all(
    target: Target, layers: Sequence[MoEFeedForward], num_blocks: int
) -> list[str]:
    """What of a model's MoE layers a target cannot say, each once."""
    reasons = []
    if target.every_block and len(layers) < num_blocks:
        reasons.append(
            f"{num_blocks - len(layers)} of its {num_blocks} blocks are dense, "
            'and all of the target\'s hold experts. Use layers="all"'
        )
    for layer in layers:
        reasons += why_not(target, layer)
    alike = [settings_of(layer) for layer in layers]
    for name in target.counts:
        found = list(dict.fromkeys(each[name] for each in alike))
        # A loss is for training alone.
        if len(found) > 1 and name != "load_balance_loss":
            reasons.append(
                f"its MoE layers differ: {name} is {found}, and the target "
                "has one for all"
            )
    return list(dict.fromkeys(reasons))


def why_not(target: Target, layer: MoEFeedForward) -> list[str]:
    """What of a layer a target cannot say, each with what would allow it.

    Args:
        target: The format.
        layer: A MoE layer, built or not.
    """
    row = target.row
    reasons = list(_why_not_router(target, layer.router))
    if not layer.gated:
        reasons.append(
            "its experts are not gated, and the target's are; gated are those "
            "of Llama, Mistral, Qwen and Gemma"
        )
    if layer.use_bias != (row.bias is not None):
        reasons.append(
            f"its experts have use_bias={layer.use_bias}, and the target's "
            f"use_bias={row.bias is not None}"
        )
    if layer.output_bias is not None:
        reasons.append("it has output_bias=True, and the target has none")
    if _name(layer.activation) != target.activation:
        reasons.append(
            f"its activation is {_name(layer.activation)}, and the target's "
            f"{target.activation}"
        )
    shared = layer.shared is not None
    if shared != (row.shared is not None):
        reasons.append(
            f"it has shared_intermediate_dim={layer.shared_intermediate_dim}, "
            "and the target "
            + (
                "needs a shared expert"
                if row.shared
                else "has no shared expert"
            )
        )
    elif shared and (layer.shared_gate is None) == (
        row.shared_gate is not None
    ):
        reasons.append(
            f"it has shared_gate={layer.shared_gate is not None}, and the "
            f"target shared_gate={row.shared_gate is not None}"
        )
    return reasons


def _why_not_router(target, router: Router):
    row = target.row
    if getattr(router, "expert_groups", None) is not None:
        yield (
            "its router has expert_groups, of which a token meets one expert "
            "each, and the target chooses from all. Grow with "
            'grow_experts(..., router="copy")'
        )
        return
    beside = row.beside is not None
    if beside != isinstance(router, RescaledTopKRouter) or not (
        beside or router.is_plain_top_k
    ):
        yield (
            f"its router is a {type(router).__name__}, which at inference is "
            "no plain Top-K. Use router=TopKRouter(...)"
        )
        return
    top_k: Any = router
    if top_k.eval_capacity_factor is not None:
        yield (
            "its router has eval_capacity_factor="
            f"{top_k.eval_capacity_factor}, so that it drops tokens at "
            "inference, and the target drops none. Use "
            "eval_capacity_factor=None"
        )
    if top_k.use_bias and row.softmax == "before_top_k":
        yield "its router has use_bias=True, and the target's has no bias"
    if top_k.bias_update_rate:
        yield (
            f"its router has bias_update_rate={top_k.bias_update_rate}, and "
            "the target chooses without a bias. Use bias_update_rate=0"
        )
    if row.normalize is True and not (router.sums_to_one or beside):
        yield (
            "its router has normalize=False, and the target's weights sum to "
            "1. Use TopKRouter(normalize=True)"
        )


def _name(activation):
    if isinstance(activation, Float32Activation):
        activation = activation.activation
    if isinstance(activation, ClippedSwiGLU):
        return "ClippedSwiGLU"
    # KerasHub's blocks have the one or the other.
    if activation in (keras.activations.silu, keras.ops.silu):
        return "silu"
    return getattr(activation, "__name__", repr(activation))

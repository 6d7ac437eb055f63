"""Formats that others serve: which mixtures they can say, and how.

A target is a mixture of KerasHub's own, by its row, and the dense models of
which one may be made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import keras_hub_mixtures
from keras_upcycle.families.keras_hub_family import backbone_of
from keras_upcycle.families.rows import Mixture
from keras_upcycle.layers.activations import ClippedSwiGLU, Float32Activation
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.rescaled_top_k_router import RescaledTopKRouter
from keras_upcycle.routing.router import Router
from keras_upcycle.routing.top_k_router import TopKRouter

_SHARED_ARGUMENTS = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "rope_max_wavelength",
    "layer_norm_epsilon",
    "dropout",
)


@dataclass(frozen=True)
class Target:
    """A mixture that others know.

    Attributes:
        name: As `target=` takes it, and `config.json` calls it.
        backbone: Its class in `keras_hub.models`.
        sources: From a dense backbone's class to the arguments of the target
            that do not hang on experts, from a backbone of it.
        why_not: From the same to a function that says what of a backbone the
            target cannot say; `None` where it can say all.
        every_block: Whether all blocks must hold experts.
        ties: Whether it knows tied embeddings.
        activation: The experts'.
        counts: From what a layer is to the argument that says it.
    """

    name: str
    backbone: str
    counts: Mapping[str, str]
    sources: Mapping[str, Callable[[Any], dict[str, Any]]]
    why_not: Mapping[str, Callable[[Any], list[str]]]
    every_block: bool = True
    ties: bool = False
    activation: str = "silu"

    @property
    def row(self) -> Mixture:
        """Where the target keeps what a layer holds."""
        return keras_hub_mixtures.MIXTURES[self.backbone]

    def why_not_backbone(self, kind: str, backbone: Any) -> list[str]:
        """What of a backbone, of so named a stock class, it cannot say."""
        return self.why_not[kind](backbone) if kind in self.why_not else []


def _of(backbone, *more, **renamed):
    names = {name: name for name in (*_SHARED_ARGUMENTS, *more)}
    names |= {there: here for here, there in renamed.items()}
    return {there: getattr(backbone, here) for there, here in names.items()}


def _mixtral_of_llama(backbone):
    return {
        **_of(backbone, rope_position_scaling_factor="rope_scaling_factor"),
        # Its default is a window of 512.
        "sliding_window": None,
    }


def _mixtral_of_mistral(backbone):
    return _of(backbone, "rope_scaling_factor", "sliding_window")


def _qwen3_moe_of_qwen3(backbone):
    return _of(
        backbone,
        "head_dim",
        "rope_scaling_factor",
        "tie_word_embeddings",
        "sliding_window_size",
    )


def _why_not_llama(backbone):
    if backbone.rope_frequency_adjustment_factor is None:
        return []
    return [
        "its rotary embedding is scaled by frequencies, as Llama 3.1's "
        f"(rope_frequency_adjustment_factor="
        f"{backbone.rope_frequency_adjustment_factor}), which the target "
        "cannot say. Start from a Llama without, such as Llama 2 or 3.0"
    ]


def _why_not_mistral(backbone):
    own = backbone.head_dim
    if own in (None, backbone.hidden_dim // backbone.num_query_heads):
        return []
    return [
        f"its heads have a width of their own (head_dim={own}), which the "
        "target cannot say. Start from a Mistral of head_dim=None"
    ]


_COUNTS = {"num_experts": "num_experts", "top_k": "top_k"}
_NARROW = {
    **_COUNTS,
    "intermediate_dim": "moe_intermediate_dim",
    "load_balance_loss": "router_aux_loss_coefficient",
}
TARGETS = {
    target.name: target
    for target in (
        Target(
            "mixtral",
            "MixtralBackbone",
            {
                **_COUNTS,
                "intermediate_dim": "intermediate_dim",
                "load_balance_loss": "router_aux_loss_coef",
            },
            {
                "LlamaBackbone": _mixtral_of_llama,
                "Llama3Backbone": _mixtral_of_llama,
                "MistralBackbone": _mixtral_of_mistral,
            },
            {
                "LlamaBackbone": _why_not_llama,
                "Llama3Backbone": _why_not_llama,
                "MistralBackbone": _why_not_mistral,
            },
        ),
        Target(
            "qwen3_moe",
            "Qwen3MoeBackbone",
            {**_NARROW, "normalize": "norm_top_k_prob"},
            {"Qwen3Backbone": _qwen3_moe_of_qwen3},
            {},
            every_block=False,
            ties=True,
        ),
        Target(
            "qwen2_moe",
            "QwenMoeBackbone",
            {
                **_NARROW,
                "normalize": "norm_top_k_prob",
                "shared_intermediate_dim": "shared_expert_intermediate_dim",
            },
            {},
            {},
            every_block=False,
            ties=True,
        ),
        Target(
            "qwen3_5_moe",
            "Qwen3_5MoeBackbone",
            {
                **_NARROW,
                "shared_intermediate_dim": "shared_expert_intermediate_size",
            },
            {},
            {},
            ties=True,
        ),
        Target(
            "gpt_oss",
            "GptOssBackbone",
            {**_COUNTS, "intermediate_dim": "intermediate_dim"},
            {},
            {},
            activation="ClippedSwiGLU",
        ),
        Target(
            "gemma4",
            "Gemma4Backbone",
            {
                "num_experts": "num_experts",
                "top_k": "num_experts_per_token",
                "intermediate_dim": "expert_intermediate_dim",
            },
            {},
            {},
            ties=True,
            activation="gelu_tanh",
        ),
    )
}
# Of which one may be made from a dense model.
CHOICES = tuple(name for name, each in TARGETS.items() if each.sources)


def get_target(name: Any) -> Target:
    """The target of a name that `upcycle_model` takes.

    Raises:
        ValueError: For another.
    """
    return TARGETS[checks.check_choice("target", name, CHOICES)]


def choose(
    model: keras.Model, name: str, router: Any, layers: Any, recipe: Any
) -> tuple[Any, Any]:
    """Router and layers of `upcycle_model` for a target, where none is asked.

    Raises:
        TypeError, ValueError: For no target's name, or no model.
        UpcycleError: For a model that the target is not made from.
    """
    target = get_target(name)
    checks.check_instance("model", model, keras.Model, "a Keras model")
    kind = type(backbone_of(model)).__name__
    if kind not in target.sources:
        raise UpcycleError(
            f"`target={name!r}` is made from {list(target.sources)}. Received: "
            f"{model.name!r}, a {kind}. Leave `target` out, or start from one "
            "of these."
        )
    if recipe is None:
        router = TopKRouter() if router is None else router
        if layers is None and target.every_block:
            layers = "all"
    return router, layers


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


def settings_of(layer: MoEFeedForward) -> dict[str, Any]:
    """What all sparse blocks of a target have alike, by our names."""
    router: Any = layer.router
    return {
        "num_experts": layer.num_experts,
        "intermediate_dim": layer.intermediate_dim,
        "top_k": getattr(router, "top_k", None),
        "normalize": router.sums_to_one,
        "shared_intermediate_dim": layer.shared_intermediate_dim,
        "load_balance_loss": getattr(router, "load_balance_loss", 0.0),
    }


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

"""Formats that others serve: which mixtures they can say, and how.

A target is a mixture of KerasHub's own, by its row, and the dense models of
which one may be made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import keras_hub_mixtures
from keras_upcycle.families.keras_hub_family import backbone_of
from keras_upcycle.families.rows import Mixture
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
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

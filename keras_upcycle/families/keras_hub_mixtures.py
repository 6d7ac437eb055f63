"""KerasHub's models that are sparse as they come, a row each.

Read off KerasHub 0.32. `adopt_model` makes their experts ours.
"""

from typing import Any

from keras_upcycle.families.keras_hub_text_blocks import GATED_DENSE
from keras_upcycle.families.rows import Mixture, Model, Network, Stack, whole
from keras_upcycle.layers.activations import (
    ClippedSwiGLU,
    Float32Activation,
    gelu_tanh,
)


def _activation(experts):
    """Of a layer that has a function, or SiLU as all of them."""
    return Float32Activation(getattr(experts, "activation", "silu"))


def _clipped(experts):
    return ClippedSwiGLU(experts.alpha, experts.limit)


_GATE_AND_UP = "_expert_feedforward_gate_dense"
_QWEN: dict[str, Any] = {
    "router": "_sparse_feedforward_gate_dense",
    "experts": "expert_bank",
    "gate": _GATE_AND_UP,
    "up": _GATE_AND_UP,
    "down": "_expert_feedforward_output_dense",
    "activation": _activation,
    "normalize": "norm_top_k_prob",
    "loss": "router_aux_loss_coefficient",
}
_MLP = Network(**GATED_DENSE)
_MASK = "decoder_padding_mask"

# By name of the backbone.
MIXTURES = {
    "MixtralBackbone": Mixture(
        layer="models.mixtral.mixtral_decoder.MixtralSparseMoeBlock",
        **{
            **_QWEN,
            "up": "_expert_feedforward_intermediate_dense",
            "normalize": True,
            "loss": "router_aux_loss_coef",
        },
        noise="router_jitter_noise",
    ),
    "QwenMoeBackbone": Mixture(
        layer="models.qwen_moe.qwen_moe_decoder.QwenSparseMoeBlock",
        **_QWEN,
        shared="shared_expert_dense",
        shared_network=_MLP,
        shared_gate="shared_expert_gate_dense",
    ),
    "Qwen3MoeBackbone": Mixture(
        layer="models.qwen3_moe.qwen3_moe_decoder.Qwen3SparseMoeBlock",
        **_QWEN,
    ),
    "Qwen3_5MoeBackbone": Mixture(
        layer="models.qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5MoeSparseMoeBlock",
        **{**_QWEN, "router": "_router_gate", "normalize": True},
        shared="shared_expert",
        shared_network=_MLP,
        shared_gate="_shared_expert_gate",
    ),
    "GptOssBackbone": Mixture(
        layer="models.gpt_oss.gpt_oss_decoder.GptOssSparseMoeBlock",
        router="router.router_dense",
        experts="experts",
        gate="gate_up_proj",
        up="gate_up_proj",
        down="down_proj",
        interleaved=True,
        bias="_bias",
        activation=_clipped,
        softmax="after_top_k",
    ),
    # A dense network beside them stays as it is.
    "Gemma4Backbone": Mixture(
        layer="models.gemma4.gemma4_moe.Gemma4MoEBlock",
        router="proj",
        experts="",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        activation=lambda experts: Float32Activation(gelu_tanh),
        top_k="num_experts_per_token",
        beside="moe_router",
        token_scale="per_dim_scale",
        expert_scale="per_expert_scale",
    ),
}
BLOCKS = tuple(
    whole(f"models.{module}", name, MIXTURES[backbone], mask=mask)
    for backbone, module, name, mask in (
        (
            "MixtralBackbone",
            "mixtral.mixtral_decoder.MixtralTransformerDecoder",
            "_sparse_moe_block",
            _MASK,
        ),
        (
            "QwenMoeBackbone",
            "qwen_moe.qwen_moe_decoder.QwenMoeTransformerDecoder",
            "mlp",
            _MASK,
        ),
        (
            "Qwen3MoeBackbone",
            "qwen3_moe.qwen3_moe_decoder.Qwen3MoeTransformerDecoder",
            "mlp",
            _MASK,
        ),
        (
            "Qwen3_5MoeBackbone",
            "qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5MoeTransformerDecoder",
            "mlp",
            _MASK,
        ),
        (
            "GptOssBackbone",
            "gpt_oss.gpt_oss_decoder.GptOssTransformerDecoder",
            "sparse_moe_block",
            _MASK,
        ),
        (
            "Gemma4Backbone",
            "gemma4.gemma4_decoder_block.Gemma4TextDecoderBlock",
            "moe_expert_bank",
            "padding_mask",
        ),
    )
)
_DECODER = Stack("decoder", "transformer_layers", causal=True)
# What `get_config` leaves out.
_FORGETS = {
    "MixtralBackbone": ("output_router_logits",),
    "QwenMoeBackbone": ("router_aux_loss_coefficient",),
}
MODELS = tuple(
    Model(backbone, (_DECODER,), _FORGETS.get(backbone, ()))
    for backbone in MIXTURES
)
# Of those that may be made without experts: why they are not converted then.
DENSE = {
    "Gemma4Backbone": (
        "made without enable_moe_block=True, its blocks multiply by the "
        "kernels of their projections themselves and never call them, so that "
        "nothing can stand in their place. Upcycle `Gemma3Backbone` instead"
    ),
}

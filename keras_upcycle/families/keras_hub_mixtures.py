"""KerasHub's models that are sparse as they come, a row each.

Read off KerasHub 0.32. `adopt_model` makes their experts ours.
"""

from typing import Any

from keras_upcycle.families.keras_hub_text_blocks import GATED_DENSE
from keras_upcycle.families.rows import Mixture, Model, Network, Stack, whole
from keras_upcycle.layers.activations import ClippedSwiGLU, Float32Activation


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
}
BLOCKS = tuple(
    whole(
        f"models.{module}TransformerDecoder",
        name,
        MIXTURES[backbone],
        mask="decoder_padding_mask",
    )
    for backbone, module, name in (
        (
            "MixtralBackbone",
            "mixtral.mixtral_decoder.Mixtral",
            "_sparse_moe_block",
        ),
        ("QwenMoeBackbone", "qwen_moe.qwen_moe_decoder.QwenMoe", "mlp"),
        ("Qwen3MoeBackbone", "qwen3_moe.qwen3_moe_decoder.Qwen3Moe", "mlp"),
        (
            "Qwen3_5MoeBackbone",
            "qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5Moe",
            "mlp",
        ),
        (
            "GptOssBackbone",
            "gpt_oss.gpt_oss_decoder.GptOss",
            "sparse_moe_block",
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

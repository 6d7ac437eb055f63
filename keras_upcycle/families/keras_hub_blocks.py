"""The Transformer blocks of KerasHub: where the parts of each network are.

A row a class. Read off KerasHub 0.32 and checked there: the tensor that enters
`down` is what the row says, to the last bit. Two names mislead: T5's
`gate_projector` and EdRec's `gate_proj` are what is *not* activated.
"""

from typing import Any

import keras

from keras_upcycle.families.rows import (
    GATE_FIRST,
    UP_FIRST,
    Block,
    Network,
)
from keras_upcycle.layers.activations import (
    gelu_tanh,
    quick_gelu,
    relu_squared,
)


def _gelu_tanh(holder):
    del holder
    return gelu_tanh


def _relu_squared(holder):
    del holder
    return relu_squared


def _silu(holder):
    del holder
    return keras.activations.silu


def _by_name(attribute):
    """Of a layer that keeps its activation's name and calls a function of its
    own for GELU by tanh, which no file could name."""

    def activation(holder):
        name = getattr(holder, attribute)
        if name == "gelu_approximate":
            return gelu_tanh
        return keras.activations.get(name)

    return activation


def _of_edrec(holder):
    if holder.activation == "gelu":
        return gelu_tanh
    return keras.activations.get(holder.activation)


def _of_clip(holder):
    if holder.intermediate_activation == "quick_gelu":
        return quick_gelu
    return holder.activation


def _one_kernel_for_both(flag=None):
    def why_not(holder):
        if flag is not None and not getattr(holder, flag):
            return None
        return (
            "one kernel holds its gate and its up projection, which experts "
            "keep apart"
        )

    return why_not


def _of_sparse_gate(holder):
    if holder.activation_sparsity > 0:
        return (
            "its gate is cut at a quantile of its own row "
            f"(activation_sparsity={holder.activation_sparsity}), which is no "
            "function of single neurons, so experts would not add up to it"
        )
    return None


def _inner(layer, mask=None, calls=("call",), inside=(), **network):
    return Block(
        layer, (Network(**network),), mask=mask, calls=calls, inside=inside
    )


def _whole(layer, whole, *networks, mask=None, inside=()):
    return Block(layer, networks, whole=whole, mask=mask, inside=inside)


_ENCODER_DENSE = {
    "up": "_feedforward_intermediate_dense",
    "down": "_feedforward_output_dense",
}
# Of Llama and those after it.
_GATED_DENSE = {"gate": "_feedforward_gate_dense", **_ENCODER_DENSE}
_LLAMA = {
    **_GATED_DENSE,
    "activation": "activation",
    "float32": True,
    "mask": "decoder_padding_mask",
}
_GEMMA = {
    "gate": "gating_ffw",
    "up": "gating_ffw_2",
    "down": "ffw_linear",
    "activation": _gelu_tanh,
    "mask": "padding_mask",
}
# `dropout_layer` serves attention as well and stays where it is.
_ESM = {
    "up": "feedforward_intermediate_dense",
    "down": "feedforward_output_dense",
    "mask": "attention_mask",
}
_CLIP = {"up": "dense_1", "down": "dense_2", "activation": _of_clip}
_IMAGE_OF_GEMMA = {
    "up": "mlp_dense_1",
    "down": "mlp_dense_2",
    "activation": _gelu_tanh,
}
_D_FINE = {
    "up": "fc1",
    "down": "fc2",
    # `dropout_layer`, behind, serves attention as well.
    "dropout": "activation_dropout_layer",
}
_GATED_PROJ: dict[str, Any] = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_VIT_MLP = Network(
    layer="models.vit.vit_layers.MLP",
    up="dense_1",
    down="dense_2",
    dropout="dropout",
    output_dropout="dropout",
)
_MOONSHINE = Network(
    layer="models.moonshine.moonshine_layers.MoonshineMLP",
    up="dense_1",
    down="dense_2",
    activation="activation",
    halves=UP_FIRST,
    why_not=_one_kernel_for_both("use_swiglu_activation"),
)
TRANSFORMER_ENCODER = _inner(
    "layers.modeling.transformer_encoder.TransformerEncoder",
    mask="padding_mask",
    output_dropout="_feedforward_dropout",
    **_ENCODER_DENSE,
)
TRANSFORMER_DECODER = _inner(
    "layers.modeling.transformer_decoder.TransformerDecoder",
    mask="decoder_padding_mask",
    output_dropout="_feedforward_dropout",
    **_ENCODER_DENSE,
)
F_NET_ENCODER = _inner(
    "layers.modeling.f_net_encoder.FNetEncoder",
    up="_intermediate_dense",
    down="_output_dense",
    output_dropout="_output_dropout",
)

BLOCKS = (
    # Text, encoders.
    TRANSFORMER_ENCODER,
    F_NET_ENCODER,
    _inner(
        "models.deberta_v3.disentangled_attention_encoder"
        ".DisentangledAttentionEncoder",
        mask="padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    _inner("models.esm.esm_encoder.ESMEncoder", **_ESM),
    _inner("models.roformer_v2.roformer_v2_encoder.RoformerV2Encoder", **_ESM),
    # Its padding mask, `(S, B)` by a reshape, mixes rows up: none is used.
    _inner(
        "models.xlnet.xlnet_encoder.XLNetEncoder",
        up="feedforward_intermediate_dense",
        down="feedforward_output_dense",
        activation="activation_function_ff",
        dropout="dropout_ff",
        output_dropout="dropout_ff",
    ),
    # Text, decoders.
    TRANSFORMER_DECODER,
    # Its `_feedforward_dropout` is built and never called.
    _inner(
        "models.gpt_neo_x.gpt_neo_x_decoder.GPTNeoXDecoder",
        mask="decoder_padding_mask",
        **_ENCODER_DENSE,
    ),
    _inner(
        "models.bloom.bloom_decoder.BloomDecoder",
        mask="decoder_padding_mask",
        up="_mlp_intermediate_dense",
        down="_mlp_output_dense",
        activation=_gelu_tanh,
        output_dropout="_dropout_layer",
    ),
    _inner(
        "models.falcon.falcon_transformer_decoder.FalconTransformerDecoder",
        mask="decoder_padding_mask",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        output_dropout="feedforward_dropout",
    ),
    _inner("models.llama.llama_decoder.LlamaTransformerDecoder", **_LLAMA),
    _inner(
        "models.mistral.mistral_transformer_decoder.MistralTransformerDecoder",
        **_LLAMA,
    ),
    _inner("models.qwen.qwen_decoder.QwenTransformerDecoder", **_LLAMA),
    _inner("models.qwen3.qwen3_decoder.Qwen3TransformerDecoder", **_LLAMA),
    _inner(
        "models.qwen3_5.qwen3_5_decoder.Qwen3_5TransformerDecoder", **_LLAMA
    ),
    _inner(
        "models.phi3.phi3_decoder.Phi3Decoder",
        mask="decoder_padding_mask",
        gate="feedforward_gate_dense",
        up="feedforward_intermediate_dense",
        down="feedforward_output_dense",
        activation="activation",
        float32=True,
        output_dropout="feedforward_dropout",
    ),
    # Gemma's `feedforward_dropout` is built and never called.
    _inner("models.gemma.gemma_decoder_block.GemmaDecoderBlock", **_GEMMA),
    _inner("models.gemma3.gemma3_decoder_block.Gemma3DecoderBlock", **_GEMMA),
    _inner(
        "models.pali_gemma.pali_gemma_decoder_block.PaliGemmaDecoderBlock",
        **_GEMMA,
    ),
    _whole(
        "models.smollm3.smollm3_layers.SmolLM3DecoderLayer",
        "mlp",
        Network(
            layer="models.smollm3.smollm3_layers.SmolLM3MLP",
            activation=_silu,
            follows_global_dtype=True,
            **_GATED_PROJ,
        ),
        mask="decoder_padding_mask",
    ),
    _whole(
        "models.gemma3n.gemma3n_text_decoder.Gemma3nTextDecoderBlock",
        "mlp",
        Network(
            layer="models.gemma3n.gemma3n_text_layers.Gemma3nTextMLP",
            activation=_by_name("hidden_activation"),
            float32=True,
            why_not=_of_sparse_gate,
            **_GATED_PROJ,
        ),
        inside=("models.gemma3n.gemma3n_text_model.Gemma3nTextModel",),
    ),
    # Its tokens are mixed with their neighbours inside `ffn`, before `key`.
    _inner(
        "models.rwkv7.rwkv7_layer.RWKV7_Block",
        mask="padding_mask",
        up="ffn.key",
        down="ffn.value",
        activation=_relu_squared,
        calls=("call", "generate_call"),
    ),
    # Encoder and decoder.
    _inner(
        "models.whisper.whisper_encoder.WhisperEncoder",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    _inner(
        "models.whisper.whisper_decoder.WhisperDecoder",
        mask="decoder_padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    # One dropout layer serves the hidden layer and the output.
    _inner(
        "models.t5.t5_transformer_layer.T5TransformerLayer",
        mask="attention_mask",
        gate="input_projector",
        up="gate_projector",
        down="output_projector",
        gated_if="use_gated_activation",
        dropout="dropout_layer",
        output_dropout="dropout_layer",
    ),
    *(
        _whole(
            f"models.{package}.{package}_{kind}.{name}{part}Layer",
            "mlp",
            Network(
                layer=f"models.{package}.{package}_layers.{name}MLP",
                activation=_by_name("hidden_activation"),
                dropout="dropout",
                **_GATED_PROJ,
            ),
            mask=mask,
        )
        for package, name in (("t5gemma", "T5Gemma"), ("t5gemma2", "T5Gemma2"))
        for kind, part, mask in (
            ("encoder", "Encoder", "padding_mask"),
            ("decoder", "Decoder", "self_attention_padding_mask"),
        )
    ),
    *(
        _whole(
            f"models.edrec.edrec_layers.{name}",
            "mlp",
            Network(
                layer="models.edrec.edrec_layers.EdRecGatedFeedForward",
                gate="up_proj",
                up="gate_proj",
                down="down_proj",
                activation=_of_edrec,
                output_dropout="dropout",
            ),
            mask=mask,
        )
        for name, mask in (
            ("EdRecEncoderBlock", "padding_mask"),
            ("EdRecDecoderBlock", "decoder_padding_mask"),
        )
    ),
    _whole(
        "models.moonshine.moonshine_encoder.MoonshineEncoderBlock",
        "feedforward",
        _MOONSHINE,
        mask="attention_mask",
    ),
    _whole(
        "models.moonshine.moonshine_decoder.MoonshineDecoderBlock",
        "ff",
        _MOONSHINE,
        mask="decoder_padding_mask",
    ),
    # Vision.
    _whole(
        "models.vit.vit_layers.ViTEncoderBlock",
        "mlp",
        _VIT_MLP,
        inside=("models.vit.vit_layers.ViTEncoder",),
    ),
    # `DeiTOutput` adds the residual itself: what is within it is replaced.
    _inner(
        "models.deit.deit_layers.DeiTEncoderBlock",
        up="mlp.dense",
        down="output_layer.dense",
        output_dropout="output_layer.dropout",
        inside=("models.deit.deit_layers.DeiTEncoder",),
    ),
    _whole(
        "models.dinov2.dinov2_layers.DINOV2Layer",
        "mlp",
        Network(
            layer="models.dinov2.dinov2_layers.DINOV2MLP",
            up="fc1",
            down="fc2",
        ),
        Network(
            layer="models.dinov2.dinov2_layers.DINOV2SwiGLUFFN",
            up="weights_in",
            down="weights_out",
            activation=_silu,
            halves=GATE_FIRST,
            why_not=_one_kernel_for_both(),
        ),
        inside=("models.dinov2.dinov2_layers.DINOV2Encoder",),
    ),
    _whole(
        "models.dinov3.dinov3_layers.DINOV3Layer",
        "mlp",
        Network(
            layer="models.dinov3.dinov3_layers.DINOV3MLP",
            up="up_proj",
            down="down_proj",
        ),
        Network(
            layer="models.dinov3.dinov3_layers.DINOV3GatedMLP", **_GATED_PROJ
        ),
        inside=("models.dinov3.dinov3_layers.DINOV3Encoder",),
    ),
    _whole(
        "models.swin_transformer.swin_transformer_layers.SwinTransformerBlock",
        "mlp",
        Network(
            layer="models.swin_transformer.swin_transformer_layers.Mlp",
            up="fc1",
            down="fc2",
            activation="act_layer",
            dropout="dropout",
            output_dropout="dropout",
        ),
        inside=(
            "models.swin_transformer.swin_transformer_layers.SwinTransformerStage",
        ),
    ),
    _whole(
        "models.vit_det.vit_layers.WindowedTransformerEncoder",
        "mlp_block",
        Network(
            layer="models.vit_det.vit_layers.MLP",
            up="dense_net.layers.0",
            down="dense_net.layers.2",
            activation="dense_net.layers.1",
            follows_global_dtype=True,
        ),
    ),
    _whole(
        "models.video_prism.video_prism_layers.VideoPrismEncoderBlock",
        "mlp",
        Network(
            layer="models.video_prism.video_prism_layers.VideoPrismMLP",
            up="dense_1",
            down="dense_2",
            dropout="dropout",
            output_dropout="dropout",
        ),
        inside=("models.video_prism.video_prism_layers.VideoPrismEncoder",),
    ),
    _inner(
        "models.d_fine.d_fine_encoder.DFineEncoderLayer",
        activation="activation_fn_layer",
        inside=("models.d_fine.d_fine_hybrid_encoder.DFineHybridEncoder",),
        **_D_FINE,
    ),
    _inner(
        "models.d_fine.d_fine_decoder.DFineDecoderLayer",
        activation="activation_fn",
        inside=("models.d_fine.d_fine_decoder.DFineDecoder",),
        **_D_FINE,
    ),
    # Several modalities.
    _inner("models.clip.clip_layers.CLIPEncoderLayer", **_CLIP),
    _inner(
        "models.metaclip_2.metaclip_2_layers.MetaCLIP2EncoderLayer", **_CLIP
    ),
    _whole(
        "models.siglip.siglip_layers.SigLIPEncoderLayer",
        "mlp",
        Network(
            layer="models.siglip.siglip_layers.SigLIPMLP", up="fc1", down="fc2"
        ),
    ),
    _inner(
        "models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoderBlock",
        inside=("models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoder",),
        **_IMAGE_OF_GEMMA,
    ),
    _inner(
        "models.gemma3.gemma3_vision_encoder.Gemma3VisionEncoderLayer",
        inside=(
            "models.gemma3.gemma3_vision_encoder.Gemma3VisionEncoderBlock",
        ),
        **_IMAGE_OF_GEMMA,
    ),
    _whole(
        "models.qwen3_5.qwen3_5_vision_encoder.Qwen3_5VisionBlock",
        "mlp",
        Network(
            layer="models.qwen3_5.qwen3_5_vision_encoder.Qwen3_5VisionMLP",
            up="fc1",
            down="fc2",
            activation=_gelu_tanh,
        ),
    ),
    _whole(
        "models.parseq.parseq_decoder.PARSeqDecoderBlock",
        "mlp",
        _VIT_MLP,
        mask="padding_mask",
        inside=("models.parseq.parseq_decoder.PARSeqDecoder",),
    ),
    _inner(
        "models.blip2.blip2_qformer.QFormerLayer",
        up="intermediate_dense",
        down="output_dense",
        output_dropout="output_dropout",
    ),
    _whole(
        "models.stable_diffusion_3.mmdit.DismantledBlock",
        "mlp",
        Network(
            layer="models.stable_diffusion_3.mmdit.MLP",
            up="dense1",
            down="dense2",
        ),
        inside=("models.stable_diffusion_3.mmdit.MMDiTBlock",),
    ),
)

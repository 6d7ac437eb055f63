"""The Transformer blocks of KerasHub's models of text and speech.

A row a class: where the parts of its feed-forward network are. Read off
KerasHub 0.32. Two names mislead: T5's `gate_projector` and EdRec's `gate_proj`
are what is *not* activated.
"""

import dataclasses
from typing import Any

import keras

from keras_upcycle.families.rows import (
    GATED_PROJ,
    ONE_KERNEL,
    Network,
    inner,
    whole,
)
from keras_upcycle.layers.activations import gelu_tanh, relu_squared


def _by_name(holder):
    """Of a layer that keeps its activation's name, and calls a function of its
    own for GELU by tanh, which no file could name."""
    if holder.hidden_activation == "gelu_approximate":
        return gelu_tanh
    return keras.activations.get(holder.hidden_activation)


def _of_edrec(holder):
    if holder.activation == "gelu":
        return gelu_tanh
    return keras.activations.get(holder.activation)


def _of_sparse_gate(holder):
    if holder.activation_sparsity > 0:
        return (
            "its gate is cut at a quantile of its own row "
            f"(activation_sparsity={holder.activation_sparsity}), which is no "
            "function of single neurons, so experts would not add up to it"
        )
    return None


def _one_kernel_for_both(holder):
    return ONE_KERNEL if holder.use_swiglu_activation else None


_ENCODER_DENSE = {
    "up": "_feedforward_intermediate_dense",
    "down": "_feedforward_output_dense",
}
# Of Llama and those after it.
GATED_DENSE: dict[str, Any] = {
    "gate": "_feedforward_gate_dense",
    **_ENCODER_DENSE,
}
_LLAMA = {
    **GATED_DENSE,
    "activation": "activation",
    "float32": True,
    "mask": "decoder_padding_mask",
}
_GEMMA = {
    "gate": "gating_ffw",
    "up": "gating_ffw_2",
    "down": "ffw_linear",
    "activation": gelu_tanh,
    "mask": "padding_mask",
}
# `dropout_layer` serves attention as well and stays where it is.
_ESM = {
    "up": "feedforward_intermediate_dense",
    "down": "feedforward_output_dense",
    "mask": "attention_mask",
}
_MOONSHINE = Network(
    layer="models.moonshine.moonshine_layers.MoonshineMLP",
    up="dense_1",
    down="dense_2",
    activation="activation",
    why_not=_one_kernel_for_both,
)

TRANSFORMER_ENCODER = dataclasses.replace(
    inner(
        "layers.modeling.transformer_encoder.TransformerEncoder",
        mask="padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    alone=True,
)
TRANSFORMER_DECODER = dataclasses.replace(
    inner(
        "layers.modeling.transformer_decoder.TransformerDecoder",
        mask="decoder_padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    alone=True,
    causal=True,
)
F_NET_ENCODER = dataclasses.replace(
    inner(
        "layers.modeling.f_net_encoder.FNetEncoder",
        up="_intermediate_dense",
        down="_output_dense",
        output_dropout="_output_dropout",
    ),
    alone=True,
)

BLOCKS = (
    # Text, encoders.
    TRANSFORMER_ENCODER,
    F_NET_ENCODER,
    inner(
        "models.deberta_v3.disentangled_attention_encoder"
        ".DisentangledAttentionEncoder",
        mask="padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    inner("models.esm.esm_encoder.ESMEncoder", **_ESM),
    inner("models.roformer_v2.roformer_v2_encoder.RoformerV2Encoder", **_ESM),
    # Its padding mask, `(S, B)` by a reshape, mixes rows up: none is used.
    inner(
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
    inner(
        "models.gpt_neo_x.gpt_neo_x_decoder.GPTNeoXDecoder",
        mask="decoder_padding_mask",
        **_ENCODER_DENSE,
    ),
    inner(
        "models.bloom.bloom_decoder.BloomDecoder",
        mask="decoder_padding_mask",
        up="_mlp_intermediate_dense",
        down="_mlp_output_dense",
        activation=gelu_tanh,
        output_dropout="_dropout_layer",
    ),
    inner(
        "models.falcon.falcon_transformer_decoder.FalconTransformerDecoder",
        mask="decoder_padding_mask",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        output_dropout="feedforward_dropout",
    ),
    inner("models.llama.llama_decoder.LlamaTransformerDecoder", **_LLAMA),
    inner(
        "models.mistral.mistral_transformer_decoder.MistralTransformerDecoder",
        **_LLAMA,
    ),
    inner("models.qwen.qwen_decoder.QwenTransformerDecoder", **_LLAMA),
    inner("models.qwen3.qwen3_decoder.Qwen3TransformerDecoder", **_LLAMA),
    inner("models.qwen3_5.qwen3_5_decoder.Qwen3_5TransformerDecoder", **_LLAMA),
    inner(
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
    inner("models.gemma.gemma_decoder_block.GemmaDecoderBlock", **_GEMMA),
    inner("models.gemma3.gemma3_decoder_block.Gemma3DecoderBlock", **_GEMMA),
    inner(
        "models.pali_gemma.pali_gemma_decoder_block.PaliGemmaDecoderBlock",
        **_GEMMA,
    ),
    whole(
        "models.smollm3.smollm3_layers.SmolLM3DecoderLayer",
        "mlp",
        Network(
            layer="models.smollm3.smollm3_layers.SmolLM3MLP",
            activation=keras.activations.silu,
            follows_global_dtype=True,
            **GATED_PROJ,
        ),
        mask="decoder_padding_mask",
    ),
    whole(
        "models.gemma3n.gemma3n_text_decoder.Gemma3nTextDecoderBlock",
        "mlp",
        Network(
            layer="models.gemma3n.gemma3n_text_layers.Gemma3nTextMLP",
            activation_from=_by_name,
            float32=True,
            why_not=_of_sparse_gate,
            **GATED_PROJ,
        ),
        inside=("models.gemma3n.gemma3n_text_model.Gemma3nTextModel",),
    ),
    # Its tokens are mixed with their neighbours inside `ffn`, before `key`.
    inner(
        "models.rwkv7.rwkv7_layer.RWKV7_Block",
        mask="padding_mask",
        up="ffn.key",
        down="ffn.value",
        activation=relu_squared,
        calls=("call", "generate_call"),
    ),
    # Encoder and decoder.
    inner(
        "models.whisper.whisper_encoder.WhisperEncoder",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    inner(
        "models.whisper.whisper_decoder.WhisperDecoder",
        mask="decoder_padding_mask",
        output_dropout="_feedforward_dropout",
        **_ENCODER_DENSE,
    ),
    # One dropout layer serves the hidden layer and the output.
    inner(
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
        whole(
            f"models.{package}.{package}_{kind}.{name}{part}Layer",
            "mlp",
            Network(
                layer=f"models.{package}.{package}_layers.{name}MLP",
                activation_from=_by_name,
                dropout="dropout",
                **GATED_PROJ,
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
        whole(
            f"models.edrec.edrec_layers.{name}",
            "mlp",
            Network(
                layer="models.edrec.edrec_layers.EdRecGatedFeedForward",
                gate="up_proj",
                up="gate_proj",
                down="down_proj",
                activation_from=_of_edrec,
                output_dropout="dropout",
            ),
            mask=mask,
        )
        for name, mask in (
            ("EdRecEncoderBlock", "padding_mask"),
            ("EdRecDecoderBlock", "decoder_padding_mask"),
        )
    ),
    whole(
        "models.moonshine.moonshine_encoder.MoonshineEncoderBlock",
        "feedforward",
        _MOONSHINE,
        mask="attention_mask",
    ),
    whole(
        "models.moonshine.moonshine_decoder.MoonshineDecoderBlock",
        "ff",
        _MOONSHINE,
        mask="decoder_padding_mask",
    ),
)

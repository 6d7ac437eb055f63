"""The Transformer blocks of KerasHub's models of images, video and several
modalities: a row a class, as in `keras_hub_text_blocks`.
"""

import keras

from keras_upcycle.families.rows import (
    GATED_PROJ,
    ONE_KERNEL,
    Network,
    inner,
    whole,
)
from keras_upcycle.layers.activations import gelu_tanh, quick_gelu


def _of_clip(holder):
    if holder.intermediate_activation == "quick_gelu":
        return quick_gelu
    return holder.activation


def _one_kernel_for_both(holder):
    del holder
    return ONE_KERNEL


_CLIP = {"up": "dense_1", "down": "dense_2", "activation_from": _of_clip}
_IMAGE_OF_GEMMA = {
    "up": "mlp_dense_1",
    "down": "mlp_dense_2",
    "activation": gelu_tanh,
}
_D_FINE = {
    "up": "fc1",
    "down": "fc2",
    # `dropout_layer`, behind, serves attention as well.
    "dropout": "activation_dropout_layer",
}
_VIT_MLP = Network(
    layer="models.vit.vit_layers.MLP",
    up="dense_1",
    down="dense_2",
    dropout="dropout",
    output_dropout="dropout",
)

BLOCKS = (
    # Vision.
    whole(
        "models.vit.vit_layers.ViTEncoderBlock",
        "mlp",
        _VIT_MLP,
        inside=("models.vit.vit_layers.ViTEncoder",),
    ),
    # `DeiTOutput` adds the residual itself: what is within it is replaced.
    inner(
        "models.deit.deit_layers.DeiTEncoderBlock",
        up="mlp.dense",
        down="output_layer.dense",
        output_dropout="output_layer.dropout",
        inside=("models.deit.deit_layers.DeiTEncoder",),
    ),
    whole(
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
            activation=keras.activations.silu,
            why_not=_one_kernel_for_both,
        ),
        inside=("models.dinov2.dinov2_layers.DINOV2Encoder",),
    ),
    whole(
        "models.dinov3.dinov3_layers.DINOV3Layer",
        "mlp",
        Network(
            layer="models.dinov3.dinov3_layers.DINOV3MLP",
            up="up_proj",
            down="down_proj",
        ),
        Network(
            layer="models.dinov3.dinov3_layers.DINOV3GatedMLP", **GATED_PROJ
        ),
        inside=("models.dinov3.dinov3_layers.DINOV3Encoder",),
    ),
    whole(
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
    whole(
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
    whole(
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
    inner(
        "models.d_fine.d_fine_encoder.DFineEncoderLayer",
        activation="activation_fn_layer",
        inside=("models.d_fine.d_fine_hybrid_encoder.DFineHybridEncoder",),
        **_D_FINE,
    ),
    inner(
        "models.d_fine.d_fine_decoder.DFineDecoderLayer",
        activation="activation_fn",
        inside=("models.d_fine.d_fine_decoder.DFineDecoder",),
        **_D_FINE,
    ),
    # Several modalities.
    inner("models.clip.clip_layers.CLIPEncoderLayer", **_CLIP),
    inner("models.metaclip_2.metaclip_2_layers.MetaCLIP2EncoderLayer", **_CLIP),
    whole(
        "models.siglip.siglip_layers.SigLIPEncoderLayer",
        "mlp",
        Network(
            layer="models.siglip.siglip_layers.SigLIPMLP", up="fc1", down="fc2"
        ),
    ),
    inner(
        "models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoderBlock",
        inside=("models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoder",),
        **_IMAGE_OF_GEMMA,
    ),
    inner(
        "models.gemma3.gemma3_vision_encoder.Gemma3VisionEncoderLayer",
        inside=(
            "models.gemma3.gemma3_vision_encoder.Gemma3VisionEncoderBlock",
        ),
        **_IMAGE_OF_GEMMA,
    ),
    whole(
        "models.qwen3_5.qwen3_5_vision_encoder.Qwen3_5VisionBlock",
        "mlp",
        Network(
            layer="models.qwen3_5.qwen3_5_vision_encoder.Qwen3_5VisionMLP",
            up="fc1",
            down="fc2",
            activation=gelu_tanh,
        ),
    ),
    whole(
        "models.parseq.parseq_decoder.PARSeqDecoderBlock",
        "mlp",
        _VIT_MLP,
        mask="padding_mask",
        inside=("models.parseq.parseq_decoder.PARSeqDecoder",),
    ),
    inner(
        "models.blip2.blip2_qformer.QFormerLayer",
        up="intermediate_dense",
        down="output_dense",
        output_dropout="output_dropout",
    ),
    whole(
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

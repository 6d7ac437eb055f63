"""The backbones of KerasHub, a row each: their stacks, what configs forget.

To add one, see CONTRIBUTING: its block's row in `keras_hub_text_blocks` or
`keras_hub_image_blocks`, its own here. What cannot be converted is in
`keras_hub_refused`.
"""

import keras
from keras import ops

from keras_upcycle.families.rows import Model, Stack, part

_LAYERS = "transformer_layers"


def _encoder(path=_LAYERS, name="encoder", mask="padding_mask"):
    return Stack(name, path, mask=mask)


def _decoder(path=_LAYERS, name="decoder", mask="padding_mask"):
    return Stack(name, path, causal=True, mask=mask)


def _vision(path, name="encoder"):
    return Stack(name, path, modality="vision", mask=None)


def _real_ids(backbone, inputs):
    """For models that take no mask: which ids are not padding's."""
    ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
    return ids != getattr(backbone, "pad_token_id", 0)


def _after_convolutions(backbone, inputs):
    """Moonshine's encoder sees fewer positions than sound has samples."""
    mask = backbone.output["encoder_attention_mask"]
    return keras.Model(backbone.input, mask)(inputs)


def _after_images(count):
    """The mask of a decoder that puts an image's tokens before the text's.

    Args:
        count: Name of the attribute that tells how many there are.
    """

    def mask(backbone, inputs):
        text = ops.cast(inputs["padding_mask"], "bool")
        images = ops.ones((text.shape[0], part(backbone, count)), "bool")
        return ops.concatenate([images, text], axis=1)

    return mask


_IMAGES = ("data_format",)
_TIED = ("tie_word_embeddings",)


def _both(encoder, decoder, modality="language", mask="encoder_padding_mask"):
    return (
        Stack("encoder", encoder, modality=modality, mask=mask),
        _decoder(decoder, mask="decoder_padding_mask"),
    )


_ENCODER_DECODER = _both(
    "encoder_transformer_layers", "decoder_transformer_layers"
)
_TOWERS = "encoder_layers"

MODELS = (
    # Text, encoders.
    *(
        Model(f"{name}Backbone", (_encoder(),))
        for name in (
            *("Bert", "Roberta", "XLMRoberta", "DistilBert", "Electra"),
            *("DebertaV3", "FNet"),
        )
    ),
    # Blocks by group; each is called many times.
    Model("AlbertBackbone", (_encoder("transformer_layers.*"),)),
    Model("ESMBackbone", (_encoder(mask=_real_ids),)),
    Model("RoformerV2Backbone", (_encoder(mask=_real_ids),)),
    # Its tokens lie `(S, B, D)`: what chooses among the tokens of an example
    # would choose among those of a batch.
    Model("XLNetBackbone", (_decoder(name="encoder"),)),
    # Text, decoders.
    *(
        Model(f"{name}Backbone", (_decoder(),))
        for name in (
            *("GPT2", "OPT", "GPTNeoX", "Bloom", "Falcon", "Mistral"),
            *("Qwen", "Qwen3", "Phi3", "Gemma", "SmolLM3"),
        )
    ),
    Model("LlamaBackbone", (_decoder(),), forgets=_TIED),
    Model("Llama3Backbone", (_decoder(),), forgets=_TIED),
    Model("Gemma3nBackbone", (_decoder("language_model.transformer_layers"),)),
    Model("RWKV7Backbone", (_decoder("rwkv_layers"),)),
    # Encoder and decoder.
    Model("T5Backbone", _ENCODER_DECODER),
    Model("BartBackbone", _ENCODER_DECODER),
    Model(
        "WhisperBackbone",
        _both(
            "encoder_transformer_layers",
            "decoder_transformer_layers",
            modality=None,
            mask=None,
        ),
    ),
    Model("T5GemmaBackbone", _both("encoder_layers", "decoder_layers")),
    Model(
        "T5Gemma2Backbone",
        (
            _vision("vision_encoder.image_encoder.resblocks", "vision"),
            *_both("encoder_layers", "decoder_layers"),
        ),
    ),
    Model("EdRecBackbone", _both("encoder_layers", "decoder_layers")),
    Model(
        "MoonshineBackbone",
        _both(
            "encoder_blocks",
            "decoder_blocks",
            modality=None,
            mask=_after_convolutions,
        ),
    ),
    # Vision.
    Model("ViTBackbone", (_vision("vit_encoder.encoder_layers"),), _IMAGES),
    Model("DeiTBackbone", (_vision("deit_encoder.encoder_layers"),), _IMAGES),
    Model("DINOV2Backbone", (_vision("encoder.layers"),), _IMAGES),
    Model("DINOV3Backbone", (_vision("encoder.layers"),), _IMAGES),
    Model(
        "DepthAnythingBackbone",
        (_vision("image_encoder.encoder.layers"),),
        _IMAGES,
    ),
    Model("SwinTransformerBackbone", (_vision("stages.*.blocks"),)),
    Model("ViTDetBackbone", (_vision("windowed_transformer_encoder*"),)),
    Model(
        "SAMBackbone",
        (_vision("image_encoder.windowed_transformer_encoder*"),),
    ),
    Model(
        "VideoPrismBackbone",
        (
            _vision("spatial_encoder.encoder_layers", "spatial"),
            _vision("temporal_encoder.encoder_layers", "temporal"),
            _vision("auxiliary_encoder.encoder_layers", "auxiliary"),
            _decoder("text_encoder.encoder_layers", "text"),
        ),
        _IMAGES,
    ),
    Model(
        "DFineBackbone",
        (
            _vision("encoder.encoder.*.encoder_layer.*"),
            _vision("decoder.decoder_layers", "decoder"),
        ),
    ),
    # Several modalities, and their towers alone.
    *(
        Model(
            f"{name}Backbone",
            (
                _vision("vision_encoder.encoder_layers", "vision"),
                text("text_encoder.encoder_layers", "text"),
            ),
        )
        for name, text in (
            ("CLIP", _decoder),
            ("MetaCLIP2", _decoder),
            ("SigLIP", _encoder),
        )
    ),
    *(
        Model(path, (_vision(_TOWERS, "vision"),), _IMAGES)
        for path in (
            "models.clip.clip_vision_encoder.CLIPVisionEncoder",
            "models.metaclip_2.metaclip_2_vision_encoder"
            ".MetaCLIP2VisionEncoder",
            "models.siglip.siglip_vision_encoder.SigLIPVisionEncoder",
        )
    ),
    *(
        Model(path, (text(_TOWERS, "text"),))
        for path, text in (
            ("models.clip.clip_text_encoder.CLIPTextEncoder", _decoder),
            (
                "models.metaclip_2.metaclip_2_text_encoder"
                ".MetaCLIP2TextEncoder",
                _decoder,
            ),
            ("models.siglip.siglip_text_encoder.SigLIPTextEncoder", _encoder),
        )
    ),
    Model(
        "PaliGemmaBackbone",
        (
            _vision("vit_encoder.image_encoder.resblocks", "vision"),
            _decoder(name="text", mask=_after_images("image_sequence_length")),
        ),
    ),
    Model(
        "Gemma3Backbone",
        (
            _vision("vision_encoder.image_encoder.resblocks", "vision"),
            _decoder(name="text"),
        ),
    ),
    # The tokens of all pictures are one sequence: see XLNet.
    Model(
        "Qwen3_5Backbone",
        (
            Stack(
                "vision",
                "vision_encoder.blocks",
                causal=True,
                modality="vision",
                mask=None,
            ),
            _decoder(name="text"),
        ),
    ),
    Model(
        "PARSeqBackbone",
        (
            _vision("image_encoder.vit_encoder.encoder_layers", "vision"),
            _decoder("decoder.decoder_layers", "text"),
        ),
    ),
    Model(
        "BLIP2Backbone",
        (
            _vision("vision_encoder.encoder.encoder_layers", "vision"),
            _vision("qformer.transformer_layers", "qformer"),
            _decoder(
                "language_model.transformer_layers",
                "text",
                mask=_after_images("qformer.num_query_tokens"),
            ),
        ),
    ),
    Model(
        "models.stable_diffusion_3.mmdit.MMDiT",
        (
            _vision("joint_blocks.*.x_block", "image"),
            _vision("joint_blocks.*.context_block", "text"),
        ),
        _IMAGES,
    ),
)

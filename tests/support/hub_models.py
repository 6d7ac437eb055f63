"""Small KerasHub models, one for each row of the table, and inputs for them.

KerasHub's own test sizes pass whatever stands in the blocks: here all weights
are random, no two widths are alike, and rows have padding as well as tokens.
"""

import functools
import importlib
import io

import keras
import keras_hub
import numpy as np

LENGTH = 7
SHORT = 4  # of the last row
WORDS = 30


def hub(path):
    """A class of KerasHub, public or not."""
    module, _, name = path.rpartition(".")
    if not module:
        return getattr(keras_hub.models, name)
    return getattr(importlib.import_module(f"keras_hub.src.{module}"), name)


def randomized(model, seed=0):
    """Weights that are all nonzero, biases and scales too."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" in variable.path or not keras.backend.is_float_dtype(
            keras.backend.standardize_dtype(variable.dtype)
        ):
            continue
        values = rng.normal(0, 0.3, tuple(variable.shape))
        if variable.name in ("gamma", "scale", "moving_variance"):
            values = 1 + 0.1 * np.abs(values)
        elif len(variable.shape) > 1:
            values = values / np.sqrt(max(1, variable.shape[-2] / 8))
        variable.assign(values)
    _settle_positions(model)
    return model


def _settle_positions(model):
    """DINOv2 trains a copy of the positions and saves the original.

    The copy is saved when its signed sum differs from the original's; one
    that was set at random would be lost where it does not.
    """
    for layer in model._flatten_layers():
        used = getattr(layer, "interpolated_position_embeddings", None)
        if used is not None:
            used.assign(layer.position_embeddings)


# Where one length for all will not do.
LENGTHS = {
    "moonshine_": {
        "encoder_input_values": 3000,
        "encoder_padding_mask": 3000,
    },
    "sam_": {"points": 1, "labels": 1, "boxes": 1, "masks": 0},
    "gemma3_": {
        "images": 1,
        "vision_indices": 4,
        "vision_mask": LENGTH,
    },
}


def inputs_of(model, batch=2, seed=0):
    """A batch that fits the model, by the names of its inputs."""
    rng = np.random.default_rng(seed)
    specs = model.input
    named = [known for known in LENGTHS if model.name.startswith(known)]
    lengths = LENGTHS[named[0]] if named else {}

    def one(name, spec):
        return _input(name, spec, batch, rng, lengths.get(name, LENGTH))

    if isinstance(specs, dict):
        return {name: one(name, spec) for name, spec in specs.items()}
    if isinstance(specs, list):
        return [one(spec.name, spec) for spec in specs]
    return one("images", specs)


def _input(name, spec, batch, rng, length):
    shape = [batch, *spec.shape[1:]]
    shape = tuple(length if size is None else size for size in shape)
    if name == "vision_indices":
        return np.tile(np.arange(shape[1], dtype="int32"), (batch, 1))
    if name == "mask_positions":  # three a row, of tokens
        return np.tile(np.arange(3, dtype="int32"), (batch, 1))
    if name == "vision_mask":
        return np.tile(np.arange(shape[1]) < 4, (batch, 1)).astype("int32")
    if "padding_mask" in name or name.endswith("_mask"):
        mask = np.ones(shape)
        mask[-1, max(1, shape[1] * SHORT // LENGTH) :] = 0
        return mask.astype(keras.backend.standardize_dtype(spec.dtype))
    if "token_ids" in name:
        return rng.integers(2, WORDS, shape).astype("int32")
    if "segment" in name or name == "labels":
        return np.zeros(shape, "int32")
    if "timestep" in name:
        return rng.uniform(1, 5, shape).astype("float32")
    return rng.normal(size=shape).astype("float32")


def _made(path, **settings):
    def build(**changes):
        keras.utils.set_random_seed(1)
        return randomized(hub(path)(**{**settings, **changes}))

    return build


_WORDS = {"vocabulary_size": WORDS, "num_layers": 2}
_PLAIN = {**_WORDS, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 20}
_BERT = {**_PLAIN, "max_sequence_length": 12, "dropout": 0.0}
_GROUPED = {
    **_WORDS,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 20,
}
_GEMMA = {**_GROUPED, "head_dim": 8}
_T5_GEMMA = {
    "vocabulary_size": WORDS,
    **{
        f"{side}_{name}": value
        for side, inner in (("encoder", 20), ("decoder", 18))
        for name, value in {
            "hidden_dim": 24,
            "intermediate_dim": inner,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
    "query_pre_attn_scalar": 8.0,
    "attention_bias": False,
    "hidden_activation": "gelu_approximate",
    "sliding_window": 16,
    "cross_attention_hidden_size": 24,
    "attn_logit_softcapping": 50.0,
}
_IMAGE = {"image_shape": (16, 16, 3), "patch_size": 8}
_VIT = {**_IMAGE, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}
_DINO = {**_VIT, "intermediate_dim": 20, "layer_scale_init_value": 1.0}
_TOWER = {
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_dim": 20,
}


def _vision_tower(path):
    return hub(path)(patch_size=8, image_shape=(16, 16, 3), **_TOWER)


def _text_tower(path):
    # SigLIP compares the towers' outputs as they are.
    width = 16 if "siglip" in path else 24
    text = {**_TOWER, "hidden_dim": width, "intermediate_dim": 18}
    return hub(path)(
        vocabulary_size=WORDS,
        embedding_dim=width,
        max_sequence_length=LENGTH,
        **text,
    )


def _two_towers(package, name, **settings):
    def build(**changes):
        keras.utils.set_random_seed(1)
        tower = f"models.{package}.{package}"
        return randomized(
            hub(f"{name}Backbone")(
                vision_encoder=_vision_tower(
                    f"{tower}_vision_encoder.{name}VisionEncoder"
                ),
                text_encoder=_text_tower(
                    f"{tower}_text_encoder.{name}TextEncoder"
                ),
                **settings,
                **changes,
            )
        )

    return build


def _tower(path, make):
    def build():
        keras.utils.set_random_seed(1)
        return randomized(make(path))

    return build


def _gemma3_with_images():
    keras.utils.set_random_seed(1)
    images = hub("models.gemma3.gemma3_vision_encoder.Gemma3VisionEncoder")(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=10,
        output_dim=24,
    )
    settings = {**_GEMMA, "image_size": 16, "vision_encoder": images}
    return randomized(keras_hub.models.Gemma3Backbone(**settings))


def _depth_anything():
    keras.utils.set_random_seed(1)
    images = keras_hub.models.DINOV2Backbone(
        **{**_DINO, "num_layers": 4, "image_shape": (64, 64, 3)},
        position_embedding_shape=(64, 64),
        apply_layernorm=True,
        name="image_encoder",
    )
    return randomized(
        keras_hub.models.DepthAnythingBackbone(
            image_encoder=images,
            reassemble_factors=[4, 2, 1, 0.5],
            neck_hidden_dims=[4, 6, 8, 10],
            fusion_hidden_dim=8,
            head_hidden_dim=4,
            head_in_index=-1,
            feature_keys=["stage1", "stage2", "stage3", "stage4"],
        )
    )


def _sam():
    keras.utils.set_random_seed(1)
    settings = dict(hidden_size=8, image_embedding_size=(4, 4))
    encoder = hub("models.sam.sam_prompt_encoder.SAMPromptEncoder")
    decoder = hub("models.sam.sam_mask_decoder.SAMMaskDecoder")
    return randomized(
        keras_hub.models.SAMBackbone(
            image_encoder=_vit_det(num_output_channels=8),
            prompt_encoder=encoder(
                input_image_size=(16, 16), mask_in_channels=4, **settings
            ),
            mask_decoder=decoder(
                num_layers=1,
                hidden_size=8,
                intermediate_dim=12,
                num_heads=2,
                embedding_dim=8,
                num_multimask_outputs=3,
                iou_head_depth=2,
                iou_head_hidden_dim=8,
            ),
        )
    )


def _vit_det(**changes):
    keras.utils.set_random_seed(1)
    settings = {
        "image_shape": (16, 16, 3),
        "patch_size": 4,
        "hidden_size": 8,
        "num_layers": 2,
        "global_attention_layer_indices": [1],
        "intermediate_dim": 10,
        "num_heads": 2,
        "num_output_channels": 6,
        "window_size": 2,
    }
    return randomized(
        keras_hub.models.ViTDetBackbone(**{**settings, **changes})
    )


def _parseq():
    keras.utils.set_random_seed(1)
    images = keras_hub.models.ViTBackbone(
        **{**_VIT, "num_layers": 2},
        mlp_dim=20,
        use_class_token=False,
        name="image_encoder",
    )
    return randomized(
        keras_hub.models.PARSeqBackbone(
            image_encoder=images,
            vocabulary_size=WORDS,
            max_label_length=LENGTH,
            decoder_hidden_dim=16,
            num_decoder_layers=2,
            num_decoder_heads=2,
            decoder_mlp_dim=18,
            dropout_rate=0.0,
            attention_dropout=0.0,
        )
    )


def _pali_gemma():
    keras.utils.set_random_seed(1)
    return randomized(
        keras_hub.models.PaliGemmaBackbone(
            **_GEMMA,
            image_size=16,
            vit_patch_size=8,
            vit_num_layers=2,
            vit_num_heads=2,
            vit_hidden_dim=16,
            vit_intermediate_dim=18,
        )
    )


def _blip2():
    keras.utils.set_random_seed(1)
    of = "models.blip2.blip2_"
    images = hub(f"{of}vision_encoder.BLIP2VisionEncoder")(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=10,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    former = hub(f"{of}qformer.BLIP2QFormer")(
        num_query_tokens=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=14,
        vision_dim=8,
        cross_attention_frequency=1,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    language = hub(f"{of}custom_opt.BLIP2CustomOPT")(
        **_PLAIN,
        num_query_tokens=3,
        qformer_hidden_dim=12,
        max_sequence_length=12,
        dropout=0.0,
        language_projection=None,
    )
    return randomized(
        keras_hub.models.BLIP2Backbone(
            vision_encoder=images, qformer=former, language_model=language
        )
    )


def _d_fine():
    keras.utils.set_random_seed(1)
    convolutions = keras_hub.models.HGNetV2Backbone(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        depths=[1, 1],
        hidden_sizes=[16, 32],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=(None, None, 3),
        out_features=["stage1", "stage2"],
    )
    return randomized(
        keras_hub.models.DFineBackbone(
            backbone=convolutions,
            decoder_in_channels=[16, 16],
            encoder_hidden_dim=16,
            num_denoising=10,
            num_labels=4,
            hidden_dim=16,
            learn_initial_query=False,
            num_queries=10,
            anchor_image_size=(32, 32),
            feat_strides=[4, 8],
            num_feature_levels=2,
            encoder_in_channels=[16, 32],
            encode_proj_layers=[1],
            num_attention_heads=2,
            encoder_ffn_dim=20,
            num_encoder_layers=1,
            hidden_expansion=0.5,
            depth_multiplier=0.5,
            eval_idx=-1,
            num_decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=18,
            decoder_n_points=[2, 2],
            lqe_hidden_dim=16,
            num_lqe_layers=2,
            out_features=["stage1", "stage2"],
            image_shape=(32, 32, 3),
            seed=0,
        )
    )


def _gemma3n():
    return _made(
        "Gemma3nBackbone",
        text_vocab_size=WORDS,
        text_hidden_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=[10, 12],
        hidden_activation="gelu_approximate",
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=12,
        vocab_size_per_layer_input=WORDS,
        hidden_size_per_layer_input=2,
        altup_num_inputs=2,
        laurel_rank=1,
    )


MODELS = {
    # Text, encoders.
    **{
        name: _made(name, **_BERT)
        for name in (
            *("BertBackbone", "RobertaBackbone", "XLMRobertaBackbone"),
            *("DistilBertBackbone", "DebertaV3Backbone", "FNetBackbone"),
        )
    },
    "ElectraBackbone": _made(
        "ElectraBackbone",
        **{k: v for k, v in _BERT.items() if k != "vocabulary_size"},
        vocab_size=WORDS,
        embedding_dim=10,
    ),
    "AlbertBackbone": _made(
        "AlbertBackbone",
        **{**_BERT, "num_layers": 4},
        embedding_dim=10,
        num_groups=2,
        num_inner_repetitions=2,
    ),
    "ESMBackbone": _made("ESMBackbone", **_PLAIN),
    "RoformerV2Backbone": _made("RoformerV2Backbone", **_PLAIN, head_size=8),
    "XLNetBackbone": _made("XLNetBackbone", **_PLAIN, dropout=0.0),
    # Text, decoders.
    "GPT2Backbone": _made("GPT2Backbone", **_BERT),
    "OPTBackbone": _made("OPTBackbone", **_BERT),
    "GPTNeoXBackbone": _made("GPTNeoXBackbone", **_BERT),
    "BloomBackbone": _made("BloomBackbone", **_PLAIN, dropout=0.0),
    "FalconBackbone": _made(
        "FalconBackbone",
        **{k: v for k, v in _PLAIN.items() if k != "num_heads"},
        num_attention_heads=2,
        feedforward_dropout_rate=0.0,
        attention_dropout_rate=0.0,
    ),
    "LlamaBackbone": _made("LlamaBackbone", **_GROUPED),
    "LlamaBackbone, tied": _made(
        "LlamaBackbone", **_GROUPED, tie_word_embeddings=True
    ),
    "Llama3Backbone": _made("Llama3Backbone", **_GROUPED),
    "MistralBackbone": _made("MistralBackbone", **_GROUPED, sliding_window=4),
    "QwenBackbone": _made(
        "QwenBackbone", **_GROUPED, use_sliding_window_attention=False
    ),
    "Qwen3Backbone": _made("Qwen3Backbone", **_GEMMA),
    "Qwen3_5Backbone": _made(
        "Qwen3_5Backbone",
        **_GEMMA,
        layer_types=["linear_attention", "full_attention"],
        partial_rotary_factor=0.25,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_conv_kernel_dim=4,
    ),
    "Phi3Backbone": _made("Phi3Backbone", **_GROUPED),
    "GemmaBackbone": _made("GemmaBackbone", **_GEMMA),
    "Gemma3Backbone": _made(
        "Gemma3Backbone", **_GEMMA, image_size=16, vision_encoder=None
    ),
    "SmolLM3Backbone": _made(
        "SmolLM3Backbone",
        vocabulary_size=WORDS,
        hidden_dim=24,
        intermediate_dim=20,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["attention", "attention"],
        mlp_bias=True,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=16,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    ),
    "Gemma3nBackbone": _gemma3n(),
    "RWKV7Backbone": _made(
        "RWKV7Backbone",
        vocabulary_size=WORDS,
        hidden_size=16,
        num_layers=2,
        head_size=4,
        intermediate_dim=20,
        gate_lora=6,
        mv_lora=5,
        aaa_lora=7,
        decay_lora=3,
    ),
    # Encoder and decoder.
    "T5Backbone": _made("T5Backbone", **_PLAIN, dropout=0.0),
    "T5Backbone, plain": _made(
        "T5Backbone",
        **_PLAIN,
        dropout=0.0,
        use_gated_activation=False,
        activation="relu",
    ),
    "BartBackbone": _made("BartBackbone", **_BERT),
    "WhisperBackbone": _made(
        "WhisperBackbone",
        **_PLAIN,
        max_encoder_sequence_length=12,
        max_decoder_sequence_length=12,
        dropout=0.0,
    ),
    "T5GemmaBackbone": _made("T5GemmaBackbone", **_T5_GEMMA),
    "T5Gemma2Backbone": _made(
        "T5Gemma2Backbone", **_T5_GEMMA, use_query_key_norm=True
    ),
    "EdRecBackbone": _made(
        "EdRecBackbone",
        vocab_size=WORDS,
        num_layers_enc=2,
        num_layers_dec=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=20,
        dropout=0.0,
    ),
    # Its decoder is gated, and one kernel holds gate and up.
    "MoonshineBackbone": _made(
        "MoonshineBackbone",
        vocabulary_size=WORDS,
        filter_dim=16,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=16,
        intermediate_dim=20,
        encoder_num_heads=2,
        decoder_num_heads=2,
        feedforward_expansion_factor=2,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    # Vision.
    "ViTBackbone": _made("ViTBackbone", **_VIT, mlp_dim=20),
    "DeiTBackbone": _made("DeiTBackbone", **_VIT, intermediate_dim=20),
    "DINOV2Backbone": _made(
        "DINOV2Backbone", **_DINO, position_embedding_shape=(16, 16)
    ),
    "DINOV3Backbone": _made("DINOV3Backbone", **_DINO, num_register_tokens=2),
    "DINOV3Backbone, gated": _made(
        "DINOV3Backbone", **_DINO, num_register_tokens=2, use_gated_mlp=True
    ),
    "DepthAnythingBackbone": _depth_anything,
    "SwinTransformerBackbone": _made(
        "SwinTransformerBackbone",
        image_shape=(16, 16, 3),
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=2,
    ),
    "ViTDetBackbone": _vit_det,
    "SAMBackbone": _sam,
    "VideoPrismBackbone": _made(
        "VideoPrismBackbone",
        image_shape=(8, 8, 3),
        num_frames=3,
        patch_size=4,
        hidden_dim=16,
        intermediate_dim=20,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        num_text_layers=2,
        vocabulary_size=WORDS,
        max_sequence_length=LENGTH,
    ),
    "DFineBackbone": _d_fine,
    # Several modalities, and their towers alone.
    "CLIPBackbone": _two_towers("clip", "CLIP", projection_dim=10),
    "MetaCLIP2Backbone": _two_towers(
        "metaclip_2", "MetaCLIP2", projection_dim=10
    ),
    "SigLIPBackbone": _two_towers("siglip", "SigLIP"),
    **{
        path.rpartition(".")[2]: _tower(path, make)
        for package, name in (
            ("clip", "CLIP"),
            ("metaclip_2", "MetaCLIP2"),
            ("siglip", "SigLIP"),
        )
        for path, make in (
            (
                f"models.{package}.{package}_vision_encoder"
                f".{name}VisionEncoder",
                _vision_tower,
            ),
            (
                f"models.{package}.{package}_text_encoder.{name}TextEncoder",
                _text_tower,
            ),
        )
    },
    "PaliGemmaBackbone": _pali_gemma,
    "Gemma3Backbone, images": _gemma3_with_images,
    "PARSeqBackbone": _parseq,
    "BLIP2Backbone": _blip2,
    "MMDiT": _made(
        "models.stable_diffusion_3.mmdit.MMDiT",
        patch_size=2,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_ratio=1.5,
        position_size=8,
        qk_norm=None,
        dual_attention_indices=None,
        latent_shape=(8, 8, 4),
        context_shape=(5, 12),
        pooled_projection_shape=(6,),
    ),
}


_MIXTURE = {
    "vocabulary_size": WORDS,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "num_experts": 6,
    "top_k": 2,
}
# By name of a backbone that is sparse as it comes.
MIXTURES = {
    "MixtralBackbone": _made(
        "MixtralBackbone", **_MIXTURE, intermediate_dim=20
    ),
    "QwenMoeBackbone": _made(
        "QwenMoeBackbone",
        **_MIXTURE,
        intermediate_dim=20,
        moe_intermediate_dim=12,
        shared_expert_intermediate_dim=14,
        norm_top_k_prob=False,
        decoder_sparse_step=1,
        layer_norm_epsilon=1e-6,
    ),
    # Its first block is dense.
    "Qwen3MoeBackbone": _made(
        "Qwen3MoeBackbone",
        **_MIXTURE,
        head_dim=6,
        intermediate_dim=20,
        moe_intermediate_dim=12,
        norm_top_k_prob=True,
        mlp_only_layers=[0],
    ),
    "Qwen3_5MoeBackbone": _made(
        "Qwen3_5MoeBackbone",
        **_MIXTURE,
        head_dim=8,
        moe_intermediate_dim=12,
        shared_expert_intermediate_size=14,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "GptOssBackbone": _made(
        "GptOssBackbone", **_MIXTURE, head_dim=6, intermediate_dim=20
    ),
    "Gemma4Backbone": _made(
        "Gemma4Backbone",
        **{k: v for k, v in _MIXTURE.items() if k != "top_k"},
        image_size=16,
        head_dim=6,
        intermediate_dim=20,
        enable_moe_block=True,
        expert_intermediate_dim=12,
        num_experts_per_token=2,
    ),
}


@functools.cache
def mixture(name):
    """A mixture of KerasHub's own, which no test may change."""
    return MIXTURES[name]()


@functools.cache
def dense(name):
    """The model of a row, which no test may change."""
    return MODELS[name]()


@functools.cache
def proto():
    """A SentencePiece model as Llama's are, of a few words."""
    import sentencepiece

    text = ["the quick brown fox", "an airplane at the airport"]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 10),
        model_writer=made,
        vocab_size=30,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    return made.getvalue()

"""The self-attention layers of KerasHub's models, a row a class.

Where the heads of each are put together: its output projection, how many query
and key-value heads it has, and the projections of its inputs. Read off KerasHub
0.32. What is not here is no stack of heads (RWKV, FNet, deformable attention),
or lies outside of its block (the joint attention of Stable Diffusion 3), or
shares its projection between two streams (XLNet).
"""

from dataclasses import dataclass

import keras

from keras_upcycle.keras_internals.keras_hub import inner_class


@dataclass(frozen=True)
class Attention:
    """Where the heads of an attention layer are.

    Attributes:
        layer: The class, or where KerasHub keeps it.
        output: Name of its output projection.
        heads: Name of the number of query heads.
        key_value_heads: Name of the number of key-value heads; `None` where
            they are as many.
        inputs: Names of its query, key and value projections; `None` where one
            kernel holds them.
    """

    layer: type | str
    output: str
    heads: str = "num_heads"
    key_value_heads: str | None = None
    inputs: tuple[str, str, str] | None = None

    def projections(self, shared_key_values: bool) -> dict[str, str]:
        """By role the names of the projections that experts have of their own.

        None where `inputs` are none.
        """
        if self.inputs is None:
            return {}
        query, key, value = self.inputs
        own = {} if shared_key_values else {"key": key, "value": value}
        return {"query": query, **own, "output": self.output}


def _grouped(layer, output, prefix=""):
    return Attention(
        layer,
        output,
        f"{prefix}num_query_heads",
        f"{prefix}num_key_value_heads",
        inputs=_DENSE if output == "output_dense" else _PRIVATE,
    )


_PRIVATE = ("_query_dense", "_key_dense", "_value_dense")
_DENSE = ("query_dense", "key_dense", "value_dense")
_PROJ = ("query_proj", "key_proj", "value_proj")
_SHORT = ("q_proj", "k_proj", "v_proj")

_MHA = "layers.modeling.cached_multi_head_attention.CachedMultiHeadAttention"

ATTENTION = (
    # Keras's own and what derives from it.
    *(
        Attention(layer, "_output_dense", "_num_heads", inputs=_PRIVATE)
        for layer in (
            keras.layers.MultiHeadAttention,
            _MHA,
            "models.whisper.whisper_cached_multi_head_attention"
            ".WhisperCachedMultiHeadAttention",
            "models.moonshine.moonshine_multi_head_attention"
            ".MoonshineMultiHeadAttention",
        )
    ),
    # Text.
    Attention(
        "models.deberta_v3.disentangled_self_attention"
        ".DisentangledSelfAttention",
        "_output_dense",
        inputs=_PRIVATE,
    ),
    *(
        Attention(
            f"models.{layer}",
            "o_dense",
            "heads",
            inputs=("q_dense", "k_dense", "v_dense"),
        )
        for layer in (
            "esm.esm_attention.EsmSelfAttention",
            "roformer_v2.roformer_v2_attention.RoformerAttention",
        )
    ),
    Attention(
        "models.gpt_neo_x.gpt_neo_x_attention.GPTNeoXAttention",
        "_output_dense",
    ),
    Attention(
        "models.bloom.bloom_attention.BloomAttention",
        "_output_dense",
        inputs=_PRIVATE,
    ),
    Attention(
        "models.falcon.falcon_attention.FalconAttention",
        "output_dense",
        inputs=_DENSE,
    ),
    Attention(
        "models.t5.t5_multi_head_attention.T5MultiHeadAttention",
        "output_projector",
        inputs=("query_projector", "key_projector", "value_projector"),
    ),
    # Grouped heads.
    *(
        _grouped(f"models.{layer}", "_output_dense")
        for layer in (
            "llama.llama_attention.LlamaAttention",
            "qwen.qwen_attention.QwenAttention",
            "qwen3.qwen3_attention.Qwen3Attention",
            "qwen3_5.qwen3_5_attention.Qwen3_5Attention",
        )
    ),
    _grouped(
        "models.mistral.mistral_attention.CachedMistralAttention",
        "_output_dense",
        prefix="_",
    ),
    *(
        _grouped(f"models.{layer}", "output_dense")
        for layer in (
            "phi3.phi3_attention.Phi3Attention",
            "gemma.gemma_attention.CachedGemmaAttention",
            "gemma3.gemma3_attention.CachedGemma3Attention",
            "t5gemma.t5gemma_attention.T5GemmaAttention",
            "t5gemma2.t5gemma2_attention.T5Gemma2Attention",
            # Of the decoder's tokens and the encoder's at once.
            "t5gemma2.t5gemma2_attention.T5Gemma2MergedAttention",
        )
    ),
    *(
        Attention(
            f"models.{layer}",
            "o_proj",
            "num_attention_heads",
            "num_key_value_heads",
            inputs=_SHORT,
        )
        for layer in (
            "smollm3.smollm3_layers.SmolLM3Attention",
            "gemma3n.gemma3n_attention.Gemma3nTextAttention",
        )
    ),
    # Images.
    Attention(
        "models.dinov3.dinov3_layers.DINOV3Attention",
        "output_dense",
        inputs=_DENSE,
    ),
    *(
        Attention(f"models.{layer}", "out_proj", inputs=_PROJ)
        for layer in (
            "gemma3.gemma3_vision_encoder.Gemma3VisionAttention",
            "pali_gemma.pali_gemma_vit.PaliGemmaVitAttention",
        )
    ),
    Attention(
        "models.qwen3_5.qwen3_5_vision_encoder.Qwen3_5VisionAttention", "proj"
    ),
    Attention(
        "models.swin_transformer.swin_transformer_layers.WindowAttention",
        "proj",
    ),
    Attention(
        "models.vit_det.vit_layers.MultiHeadAttentionWithRelativePE",
        "projection",
    ),
    Attention(
        "models.video_prism.video_prism_layers.VideoPrismAttention",
        "output_dense",
        inputs=_DENSE,
    ),
    Attention(
        "models.d_fine.d_fine_attention.DFineMultiheadAttention",
        "out_proj",
        inputs=_SHORT,
    ),
)


def known() -> dict[type, Attention]:
    """The rows by class, of those that the installed KerasHub has."""
    found = {}
    for row in ATTENTION:
        layer = row.layer
        kind = inner_class(layer) if isinstance(layer, str) else layer
        if kind is not None:
            found[kind] = row
    return found

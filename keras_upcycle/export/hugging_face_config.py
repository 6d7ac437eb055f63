"""`config.json` and `generation_config.json` of what is exported."""

from collections.abc import Mapping
from typing import Any

from keras_upcycle import checks
from keras_upcycle.conversion.targets import Target
from keras_upcycle.families import sparse_blocks

# What no model of KerasHub's knows: how long sequences may be.
_POSITIONS = 32768
# What readers look for, and the model does not say: a user may.
_FREE = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "router_aux_loss_coef",
    "output_router_logits",
    "attention_dropout",
    "use_cache",
    "_name_or_path",
)


def of_model(
    backbone: Any,
    target: Target,
    experts: Mapping[str, Any],
    dtype: str,
    tokenizer: Any,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What `config.json` says.

    Args:
        backbone: The sparse backbone.
        target: What it becomes.
        experts: What all of its MoE layers have alike.
        dtype: Of the file's weights.
        tokenizer: Of the model, or `None`.
        more: Entries of the user's.

    Raises:
        TypeError, ValueError: For entries that describe the weights.
    """
    config = {
        **_common(backbone, experts, dtype),
        **_OF_TARGET[target.name](backbone, experts),
        **_tokens(tokenizer),
    }
    if more is None:
        return config
    checks.check_instance("config", more, Mapping, "a mapping")
    wrong = [name for name in more if name in config and name not in _FREE]
    if wrong:
        raise ValueError(
            f"`config` must not change what describes the weights. Received: "
            f"config with {wrong}. It may add to the file, or set {_FREE}."
        )
    return {**config, **more}


def of_generation(tokenizer: Any) -> dict[str, Any]:
    """What `generation_config.json` says."""
    found = {k: v for k, v in _tokens(tokenizer).items() if v is not None}
    return {"_from_model_config": True, **found}


def _common(backbone, experts, dtype):
    theta = float(backbone.rope_max_wavelength)
    return {
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "num_experts_per_tok": experts["top_k"],
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "rope_theta": theta,
        "hidden_act": "silu",
        "max_position_embeddings": _POSITIONS,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "router_aux_loss_coef": experts["load_balance_loss"],
        "output_router_logits": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _mixtral(backbone, experts):
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": experts["intermediate_dim"],
        "num_local_experts": experts["num_experts"],
        # A Llama looks at everything.
        "sliding_window": getattr(backbone, "sliding_window", None),
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
    }


def _qwen3_moe(backbone, experts):
    window = backbone.sliding_window_size
    used = window is not None and window < _POSITIONS
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": backbone.head_dim,
        "intermediate_size": backbone.intermediate_dim,
        "moe_intermediate_size": experts["intermediate_dim"],
        "num_experts": experts["num_experts"],
        "norm_topk_prob": experts["normalize"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [
            number
            for number, block in enumerate(backbone.transformer_layers)
            if not sparse_blocks.is_sparse(block)
        ],
        "attention_bias": False,
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "max_window_layers": 0 if used else backbone.num_layers,
        "tie_word_embeddings": bool(backbone.tie_word_embeddings),
    }


_OF_TARGET = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe}


def _tokens(tokenizer):
    return {
        f"{short}_token_id": getattr(tokenizer, f"{name}_token_id", None)
        for short, name in (("bos", "start"), ("eos", "end"), ("pad", "pad"))
    }

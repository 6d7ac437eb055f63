"""`export_model` and `can_export`: what users call."""

import os
from collections.abc import Mapping
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.export import reasons
from keras_upcycle.export.reasons import HUGGING_FACE, ExportCheck
from keras_upcycle.export.to_hugging_face import to_hugging_face
from keras_upcycle.export.to_keras_hub import to_keras_hub


def can_export(
    model: keras.Model,
    format: str = HUGGING_FACE,
    *,
    target: str | None = None,
    untie_embeddings: bool = False,
) -> ExportCheck:
    """Whether `export_model` would take a model, and if not, all reasons.

    Args:
        model: A Keras model, what `upcycle_model` or `adopt_model` made.
        format: String, `"hugging_face"` (default) or `"keras_hub"`.
        target: String or `None`, the kind of mixture; `None` (default) takes
            the one that suits the model. See `export_model`.
        untie_embeddings: Boolean, whether tied embeddings may be written
            twice. Defaults to `False`.

    Returns:
        An `ExportCheck`, true if it can be; `print` shows the reasons.

    Raises:
        TypeError, ValueError: For a bad argument.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(8),
        ... ])
        >>> bool(can_export(keras_upcycle.upcycle_model(dense, 2)))
        False
    """
    untie_embeddings = checks.check_flag("untie_embeddings", untie_embeddings)
    return reasons.check(model, format, target, untie_embeddings)


def export_model(
    model: keras.Model,
    format: str,
    folder: str | os.PathLike | None = None,
    *,
    target: str | None = None,
    dtype: str | None = None,
    untie_embeddings: bool = False,
    max_shard_size: float | str = 5.0,
    config: Mapping[str, Any] | None = None,
) -> keras.Model | None:
    """A sparse model for those who know nothing of this package.

    `"keras_hub"`: a stock mixture of KerasHub with the same weights. What
    `adopt_model` took goes back to its own class, exactly; a sparse Llama or
    Mistral becomes a Mixtral, a sparse Qwen3 a Qwen3-MoE.

    `"hugging_face"`: a folder that `transformers`, vLLM and KerasHub load:
    weights as `safetensors` shards with their index, `config.json`,
    `generation_config.json`, and the tokenizer where the model has one. The
    folder appears whole or not at all.

    A router's `temperature`, of which the formats know nothing, is divided into
    its kernel, as it is now where a schedule gives it: predictions stay.

    Args:
        model: A Keras model, what `upcycle_model` or `adopt_model` made, built,
            a backbone of KerasHub or a causal language model. Not changed.
        format: String, `"keras_hub"` or `"hugging_face"`.
        folder: Path that does not exist yet, in a folder that does; for
            `"hugging_face"` alone. Defaults to `None`.
        target: String, the kind of mixture: `"mixtral"`, `"qwen3_moe"`,
            `"qwen2_moe"`, `"qwen3_5_moe"`, `"gpt_oss"`, `"gemma4"`, the last
            four for their own adopted models. `None` (default) takes the one
            that suits the model.
        dtype: String, of the files' weights, such as `"bfloat16"`; for
            `"hugging_face"` alone. `None` (default) keeps that of the model.
        untie_embeddings: Boolean, whether a model that uses its embeddings for
            logits too may be written with both apart, for a target that has
            them so: the same function, one matrix more. Defaults to `False`.
        max_shard_size: Float, above 0, in units of 10^9 bytes, or a string such
            as `"500MB"`: the largest file of weights. Defaults to 5.
        config: Mapping or `None`: entries of `config.json` that a model does
            not know, such as `{"max_position_embeddings": 4096}`. What
            describes the weights cannot be changed. Defaults to `None`.

    Returns:
        For `"keras_hub"` the model, a task where `model` is one; else `None`.

    Raises:
        TypeError, ValueError: For a bad argument.
        FileExistsError: If `folder` exists: nothing is overwritten.
        ImportError: If `safetensors` is not installed.
        UpcycleError: If the format cannot say what the model is, with all
            reasons and what would allow each; `can_export` tells beforehand.

    Example:
        >>> dense = keras_hub.models.LlamaBackbone(
        ...     vocabulary_size=32, num_layers=2, num_query_heads=2,
        ...     num_key_value_heads=2, hidden_dim=8, intermediate_dim=16,
        ... )
        >>> moe = keras_upcycle.upcycle_model(dense, 4, target="mixtral")
        >>> type(export_model(moe, "keras_hub")).__name__
        'MixtralBackbone'
    """
    untie_embeddings = checks.check_flag("untie_embeddings", untie_embeddings)
    found = reasons.require(model, format, target, untie_embeddings)
    if format == HUGGING_FACE:
        to_hugging_face(
            model,
            found,
            folder,
            dtype=dtype,
            max_shard_size=max_shard_size,
            config=config,
        )
        return None
    for name, value in (("folder", folder), ("dtype", dtype)):
        if value is not None:
            raise ValueError(
                f"`{name}` is for format='hugging_face'. Received: "
                f"{name}={value!r} with format={format!r}. Save what is "
                "returned with `save_to_preset`."
            )
    return to_keras_hub(model, found)

"""A sparse model as a folder that `transformers` loads."""

import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_upcycle import atomic_files, checks
from keras_upcycle.conversion import targets
from keras_upcycle.conversion.targets import Target
from keras_upcycle.export import (
    epsilons,
    hugging_face_config,
    hugging_face_tokenizer,
)
from keras_upcycle.export.hugging_face_names import Tensor, tensors
from keras_upcycle.families.keras_hub_family import backbone_of
from keras_upcycle.layers import moe_layers
from keras_upcycle.training import progress

_DTYPES = ("float32", "bfloat16", "float16")
_GB = 10**9


def to_hugging_face(
    model: keras.Model,
    target: Target,
    folder: Any,
    *,
    dtype: str | None,
    max_shard_size: float | str,
    config: Mapping[str, Any] | None,
) -> None:
    """Writes the folder; see `export_model` for the arguments."""
    place = _checked_folder(folder)
    if dtype is not None:
        dtype = checks.check_choice("dtype", dtype, _DTYPES)
    if isinstance(max_shard_size, str):
        size = checks.check_bytes("max_shard_size", max_shard_size) / 1e9
    else:
        size = checks.check_factor("max_shard_size", max_shard_size)
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(
            "Folders of Hugging Face are written with `safetensors`, which is "
            "not installed. Run `pip install safetensors`."
        )
    backbone = backbone_of(model)
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    alike = targets.settings_of(moe_layers.moe_layers_in(backbone)[0])
    found = list(tensors(backbone, target))
    written = dtype or found[0].dtype
    described = hugging_face_config.of_model(
        backbone, target, alike, written, tokenizer, config
    )
    epsilons.say(epsilons.of_heads(backbone), {backbone.layer_norm_epsilon})
    vocabulary = hugging_face_tokenizer.files(tokenizer)
    with atomic_files.Staged(place) as staged:
        staged.place.mkdir()
        _write_weights(staged.place, found, dtype, size * _GB)
        _write_json(staged.place / "config.json", described)
        _write_json(
            staged.place / "generation_config.json",
            hugging_face_config.of_generation(tokenizer),
        )
        for name, content in vocabulary.items():
            (staged.place / name).write_bytes(content)
        staged.keep()


def _checked_folder(folder):
    if folder is None:
        raise ValueError(
            "`folder` must say where to write. Received: folder=None with "
            "format='hugging_face'. Pass a path that does not exist yet."
        )
    checks.check_instance("folder", folder, str | os.PathLike, "a path")
    place = pathlib.Path(folder)
    if os.path.lexists(place):
        raise FileExistsError(
            f"`folder` must not exist: nothing is overwritten. Received: "
            f"folder={str(folder)!r}, which does. Choose another name."
        )
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"`folder` must be in a folder that exists. Received: "
            f"folder={str(folder)!r}, and {str(place.parent)!r} does not. Make "
            "it first."
        )
    return place


def _write_weights(place, found, dtype, largest):
    from safetensors.numpy import save_file

    shards = _shards(found, dtype, largest)
    total = sum(_bytes(each, dtype) for each in found)
    single = len(shards) == 1
    index = {}
    with progress.bytes_written("Writing weights", total) as step:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if not single:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            arrays = {}
            for each in shard:
                arrays[each.name] = _array(each, dtype)
                index[each.name] = name
                step(_bytes(each, dtype))
            save_file(arrays, place / name, metadata={"format": "pt"})
    if not single:
        _write_json(
            place / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _shards(found: list[Tensor], dtype, largest) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for each in found:
        size = _bytes(each, dtype)
        if shards[-1] and held + size > largest:
            shards.append([])
            held = 0
        shards[-1].append(each)
        held += size
    return shards


def _bytes(tensor, dtype):
    return (
        math.prod(tensor.shape) * _numpy_dtype(dtype or tensor.dtype).itemsize
    )


def _array(tensor, dtype):
    array = tensor.read().astype(_numpy_dtype(dtype or tensor.dtype))
    return np.ascontiguousarray(array)


def _numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes  # Keras needs it, too

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

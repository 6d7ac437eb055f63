"""Reads and writes models, whichever of their three forms they are in."""

import hashlib
import json
import pathlib
import warnings
import zipfile
from typing import Any

import keras
import keras_hub
import numpy as np

# What a file may name: the command's own process imports nothing unasked.
import keras_upcycle.methods
import keras_upcycle.training.schedules  # noqa: F401
from keras_upcycle import keras_internals
from keras_upcycle.cli import paths
from keras_upcycle.conversion import compile_settings

# What may lie beside a backbone in a preset, in an order in which a later one
# may write an earlier one again.
_BESIDE = ("tokenizer.json", "image_converter.json", "preprocessor.json")


def load(
    source: paths.Source, dtype: str | None = None, compile: bool = False
) -> keras.Model:
    """The model: of a preset the task where it holds one, else the backbone.

    Args:
        source: Where it is.
        dtype: A dtype policy, for presets.
        compile: Whether a `.keras` file's model is compiled as it was.

    Raises:
        ValueError: For a policy that does not exist, or one for a file.
        OSError: If it cannot be read; says why.
    """
    given = {}
    if dtype is not None:
        if source.kind == paths.FILE:
            raise ValueError(
                "`--dtype` is for presets; a .keras file keeps the policies "
                f"of its layers. Received: --dtype {dtype} for "
                f"{source.place!r}. Save the model as a preset first."
            )
        given["dtype"] = keras.dtype_policies.get(dtype).name
    try:
        if source.kind == paths.FILE:
            return _load_file(source.place, compile)
        task = keras_internals.preset_class(source.place, "task.json")
        return (task or keras_hub.models.Backbone).from_preset(
            source.place, **given
        )
    except Exception as error:  # a broken file or a network fails in any way
        kind = "preset" if source.kind == paths.NAME else source.kind
        raise OSError(
            f"Cannot read the {kind} {source.place!r}: "
            f"{type(error).__name__}: {error}{_hint(source)}"
        ) from error


def beside(source: paths.Source, model: keras.Model) -> list[Any]:
    """Tokenizer, image converter and preprocessor of a backbone's preset.

    A task owns them; beside a backbone they are the preset's alone, and would
    be lost if the backbone were saved alone.
    """
    if source.kind == paths.FILE or not isinstance(
        model, keras_hub.models.Backbone
    ):
        return []
    found = [keras_internals.preset_class(source.place, f) for f in _BESIDE]
    return [part.from_preset(source.place) for part in found if part]


def check_form(model: keras.Model, path: pathlib.Path) -> None:
    """Raises `ValueError` if the model cannot be saved in the output's form."""
    if path.suffix != paths.KERAS and not hasattr(model, "save_to_preset"):
        raise ValueError(
            "Only KerasHub models can be written as a preset folder. "
            f"Received: {path.name!r} for a {type(model).__name__}. Write "
            f"{path.name + paths.KERAS!r} instead."
        )


def save(model: keras.Model, path: pathlib.Path, parts: list[Any]) -> None:
    """Writes a `.keras` file, or a preset with what lay beside the model."""
    if path.suffix == paths.KERAS:
        for part in parts:
            warnings.warn(
                f"The preset's {type(part).__name__} is not kept: a .keras "
                "file of a backbone has no place for it. Write a preset "
                "folder to keep it."
            )
        model.save(path)
        return
    for part in (model, *parts):
        part.save_to_preset(str(path))


def digests(model: keras.Model) -> list[bytes]:
    """One for each weight, to compare with when the model is gone."""
    return [_digest(variable) for variable in model.weights]


def changed(model: keras.Model, expected: list[bytes]) -> list[str]:
    """Paths of weights that differ in any bit from those of another model.

    Args:
        model: Of the same structure.
        expected: What `digests` gave for the other one.
    """
    weights = model.weights
    if len(weights) != len(expected):
        return [variable.path for variable in weights]
    return [
        variable.path
        for variable, digest in zip(weights, expected, strict=True)
        if _digest(variable) != digest
    ]


def _digest(variable):
    value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value))
    digest = hashlib.blake2b(f"{variable.dtype} {value.shape}".encode())
    digest.update(value.reshape(-1).view(np.uint8))
    return digest.digest()


def _load_file(path, compile):
    model = keras.models.load_model(path, compile=False)
    config = _compile_config(path) if compile else None
    if config is None:
        return model
    try:
        # Not by Keras, which reads all or nothing, and nothing of a task's.
        arguments, left_out = compile_settings.read(config)
        model.compile(**arguments)
    except Exception as error:  # a loss of the user's own, perhaps
        model.compiled = False  # a task has compiled itself
        left_out = [
            "The compile settings could not be read and are left out "
            f"({type(error).__name__}: {error}). Call `compile` on the result "
            "before training."
        ]
    for line in left_out:
        warnings.warn(line, stacklevel=2)
    return model


def _compile_config(path):
    """What a `.keras` file says of `compile`; `None` if it says nothing."""
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("config.json")).get("compile_config")


def _hint(source):
    if source.kind == paths.NAME and "://" not in source.place:
        here = pathlib.Path(source.place).absolute()
        return f" (No file or folder of that name either: {here}.)"
    return ""

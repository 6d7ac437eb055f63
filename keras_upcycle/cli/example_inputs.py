"""Inputs for a model: made up from its own specification, or read."""

from typing import Any

import keras
import numpy as np
from keras import tree

from keras_upcycle import families, keras_internals

BATCH = 4
LENGTH = 32
# Of positions, up to which a sequence has as many as there are.
MOST = 128
# Ends of names of inputs that hold small numbers and no words of a vocabulary.
_FEW = ("segment_ids", "positions", "indices")


def get(model: keras.Model, path: str | None) -> Any:
    """What `--inputs` gives, or made-up inputs where that is `None`.

    The model is tried on them: what it cannot take is better known before a
    long conversion than after it.

    Raises:
        ValueError: If there are none, or the model cannot take them.
    """
    inputs = make(model) if path is None else read(model, path)
    families.family_of(model).check_inputs(model, inputs)
    try:
        model(inputs, training=False)
    except Exception as error:  # each backend has its own
        raise ValueError(
            f"{model.name!r} cannot be run on the inputs "
            f"{'made up' if path is None else 'read'} for it: "
            f"{type(error).__name__}: {error} Pass others with `--inputs`."
        ) from error
    return inputs


def make(model: keras.Model) -> Any:
    """A small batch in the structure of the model's inputs, always the same.

    Floats are normal. Of token ids and masks each example is a bit shorter
    than the one before and ends in padding, id 0. An axis without a size has
    32 elements.

    Raises:
        ValueError: For an input whose values nobody could guess.
    """
    rng = np.random.default_rng(0)
    return tree.map_structure(
        lambda tensor: _values(model, tensor, rng), _specification(model)
    )


def read(model: keras.Model, path: str) -> Any:
    """Inputs from a `.npz` file: an array for each input, by its name.

    A model of one input takes the only array of the file, whatever its name.

    Raises:
        ValueError: If the file does not hold what the model takes.
    """
    specification = _specification(model)
    names = [name for name, _ in _named(specification)]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # other formats fail in other ways
        raise ValueError(
            "`--inputs` must be a NumPy file of arrays, written with "
            f"`numpy.savez`. Received: {path!r}, which cannot be read: {error}"
        ) from error
    if len(names) == len(arrays) == 1:
        arrays = dict.fromkeys(names, *arrays.values())
    if sorted(names) != sorted(arrays):
        raise ValueError(
            f"`--inputs` must hold an array for each of the inputs {names}. "
            f"Received: {path!r} with {sorted(arrays)}."
        )
    for name, tensor in _named(specification):
        _check_shape(name, tensor, arrays[name])
    return tree.pack_sequence_as(specification, [arrays[n] for n in names])


def _specification(model):
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    try:
        return model.input
    except AttributeError:
        raise ValueError(
            "A model must say what inputs it takes, as a functional model "
            f"does. Received: {model.name!r} ({type(model).__name__}), which "
            "does not. Put it into a functional model and save that."
        ) from None


def _named(specification):
    """`(name, tensor)` of each input, in the structure's own order."""
    return [
        (
            path[-1] if path and isinstance(path[-1], str) else tensor.name,
            tensor,
        )
        for path, tensor in tree.flatten_with_path(specification)
    ]


def _check_shape(name, tensor, array):
    expected = tuple(tensor.shape)
    same = len(expected) == array.ndim and all(
        size in (None, given)
        for size, given in zip(expected, array.shape, strict=True)
    )
    if not same:
        raise ValueError(
            f"`--inputs` must hold {name!r} of shape {expected}, where None "
            f"is any size. Received: {array.shape}."
        )


def _values(model, tensor, rng):
    first, *rest = tensor.shape
    length = _length(model)
    shape = (first or BATCH, *(size or length for size in rest))
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if keras.backend.is_float_dtype(dtype):
        # NumPy has no bfloat16; Keras casts what it is called on.
        return rng.normal(size=shape).astype("float32")
    real = _real(shape)
    if tensor.name.endswith(_FEW):
        return np.zeros(shape, dtype)
    if dtype == "bool" or "mask" in tensor.name:
        return real.astype(dtype)
    vocabulary = _vocabulary(model)
    if not keras.backend.is_int_dtype(dtype) or vocabulary is None:
        raise ValueError(
            f"No values can be made up for the input {tensor.name!r} of dtype "
            f"{dtype} and shape {tuple(tensor.shape)}. Pass some with "
            "`--inputs file.npz`."
        )
    ids = rng.integers(min(1, vocabulary - 1), vocabulary, size=shape)
    return np.where(real, ids, 0).astype(dtype)


def _length(model):
    """How long a sequence is that all of the model's positions allow.

    Where they are few, exactly that many: SigLIP takes no fewer.
    """
    said = [
        getattr(layer, "sequence_length", None)
        for layer in keras_internals.all_layers(model)
    ]
    most = min((size for size in said if isinstance(size, int)), default=None)
    return LENGTH if most is None or most > MOST else most


def _real(shape):
    """Bool, of the shape: the last axis ends in ever more padding."""
    batch, length = shape[0], shape[-1]
    lengths = length - np.arange(batch) * length // (2 * batch)
    real = np.arange(length) < lengths[:, None]
    between = (1,) * (len(shape) - 2)
    return np.broadcast_to(real.reshape(batch, *between, length), shape)


def _vocabulary(model):
    """How many ids every embedding of the model knows; `None` without any."""
    layers = keras_internals.all_layers(model)
    said = [getattr(layer, "vocabulary_size", None) for layer in layers]
    # A tokenizer's is a method; the model's own number is what counts.
    sizes = [size for size in said if isinstance(size, int)] or [
        layer.input_dim
        for layer in layers
        if isinstance(layer, keras.layers.Embedding)
    ]
    return min(sizes, default=None)

"""What low-rank experts learned, in a small file of its own."""

import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_upcycle import atomic_files, checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import named_mixtures


def save_adapters(moe: keras.Model, path: str | os.PathLike) -> int:
    """Writes the low-rank differences and routers of a sparse model.

    A NumPy archive, whole or not at all: of a model of 2 x 10^9 parameters some
    megabytes. `load_adapters` reads it into a model made as this one was.

    Args:
        moe: A Keras model with low-rank experts.
        path: Path that ends in `.npz`. A file that is there is replaced.

    Returns:
        How many parameters were written.

    Raises:
        TypeError: If `moe` is no Keras model, or `path` no path.
        ValueError: If `path` does not end in `.npz`.
        UpcycleError: If `moe` has no low-rank experts.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, experts=keras_upcycle.LowRankExperts(rank=2)
        ... )
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapters.npz"
        >>> save_adapters(moe, path), load_adapters(moe, path)
        (416, 416)
    """
    variables = _variables(moe)
    place = _checked_path(path)
    arrays = {
        name: ops.convert_to_numpy(ops.cast(variable.value, "float32"))
        for name, variable in variables.items()
    }

    def write(draft):
        with open(draft, "wb") as file:
            np.savez(file, **arrays)

    atomic_files.replace(place, write)
    return sum(array.size for array in arrays.values())


def load_adapters(moe: keras.Model, path: str | os.PathLike) -> int:
    """Reads what `save_adapters` wrote; all of it or nothing.

    Args:
        moe: A Keras model with low-rank experts of the same blocks, number and
            rank.
        path: Path of the file.

    Returns:
        How many parameters were read.

    Raises:
        TypeError: If `moe` is no Keras model, or `path` no path.
        FileNotFoundError: If there is no file.
        ValueError: If the file is of another model, or none of ours.
        UpcycleError: If `moe` has no low-rank experts.

    Example:
        See `save_adapters`.

        >>> load_adapters.__name__
        'load_adapters'
    """
    variables = _variables(moe)
    place = _checked_path(path)
    try:
        with np.load(place) as archive:
            found = {name: archive[name] for name in archive.files}
    except (ValueError, OSError) as error:
        if not place.exists():
            raise FileNotFoundError(
                f"`path` must be a file. Received: {str(path)!r}, where there "
                "is none."
            ) from error
        raise ValueError(
            f"`path` must be what `save_adapters` wrote. Received: "
            f"{str(path)!r}, which cannot be read: {error}."
        ) from error
    wrong = sorted(set(found) ^ set(variables)) or [
        f"{name} of shape {found[name].shape} for {tuple(variable.shape)}"
        for name, variable in variables.items()
        if found[name].shape != tuple(variable.shape)
    ]
    if wrong:
        raise ValueError(
            "Adapters must come from a model with the same blocks, number of "
            f"experts and rank. Received: {str(path)!r} for {moe.name!r}, "
            f"which do not agree about {wrong[:4]}. Nothing was changed. Load "
            "them into a model made as theirs was."
        )
    for name, variable in variables.items():
        variable.assign(found[name])
    return sum(array.size for array in found.values())


def _variables(moe):
    """By a name that holds in every model made alike."""
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    found = {}
    for name, layer in named_mixtures(moe).items():
        if layer.low_rank is None:
            continue
        for number, variable in enumerate(layer.router.weights):
            found[f"{name}/router/{number}"] = variable
        for role, projection in layer.experts.projections.items():
            found[f"{name}/{role}/a"] = projection.lora_a
            found[f"{name}/{role}/b"] = projection.lora_b
    if not found:
        raise UpcycleError(
            "`moe` must hold low-rank experts. Received: "
            f"{moe.name!r} with none. `save_weights` writes whole ones."
        )
    return found


def _checked_path(path):
    checks.check_instance("path", path, str | os.PathLike, "a path")
    place = pathlib.Path(path)
    if place.suffix != ".npz":
        raise ValueError(
            f"`path` must end in .npz. Received: path={str(path)!r}."
        )
    return place

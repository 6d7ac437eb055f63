"""A demo's last check: the sparse model, saved and loaded."""

import pathlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import atomic_files


def and_loaded(model: keras.Model, path: pathlib.Path, inputs: Any) -> str:
    """Saves a model, loads it again, and says how far the two are apart.

    Args:
        model: Gives logits.
        path: Of the `.keras` file.
        inputs: What both are called on.
    """
    atomic_files.replace(path, model.save)
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    loaded = keras.models.load_model(path, compile=False)
    outputs = [
        ops.convert_to_numpy(each(inputs, training=False))
        for each in (model, loaded)
    ]
    difference = float(np.max(np.abs(outputs[0] - outputs[1])))
    return (
        "Saved and loaded again: largest difference of the logits "
        f"{difference:.1e}."
    )

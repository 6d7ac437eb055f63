"""A run on several devices goes on from what `OrbaxCheckpoint` saved."""

import os
import pathlib

import keras

from keras_upcycle import checks, keras_internals


def load_checkpoint(model: keras.Model, directory: str | os.PathLike) -> int:
    """Restores the latest checkpoint, onto whatever mesh there is now.

    Weights, the optimizer's memory and the seeds of all layers, each process
    its own part; the mesh may be another than the one that saved, and the
    processes fewer or more. `keras.callbacks.OrbaxCheckpoint` only saves; what
    it needs besides to load is looked at first:

    - the folder is absolute, one that all processes see;
    - a distribution is set, on one device too, or Orbax looks for the devices
      that saved;
    - the optimizer and the metrics have their variables, for which one
      `model.train_on_batch(x, y)` before is enough: what it changes is
      restored.

    Variables are found by name, and Keras counts names: build the model as the
    process that saved did, and once.

    Args:
        model: A Keras model, compiled, made as the saved one was.
        directory: Path of the folder that the callback was given.

    Returns:
        The number of epochs that are done, for `fit(initial_epoch=)`, where the
        callback saved at the end of epochs.

    Raises:
        TypeError: If `model` is no Keras model, or `directory` no path.
        ValueError: For each of the three above, by name; and if there is no
            checkpoint in the folder.

    Example:
        ```python
        moe.train_on_batch(*data[0])
        done = ku.distribution.load_checkpoint(moe, "/shared/run")
        moe.fit(data, epochs=10, initial_epoch=done, callbacks=[
            keras.callbacks.OrbaxCheckpoint("/shared/run"),
        ])
        ```
    """
    checks.check_instance("model", model, keras.Model, "a Keras model")
    checks.check_instance("directory", directory, str | os.PathLike, "a path")
    folder = pathlib.Path(directory)
    if not folder.is_absolute():
        raise ValueError(
            "`directory` must be absolute: every process must mean the same "
            f"folder. Received: directory={str(directory)!r}. Pass "
            f"{str(folder.absolute())!r}, if all processes see that."
        )
    steps = [int(f.name) for f in folder.glob("*") if f.name.isdigit()]
    if not steps:
        raise ValueError(
            "`directory` must hold a checkpoint of "
            "`keras.callbacks.OrbaxCheckpoint`, a folder with a number for a "
            f"name. Received: {str(folder)!r}, which has none. Give the path "
            "that the callback was given."
        )
    if keras.backend.backend() == "jax" and (
        keras.distribution.distribution() is None
    ):
        raise ValueError(
            "A distribution must be set, on one device too, or Orbax looks for "
            "the devices that saved. Received: none. Call "
            "`keras.distribution.set_distribution` before the model is made; "
            "`keras.distribution.DataParallel()` does."
        )
    lacking = keras_internals.not_built_for_training(model)
    if lacking:
        raise ValueError(
            "The optimizer and the metrics must have their variables before "
            f"they are restored. Received: model {model.name!r} without those "
            f"of its {' and '.join(lacking)}. Call `model.train_on_batch(x, "
            "y)` once before; what it changes is restored."
        )
    model.load_weights(folder)
    return max(steps) + 1

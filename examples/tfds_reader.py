"""Data of TensorFlow Datasets, with errors that say what to do."""

import pathlib

import numpy as np


def load(
    name: str, split: str, data_dir: str | None = None
) -> dict[str, np.ndarray]:
    """A whole split as NumPy arrays.

    Args:
        name: Of the dataset, such as `"cifar10"` or `"glue/sst2"`.
        split: Such as `"train"` or `"test[:100]"`.
        data_dir: Folder that holds the dataset; `None` downloads to TFDS's
            own folder.

    Returns:
        A dictionary of arrays.
    """
    folder = name.partition("/")[0]
    if data_dir and not pathlib.Path(data_dir, folder).is_dir():
        raise FileNotFoundError(
            f"`--data-dir` must be a folder that holds TFDS's `{folder}`. "
            f"Received: --data-dir={data_dir}, which has no folder `{folder}`. "
            "Leave the option out to download the data to TFDS's own folder."
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "TensorFlow Datasets is missing. Install it with "
            "`pip install tensorflow-datasets`."
        ) from error
    try:
        loaded = tfds.load(
            name,
            split=split,
            data_dir=data_dir,
            batch_size=-1,
            download=data_dir is None,
        )
    except Exception as error:  # no network, no space, a broken file
        raise OSError(
            f"{name} could not be loaded ({type(error).__name__}: {error}). "
            "Without a network, give `--data-dir` a folder that holds TFDS's "
            f"`{folder}`."
        ) from error
    return tfds.as_numpy(loaded)

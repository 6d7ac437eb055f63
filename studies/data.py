"""The text that a study learns."""

import pathlib

import tfds_reader

from keras_upcycle.demo import sources

TFDS = "tfds:"


def read(name: str | None, data_dir: str | None = None) -> sources.Text:
    """A text file, a folder, `tfds:NAME`, or else Python's own library.

    Args:
        name: Which.
        data_dir: Folder with data that TensorFlow Datasets prepared; `None`
            downloads them.

    Raises:
        OSError: If there is no text.
        ImportError: If TensorFlow Datasets is needed and missing.
    """
    if name is None:
        return sources.standard_library()
    if not name.startswith(TFDS):
        return sources.folder(pathlib.Path(name))
    name = name.removeprefix(TFDS)
    examples = tfds_reader.load(name, "all", data_dir)
    texts = [part for part in examples.values() if part.dtype.kind in "OS"]
    if not texts:
        raise OSError(
            f"A set with a feature of text is needed. Received: {name!r}, "
            f"whose features are {sorted(examples)}. Choose another."
        )
    return sources.one_text(b"\n".join(texts[0].tolist()), name)

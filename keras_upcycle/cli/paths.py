"""Where models are read from and written to, and what is checked there."""

import os
import pathlib
import re
import shutil
from dataclasses import dataclass

from keras_upcycle import tables

KERAS = ".keras"
FILE, FOLDER, NAME = "file", "folder", "name"


@dataclass(frozen=True)
class Source:
    """A model to read.

    Attributes:
        place: A path, or a preset's name, as KerasHub takes it.
        kind: `"file"` (`.keras`), `"folder"` (a preset) or `"name"`.
    """

    place: str
    kind: str


def source(text: str) -> Source:
    """What the user means by a model.

    A path is never sent to KerasHub as a name: a typing error is no reason to
    ask the network.

    Raises:
        ValueError: For a path to something else.
        FileNotFoundError: For a path to nothing.
    """
    # Absolute, so that a folder is not taken for a built-in preset's name.
    path = pathlib.Path(text).expanduser().absolute()
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = sorted(inner.name for inner in path.iterdir())
            raise ValueError(
                "A model's folder must be a KerasHub preset, which holds a "
                f"config.json. Received: {text!r}, which holds "
                f"{', '.join(held[:8]) or 'nothing'}. Write one with "
                "`model.save_to_preset(folder)`."
            )
        return Source(str(path), FOLDER)
    if path.exists():
        if path.suffix != KERAS:
            raise ValueError(
                "A model's file must be a .keras file. Received: "
                f"{text!r}. Save the model with `model.save('name.keras')`."
            )
        return Source(str(path), FILE)
    marks = [mark for mark in (os.sep, os.altsep) if mark]
    is_path = path.suffix == KERAS or text.startswith((".", "~"))
    if is_path or ("://" not in text and any(mark in text for mark in marks)):
        raise FileNotFoundError(
            "A model must be a .keras file, a preset folder or the name of a "
            f"KerasHub preset. Received: {text!r}; as a path it is {path}, "
            "where there is nothing."
        )
    return Source(text, NAME)


def check_inputs(text: str | None) -> None:
    """Raises unless the file of `--inputs` can be one."""
    if text is None:
        return
    if not pathlib.Path(text).is_file():
        raise FileNotFoundError(
            "`--inputs` must be a NumPy file of arrays, written with "
            f"`numpy.savez`. Received: {text!r}, where there is no file."
        )


def output(text: str) -> pathlib.Path:
    """Where a model may be written: to a new name in a folder that exists.

    Raises:
        FileExistsError: If there is anything of that name.
        OSError, ValueError: If nothing could be written there.
    """
    path = pathlib.Path(text).expanduser().absolute()
    if os.path.lexists(path):
        raise FileExistsError(
            "The output must not exist yet; nothing is ever overwritten. "
            f"Received: {text!r}, which does. Choose another name, or remove "
            "it first."
        )
    if path.suffix in (".h5", ".hdf5"):
        raise ValueError(
            "The output must be a .keras file or a preset folder. Received: "
            f"{text!r}, the name of an HDF5 file."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            "The output's folder must exist. Received: "
            f"{text!r}, and there is no folder {path.parent}. Make it first."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(
            "The output's folder must be writable. Received: "
            f"{text!r} in {path.parent}, which is not. Write elsewhere."
        )
    return path


def beside(text: str) -> tuple[pathlib.Path, str]:
    """Where an output's unfinished selves are, and what they are called.

    Returns:
        As `unfinished.clean` takes it.
    """
    path = pathlib.Path(text).expanduser().absolute()
    return path.parent, re.escape(path.name)


def check_space(path: pathlib.Path, size: int) -> None:
    """Raises `OSError` unless so many bytes fit beside the output."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"The output takes {tables.size(size)}, and {path.parent} has "
            f"{tables.size(free)} free. Make room, or write elsewhere."
        )


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())

"""Text that every machine has: the sources of Python's standard library.

Bytes are the tokens; all that are not ASCII are one token. Whole files are held
out, by a hash of their names, so that no text occurs on both sides and another
version of Python splits the same way.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable

import numpy as np

VOCABULARY = 128
OTHER = VOCABULARY - 1  # what is not ASCII
END = 0  # between two files
# Not the library itself, or not the same from one installation to the next.
LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "__pycache__",
        "ensurepip",
        "turtledemo",
    }
)
SHARES = 20
PIECES = 400  # of a text that is one file
LEAST = 1 << 12  # bytes of a part, and of a piece
HELD_OUT = {0: "validation", 1: "test"}  # of the shares


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens in three parts that share no file.

    Attributes:
        train: uint8 `(N,)`.
        validation: The same, to choose settings by.
        test: The same, for the figures that are told.
        name: What it is, in words.
        files: How many files there are in all.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    name: str
    files: int


def standard_library() -> Text:
    """The sources of the Python that runs, without its tests.

    Raises:
        FileNotFoundError: If this Python came without sources.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts)
    ]
    if len(files) < SHARES:
        raise FileNotFoundError(
            f"The sources of Python's standard library should lie in {root}. "
            f"Received: {len(files)} files there. Use a Python that comes "
            "with them."
        )
    version = sysconfig.get_python_version()
    return split(files, root, f"Python {version}'s standard library")


def folder(path: pathlib.Path, pattern: str = "*") -> Text:
    """Text of your own: the files of a folder, or the parts of one file.

    Args:
        path: A folder, all whose files that match are read; or a file, whose
            pieces are shared out like files.
        pattern: Which files of a folder.

    Raises:
        FileNotFoundError: If there is nothing to read.
    """
    if path.is_file():
        return one_text(path.read_bytes(), path.name)
    files = [file for file in path.rglob(pattern) if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"Expected a text file, or a folder with files {pattern!r}. "
            f"Received: {path}, which has none. Pass another path."
        )
    return split(files, path, path.name)


def one_text(content: bytes, name: str) -> Text:
    """A text without files: its pieces are shared out like files.

    Args:
        content: In UTF-8.
        name: Of the text.
    """
    size = max(len(content) // PIECES, LEAST)
    starts = range(0, len(content), size)
    return _shared_out(
        (
            (str(start // size), content[start : start + size])
            for start in starts
        ),
        name,
    )


def split(files: Iterable[pathlib.Path], root: pathlib.Path, name: str) -> Text:
    """Reads files and shares them out by a hash of their names below `root`.

    Args:
        files: Paths.
        root: Folder that is left out of the names.
        name: Of the text.
    """
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    return _shared_out(((key, file.read_bytes()) for key, file in named), name)


def _shared_out(pieces, name):
    parts = {"train": [], "validation": [], "test": []}
    count = 0
    for key, content in pieces:
        digest = int(hashlib.sha1(key.encode()).hexdigest(), 16)
        part = HELD_OUT.get(digest % SHARES, "train")
        parts[part].append(content)
        count += 1
    arrays = {}
    for part, contents in parts.items():
        raw = np.frombuffer(bytes([END]).join(contents), "uint8")
        arrays[part] = np.minimum(raw, OTHER)
    short = [part for part, array in arrays.items() if len(array) < LEAST]
    if short:
        raise FileNotFoundError(
            "Each part needs at least 4 KiB of text. Received: "
            f"{name!r}, of which {short} have less. Pass more files."
        )
    return Text(**arrays, name=name, files=count)

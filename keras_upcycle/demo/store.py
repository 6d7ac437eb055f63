"""Finished runs on disk, and their results as one file."""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub

from keras_upcycle import atomic_files, version
from keras_upcycle.demo.results import Result


class Store:
    """Finished stages on disk: each a result and the trained weights.

    Args:
        folder: Made if it is missing.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def backup(self, key: str) -> pathlib.Path:
        """Where the unfinished stage `key` is backed up."""
        folder = self.folder / f"{key}.unfinished"
        folder.mkdir(exist_ok=True)
        return folder

    def load(self, key: str, model: keras.Model) -> Result | None:
        """The result of stage `key`, its weights put into `model`."""
        result = self.folder / f"{key}.json"
        if not result.exists():
            return None
        model.load_weights(self._weights(key))
        return Result(**read_json(result))

    def save(self, key: str, model: keras.Model, result: Result) -> None:
        """Keeps a finished stage; its backup goes."""
        model.save_weights(self._weights(key))
        write_json(self.folder / f"{key}.json", dataclasses.asdict(result))
        shutil.rmtree(self.backup(key))

    def _weights(self, key):
        return self.folder / f"{key}.weights.h5"


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that an interruption leaves the old file or the new."""
    text = json.dumps(content, indent=1) + "\n"
    atomic_files.replace(path, lambda draft: _write(draft, text))


def _write(draft, text):
    draft.write_text(text)


def read_json(path: pathlib.Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())


def write_results(
    path: pathlib.Path, results: Sequence[Result], **more: Any
) -> None:
    """Writes all figures of a comparison, and on what they were made.

    Args:
        path: Of the JSON file.
        results: Of all stages.
        **more: Other entries; a dataclass becomes a dictionary.
    """
    entries = {
        key: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for key, value in more.items()
    }
    made_on = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "keras_upcycle": version.__version__,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
    }
    write_json(
        path,
        {
            "made_on": made_on,
            **entries,
            "results": [dataclasses.asdict(result) for result in results],
        },
    )

"""The raw rows: one line of JSON for each finished run."""

import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import keras

# What makes a run another run; the rest of a row is what came of it.
KEY = (
    "study",
    "text",
    "arm",
    "seed",
    "extra_compute",
    "equal",
    "learning_rate",
    "checkpoint",
    "checkpoint_rate",
    "experts",
    "top_k",
    "layers",
    "router",
    "capacity_factor",
    "normalize",
    "load_balance_loss",
    "noise_stddev",
    "slots",
    "expert_init",
    "attention",
    "before",
    "width",
    "blocks",
    "backend",
)


class Rows:
    """The rows of a file; finished runs are known by their settings.

    Args:
        path: Of the file, made at the first row.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.all: list[dict[str, Any]] = read(path)
        self._known = {key_of(row): row for row in self.all}

    def find(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished run with the settings of `row`."""
        return self._known.get(key_of(row))

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a finished run."""
        whole = {**row, **made_on()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        self.all.append(whole)
        self._known[key_of(whole)] = whole


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All rows; a last line that was cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def key_of(row: Mapping[str, Any]) -> str:
    """A row's settings, as text."""
    return json.dumps([row.get(name) for name in KEY])


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values, or for which a function says so."""

    def holds(row, name, value):
        found = row.get(name)
        return value(found) if isinstance(value, Callable) else found == value

    return [
        row
        for row in rows
        if all(holds(row, name, value) for name, value in wanted.items())
    ]


def made_on() -> dict[str, Any]:
    """Versions and machine."""
    packages = ("keras", "keras-hub", keras.backend.backend(), "keras-upcycle")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }

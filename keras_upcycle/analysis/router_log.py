"""Readings of routers on disk, one a row, and as a table for people."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from keras_upcycle import atomic_files, checks, tables
from keras_upcycle.routing.statistics import RouterReading

_FLOATS = (
    "dropped",
    "unrouted",
    "entropy",
    "confidence",
    "weight",
    "weighted_loss",
)
COLUMNS = ("step", "layer", "steps", "tokens", *_FLOATS, "load", "losses")


def append(path: str | os.PathLike, readings: Iterable[RouterReading]) -> None:
    """Adds rows to a log, which is made where it is missing.

    A CSV file. `load` holds the experts' shares, separated by spaces, and
    `losses` pairs such as `load_balance=1.02`.

    Args:
        path: Of the log.
        readings: What to add.
    """
    path = pathlib.Path(path)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(_row(reading) for reading in readings)


def read(path: str | os.PathLike, name: str = "log") -> list[RouterReading]:
    """All readings of a log, in order.

    Args:
        path: Of the log.
        name: Of the argument that it was given as.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a log of `RouterMonitor`, or has a row that
            is cut short before its end.
    """
    checks.check_file(name, path, "`RouterMonitor(log=...)` writes one.")
    with pathlib.Path(path).open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(
            "A router log is a CSV file, written by `RouterMonitor(log=...)`, "
            f"with the columns {list(COLUMNS)}. Received: {path} with "
            f"{rows[0] if rows else 'nothing in it'}. Pass the path of such "
            "a log."
        )
    readings = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            readings.append(_reading(row))
        except ValueError as error:
            if number == len(rows):  # a killed run was writing it
                break
            raise ValueError(
                f"Each row of a router log has {len(COLUMNS)} entries, "
                f"numbers where the columns say so. Received: line {number} "
                f"of {path}: {row}. Remove the line."
            ) from error
    return readings


def cut(path: str | os.PathLike, step: int) -> None:
    """Removes what a log says of steps after `step`, which are done again."""
    if not pathlib.Path(path).exists():
        return
    kept = [reading for reading in read(path) if reading.step <= step]
    if kept:
        atomic_files.replace(path, lambda draft: append(draft, kept))
    else:
        pathlib.Path(path).unlink()


def summary(readings: Sequence[RouterReading]) -> str:
    """A table of the latest reading of every layer.

    Args:
        readings: Of one run, in order.
    """
    latest = {reading.layer: reading for reading in readings}
    names = dict.fromkeys(n for r in latest.values() for n in r.losses)
    rows = [
        (
            reading.layer,
            str(reading.step),
            f"{reading.max_load:.2f}x",
            str(len(reading.dead)),
            f"{reading.dropped:.1%}",
            f"{reading.unrouted:.1%}",
            f"{reading.entropy:.3f}",
            f"{reading.confidence:.3f}",
            *(f"{reading.losses.get(name, np.nan):.4f}" for name in names),
        )
        for reading in latest.values()
    ]
    header = (
        "block",
        "step",
        "busiest",
        "dead",
        "dropped",
        "unrouted",
        "entropy",
        "confidence",
        *(name.replace("_", " ") for name in names),
    )
    return tables.text(header, rows)


def _row(reading):
    values = dataclasses.asdict(reading)
    values["load"] = " ".join(f"{share:.6g}" for share in reading.load)
    values["losses"] = " ".join(
        f"{name}={value:.8g}" for name, value in reading.losses.items()
    )
    for name in _FLOATS:
        values[name] = f"{values[name]:.8g}"
    return [values[column] for column in COLUMNS]


def _reading(row):
    values = dict(zip(COLUMNS, row, strict=True))
    pairs = [pair.split("=") for pair in values["losses"].split()]
    return RouterReading(
        step=int(values["step"]),
        layer=values["layer"],
        steps=int(values["steps"]),
        tokens=int(values["tokens"]),
        load=np.array([float(share) for share in values["load"].split()]),
        losses={name: float(value) for name, value in pairs},
        **{name: float(values[name]) for name in _FLOATS},
    )

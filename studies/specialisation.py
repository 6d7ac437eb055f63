"""Which tokens each expert takes, while the mixture trains.

    python -m studies.specialisation           # some minutes, then a picture

Counts on held-out text. Classes of bytes are counted alike, whatever their
share of the text.
"""

import argparse
import pathlib
from typing import Any

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keras_upcycle import atomic_files
from keras_upcycle.analysis import assignments
from keras_upcycle.demo import language_model, sources, training
from keras_upcycle.demo.store import read_json, write_json
from keras_upcycle.training import progress
from studies import figures, parts, plans, rows, runs
from studies.arms import UPCYCLED, Arm
from studies.language import Language

RESULT = parts.RESULTS.with_name("specialisation.json")
STEPS = (0, 30, 150, 750, 3000)  # of the sparse model
EXAMPLES = 1024
CLASSES = {
    "a vowel": "aeiou",
    "another small letter": "bcdfghjklmnpqrstvwxyz",
    "a capital": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "a digit": "0123456789",
    "an underscore": "_",
    "a space": " ",
    "the end of a line": "\n",
    "a bracket": "()[]{}",
    "a quote": "\"'",
    ". or ,": ".,",
    "an operator": "=+-*/<>%:",
    "#": "#",
}
SNIPPET = "class "  # the text shown starts where this first stands


def main() -> None:
    """Trains, counts, and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-draw", action="store_true")
    parser.add_argument("--rows", type=pathlib.Path, default=parts.RESULTS)
    parser.add_argument(
        "--checkpoints",
        type=pathlib.Path,
        default=pathlib.Path("runs/study/checkpoints"),
    )
    parser.add_argument("--result", type=pathlib.Path, default=RESULT)
    parser.add_argument("--output", type=pathlib.Path, default=figures.FOLDER)
    args = parser.parse_args()
    if not args.only_draw:
        with progress.Reporter() as reporter:
            plan = plans.language()
            setting = Language(
                sources.standard_library(), language_model.Shape(), plan
            )
            study = runs.Study(
                setting, rows.Rows(args.rows), args.checkpoints, reporter
            )
            arm = plan.arm(UPCYCLED, plan.best_rate(study.rows.all, UPCYCLED))
            write_json(args.result, measure(study, arm))
    path = args.output / "study-specialisation.png"
    figure = draw(read_json(args.result))
    atomic_files.replace(path, lambda draft: figure.savefig(draft, dpi=150))
    print(path)


def measure(
    study: runs.Study, arm: Arm, steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    """Shares of every class of bytes, at several points of the training.

    Args:
        study: Of `Language`.
        arm: What trains, at its rate, without a cool-down.
        steps: Of the sparse model; rising multiples of `training.STRETCH`.
    """
    setting = study.setting
    model, start = study.prepared(arm, 0)
    training.set_state(model, start)
    length = setting.shape.length
    at = np.linspace(0, len(setting.text.test) - length - 1, EXAMPLES)
    windows, _ = training.windows(setting.text.test, at.astype("int64"), length)
    labels = class_of()[windows]
    shown = snippet(setting.text.test, length)
    found, done = [], 0
    for count in steps:
        if count > done:
            setting.fit(
                model,
                np.full((count - done) // training.STRETCH, arm.learning_rate),
                seed=0,
                start=arm.checkpoint + done,
                callbacks=[study.reporter.callback(f"to {count} sparse steps")],
            )
            done = count
        (share,) = ku.expert_assignments(model, windows, labels).values()
        point = {
            "steps": count,
            "share": _all_classes(share).round(4).tolist(),
            "mutual_information": assignments.mutual_information(share),
        }
        if count in (steps[0], steps[-1]):  # what is drawn
            places = np.arange(shown.size).reshape(shown.shape)
            (own,) = ku.expert_assignments(model, shown, places).values()
            point["shown"] = own.round(2).tolist()
        found.append(point)
    return {
        "classes": list(CLASSES),
        "text": bytes(shown.ravel().astype("uint8")).decode("ascii"),
        "points": found,
        **rows.made_on(),
    }


def _all_classes(share):
    """Zeros for the classes after the last that the text has."""
    missing = len(CLASSES) - len(share)
    return np.pad(np.nan_to_num(share), ((0, missing), (0, 0)))


def class_of() -> np.ndarray:
    """The class of every byte; -1 for those of none."""
    classes = np.full(sources.VOCABULARY, -1)
    for number, letters in enumerate(CLASSES.values()):
        classes[[ord(letter) for letter in letters]] = number
    return classes


def snippet(tokens: np.ndarray, length: int, windows: int = 24) -> np.ndarray:
    """Windows of a text one after the other, int32 `(windows, length)`."""
    start = max(tokens.tobytes().find(SNIPPET.encode()), 0)
    part = tokens[start : start + windows * length]
    return part.reshape(windows, length).astype("int32")


def draw(result: dict) -> Figure:
    """Heat maps over training, and a text coloured by its experts."""
    points = result["points"]
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    upper.suptitle(
        "Which bytes each of 16 experts takes, after so many sparse steps, and "
        "how much a byte's class says about its expert",
        fontsize=12,
    )
    axes = upper.subplots(1, len(points), sharey=True)
    for each, point in zip(axes, points, strict=True):
        share = np.array(point["share"])
        image = each.imshow(
            share, cmap="viridis", vmin=0, vmax=0.5, aspect="auto"
        )
        each.set_title(
            f"{point['steps']:,}: {point['mutual_information']:.2f} nats",
            fontsize=10.5,
        )
        each.set_xlabel("expert")
        each.set_yticks(range(len(result["classes"])), result["classes"])
    upper.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
    pair = lower.subplots(1, 2)
    for each, point in zip(pair, (points[0], points[-1]), strict=True):
        _coloured(each, result["text"], np.array(point["shown"]))
        each.set_title(
            f"held-out text after {point['steps']:,} steps, coloured by expert",
            fontsize=10.5,
        )
    return figure


def _coloured(axes, text, shares, columns=64, most=20):
    """Every letter on the mean colour of its experts."""
    palette = matplotlib.colormaps["tab20"].colors
    colours = np.array([palette[i % 20] for i in range(shares.shape[1])])
    line = column = 0
    for letter, share in zip(text, np.nan_to_num(shares), strict=True):
        if letter == "\n" or column == columns:
            line, column = line + 1, 0
            if letter == "\n":
                continue
        if line == most:
            break
        face = 0.35 + 0.65 * (share @ colours)
        axes.add_patch(
            Rectangle(
                (column, line), 1, 1, facecolor=np.clip(face, 0, 1), linewidth=0
            )
        )
        axes.text(
            column + 0.5,
            line + 0.72,
            letter,
            ha="center",
            fontsize=6.5,
            family="monospace",
        )
        column += 1
    axes.set_xlim(0, columns)
    axes.set_ylim(most, 0)
    axes.set_axis_off()


if __name__ == "__main__":
    main()

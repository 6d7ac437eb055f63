"""Figures of the comparison. Importing this module needs matplotlib."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_upcycle import atomic_files
from keras_upcycle.demo.results import CONTINUED, DENSE, UPCYCLED, Result

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {DENSE: "#555555", CONTINUED: "#0072B2", UPCYCLED: "#D55E00"}
PANELS = (
    ("train_loss", "train loss", 1.0),
    ("test_loss", "test loss", 1.0),
    ("test_accuracy", "test accuracy (%)", 100.0),
)


def curves(
    results: Sequence[Result],
    train_size: int,
    path: pathlib.Path,
    title: str,
    unit: str = "epochs of the dense model",
) -> None:
    """Draws both continuations against compute; a thin line for each seed.

    Args:
        results: Of all seeds; a dense checkpoint may serve several.
        train_size: Training examples, which make an epoch.
        path: Of the image, whose format its suffix names.
        title: Of the figure.
        unit: Of the compute, `train_size` examples of the dense model.
    """
    others = {r.name: None for r in results if r.name not in COLOURS}
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    dense = [result for result in results if result.name == DENSE]
    before = _epochs(dense[0], train_size)
    sparse = next(result for result in results if result.name == UPCYCLED)
    # As much of the dense training as makes a third of the picture.
    shown = before[-1] - 0.5 * _epochs(sparse, train_size)[-1]
    for axes, (key, label, scale) in zip(
        figure.subplots(1, 3), PANELS, strict=True
    ):
        heights = []
        for name in (*COLOURS, *others):
            own = [result for result in results if result.name == name]
            lines = [_line(r, key, scale, train_size, before) for r in own]
            x = lines[0][0]
            values = np.array([y for _, y in lines])
            colour = COLOURS.get(name, COLOURS[CONTINUED])
            if len(values) > 1:
                axes.plot(x, values.T, color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(
                x,
                values.mean(0),
                color=colour,
                linewidth=2.2 if name in COLOURS else 1.2,
                linestyle="-" if name in COLOURS else (0, (2, 2)),
                label=name,
            )
            heights.append(values[:, x >= shown].ravel())
        axes.axvline(
            before[-1], color="#999999", linewidth=0.8, linestyle=(0, (4, 3))
        )
        low = min(part.min() for part in heights)
        high = max(part.max() for part in heights)
        room = 0.05 * (high - low)
        axes.set_ylim(low - room, high + room)
        axes.set_xlim(left=max(shown, 0))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(f"compute ({unit})")
        axes.set_title(label, fontsize=11)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
    )
    atomic_files.replace(path, lambda draft: figure.savefig(draft, dpi=150))


def _epochs(result, train_size):
    """Compute at the end of each round, in epochs of the dense model."""
    examples = result.steps * result.batch_size * result.step_cost
    rounds = len(result.rounds)
    return np.arange(1, rounds + 1) / rounds * examples / train_size


def _line(result, key, scale, train_size, before):
    x = _epochs(result, train_size)
    y = [record[key] for record in result.rounds]
    if result.name != DENSE:
        x = before[-1] + x
        if key in result.start:
            x = np.concatenate([before[-1:], x])
            y = [result.start[key], *y]
    return x, scale * np.array(y)

"""Pictures of routers: loads over time, and who takes what.

matplotlib is imported by who draws.
"""

import inspect
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from keras_upcycle import atomic_files, checks
from keras_upcycle.analysis import router_log
from keras_upcycle.routing.statistics import RouterReading

_MOST_COLUMNS = 4


def plot_expert_load(
    readings: Sequence[RouterReading] | str | os.PathLike,
    path: str | os.PathLike,
    *,
    title: str = "Load of each expert",
) -> None:
    """A heat map a block: experts upwards, training steps to the right.

    White is a fair share, red more, blue less; a dead expert is dark blue.

    Args:
        readings: List of `RouterReading`, such as `RouterMonitor.readings`, or
            the path of its log.
        path: Path of the image, whose format its suffix names.
        title: String, the title of the figure. Defaults to
            `"Load of each expert"`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `path` is no path, or `readings` are none.
        OSError: If `path` is a folder, or in none.
        ValueError: If there are no readings, or for another kind of image.

    Example:
        >>> monitor = RouterMonitor(every=1)
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16),
        ... ])
        >>> model.compile("adam", "mse")
        >>> x = keras.ops.ones((8, 6, 8))
        >>> _ = model.fit(x, x, batch_size=2, verbose=0, callbacks=[monitor])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_expert_load(monitor.readings, f"{folder}/load.png")
    """
    _check_picture(path, title)
    if isinstance(readings, str | os.PathLike):
        readings = router_log.read(readings, "readings")
    if not isinstance(readings, Iterable) or inspect.isclass(readings):
        raise TypeError(
            "`readings` must be a list of `RouterReading`s, or the path of a "
            f"log. Received: readings={readings!r} of type "
            f"{type(readings).__name__}. Pass `RouterMonitor.readings`."
        )
    readings = list(readings)
    for reading in readings:
        checks.check_instance(
            "readings", reading, RouterReading, "a list of `RouterReading`s"
        )
    by_layer: dict[str, list[RouterReading]] = {}
    for reading in readings:
        by_layer.setdefault(reading.layer, []).append(reading)
    if not by_layer:
        raise ValueError(
            "There must be readings to draw. Received: none. Train with "
            "`RouterMonitor` for at least one epoch."
        )
    figure, axes = _panels(len(by_layer), 3.6, 2.6)
    limit = 2.0
    for panel, (name, own) in zip(axes, by_layer.items(), strict=False):
        load = np.stack([r.load * r.num_experts for r in own], axis=1)
        # Each reading covers the steps since the one before.
        edges = [own[0].step - own[0].steps, *(r.step for r in own)]
        image = panel.pcolormesh(
            edges,
            np.arange(load.shape[0] + 1) - 0.5,
            np.log2(np.maximum(load, 2.0**-limit)),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
        )
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("training step", fontsize=8)
        panel.set_ylabel("expert", fontsize=8)
        _whole_numbers(panel)
    ticks = np.arange(-limit, limit + 1)
    bar = figure.colorbar(image, ax=axes, ticks=ticks, shrink=0.8)
    bar.ax.set_yticklabels(
        ["1/4 or less", "1/2", "fair share", "twice", "4x or more"], fontsize=8
    )
    figure.suptitle(title, fontsize=11)
    atomic_files.replace(path, lambda draft: figure.savefig(draft, dpi=150))


def plot_expert_assignments(
    shares: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    title: str = "Which experts process which label",
) -> None:
    """A heat map a block: labels downwards, experts to the right.

    Args:
        shares: Mapping from each block's name to a float array
            `(num_labels, E)`, what `expert_assignments` gave; rows may be
            picked from it.
        path: Path of the image, whose format its suffix names.
        names: List of strings, what the labels are called. Defaults to `None`:
            their numbers.
        title: String, the title of the figure. Defaults to
            `"Which experts process which label"`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `path` is no path, or `shares` no mapping.
        OSError: If `path` is a folder, or in none.
        ValueError: If there is nothing to draw, the names do not fit, or for
            another kind of image.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16, name="moe"),
        ... ])
        >>> shares = expert_assignments(model, np.ones((2, 6, 8)), [0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_expert_assignments(
        ...         shares, f"{folder}/who.png", names=["cat", "dog"]
        ...     )
    """
    _check_picture(path, title)
    checks.check_instance(
        "shares", shares, Mapping, "what `expert_assignments` gave"
    )
    if not shares:
        raise ValueError(
            "`shares` must hold at least one block. Received: none. Pass what "
            "`expert_assignments` gave."
        )
    for block, share in shares.items():
        made = checks.array_of(share)
        if made.ndim != 2 or made.dtype.kind not in "fiub" or not made.size:
            raise ValueError(
                "`shares` must hold numbers (num_labels, E) for each block. "
                f"Received: {type(share).__name__} of shape {made.shape} for "
                f"{block!r}. Pass what `expert_assignments` gave."
            )
    labels = max(len(share) for share in shares.values())
    if names is not None:
        checks.check_instance(
            "names", names, Sequence | np.ndarray, "a list of strings"
        )
        if isinstance(names, str) or len(names) != labels:
            raise ValueError(
                f"`names` must be a list that names all {labels} labels. "
                f"Received: {names!r}, {len(names)} names. Pick the rows of "
                "each block to draw fewer."
            )
    figure, axes = _panels(len(shares), 3.6, 1.2 + 0.22 * min(labels, 60))
    for panel, (name, share) in zip(axes, shares.items(), strict=False):
        times = np.ma.masked_invalid(share * share.shape[1])
        image = panel.imshow(
            times, aspect="auto", cmap="viridis", vmin=0.0, vmax=3.0
        )
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("expert", fontsize=8)
        _whole_numbers(panel)
        if names is not None:
            panel.set_yticks(range(labels), names, fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 2, 3])
    bar.ax.set_yticklabels(["none", "fair share", "twice", "3x or more"])
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    atomic_files.replace(path, lambda draft: figure.savefig(draft, dpi=150))


def _check_picture(path, title):
    checks.check_output("path", path)
    checks.check_instance("title", title, str, "a string")
    suffix = pathlib.Path(path).suffix.removeprefix(".").lower()
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(
            "`path` must end in the format of the image. Received: "
            f"path={str(path)!r}. Choose one of {sorted(known)}, such as "
            f"{pathlib.Path(path).stem + '.png'!r}."
        )


def _panels(count, width, height):
    from matplotlib.figure import Figure

    columns = min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(width * columns + 1.4, height * rows + 0.4),
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, list(axes)


def _whole_numbers(panel):
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.tick_params(labelsize=7)

"""Progress bars of demo and example, through a callback of `fit`."""

import contextlib

import keras
import numpy as np


class Reporter:
    """A bar for the stage that trains, and lines above it.

    Where the output is no terminal, only the lines are written.

    Args:
        every_round: Whether every round gets a line, as suits long runs.
        silent: Whether there are no bars, wherever the output goes.

    Example:
        >>> with Reporter() as reporter:
        ...     reporter.line("ready")
        ready
    """

    def __init__(self, every_round: bool = False, silent: bool = False):
        from rich import console, progress

        self.every_round = every_round
        self.console = console.Console(highlight=False, soft_wrap=True)
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("steps"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=silent or not self.console.is_terminal,
        )

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def line(self, text: str = "") -> None:
        """Prints, above the bar."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def steps(self, title: str, total: int):
        """A bar for a loop of the caller's own.

        Args:
            title: Of the bar.
            total: Steps of the loop.

        Yields:
            A function to call after each step.
        """
        task = self.bars.add_task(title, total=total)
        try:
            yield lambda: self.bars.advance(task)
        finally:
            self.bars.remove_task(task)

    def callback(self, title: str) -> keras.callbacks.Callback:
        """A callback that shows the stage `title`."""
        return _Bar(self, title)

    def curve(self, title: str) -> keras.callbacks.Callback:
        """The same for many short epochs; draws their loss beside the title."""
        return _Curve(self, title)


class _Bar(keras.callbacks.Callback):
    def __init__(self, reporter, title):
        super().__init__()
        self.reporter = reporter
        self.title = title

    def on_train_begin(self, logs=None):
        self.rounds = self.params["epochs"]
        self.steps = self.params["steps"]
        self.task = self.reporter.bars.add_task(
            self.title, total=self.rounds * self.steps
        )

    def on_epoch_begin(self, epoch, logs=None):
        self.done = epoch * self.steps

    def on_train_batch_end(self, batch, logs=None):
        # Reading `logs` here would wait for the device at every step.
        self.reporter.bars.update(self.task, completed=self.done + batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        if self.reporter.every_round:
            self.reporter.line(
                f"{self.title}, round {epoch + 1}/{self.rounds}: train loss "
                f"{logs['cross_entropy']:.3f}, test loss "
                f"{logs['val_cross_entropy']:.3f}, test accuracy "
                f"{logs['val_accuracy']:.2%}"
            )

    def on_train_end(self, logs=None):
        self.reporter.bars.remove_task(self.task)


class _Curve(_Bar):
    """A bar whose epochs' loss is drawn as it falls."""

    LEVELS = "▁▂▃▄▅▆▇█"
    POINTS = 24

    def __init__(self, reporter, title):
        super().__init__(reporter, title)
        self.losses = []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(float(logs["cross_entropy"]))
        self.reporter.bars.update(
            self.task,
            description=f"{self.title} {self.drawn()} {self.losses[-1]:.3f}",
        )

    def drawn(self):
        """The losses so far as a row of blocks, each the mean of a share."""
        parts = np.array_split(self.losses, min(len(self.losses), self.POINTS))
        heights = np.array([part.mean() for part in parts])
        low, high = heights.min(), heights.max()
        scaled = (heights - low) / max(high - low, 1e-9)
        return "".join(
            self.LEVELS[int(level * (len(self.LEVELS) - 1))] for level in scaled
        )


@contextlib.contextmanager
def bytes_written(title: str, total: int):
    """A bar on standard error for what is written; none if it is no terminal.

    Args:
        title: Of the bar.
        total: Bytes in all.

    Yields:
        A function to call with how many bytes more.
    """
    from rich import console, progress

    screen = console.Console(stderr=True)
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.update(task, advance=more)

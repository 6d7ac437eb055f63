"""A progress bar of stages, on standard error.

Not the one of `keras_upcycle.training.progress`, which is driven by `fit` and
needs Keras: importing that is the first thing that takes time here.
"""

import contextlib
import time
from collections.abc import Iterator

from rich import console, progress


class Stages:
    """A bar that shows which stage is at work, and a line for each one done.

    Where standard error is no terminal, only the lines are written.

    Args:
        total: How many stages there are.

    Attributes:
        seconds: What each finished stage took, by its name.

    Example:
        >>> with Stages(1) as stages:
        ...     with stages.stage("load"):
        ...         pass
        >>> list(stages.seconds)
        ['load']
    """

    def __init__(self, total: int):
        self.seconds: dict[str, float] = {}
        self.console = console.Console(
            stderr=True, highlight=False, soft_wrap=True
        )
        self.bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "Stages":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows the name as long as the stage lasts."""
        self.bar.update(self.task, description=name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.bar.advance(self.task)
        self.console.print(f"{name}: {self.seconds[name]:.1f} s", markup=False)

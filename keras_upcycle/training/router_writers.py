"""What a `RouterMonitor` reads, where people watch their runs."""

import os
import time
from typing import Any

import numpy as np

from keras_upcycle import checks
from keras_upcycle.routing.statistics import RouterReading

# Of a reading, as written.
NUMBERS = (
    "max_load",
    "dropped",
    "unrouted",
    "entropy",
    "confidence",
    "weight",
)


def numbers_of(reading: RouterReading) -> dict[str, float]:
    """A reading's single numbers by name, losses and schedules by theirs."""
    found = {name: float(getattr(reading, name)) for name in NUMBERS}
    found["dead_experts"] = float(len(reading.dead))
    found |= reading.scheduled
    return found | {
        f"loss/{name}": float(value) for name, value in reading.losses.items()
    }


class TensorBoardWriter:
    """Writes what routers do to a folder that TensorBoard shows.

    Of each block, at each reading: `moe_load`, a histogram whose bar `e` is the
    share of expert `e`, and `moe_max_load`, `moe_dropped`, `moe_unrouted`,
    `moe_entropy`, `moe_confidence`, `moe_weight`, `moe_dead_experts` and
    `moe_loss/<name>` as scalars, under the block's name; `moe_temperature` and
    `moe_noise_stddev` where a schedule gives them. On any backend, without
    TensorFlow. Install with the extra `tensorboard`.

    Args:
        log_dir: String or path, a folder, made where it is missing; beside that
            of `keras.callbacks.TensorBoard`, such as `"logs/routers"`.

    Raises:
        TypeError: If `log_dir` is no path.
        ImportError: If `tensorboard` is not installed.

    Example:
        ```python
        monitor = RouterMonitor(writers=[TensorBoardWriter("logs/routers")])
        model.fit(x, y, callbacks=[monitor])
        # tensorboard --logdir logs
        ```
    """

    def __init__(self, log_dir: str | os.PathLike):
        checks.check_path("log_dir", log_dir)
        checks.check_installed(
            type(self).__name__, "tensorboard", "tensorboard"
        )
        from tensorboard.summary.writer.event_file_writer import (
            EventFileWriter,
        )

        self._writer = EventFileWriter(os.fspath(log_dir))

    def __call__(self, reading: RouterReading) -> None:
        """Writes one reading."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        block = reading.layer
        values = [
            summary_pb2.Summary.Value(
                tag=f"moe_{name}/{block}", simple_value=number
            )
            for name, number in numbers_of(reading).items()
        ]
        load = np.asarray(reading.load, "float64")
        places = np.arange(len(load))
        values.append(
            summary_pb2.Summary.Value(
                tag=f"moe_load/{block}",
                histo=summary_pb2.HistogramProto(
                    min=0.0,
                    max=float(len(load)),
                    num=float(load.sum()),
                    sum=float(load @ places),
                    sum_squares=float(load @ places**2),
                    # Bar `e` from `e` to `e + 1`; the first one closes off
                    # what is below 0.
                    bucket_limit=[0.0, *(places + 1.0)],
                    bucket=[0.0, *load],
                ),
            )
        )
        self._writer.add_event(
            event_pb2.Event(
                step=reading.step,
                wall_time=time.time(),
                summary=summary_pb2.Summary(value=values),
            )
        )

    def flush(self) -> None:
        """What was written is in the file."""
        self._writer.flush()


class WandbWriter:
    """Logs what routers do to Weights & Biases.

    Of each block, at each reading: `moe_load/<block>`, a `wandb.Histogram`
    whose bar `e` is the share of expert `e`, and the numbers that
    `TensorBoardWriter` writes. Their x-axis is the optimizer's step,
    `moe_step`, whatever steps else the run counts. Install with the extra
    `wandb`.

    Args:
        run: A `wandb.Run`, as `wandb.init()` returns. Defaults to `None`: the
            run that is active at the first reading.

    Raises:
        ImportError: If `wandb` is not installed.
        RuntimeError: At the first reading, if no run is active.

    Example:
        ```python
        run = wandb.init(project="mixtures")
        monitor = RouterMonitor(writers=[WandbWriter(run)])
        model.fit(x, y, callbacks=[monitor])
        ```
    """

    def __init__(self, run: Any = None):
        checks.check_installed(type(self).__name__, "wandb", "wandb")
        self.run = run
        self._defined = False

    def __call__(self, reading: RouterReading) -> None:
        """Logs one reading."""
        import wandb

        run = wandb.run if self.run is None else self.run
        if run is None:
            raise RuntimeError(
                "A `WandbWriter` writes to a run. Received: run=None, and none "
                "is active. Call `wandb.init()` before `fit`."
            )
        if not self._defined:
            run.define_metric("moe_step")
            run.define_metric("moe_*", step_metric="moe_step")
            self._defined = True
        load = np.asarray(reading.load, "float64")
        run.log(
            {
                f"moe_load/{reading.layer}": wandb.Histogram(
                    np_histogram=(load, np.arange(len(load) + 1.0))
                ),
                **{
                    f"moe_{name}/{reading.layer}": number
                    for name, number in numbers_of(reading).items()
                },
                "moe_step": reading.step,
            }
        )

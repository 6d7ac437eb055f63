"""`RouterMonitor`: eyes on the routers, from `fit`."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_upcycle import checks, keras_internals
from keras_upcycle.analysis import router_log
from keras_upcycle.analysis.similarity import expert_distance
from keras_upcycle.conversion.verify import verify_upcycle
from keras_upcycle.conversion.verify_report import UpcycleReport
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import (
    check_batch,
    named_routing_layers,
)
from keras_upcycle.layers.routed_heads import RoutedHeads
from keras_upcycle.routing.statistics import RouterReading

# Experts that met nothing are no news where few tokens were counted.
_ENOUGH_TOKENS = 20
# Copies differ from their mean by rounding, trained experts by much more.
_TOGETHER, _ENOUGH_STEPS = 1e-4, 100


class RouterMonitor(keras.callbacks.Callback):
    """Watches what the routers do while `fit` runs.

    At the end of every epoch a few numbers are added to the logs, and so to
    `History`, to the progress bar, and to `CSVLogger` and `TensorBoard` where
    these stand after it in the list of callbacks:

    * `moe_max_load`: load of the busiest expert of any block, as a multiple
      of a fair share; 1 is balance.
    * `moe_dead_experts`: how many experts, in all blocks, processed nothing.
    * `moe_dropped`: share of assignments for which an expert had no slot.
    * `moe_unrouted`: share of tokens that no expert processed, a mean over
      blocks.
    * `moe_entropy`: of the routers' probabilities, from 0 (sure) to 1
      (undecided), a mean over blocks.
    * `moe_expert_distance`: how far experts are from their mean (see
      `expert_distance`); 0 right after copying.
    * `moe_load_balance`, `moe_z_loss` and so on: every auxiliary loss that is
      on, unweighted, a mean over the blocks that have it; `moe_loss`: what
      all of them added to `loss`, weighted and summed.
    * `moe_temperature`, `moe_noise_stddev`: what a schedule gives for the next
      step, a mean over the blocks whose router has one.

    Every `every` steps it reads the same from the device (but for distances),
    for `readings`, for the progress bar, and for a log file.

    The counting happens inside the compiled training step, on real tokens, at
    a fraction of a percent of its time; the first `fit` with a monitor
    compiles the step once more, and a step without one has none of it.
    `python -m benchmarks.monitor` prints the cost. No file that the model is
    saved to holds the counters.

    Args:
        every: Integer, at least 1: steps between readings within an epoch.
            Defaults to 50.
        log: Path of a CSV file with one row for each block and reading
            (`keras-upcycle report` shows it). A run that goes on from a
            checkpoint goes on in its log; one that starts at step 0 starts
            it anew. Defaults to `None`.
        writers: List of functions of a `RouterReading`, called with each:
            `TensorBoardWriter` and `WandbWriter` write histograms of every
            block's load, or one of your own. Defaults to none.
        detail: Boolean, whether the logs also get each number block by block,
            as `moe_dropped/<block>`. Defaults to `False`.
        max_dropped: Float, at least 0: the share of dropped assignments above
            which a block is warned of. Defaults to 0.2.
        dense: A Keras model, the dense one that the trained one was made of.
            With `inputs` its output is compared before the first step; see
            `step_0`. Defaults to `None`.
        inputs: Array, tensor or structure of them: a batch as the models are
            called on, for the comparison with `dense`. Defaults to `None`.

    Attributes:
        readings: List of `RouterReading`, in order.
        step_0: The `UpcycleReport` of `dense` and `inputs`, or `None`.

    Steps are those of the optimizer that the model is compiled with. In a loop
    of your own call its methods as `fit` would, `set_model` first and before
    anything is compiled; steps are the batches counted then, where the model
    has no optimizer that was used. In a loop of `stateless_call` on JAX write
    the state back to `model.non_trainable_variables` before
    `on_train_batch_begin` and `on_epoch_end`, and take it from there after.

    It warns, once for each block, of experts that process nothing, of experts
    that do not separate, and of more drops than `max_dropped`.

    Raises:
        TypeError, ValueError: For a setting outside its range; if only one of
            `dense` and `inputs` is given.
        UpcycleError: When training starts, if the model holds no MoE layer.
        OSError: When training starts, if `log` is a folder or in none.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16),
        ... ])
        >>> model.compile("adam", "mse")
        >>> x = keras.ops.ones((8, 6, 8))
        >>> monitor = RouterMonitor()
        >>> history = model.fit(x, x, verbose=0, callbacks=[monitor])
        >>> sorted(history.history)[:4]
        ['loss', 'moe_dead_experts', 'moe_dropped', 'moe_entropy']
        >>> monitor.readings[-1].num_experts
        4
    """

    def __init__(
        self,
        every: int = 50,
        *,
        log: str | os.PathLike | None = None,
        writers: Sequence[Callable[[RouterReading], Any]] = (),
        detail: bool = False,
        max_dropped: float = 0.2,
        dense: keras.Model | None = None,
        inputs: Any = None,
    ):
        super().__init__()
        every = checks.check_count("every", every)
        max_dropped = checks.check_number(
            "max_dropped", max_dropped, at_least=0.0
        )
        if log is not None:
            checks.check_path("log", log)
        if dense is not None:
            checks.check_instance(
                "dense", dense, keras.Model, "the dense Keras model"
            )
        if (dense is None) != (inputs is None):
            raise ValueError(
                "The difference at step 0 needs `dense` and `inputs`. "
                f"Received: dense={dense!r} and inputs of type "
                f"{type(inputs).__name__}. Pass both or neither."
            )
        if inputs is not None:
            check_batch("inputs", inputs, dense)
        self.every = every
        self.writers = _check_writers(writers)
        self.log = log
        self.detail = checks.check_flag("detail", detail)
        self.max_dropped = max_dropped
        self.dense = dense
        self.inputs = inputs
        self.readings: list[RouterReading] = []
        self.step_0: UpcycleReport | None = None
        # Only writes floats that are there already into the logs.
        self.async_safe = True
        self._blocks: dict[
            str, MoEFeedForward | RoutedHeads | AttentionMixture
        ] = {}
        self._latest: dict[str, float] = {}
        self._batches = 0
        self._warned: set[tuple[str, str]] = set()

    def set_model(self, model):
        # Before `fit` makes its training step, which is to count.
        super().set_model(model)
        if self.log is not None:
            checks.check_output("log", self.log)
        self._blocks = named_routing_layers(model)
        routers = [layer.router for layer in self._blocks.values()]
        # All of them, not `any`, which would stop at the first.
        if sum(router.watch() for router in routers):
            model.train_function = None

    def on_train_begin(self, logs=None):
        if self.dense is not None:
            self.step_0 = verify_upcycle(self.dense, self.model, self.inputs)
        self._first_step = self._step()
        if self.log is not None:
            router_log.cut(self.log, self._first_step)
        for layer in self._blocks.values():
            layer.router.statistics.read()

    def on_epoch_begin(self, epoch, logs=None):
        self._read_at = 0
        self._epoch_sums = {name: 0.0 for name in self._blocks}

    def on_train_batch_begin(self, batch, logs=None):
        # Here and not at a batch's end, where Keras may run callbacks in a
        # thread beside the next step.
        if batch - self._read_at >= self.every:
            self._read_at = batch
            keras_internals.sync_state(self.model)
            self._read()

    def on_train_batch_end(self, batch, logs=None):
        if logs is not None:
            logs.update(self._latest)

    def on_epoch_end(self, epoch, logs=None):
        self._read()
        readings = self._readings(self._epoch_sums)
        scalars = _scalars(readings, self.detail)
        distances = self._distances()
        if distances:
            scalars["moe_expert_distance"] = float(
                np.mean(list(distances.values()))
            )
            if self.detail:
                scalars |= {
                    f"moe_expert_distance/{name}": value
                    for name, value in distances.items()
                }
        self._latest = scalars
        if logs is not None:
            logs.update(scalars)

    def on_train_end(self, logs=None):
        for writer in self.writers:
            if hasattr(writer, "flush"):
                writer.flush()

    def __str__(self) -> str:
        if not self.readings:
            return "Nothing was read yet."
        return router_log.summary(self.readings)

    def _step(self):
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            return self._batches
        return keras_internals.whole(optimizer.iterations)

    def _read(self):
        sums = {
            name: layer.router.statistics.read()
            for name, layer in self._blocks.items()
        }
        self._batches += int(max(values[0] for values in sums.values()))
        for name, values in sums.items():
            self._epoch_sums[name] = self._epoch_sums[name] + values
        readings = self._readings(sums)
        self._latest = _scalars(readings, self.detail)
        self.readings += readings
        if self.log is not None:
            router_log.append(self.log, readings)
        for reading in readings:
            self._warn_of(reading)
            for write in self.writers:
                write(reading)

    def _readings(self, sums):
        step = self._step()
        found = [
            layer.router.statistics.reading(
                sums[name],
                step=step,
                layer=name,
                scheduled=layer.router.scheduled_now(),
            )
            for name, layer in self._blocks.items()
        ]
        return [reading for reading in found if reading is not None]

    def _distances(self):
        found = {}
        trained = self._step() - self._first_step
        for name, layer in self._blocks.items():
            if not isinstance(layer, MoEFeedForward):
                continue  # heads were never alike; copies are not compared
            distance = expert_distance(layer)
            if distance is None:
                continue
            found[name] = distance
            together = distance < _TOGETHER and layer.num_experts > 1
            if together and trained >= _ENOUGH_STEPS and layer.trainable:
                self._warn(
                    name,
                    "together",
                    f"The experts of {name!r} do not separate: after "
                    f"{trained} steps they are {distance:.1e} from their mean, "
                    "relative to its size. A router of zeros, experts that "
                    "all see every token, or a learning rate far too small "
                    "would do that; `moe_entropy` of 1 points to the first.",
                )
        return found

    def _warn_of(self, reading):
        name = reading.layer
        enough = reading.tokens >= _ENOUGH_TOKENS * reading.num_experts
        if reading.dead and enough:
            self._warn(
                name,
                "dead",
                f"Experts {list(reading.dead)} of {name!r} processed no token "
                f"in the {reading.steps} steps before step {reading.step}. "
                "They learn nothing. Give the load-balancing loss more weight "
                "(`TopKRouter(load_balance_loss=...)`), balance by "
                "`bias_update_rate`, or let experts choose tokens "
                "(`ExpertChoiceRouter`).",
            )
        if reading.dropped > self.max_dropped:
            self._warn(
                name,
                "dropped",
                f"{reading.dropped:.0%} of the assignments in {name!r} found "
                f"their expert full in the {reading.steps} steps before step "
                f"{reading.step}, more than max_dropped={self.max_dropped:.0%}"
                ". Raise the router's `capacity_factor`, or pass `None` for "
                "dropless training, or balance the load.",
            )

    def _warn(self, name, kind, text):
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            warnings.warn(text, stacklevel=2)


def _check_writers(writers):
    if not isinstance(writers, Sequence) or not all(map(callable, writers)):
        raise TypeError(
            "`writers` must be a list of functions of a `RouterReading`, such "
            f"as `TensorBoardWriter(folder)`. Received: writers={writers!r}."
        )
    return tuple(writers)


def _scalars(readings: Sequence[RouterReading], detail: bool):
    """The numbers for logs; see `RouterMonitor`."""
    if not readings:
        return {}
    found = {
        "moe_max_load": max(r.max_load for r in readings),
        "moe_dead_experts": float(sum(len(r.dead) for r in readings)),
        "moe_dropped": _mean(r.dropped for r in readings),
        "moe_unrouted": _mean(r.unrouted for r in readings),
        "moe_entropy": _mean(r.entropy for r in readings),
    }
    names = dict.fromkeys(name for r in readings for name in r.losses)
    for name in names:
        own = [r.losses[name] for r in readings if name in r.losses]
        found[f"moe_{name}"] = _mean(own)
    if names:
        found["moe_loss"] = sum(r.weighted_loss for r in readings)
    for name in dict.fromkeys(name for r in readings for name in r.scheduled):
        own = [r.scheduled[name] for r in readings if name in r.scheduled]
        found[f"moe_{name}"] = _mean(own)
    if detail:
        for r in readings:
            found |= {
                f"moe_max_load/{r.layer}": r.max_load,
                f"moe_dead_experts/{r.layer}": float(len(r.dead)),
                f"moe_dropped/{r.layer}": r.dropped,
                f"moe_unrouted/{r.layer}": r.unrouted,
                f"moe_entropy/{r.layer}": r.entropy,
                f"moe_confidence/{r.layer}": r.confidence,
            } | {f"moe_{k}/{r.layer}": v for k, v in r.scheduled.items()}
    return found


def _mean(values):
    values = list(values)
    return math.fsum(values) / len(values)

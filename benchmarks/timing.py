"""Interleaved timing of competing functions, and what a run took of memory."""

import os
import statistics
import threading
import time
from collections.abc import Callable

import keras

from keras_upcycle import freed_memory


def compiled(function: Callable) -> Callable:
    """The function as the backend runs it at its best, and waited for.

    JAX: `jax.jit`. TensorFlow: `tf.function(jit_compile=True)`, which is what
    `fit` does. torch: eager, since Keras runs it so.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jitted = jax.jit(function)
        return lambda *args: jax.block_until_ready(jitted(*args))
    if backend == "tensorflow":
        import tensorflow as tf

        graph = tf.function(function, jit_compile=True)

        def run(*args):
            out = graph(*args)
            # Not `.numpy()`, which copies: gradients of 32 experts took 40 ms.
            tf.test.experimental.sync_devices()
            return out

        return run
    return function


def interleaved(
    functions: dict[str, Callable],
    rounds: int,
    budget_s: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each function, one run each in every round.

    Interleaving makes what else the machine does hit all of them alike. A
    function so slow that all its rounds would take longer than `budget_s`
    stands out after fewer, at least one.
    """
    own_rounds = {}
    for name, function in functions.items():
        function()  # compiles
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        own_rounds[name] = max(1, int(min(rounds, budget_s // seconds)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            if number >= own_rounds[name]:
                continue
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def in_turn(
    functions: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """`interleaved`, of functions that return the seconds that count."""
    for function in functions.values():
        function()  # compiles
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(function())
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one function's time against another's.

    Taken round by round, so that a slow spell divides out.
    """
    return statistics.median(
        a / b for a, b in zip(times[name], times[base], strict=False)
    )


class StepClock(keras.callbacks.Callback):
    """Seconds of an epoch's steps, from the first's begin to the last's end.

    Not of `fit`: now and then that returns only when 2.56, 5.12 or 10.24
    seconds are full. Presumably a thread of tf.data, which feeds KerasHub's
    tasks on every backend, is waited for and sleeps twice as long each time.

    Args:
        steps: Of the epoch.
    """

    async_safe = True  # else Keras would wait after every step on JAX

    def __init__(self, steps: int):
        super().__init__()
        self.last = steps - 1

    def on_train_batch_begin(self, batch, logs=None):
        """Starts the clock."""
        if batch == 0:
            self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Waits for the last step and stops the clock."""
        if batch == self.last:
            float(logs["loss"])
            self.seconds = time.perf_counter() - self._start


class PeakMemory:
    """Peak resident memory of this process while the block runs, in bytes.

    Sampled every few milliseconds; `rise` is against the start.
    """

    def __init__(self, period: float = 0.005):
        import psutil

        self._process = psutil.Process()
        self._period = period
        self._stop = threading.Event()

    def __enter__(self):
        self.start = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def rise(self) -> int:
        """Bytes above the start."""
        return self.peak - self.start

    def _sample(self):
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _watch(self):
        while not self._stop.wait(self._period):
            self._sample()


def parsed(parser):
    """The arguments, with `--json`, that every benchmark of a layer has.

    What a step frees is kept (`freed_memory`), also where the package by itself
    would leave it; with `KERAS_UPCYCLE_ALLOCATOR=system` in front of the
    command it is not.
    """
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    freed_memory.keep(os.environ.get(freed_memory.VARIABLE) != "system")
    return args

"""A layer as a program that can be timed: forward, or forward and backward."""

import ctypes
import gc
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
from keras import ops

from benchmarks import timing
from keras_upcycle import freed_memory


@dataclass
class Program:
    """Something to run again and again.

    Attributes:
        run: Runs it once and waits for the result.
        compile_seconds: What it took to compile; `None` where nothing is
            compiled. On TensorFlow the first run less the second.
    """

    run: Callable
    compile_seconds: float | None
    _temporary: int | None = None

    def temporary_bytes(self) -> int | None:
        """The most memory it holds at once beyond its inputs and results.

        On JAX as XLA planned it. On torch the rise of resident memory during
        a run, less the results. `None` on TensorFlow, whose allocator keeps
        what it once got and which does not show XLA's plan.
        """
        if keras.backend.backend() == "tensorflow":
            return None
        if self._temporary is None:
            self._temporary = _resident_rise(self.run)
        return self._temporary


def forward(layer, x) -> Program:
    """The layer at inference."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        def run():
            with torch.no_grad():
                return layer(x)

        return Program(run, None)
    if backend == "jax":
        trainable, other = _state(layer)

        def call(trainable, x):
            return layer.stateless_call(trainable, other, x)[0]

        return _jax_program(call, trainable, x)
    return _tensorflow_program(layer, x)


def both(layer, x) -> Program:
    """The layer in training: a loss, and its gradients by weights and `x`.

    What the layer changes of its own state is computed as well.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        trainable, other = _state(layer)

        def loss(trainable, x):
            out, state = layer.stateless_call(
                trainable, other, x, **_training(layer)
            )
            return _loss(out), state

        step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return _jax_program(step, trainable, x)
    if backend == "tensorflow":
        import tensorflow as tf

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = _loss(layer(x, **_training(layer)))
            sources = [v.value for v in layer.trainable_variables]
            return loss, tape.gradient(loss, [*sources, x])

        return _tensorflow_program(step, x)
    import torch

    values = [v.value for v in layer.trainable_variables]
    x = x.clone().requires_grad_()

    def step():
        loss = _loss(layer(x, **_training(layer)))
        return loss, torch.autograd.grad(loss, [*values, x], allow_unused=True)

    return Program(step, None)


def _loss(outputs):
    return ops.sum(ops.square(ops.cast(outputs, "float32")))


def _training(layer):
    # What is no Keras layer, or behaves alike always, is not told.
    call = getattr(layer, "call", None)
    if call is None or "training" not in inspect.signature(call).parameters:
        return {}
    return {"training": True}


def _state(layer):
    return (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


def _jax_program(function, *args):
    import jax

    lowered = jax.jit(function).lower(*args)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    return Program(
        lambda: jax.block_until_ready(program(*args)),
        seconds,
        program.memory_analysis().temp_size_in_bytes,
    )


def _tensorflow_program(function, x):
    run = timing.compiled(function)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run(x)
        seconds.append(time.perf_counter() - start)
    return Program(lambda: run(x), max(seconds[0] - seconds[1], 0.0))


def _resident_rise(run):
    gc.collect()
    with _memory_given_back(), timing.PeakMemory(period=0.001) as memory:
        results = run()
    size = sum(_nbytes(leaf) for leaf in keras.tree.flatten(results))
    return max(memory.rise - size, 0)


def _nbytes(leaf):
    if leaf is None or not ops.is_tensor(leaf):
        return 0
    itemsize = (
        2 if keras.backend.standardize_dtype(leaf.dtype)[-2:] == "16" else 4
    )
    size = 1
    for length in leaf.shape:
        size *= length
    return size * itemsize


class _memory_given_back:
    """Within, freed memory goes back to the system, as glibc would have it.

    The package asks the allocator to keep it (`freed_memory`), and nothing
    would be seen to rise.
    """

    # Of <malloc.h>: trim threshold, top pad, number of mapped blocks.
    _GIVEN_BACK = ((-1, 128 << 10), (-2, 0), (-4, 65536))

    def __enter__(self):
        self._set(self._GIVEN_BACK)

    def __exit__(self, *error):
        if freed_memory.is_kept():
            self._set(freed_memory.KEPT)

    def _set(self, options):
        if freed_memory.set_options(options):
            ctypes.CDLL(None).malloc_trim(0)

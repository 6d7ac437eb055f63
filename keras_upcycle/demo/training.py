"""`model.fit` on windows of a text, at a rate that holds and then falls.

A model is compiled once and trains from many checkpoints: the learning rate is
set from outside, every few steps, by Keras's own callback.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

# Steps at one learning rate: an epoch of `fit`, and one call of the backend.
STRETCH = 10
WARM_UP = 100  # steps, of a model that starts from random weights
TESTED = 4096  # windows of a test
TEST_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stretch of training came to.

    Attributes:
        train: Mean cross-entropy of the last 100 steps, nats a token; routers'
            losses are not in.
        seconds: Of all steps, the first few estimated by the others: they
            compile.
        losses: Mean cross-entropy of every `STRETCH` steps.
    """

    train: float
    seconds: float
    losses: tuple[float, ...]


def compile_for(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    *,
    at_once: int = STRETCH,
) -> None:
    """Compiles a model that gives logits, for `train` and `held_out`.

    The optimizer has its slots at once, so that its state can be set.

    Args:
        model: Gives logits.
        optimizer: A new one, or one that goes on.
        at_once: Steps of a call of the backend. torch makes one each in Keras,
            and reads no file that says otherwise.
    """
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # The loss again: Keras adds the routers' own losses to `loss`.
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="cross_entropy"
            ),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
        steps_per_execution=(
            1 if keras.backend.backend() == "torch" else at_once
        ),
    )


def rates(
    learning_rate: float, steps: int, *, warm_up: int = 0, cool_down: float = 0
) -> np.ndarray:
    """A rate for each `STRETCH` steps: rises, holds, falls linearly to zero.

    Args:
        learning_rate: In between.
        steps: In all, a multiple of `STRETCH`.
        warm_up: Steps of the rise.
        cool_down: Share of the steps of the fall.

    Example:
        >>> rates(1.0, 40, cool_down=0.5).tolist()
        [1.0, 1.0, 0.75, 0.25]
    """
    at = np.arange(0, steps, STRETCH) + STRETCH / 2
    rate = np.full(len(at), float(learning_rate))
    if cool_down:
        rate *= np.clip((steps - at) / (cool_down * steps), 0, 1)
    if warm_up:
        rate *= np.minimum(1, at / warm_up)
    return rate


def train(
    model: keras.Model,
    tokens: np.ndarray,
    rate: np.ndarray,
    *,
    seed: int,
    start: int = 0,
    batch_size: int = 64,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Outcome:
    """`fit` on windows of a text.

    Args:
        model: See `fit`; its input has the length of a window.
        tokens: Text, uint8 `(N,)`.
        rate: See `fit`.
        seed: Of the stream of batches. Two models that train with the same
            seed and the same start see the same batches.
        start: Place in that stream.
        batch_size: Windows of a step.
        callbacks: See `fit`.
    """
    length = model.input_shape[1]
    stream = batches(tokens, length, batch_size, seed, start)
    return fit(model, stream, rate, callbacks=callbacks)


def fit(
    model: keras.Model,
    stream: Iterator[tuple],
    rate: np.ndarray,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Outcome:
    """Trains a model that `compile_for` compiled.

    Args:
        model: Its weights and its optimizer go on from where they are.
        stream: Batches without end.
        rate: As `rates` gives: `STRETCH` steps at each.
        callbacks: More callbacks of Keras's `fit`.
    """
    clock = _Clock()
    # Not a KerasHub task's own, which takes no generator.
    history = keras.Model.fit(
        model,
        stream,
        epochs=len(rate),
        steps_per_epoch=STRETCH,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(
                lambda epoch: float(rate[epoch])
            ),
            clock,
            *callbacks,
        ],
    )
    losses = [float(loss) for loss in history.history["cross_entropy"]]
    own = clock.seconds[1:] or clock.seconds
    return Outcome(
        train=float(np.mean(losses[-100 // STRETCH :])),
        seconds=float(np.mean(own) * len(losses)),
        losses=tuple(losses),
    )


def held_out(model: keras.Model, tokens: np.ndarray) -> dict[str, float]:
    """`cross_entropy` (nats a token) and `accuracy` on windows of a text.

    The same windows every time, spread evenly over the text.
    """
    length = model.input_shape[1]
    inputs, targets = windows(tokens, places(tokens, length), length)
    return evaluate(model, inputs, targets)


def places(tokens: np.ndarray, length: int) -> np.ndarray:
    """Where the windows of a test start, spread evenly over a text.

    Args:
        tokens: Text, `(T,)`.
        length: Of a window.

    Returns:
        int64, whole batches of them if there are enough.
    """
    last = len(tokens) - length - 1
    at = np.linspace(0, last, min(TESTED, last)).astype("int64")
    return at[: max(len(at) // TEST_BATCH, 1) * TEST_BATCH]


def evaluate(model: keras.Model, inputs: Any, targets: Any) -> dict[str, float]:
    """`cross_entropy` and `accuracy` of a model that `compile_for` compiled.

    Args:
        model: Gives logits.
        inputs: What it takes.
        targets: Integers.
    """
    found = keras.Model.evaluate(
        model,
        inputs,
        targets,
        batch_size=TEST_BATCH,
        verbose=0,
        return_dict=True,
    )
    return {key: float(found[key]) for key in ("cross_entropy", "accuracy")}


def state_of(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> list[list[np.ndarray]]:
    """Weights and optimizer as arrays."""
    return [
        [np.array(keras.ops.convert_to_numpy(v)) for v in part]
        for part in (model.weights, optimizer.variables)
    ]


def get_state(model: keras.Model) -> list[list[np.ndarray]]:
    """`state_of` a compiled model."""
    return state_of(model, model.optimizer)


def set_state(model: keras.Model, state: list[list[np.ndarray]]) -> None:
    """Puts back what `get_state` gave, into a model of the same shape."""
    for part, values in zip(
        (model.weights, model.optimizer.variables), state, strict=True
    ):
        for variable, value in zip(part, values, strict=True):
            variable.assign(value)


def batches(
    tokens: np.ndarray, length: int, batch_size: int, seed: int, start: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random windows of a text without end, each step drawn by its number.

    Args:
        tokens: Text, `(T,)`.
        length: Of a window.
        batch_size: Windows of a step.
        seed: Of the stream.
        start: Place in it, in steps.
    """

    def draw(rng):
        at = rng.integers(0, len(tokens) - length - 1, batch_size)
        return windows(tokens, at, length)

    return drawn(draw, seed, start)


def drawn(
    draw: Callable[[np.random.Generator], tuple], seed: int, start: int
) -> Iterator[tuple]:
    """Batches without end, each drawn by its number.

    Args:
        draw: Makes one.
        seed: Of the stream.
        start: Place in it, in steps.
    """
    while True:
        yield draw(np.random.default_rng([seed, start]))
        start += 1


def windows(
    tokens: np.ndarray, at: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and the tokens that follow, int32 `(N, length)` each.

    Args:
        tokens: Text, `(T,)`.
        at: Where windows start, int `(N,)`.
        length: Of a window.
    """
    rows = tokens[at[:, None] + np.arange(length + 1)].astype("int32")
    return rows[:, :-1], rows[:, 1:]


class _Clock(keras.callbacks.Callback):
    """Seconds of every epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)

"""The comparison of demo and example: two continuations, equal compute.

A dense model is trained. Then it trains on, once as it is and once upcycled,
from the same weights, with a fresh Adam and the same learning rate. A sparse
step costs more than a dense one, so the dense model gets more steps: both
spend the same floating-point operations. Everything goes through `model.fit`.

Training runs in rounds (the epochs of `fit`). A round of either continuation
costs the same, so their curves can be laid over one another.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Sequence

import keras
from keras import ops

from keras_upcycle.demo.batches import (
    Data,
    TestBatches,
    TrainBatches,
    WarmUpAndCoolDown,
)
from keras_upcycle.demo.results import Result, Stage
from keras_upcycle.demo.store import read_json, write_json


def trainer(
    task: keras.Model,
    stage: Stage,
    accuracy: keras.metrics.Metric | None = None,
) -> keras.Model:
    """A compiled model for `fit`, of the same graph and the same weights.

    KerasHub's tasks train from arrays, `tf.data` and Grain only; the same
    graph as a plain Keras model takes any dataset that Keras takes. Where a
    batch has sample weights, loss and metrics are weighted means: what has
    the weight 0, such as padding, does not count.

    Args:
        task: A model that returns logits.
        stage: How the model trains.
        accuracy: Metric of labels, logits and sample weights, named
            `"accuracy"`. Defaults to the share of labels that have the
            largest logit.
    """
    model = keras.Model(task.input, task.output)
    if accuracy is None:
        accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile(
        optimizer=keras.optimizers.Adam(
            WarmUpAndCoolDown(
                stage.learning_rate,
                stage.total_steps,
                warm_up=min(50, stage.total_steps // 10),
                cool_down=stage.cool_down,
            ),
            global_clipnorm=stage.clip_norm,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        # The loss again: Keras adds the model's own losses to `loss`, and
        # weights every batch alike whatever its padding.
        weighted_metrics=[
            accuracy,
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="cross_entropy"
            ),
        ],
    )
    return model


def restart_optimizer(model: keras.Model) -> None:
    """Clears the slots and the step count of a compiled model's optimizer.

    A model may then be trained from other weights without compiling again.
    """
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))


def train(
    model: keras.Model,
    data: Data,
    stage: Stage,
    *,
    name: str,
    seed: int,
    active_parameters: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    backup: pathlib.Path | None = None,
) -> Result:
    """Trains a model that `trainer` made.

    Args:
        model: What `trainer` made.
        data: A `Data`.
        stage: The `Stage` that the model was made for.
        name: Of the result.
        seed: Of the order of the batches and of what is random in them.
        active_parameters: Of the result; all of the model's if `None`.
        callbacks: More callbacks of `fit`.
        backup: Folder to which every round is backed up, and from which an
            interrupted stage goes on.

    Returns:
        A `Result`.
    """
    batches = TrainBatches(data, stage, seed)
    recorder = _Recorder(batches, backup and backup / "rounds.json")
    following = [recorder, *callbacks]
    if backup:
        following += _backing_up(backup)
    test = TestBatches(data)
    start = model.evaluate(test, verbose=0, return_dict=True)
    model.fit(
        batches,
        epochs=stage.rounds,
        validation_data=test,
        shuffle=False,
        verbose=0,
        callbacks=following,
    )
    parameters = model.count_params()
    return Result(
        name=name,
        seed=seed,
        steps=stage.total_steps,
        step_cost=stage.step_cost,
        batch_size=stage.batch_size,
        seconds=sum(record["seconds"] for record in recorder.rounds),
        parameters=parameters,
        active_parameters=active_parameters or parameters,
        start={
            "test_loss": float(start["cross_entropy"]),
            "test_accuracy": float(start["accuracy"]),
        },
        rounds=recorder.rounds,
    )


def _backing_up(folder):
    """Callbacks that back a stage up and restore it, also if killed midway."""
    state, complete = folder / "state", folder / "complete"
    if not complete.exists():
        # The very first backup was cut short: there is none to fall back on.
        shutil.rmtree(state, ignore_errors=True)
    return [
        keras.callbacks.BackupAndRestore(
            str(state), double_checkpoint=True, delete_checkpoint=False
        ),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: complete.touch()
        ),
    ]


def continued_stages(
    dense: Stage, rounds: int, flops_ratio: float
) -> tuple[Stage, Stage]:
    """Recipes for the dense and the sparse continuation, equal in compute.

    Args:
        dense: That of the dense checkpoint.
        rounds: Of each continuation.
        flops_ratio: Cost of a sparse step as a multiple of a dense step's.

    Example:
        >>> first = Stage(rounds=5, steps=100, batch_size=32)
        >>> dense, sparse = continued_stages(first, 2, flops_ratio=1.25)
        >>> dense.total_steps, sparse.total_steps
        (250, 200)
    """
    sparse = dataclasses.replace(
        dense, rounds=rounds, cool_down=0.3, step_cost=flops_ratio
    )
    more = dataclasses.replace(
        sparse, steps=round(dense.steps * flops_ratio), step_cost=1.0
    )
    return more, sparse


class _Recorder(keras.callbacks.Callback):
    """Tells the batches their round; keeps each round's figures and time."""

    def __init__(self, batches, path=None):
        super().__init__()
        self.batches = batches
        self.path = path
        self.rounds = []
        if path and path.exists():
            self.rounds = read_json(path)

    def on_epoch_begin(self, epoch, logs=None):
        del self.rounds[epoch:]  # what a restored backup does not know of
        self.batches.round = epoch
        self.warm = epoch > 0 and self.started is not None
        self.started = time.perf_counter()

    def on_train_begin(self, logs=None):
        self.started = None

    def on_train_batch_end(self, batch, logs=None):
        if not self.warm:
            self.warm = True
            self.started = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.seconds = time.perf_counter() - self.started

    def on_epoch_end(self, epoch, logs=None):
        self.rounds.append(
            {
                "train_loss": float(logs["cross_entropy"]),
                "test_loss": float(logs["val_cross_entropy"]),
                "test_accuracy": float(logs["val_accuracy"]),
                "seconds": self.seconds,
            }
        )
        if self.path:
            write_json(self.path, self.rounds)

"""The comparison of demo and example: two continuations, equal compute.

A dense model is trained. Then it trains on, once as it is and once upcycled,
from the same weights, with a fresh Adam and the same learning rate. A sparse
step costs more than a dense one, so the dense model gets more steps: both
spend the same floating-point operations. Everything goes through `model.fit`.

Training runs in rounds (the epochs of `fit`). A round of either continuation
costs the same, so their curves can be laid over one another.
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_upcycle import atomic_files, version

DENSE = "dense checkpoint"
CONTINUED = "dense continued"
UPCYCLED = "upcycled"


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples as stored; `batch` makes them what a model eats.

    Attributes:
        train: NumPy arrays with one row for each example, as many arrays as
            an example has parts (an image and its label; a text).
        test: The same, not trained on.
        batch: Function `(rows, rng, training)` to what `fit` takes, `(x, y)`
            or `(x, y, sample_weight)`; `rows` is a tuple like `train`, of a
            batch's rows, and `rng` a `numpy.random.Generator`. A test batch
            gets the same one every time.
        test_batch_size: Examples of a test batch. Defaults to 500.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    batch: Callable[[tuple[np.ndarray, ...], np.random.Generator, bool], tuple]
    test_batch_size: int = 500

    def test_inputs(self, count: int | None = None) -> Any:
        """What a model takes, of the first `count` test examples, or of all."""
        rows = tuple(part[:count] for part in self.test)
        inputs = self.batch(rows, _test_rng(0), False)[0]
        return keras.tree.map_structure(ops.convert_to_tensor, inputs)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
        rounds: Epochs of `fit`.
        steps: Steps of a round.
        batch_size: Examples of a step.
        learning_rate: Adam's, constant after a short warm-up.
        cool_down: Share of the stage at its end in which the rate falls
            linearly to zero.
        step_cost: Cost of a step as a multiple of a dense step's.
        clip_norm: Gradients whose norm, over all weights, is larger are
            scaled down to it; `None` leaves them alone.
    """

    rounds: int
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    cool_down: float = 0.0
    step_cost: float = 1.0
    clip_norm: float | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.rounds * self.steps


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one stage.

    Attributes:
        name: `DENSE`, `CONTINUED` or `UPCYCLED`.
        seed: Of the stage.
        steps: Steps of the stage.
        step_cost: Of its recipe.
        batch_size: Of its recipe.
        seconds: Spent in training steps; compilation of the first step and
            tests are not in.
        parameters: Of the model.
        active_parameters: Of what an average token meets.
        start: `test_loss` and `test_accuracy` before the first step.
        rounds: For each round a dictionary of `train_loss` (mean over the
            round), `test_loss`, `test_accuracy` and `seconds`. Losses are the
            cross-entropy alone: a router's auxiliary losses are not in.
    """

    name: str
    seed: int
    steps: int
    step_cost: float
    batch_size: int
    seconds: float
    parameters: int
    active_parameters: int
    start: dict[str, float]
    rounds: list[dict[str, float]]

    def final(self, key: str) -> float:
        """A figure of the last round."""
        return self.rounds[-1][key]


@keras.saving.register_keras_serializable(package="keras_upcycle")
class WarmUpAndCoolDown(keras.optimizers.schedules.LearningRateSchedule):
    """A constant rate, with a linear rise before and a linear fall after.

    Args:
        learning_rate: Float.
        total_steps: Steps after which the rate is zero.
        warm_up: Steps of the rise. Defaults to 50.
        cool_down: Share of `total_steps` of the fall; 0 leaves it out.

    Example:
        >>> schedule = WarmUpAndCoolDown(0.1, 100, warm_up=0, cool_down=0.5)
        >>> [round(float(schedule(step)), 3) for step in (0, 50, 75)]
        [0.1, 0.1, 0.05]
    """

    def __init__(self, learning_rate, total_steps, warm_up=50, cool_down=0.0):
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.warm_up = warm_up
        self.cool_down = cool_down

    def __call__(self, step):
        step = ops.cast(step, "float32")
        factor = ops.minimum((step + 1.0) / max(self.warm_up, 1), 1.0)
        if self.cool_down:
            fall = self.cool_down * self.total_steps
            left = (self.total_steps - step) / fall
            factor = factor * ops.clip(left, 0.0, 1.0)
        return self.learning_rate * factor

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "total_steps": self.total_steps,
            "warm_up": self.warm_up,
            "cool_down": self.cool_down,
        }


class TrainBatches(keras.utils.PyDataset):
    """Training batches; which ones depends on seed and round alone.

    So a stage that is interrupted goes on with the batches it would have
    seen. Set `round` before a round begins.

    Args:
        data: A `Data`.
        recipe: A `Recipe`.
        seed: Integer.
    """

    def __init__(self, data: Data, recipe: Recipe, seed: int):
        super().__init__()
        self.data = data
        self.recipe = recipe
        self.seed = seed
        self.round = 0
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __len__(self):
        return self.recipe.steps

    def __getitem__(self, index):
        step = self.round * self.recipe.steps + index
        in_pass = max(len(self.data.train[0]) // self.recipe.batch_size, 1)
        number, place = divmod(step, in_pass)
        start = place * self.recipe.batch_size
        chosen = self.order(number)[start : start + self.recipe.batch_size]
        rng = np.random.default_rng((self.seed, 1, step))
        rows = tuple(part[chosen] for part in self.data.train)
        return self.data.batch(rows, rng, True)

    def _order(self, number):
        rng = np.random.default_rng((self.seed, 0, number))
        return rng.permutation(len(self.data.train[0]))


class TestBatches(keras.utils.PyDataset):
    """The test examples, in order.

    What is random in a batch depends on its place alone, so figures of
    different stages can be compared.

    Args:
        data: A `Data`.
    """

    __test__ = False  # pytest takes it for a test otherwise

    def __init__(self, data: Data):
        super().__init__()
        self.data = data

    def __len__(self):
        return -(-len(self.data.test[0]) // self.data.test_batch_size)

    def __getitem__(self, index):
        start = index * self.data.test_batch_size
        part = slice(start, start + self.data.test_batch_size)
        rows = tuple(each[part] for each in self.data.test)
        return self.data.batch(rows, _test_rng(index), False)


def _test_rng(index):
    return np.random.default_rng((2, index))


def trainer(
    task: keras.Model,
    recipe: Recipe,
    accuracy: keras.metrics.Metric | None = None,
) -> keras.Model:
    """A compiled model for `fit`, of the same graph and the same weights.

    KerasHub's tasks train from arrays, `tf.data` and Grain only; the same
    graph as a plain Keras model takes any dataset that Keras takes. Where a
    batch has sample weights, loss and metrics are weighted means: what has
    the weight 0, such as padding, does not count.

    Args:
        task: A model that returns logits.
        recipe: Of the stage.
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
                recipe.learning_rate,
                recipe.total_steps,
                warm_up=min(50, recipe.total_steps // 10),
                cool_down=recipe.cool_down,
            ),
            global_clipnorm=recipe.clip_norm,
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
    recipe: Recipe,
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
        recipe: The `Recipe` that the model was made for.
        name: Of the result.
        seed: Of the order of the batches and of what is random in them.
        active_parameters: Of the result; all of the model's if `None`.
        callbacks: More callbacks of `fit`.
        backup: Folder to which every round is backed up, and from which an
            interrupted stage goes on.

    Returns:
        A `Result`.
    """
    batches = TrainBatches(data, recipe, seed)
    recorder = _Recorder(batches, backup and backup / "rounds.json")
    following = [recorder, *callbacks]
    if backup:
        following += _backing_up(backup)
    test = TestBatches(data)
    start = model.evaluate(test, verbose=0, return_dict=True)
    model.fit(
        batches,
        epochs=recipe.rounds,
        validation_data=test,
        shuffle=False,
        verbose=0,
        callbacks=following,
    )
    parameters = model.count_params()
    return Result(
        name=name,
        seed=seed,
        steps=recipe.total_steps,
        step_cost=recipe.step_cost,
        batch_size=recipe.batch_size,
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


def continue_recipes(
    dense: Recipe, rounds: int, flops_ratio: float
) -> tuple[Recipe, Recipe]:
    """Recipes for the dense and the sparse continuation, equal in compute.

    Args:
        dense: The recipe of the dense checkpoint.
        rounds: Of each continuation.
        flops_ratio: Cost of a sparse step as a multiple of a dense step's.

    Example:
        >>> first = Recipe(rounds=5, steps=100, batch_size=32)
        >>> dense, sparse = continue_recipes(first, 2, flops_ratio=1.25)
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


class Store:
    """Finished stages on disk: each a result and the trained weights.

    Args:
        folder: Made if it is missing.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def backup(self, key: str) -> pathlib.Path:
        """Where the unfinished stage `key` is backed up."""
        folder = self.folder / f"{key}.unfinished"
        folder.mkdir(exist_ok=True)
        return folder

    def load(self, key: str, model: keras.Model) -> Result | None:
        """The result of stage `key`, its weights put into `model`."""
        result = self.folder / f"{key}.json"
        if not result.exists():
            return None
        model.load_weights(self._weights(key))
        return Result(**read_json(result))

    def save(self, key: str, model: keras.Model, result: Result) -> None:
        """Keeps a finished stage; its backup goes."""
        model.save_weights(self._weights(key))
        write_json(self.folder / f"{key}.json", dataclasses.asdict(result))
        shutil.rmtree(self.backup(key))

    def _weights(self, key):
        return self.folder / f"{key}.weights.h5"


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that an interruption leaves the old file or the new."""
    text = json.dumps(content, indent=1) + "\n"
    atomic_files.replace(path, lambda draft: draft.write_text(text))


def read_json(path: pathlib.Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())


def write_results(
    path: pathlib.Path, results: Sequence[Result], **more: Any
) -> None:
    """Writes all figures of a comparison, and on what they were made.

    Args:
        path: Of the JSON file.
        results: Of all stages.
        **more: Other entries; a dataclass becomes a dictionary.
    """
    entries = {
        key: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value)
        else value
        for key, value in more.items()
    }
    made_on = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "keras_upcycle": version.__version__,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
    }
    write_json(
        path,
        {
            "made_on": made_on,
            **entries,
            "results": [dataclasses.asdict(result) for result in results],
        },
    )


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

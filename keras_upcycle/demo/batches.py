"""Batches for `fit`, the same in every run, and a learning rate that falls."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle.demo.results import Stage


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
        stage: A `Stage`.
        seed: Integer.
    """

    def __init__(self, data: Data, stage: Stage, seed: int):
        super().__init__()
        self.data = data
        self.stage = stage
        self.seed = seed
        self.round = 0
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, index):
        step = self.round * self.stage.steps + index
        in_pass = max(len(self.data.train[0]) // self.stage.batch_size, 1)
        number, place = divmod(step, in_pass)
        start = place * self.stage.batch_size
        chosen = self.order(number)[start : start + self.stage.batch_size]
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

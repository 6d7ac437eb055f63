"""What moves once an optimizer step, and not once a batch.

A layer's call sees batches. With `gradient_accumulation_steps` several of them
make one step of the optimizer, and under `tf.distribute` several replicas.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.types import Tensor


def batches_per_step(given: int | None = None) -> int:
    """How many training calls make one step of the optimizer.

    Args:
        given: What the user said; `None` for what the optimizer says of the
            model whose `train_step` is running, and 1 in any other loop.
    """
    if given is not None:
        return int(given)
    return _accumulated(keras_internals.optimizer_of_step())


def _accumulated(optimizer: Any) -> int:
    if optimizer is None:
        return 1
    inner = getattr(optimizer, "inner_optimizer", None)  # of a loss scale
    if inner is not None:
        return _accumulated(inner)
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return max(_accumulated(part) for part in optimizer.optimizers)
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


class GatheredOverStep(keras_internals.StepState):
    """Sums over the batches of one optimizer step.

    Held by a layer as an attribute that is set before the layer is built.
    Zeros, and not touched, where a step has one batch.

    Args:
        shapes: Of the sums.
        name: Of the variable that holds them.
    """

    def __init__(self, shapes: tuple[tuple[int, ...], ...], name: str):
        self.shapes = shapes
        size = sum(math.prod(shape) for shape in shapes)
        # The last number counts batches. What is added is the same in all
        # replicas.
        super().__init__((size + 1,), name, "only_first_replica")

    def add(
        self, values: tuple[Tensor, ...], batches: int
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Adds a batch.

        Args:
            values: Tensors of `shapes`, summed over replicas already.
            batches: How many make a step.

        Returns:
            `(sums, last)`: the sums of this step so far, in the dtypes of
            `values`, and whether the step is complete, as a bool or a scalar
            bool tensor. After a complete step they start again at 0.
        """
        if batches == 1:
            return values, True
        flat = [
            ops.reshape(ops.cast(value, "float32"), (-1,)) for value in values
        ]
        row = ops.concatenate([*flat, ops.ones((1,), "float32")], axis=0)
        row = ops.convert_to_tensor(self.state) + ops.stop_gradient(row)
        last = row[-1] >= batches
        self.state.assign(ops.where(last, ops.zeros_like(row), row))
        sums, start = [], 0
        for value, shape in zip(values, self.shapes, strict=True):
            end = start + math.prod(shape)
            part = ops.reshape(row[start:end], shape)
            sums.append(ops.cast(part, value.dtype))
            start = end
        return tuple(sums), last

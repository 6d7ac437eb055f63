"""Where tensors lie on several devices or replicas: on one, nothing to do.

The other half of `portable`: what only some backends have, as it is where
there is one device.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_upcycle.types import Tensor


def lay_out(
    make: Callable[..., Tensor], shape: tuple, dtype: str, layout: object
) -> Tensor:
    """A variable's first value, laid out over devices.

    Args:
        make: `(shape, dtype) -> tensor`.
        shape: Of the variable.
        dtype: Of the variable.
        layout: What Keras hands to initializers; only JAX has layouts.

    Returns:
        The tensor, of that shape.
    """
    del layout
    return make(shape, dtype)


def to_experts(split: Tensor, placement: Any) -> Tensor:
    """Buffers of groups to those of experts.

    Args:
        split: `(G, E, C, D)`.
        placement: `None`, or where groups and experts lie on a mesh, as a
            `distribution.Placement` says; only JAX has one.

    Returns:
        `(E, G, C, D)`.
    """
    del placement
    return ops.transpose(split, (1, 0, 2, 3))


def to_groups(split: Tensor, placement: Any) -> Tensor:
    """`to_experts` undone.

    Args:
        split: `(E, G, C, D)`.
        placement: As for `to_experts`.

    Returns:
        `(G, E, C, D)`.
    """
    del placement
    return ops.transpose(split, (1, 0, 2, 3))


def on_each_device(
    function: Callable, placement: Any, rows: Any, kernels: Any
) -> Any:
    """Runs a function once a device, on its own tokens and experts.

    Args:
        function: `(device, rows, kernels) -> (rows, by_expert)`; `device` has
            `gather`, `add_up`, `add_over_others` and `number`.
        placement: A `distribution.Placement`.
        rows: Tensors `(T, ...)`, split as examples are.
        kernels: Tensors `(E, ...)`, split as experts are.

    Returns:
        What the function returned, `(T, ...)` and `(E, ...)`.
    """
    raise NotImplementedError(
        "Experts lie on several devices on the JAX backend. Received: "
        f"{placement}. Set KERAS_BACKEND=jax."
    )


def is_at_hand(value: Tensor) -> bool:
    """Whether this process can read all of a value.

    Args:
        value: Of a variable.
    """
    del value
    return True


def num_replicas() -> int:
    """How many copies of the model share a step, each with its own batch.

    Of `tf.distribute`; 1 everywhere else, where a batch is one batch however
    many devices hold it.
    """
    return 1


def replica_number() -> int:
    """Which of `num_replicas` is running, from 0."""
    return 0


def sum_over_replicas(x: Tensor) -> Tensor:
    """The sum of what all replicas of a step pass; `x` itself where one is.

    Args:
        x: A tensor of the same shape in all replicas.

    Returns:
        The same in all replicas.
    """
    return x

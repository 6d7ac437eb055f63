"""Dense kernels to expert kernels: what experts hold when they start."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_upcycle.types import Tensor

# (value, num_experts, name) -> expert values with a leading axis `E`. `name`
# is "up_kernel" `(D, F)`, "up_bias" `(F,)`, "gate_...", "down_kernel"
# `(F, D)` or "down_bias" `(D,)`.
ExpertInit: TypeAlias = Callable[[Tensor, int, str], Tensor]


def copy(value: Tensor, num_experts: int, name: str) -> Tensor:
    """Every expert is the dense block: Sparse Upcycling, figure 1.

    Args:
        value: A kernel or bias of the dense block, any shape.
        num_experts: Integer, `E`.
        name: Which one; not used.

    Returns:
        `(E, *value.shape)`.

    Example:
        >>> tuple(copy(keras.ops.ones((8, 16)), 4, "up_kernel").shape)
        (4, 8, 16)
    """
    value = ops.expand_dims(value, 0)
    if num_experts == 1:
        # A tiling of one may be the same buffer, which training the result
        # would then donate, and the donor would be gone.
        return ops.copy(value)
    return ops.tile(value, (num_experts,) + (1,) * (len(value.shape) - 1))


INITS: dict[str, ExpertInit] = {"copy": copy}


def get(identifier: Any) -> ExpertInit:
    """The expert initialisation with that name, or the function itself.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor callable.
    """
    if callable(identifier):
        return identifier
    if not isinstance(identifier, str):
        raise TypeError(
            "`expert_init` must be a name or a function (value, num_experts, "
            f"name) -> expert values. Received: expert_init={identifier!r} "
            f"of type {type(identifier).__name__}."
        )
    if identifier not in INITS:
        raise ValueError(
            f"`expert_init` must be one of {sorted(INITS)} or a function. "
            f"Received: expert_init={identifier!r}."
        )
    return INITS[identifier]


def first_values(
    init: ExpertInit, donor: dict[str, keras.Variable], num_experts: int
) -> dict[str, Callable]:
    """What `Experts.start_from` takes, from a dense block's variables.

    Args:
        init: An expert initialisation.
        donor: From `"up_kernel"`, `"up_bias"`, ... to the dense variable. A
            stacked bias has the shape `(E, 1, F)`.
        num_experts: Integer, `E`.

    Returns:
        From the same names to initializers. The values are made one kernel at
        a time, when the weight is built.
    """

    def initializer(name, variable):
        def value(shape, dtype=None):
            result = init(variable.value, num_experts, name)
            return ops.reshape(ops.cast(result, dtype), shape)

        return value

    return {
        name: initializer(name, variable) for name, variable in donor.items()
    }

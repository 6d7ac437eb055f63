"""Routers made of others: of whose settings people have been told."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import keras
import numpy as np
from keras import ops

from keras_upcycle.types import Tensor

# Whether a router is made from settings that someone has met before.
_REMADE: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_upcycle_remade", default=False
)


@contextlib.contextmanager
def remade() -> Iterator[None]:
    """Routers made inside are made again: what was to be said was said."""
    token = _REMADE.set(True)
    try:
        yield
    finally:
        _REMADE.reset(token)


def is_remade() -> bool:
    """Whether a router is made again, from settings met before."""
    return _REMADE.get()


def value_of(
    variable: keras.Variable, shape: tuple, index: Sequence[int]
) -> Tensor:
    """A weight for other experts, of which each is one of those there were.

    Whatever axis has another length is the experts', so that routers may have
    weights of any shape.

    Args:
        variable: The weight that is there.
        shape: Of the one to be made.
        index: Old numbers of the experts there are now.
    """
    value = ops.copy(variable.value)
    for axis, (before, after) in enumerate(
        zip(variable.shape, shape, strict=True)
    ):
        if before != after:
            value = ops.take(value, np.array(index, "int32"), axis=axis)
    return value

"""Routers made of others: of whose settings people have been told."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops

from keras_upcycle.types import Tensor

_Router = TypeVar("_Router", bound=keras.layers.Layer)
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


def clone(router: _Router, seed: int | None = None, **settings: Any) -> _Router:
    """A router with the same settings and weights of its own.

    Args:
        router: Any router.
        seed: Seed for the clone's kernel, where its initializer takes one.
            `None` keeps the initializer's own, which draws one if it has none.
        **settings: Those that differ.
    """
    initializer = router.kernel_initializer
    if isinstance(initializer, keras.initializers.Initializer):
        fresh = initializer.get_config()
        if seed is not None and "seed" in fresh:
            fresh["seed"] = seed
        initializer = type(initializer).from_config(fresh)
    # Objects and not their configs: a function of the user's own has none.
    config = {
        **router.get_config(),
        **router.scheduled,
        "kernel_initializer": initializer,
        **settings,
    }
    with remade():
        return type(router).from_config(config)

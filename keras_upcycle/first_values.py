"""What a new variable holds, also where a `keras.distribution` is set."""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_upcycle import backend


class LaidOut(keras.initializers.Initializer):
    """A function as an initializer that lays its value out over devices.

    Under a distribution Keras compiles the initializer of a large variable
    (250 MiB on all devices together), which a plain function does not survive,
    and which would make constants of whatever the function reads. An
    initializer that takes a `layout` is called as it is instead, for large
    variables and small. Keras 3.15.

    Args:
        make: `(shape, dtype) -> tensor`. It may read other variables; its
            value must not be written to afterwards.

    Example:
        >>> value = LaidOut(lambda shape, dtype: keras.ops.ones(shape, dtype))
        >>> tuple(value((2, 3), "float32").shape)
        (2, 3)
    """

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, shape, dtype=None, layout=None):
        if layout is None:
            return self.make(shape, dtype)
        return backend.lay_out(self.make, shape, dtype, layout)


def laid_out(initializer: Any) -> Any:
    """`initializer`, as a `LaidOut` where it takes no layout itself."""
    if "layout" in inspect.signature(initializer).parameters:
        return initializer
    return LaidOut(initializer)

"""What a new variable holds, also where a `keras.distribution` is set."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import backend, checks


def initializer_of(name: str, value: Any) -> Any:
    """An initializer as Keras takes it, made a function.

    Args:
        name: Of the argument.
        value: A name, a config, a class or an object.

    Raises:
        TypeError: If it is none that can be called with a shape.
        ValueError: If Keras knows none of that name.
    """
    made = checks.check_known(
        name, value, keras.initializers.get, "an initializer"
    )
    # Keras makes an object of any class, and of `None` nothing.
    if isinstance(made, keras.Layer) or not callable(made):
        raise TypeError(
            f"`{name}` must be an initializer, (shape, dtype) -> value. "
            f"Received: {name}={value!r} of type {type(value).__name__}. Pass "
            'one of `keras.initializers`, or its name, such as "zeros".'
        )
    return made


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


class ByExpert:
    """A first value of stacked experts, of which each can be made by itself.

    Where experts are spread over devices, each device's are made there, and
    nobody holds all of them.

    Args:
        make: From numbers of experts to their values, stacked, in the order of
            the weight's elements. The same number must give the same value
            every time.

    Example:
        >>> value = ByExpert(
        ...     lambda experts: np.stack([np.full((2, 3), e) for e in experts])
        ... )
        >>> float(value((4, 2, 3), "float32")[3, 0, 0])
        3.0
    """

    def __init__(self, make: Callable[[Sequence[int]], Any]):
        self._make = make

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """The value of all experts."""
        return self.some(range(shape[0]), shape, dtype)

    def some(
        self, experts: Sequence[int], shape: Sequence[int], dtype: Any = None
    ) -> Any:
        """The value of some experts, `(len(experts), *shape[1:])`.

        Args:
            experts: Their numbers.
            shape: Of the whole weight.
            dtype: Of the weight.
        """
        value = ops.convert_to_tensor(self._make(experts), dtype)
        return ops.reshape(value, (len(experts), *shape[1:]))

    def times(self, factor: float) -> "ByExpert":
        """The same, multiplied."""
        return ByExpert(lambda experts: self._make(experts) * factor)


class Copies:
    """A first value of stacked experts that are all one weight.

    Args:
        source: What has the weight as `value`.
    """

    def __init__(self, source: Any):
        self.source = source

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """The value of all experts."""
        return self.of(self.source.value, shape, dtype)

    def of(self, value: Any, shape: Sequence[int], dtype: Any) -> Any:
        """Experts that are all `value`; each may be made where it lies."""
        value = ops.reshape(ops.cast(value, dtype), (1, *shape[1:]))
        if shape[0] == 1:
            # A tiling of one may be the same buffer, which training the result
            # would then donate, and the donor would be gone.
            return ops.copy(value)
        return ops.tile(value, (shape[0],) + (1,) * (len(shape) - 1))


def laid_out(initializer: Any) -> Any:
    """`initializer`, as a `LaidOut` where it takes no layout itself."""
    if "layout" in inspect.signature(initializer).parameters:
        return initializer
    return LaidOut(initializer)


def by_expert(initializer: Any, name: str) -> LaidOut:
    """Draws every expert by itself, as the weight of a `Dense` of its own.

    On the whole stack `(E, D, F)` Keras would take the expert axis for a part
    of the fan-in, which makes experts too small by the square root of `E`, or
    for rows of one orthogonal matrix. And an initializer, seeded or not, gives
    the same numbers at every call: its seed is turned into one for each expert
    of each weight. A `SeedGenerator` gives new numbers at every call by
    itself, and an initializer without a seed is called as it is.

    Args:
        initializer: Keras's or any other, `(shape, dtype) -> tensor`. It is
            not changed.
        name: Of the weight, such as `"up_kernel"`: weights of other names
            draw other numbers.

    Returns:
        An initializer for `(E, D, F)`, or for `(E, 1, F)` where the name ends
        in `"bias"`; each expert's shape is `(D, F)` or `(F,)`.

    Example:
        >>> draw = by_expert(keras.initializers.HeNormal(seed=1), "up_kernel")
        >>> kernels = keras.ops.convert_to_numpy(draw((2, 64, 64), "float32"))
        >>> bool((kernels[0] == kernels[1]).any())
        False
    """
    return LaidOut(_Drawn(initializer, name))


class _Drawn(ByExpert):
    """What an initializer draws for each expert by itself."""

    def __init__(self, initializer, name):
        self._initializer, self._name = initializer, name

    def some(self, experts, shape, dtype=None):
        initializer, name = self._initializer, self._name
        own = tuple(shape[2:] if name.endswith("bias") else shape[1:])
        drawn = [
            of_expert(initializer, name, expert)(own, dtype=dtype)
            for expert in experts
        ]
        for value in drawn:
            if tuple(ops.shape(value)) != own:
                raise ValueError(
                    "An initializer is called for one expert at a time and "
                    f"must return what it is asked for: {own} of {name!r}. "
                    f"Received: {initializer!r}, which returned a tensor of "
                    f"shape {tuple(ops.shape(value))}."
                )
        return ops.reshape(ops.stack(drawn), (len(experts), *shape[1:]))


def of_expert(initializer: Any, name: str, expert: int) -> Any:
    """What `by_expert` draws one expert from: the same with another seed."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int) or isinstance(seed, bool):
        return initializer
    words = [seed % 2**64, expert, *name.encode()]
    (own,) = np.random.SeedSequence(words).generate_state(1)
    # A copy, and not a new one from the config, which need not hold the seed.
    initializer = copy.copy(initializer)
    initializer.seed = int(own >> 1)
    return initializer

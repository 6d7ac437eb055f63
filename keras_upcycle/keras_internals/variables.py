"""Variables: whose they are, and values that come later or are gone."""

import contextlib
from collections.abc import Callable

import keras

# Where Keras lists variables that wait for a value; see `without_values`.
from keras.src.backend.common import global_state

from keras_upcycle.keras_internals.state import seed_generators


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Variables that the layer itself made, seeds' state included.

    The public `variables` adds the sub-layers' to them. What `UnsavedState`
    holds is no part of a model and is left out. Keras 3.15.
    """
    seeds = [seed.state for seed in seed_generators(layer)]
    return [
        *layer._trainable_variables,
        *layer._non_trainable_variables,
        *seeds,
    ]


def metric_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Variables of metrics that the layer itself holds.

    Those of a model are what `compile` made. `Layer._metrics`, Keras 3.15.
    """
    if isinstance(layer, keras.Model):
        return []
    return [v for metric in layer._metrics for v in metric.variables]


def lost_variables(model: keras.Layer) -> list[keras.Variable]:
    """Variables that had a value and have none any more.

    On JAX Keras takes the values out of a model while `fit`, `evaluate` or
    `predict` runs; where `predict` or `evaluate` fails they are not put back.
    One made under `without_values` still knows how to draw its first. Keras
    3.15.
    """
    return [
        variable
        for variable in model.variables
        if not has_value(variable) and variable._initializer is None
    ]


@contextlib.contextmanager
def values_kept(model: keras.Layer):
    """Gives a model back what a failed `predict` inside took out of it.

    See `lost_variables`. What a first batch had computed with before a later
    one failed may be deleted on the device, and stays lost. `Variable._value`,
    Keras 3.15.
    """
    before = [
        (variable, variable._value)
        for variable in model.variables
        if has_value(variable)
    ]
    try:
        yield
    finally:
        for variable, value in before:
            deleted = getattr(value, "is_deleted", bool)
            if not has_value(variable) and not deleted():
                variable._value = value


class Reshaped(keras.Variable):
    """A variable seen in another shape: it holds nothing itself.

    Keras's operations take it as they take any variable, and what is assigned
    to it goes to the variable that it shows. Of `keras.Variable` it has what
    is written here; nothing is tracked. Keras 3.15.

    Args:
        source: A variable.
        shape: Of as many elements.
    """

    def __init__(self, source, shape):
        self.source = source
        self._shape = tuple(shape)
        self._trainable = source.trainable
        self._autocast = source._autocast
        self._dtype = source._dtype
        self._name, self._path = source.name, source.path
        self._initializer = None
        self.regularizer = self.constraint = None

    @property
    def value(self):
        """The other's value, in this shape."""
        return keras.ops.reshape(self.source.value, self._shape)

    @property
    def _value(self):
        return None if self.source._value is None else self.value

    @property
    def trainable(self):
        """The other's flag."""
        return self.source.trainable

    def assign(self, value):
        """Assigns to the other."""
        value = keras.ops.reshape(value, self.source.shape)
        return self.source.assign(value)


def shown(variable):
    """The variable that a `Reshaped` shows; any other is itself."""
    return getattr(variable, "source", variable)


@contextlib.contextmanager
def without_values():
    """Layers made inside have variables of a shape but without a value.

    Spares drawing random values that nobody reads, and the memory of a model
    of which only the shapes are wanted. `set_first_value` and
    `draw_first_values` give them one. It is what the public `StatelessScope`
    does when told not to initialise on exit; but then the next scope that is
    not told so initialises what is on Keras's list, so the list is put back
    as it was. Keras 3.15.
    """
    waiting = "uninitialized_variables"
    before = list(global_state.get_global_attribute(waiting, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(waiting, before)


def has_value(variable: keras.Variable) -> bool:
    """Whether the variable has been initialised. `Variable._value`, 3.15."""
    return variable._value is not None


def set_first_value(variable: keras.Variable, make: Callable) -> None:
    """Gives a variable made under `without_values` its value.

    `Variable._initializer` and `_deferred_initialize`, Keras 3.15.

    Args:
        variable: Without a value.
        make: As an initializer, `(shape, dtype) -> tensor`; whatever holds
            the tensor must not be written to afterwards.
    """
    variable._initializer = make
    variable._deferred_initialize()


def draw_first_values(layer: keras.Layer) -> None:
    """Lets every variable that has no value yet take its initializer's."""
    for variable in layer.variables:
        if not has_value(variable):
            variable._deferred_initialize()

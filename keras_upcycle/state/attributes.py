"""Attributes that came after construction, and copies of them."""

import copy
import types

import keras
import numpy as np
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.state.values import (
    KERAS,
    captured,
    dumped,
    is_array,
    plain,
    same,
)

_REMEDY = (
    "Give it a `get_config` that makes an equal layer, or the methods "
    "`save_own_variables` and `load_own_variables`, or `save_assets` and "
    "`load_assets`, that bring its state across, as a saved model needs too."
)
_LIBRARIES = ("keras", "keras_hub", "tensorflow", "torch", "jax", "jaxlib")


def copier(source):
    """A first value: the source's, in a buffer of its own."""

    def copy(shape, dtype=None):
        return ops.copy(ops.cast(source.value, dtype))

    return copy


# Plain attributes.


def attributes(layer):
    """`(name, value)` of what a class put into its instance."""
    skipped = keras_internals.base_attributes(layer)
    for name, value in list(vars(layer).items()):
        # TensorFlow's and Python's own bookkeeping.
        if name in skipped or name.startswith(("_self_", "_obj_", "__")):
            continue
        yield name, value
    yield from keras_internals.torch_tensors(layer).items()


def copy_attributes(old, new, attributes):
    """Gives `new` those of the attributes that it has not."""
    theirs = {**vars(new), **keras_internals.torch_tensors(new)}
    for name, value in attributes:
        missing = theirs.get(name) is None
        if isinstance(value, keras.Variable):
            if missing:
                _add_variable(new, name, value)
            continue
        if isinstance(value, types.MethodType) and value.__self__ is old:
            if missing:
                setattr(new, name, types.MethodType(value.__func__, new))
            continue
        if same(value, theirs.get(name)):
            continue
        if _belongs_elsewhere(value, old):
            if missing and isinstance(value, types.FunctionType):
                raise lost(
                    old, f"its attribute {name!r} is a function of the layer"
                )
            continue
        try:
            copied = _copied(value)
        except Exception as error:
            # Made by the constructor, it is what the config asks for.
            if not missing:
                continue
            raise lost(
                old,
                f"its attribute {name!r} of type {type(value).__name__} came "
                "after construction and cannot be copied "
                f"({type(error).__name__}: {error})",
            ) from error
        keras_internals.set_attribute(new, name, copied)


def _add_variable(new, name, variable):
    """A variable that the layer made after it was built, in the copy too."""
    made = keras.Variable(
        ops.copy(variable.value),
        shape=variable.shape,
        dtype=variable.dtype,
        trainable=variable.trainable,
        name=variable.name,
    )
    keras_internals.set_attribute(new, name, made)


def _belongs_elsewhere(value, old):
    """Whether a value is a part of a model, or of a library: not data."""
    if is_array(value):
        return False
    if isinstance(value, types.FunctionType):
        return any(
            inside is old or isinstance(inside, KERAS)
            for inside in captured(value)
        )
    if isinstance(value, KERAS):
        return True
    return type(value).__module__.partition(".")[0] in _LIBRARIES and not (
        isinstance(value, list | dict | tuple | set)
    )


def _copied(value):
    if is_array(value):
        if isinstance(value, np.ndarray):
            return np.array(value)
        return ops.copy(value) if ops.is_tensor(value) else value
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return value
    dumped(value)  # raises for what holds parts of a model
    return copy.deepcopy(plain(value))


def lost(layer, why):
    """The error for what cannot be carried over."""
    return UpcycleError(
        f"Layer {layer.name!r} ({type(layer).__name__}) cannot be carried over "
        f"with all that it holds: {why}. {_REMEDY}"
    )

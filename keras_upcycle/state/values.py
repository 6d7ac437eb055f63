"""Values of attributes: as plain data, as bytes; whether two are the same."""

import io
import pickle
import types
from typing import Any

import keras
import numpy as np
from keras import ops

# Their place in a model, and what they count, is their own layer's.
KERAS = (
    keras.Variable,
    keras.KerasTensor,
    keras.Layer,
    keras.Operation,
    keras.Metric,
    keras.random.SeedGenerator,
)
SCALARS = (bool, int, float, complex, str, bytes, np.generic, type(None))


def is_array(value):
    """Whether a value is an array of any library, a variable's among them."""
    return (
        hasattr(value, "shape")
        and hasattr(value, "dtype")
        and not isinstance(value, (*KERAS, np.generic))
        and not isinstance(value, type)
    )


def captured(function):
    """What a function holds: its closure and its defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = list(function.__defaults__ or ())
    return [*cells, *defaults, *(function.__kwdefaults__ or {}).values()]


class _DataPickler(pickle.Pickler):
    """Writes data, and refuses what is a part of a model."""

    def persistent_id(self, obj):
        if isinstance(obj, KERAS):
            raise TypeError(f"a {type(obj).__name__} is inside")


def dumped(value):
    """A value as bytes; raises for what holds parts of a model."""
    written = io.BytesIO()
    _DataPickler(written).dump(plain(value))
    return written.getvalue()


def plain(value):
    """Containers without Keras's and TensorFlow's watch over them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain, value))
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    return value


def same(a: Any, b: Any) -> bool | None:
    """Whether two values are the same data; `None` where nobody can tell."""
    if a is b:
        return True
    if isinstance(a, SCALARS) and isinstance(b, SCALARS):
        both_nan = a != a and b != b
        return bool(type(a) is type(b) and (a == b or both_nan))
    if is_array(a):
        return _same_arrays(a, b)
    if isinstance(a, types.FunctionType) and isinstance(b, type(a)):
        return _same_functions(a, b)
    try:
        data = dumped(a)
    except Exception:  # whatever is inside may refuse in its own way
        return None
    try:
        return data == dumped(b)
    except Exception:
        return False


def _same_arrays(a, b):
    try:
        a = as_numpy(a)
    except Exception:  # a symbol, of a trace that is over
        return None
    if not is_array(b):
        return False
    try:
        b = as_numpy(b)
    except Exception:
        return False
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and (a.tobytes() == b.tobytes() or bool(np.all(a == b)))
    )


def _same_functions(a, b):
    if a.__code__ is not b.__code__:
        return False
    pairs = zip(captured(a), captured(b), strict=False)
    return all(same(x, y) is not False for x, y in pairs)


def as_numpy(value):
    """An array of any library as NumPy's."""
    if isinstance(value, keras.Variable):
        value = value.value
    if ops.is_tensor(value):
        return np.array(ops.convert_to_numpy(value))
    return np.array(value)

"""Losses, metrics and the like made anew: of the same settings, no state."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_upcycle import keras_internals


class CannotRemake(Exception):
    """Why an object could not be made anew."""


def remake(thing: Any, config: Mapping[str, Any] | None = None) -> Any:
    """A new object like `thing`, which need not be registered.

    Made by `from_config`. A config may say less than `__init__` takes, and the
    object come back silently with a default (Keras 3.15's own `Huber` does):
    so every argument that the config leaves out is taken from the attribute
    of its name, and compared afterwards.

    Args:
        thing: A Keras metric, loss, schedule or optimizer, or one like it.
        config: To take in place of its own.

    Returns:
        An object of the same class that shares no variable with `thing`.

    Raises:
        CannotRemake: With the reason in a few words.
    """
    if type(thing) is keras.metrics.MeanMetricWrapper:
        function, arguments = keras_internals.wrapped_function(thing)
        named = {"name": thing.name, "dtype": thing.dtype}
        return type(thing)(function, **named, **arguments)
    taken, any_other = _parameters(type(thing))
    config = _config(thing) if config is None else dict(config)
    if config is None:
        if any_other:
            raise CannotRemake("it has no `get_config`")
        config = {}
    untold = _untold(thing, taken, config)
    unknown = [name for name, value in untold.items() if value is _MISSING]
    if unknown:
        raise CannotRemake(f"its `get_config` leaves out {unknown[0]!r}")
    try:
        new = type(thing).from_config(dict(config))
        error = None
    except Exception as failure:  # a user's class may fail in its own way
        new, error = None, failure
    if new is None or not _have(new, untold):
        known = {
            name: value
            for name, value in config.items()
            if any_other or name in taken
        }
        try:
            new = type(thing)(**known, **untold)
        except Exception as failure:
            error = error or failure
            raise CannotRemake(f"{type(error).__name__}: {error}") from error
    if not _have(new, untold):
        differ = [n for n in untold if not _have(new, {n: untold[n]})]
        raise CannotRemake(f"its `get_config` leaves out {differ[0]!r}")
    if _variables(new) & _variables(thing):
        raise CannotRemake("a copy would share its state")
    return new


_MISSING = object()


def _config(thing):
    with warnings.catch_warnings():
        # Of functions that will not be read back.
        warnings.simplefilter("ignore")
        try:
            return dict(thing.get_config())
        except Exception:  # none, or not implemented
            return None


def _parameters(cls):
    """Names that `__init__` takes, and whether it takes any other.

    Where it hands what else it is given to the next class, that one's too.
    """
    names: dict[str, None] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        found = list(inspect.signature(each.__init__).parameters.values())[1:]
        kinds = {parameter.kind for parameter in found}
        names |= {p.name: None for p in found if p.kind in _NAMED}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return names, False
    return names, True


_NAMED = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def _untold(thing, taken, config):
    """Values of the arguments of which the config says nothing."""
    untold = {}
    for name in taken:
        if name in config or name == "dtype":
            continue
        value = _attribute(thing, name)
        if isinstance(value, keras.metrics.Metric):
            value = remake(value)
        if isinstance(value, keras.Variable):
            value = _MISSING
        untold[name] = value
    return untold


def _attribute(thing, name):
    for own in (name, f"_{name}"):
        value = getattr(thing, own, _MISSING)
        if value is not _MISSING:
            return value
    return getattr(thing, "_fn_kwargs", {}).get(name, _MISSING)


def _have(new, values):
    """Whether an object has these attributes, by one name or the other."""
    for name, value in values.items():
        if not _equal(_attribute(new, name), value):
            return False
    return True


def _equal(a, b):
    if isinstance(a, keras.metrics.Metric):
        return type(a) is type(b)
    return same(a, b)


def same(a: Any, b: Any) -> bool:
    """Whether two settings, or structures of them, surely are the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return bool(np.all(a == b))
    except Exception:  # what does not say whether it is equal is not
        return False


def _variables(thing):
    own = getattr(thing, "variables", ())
    return {id(variable) for variable in own if variable is not None}

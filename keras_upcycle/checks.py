"""Checks of settings: what was expected, what came, what to do.

Each check returns the value as Python's own, for a layer's attributes and so
for its config, which NumPy's numbers would keep from being written as JSON. An
array of NumPy's without axes is the number in it. `bool` is no number, and a
number no `bool`: who mixes them up has most likely mixed up two arguments.
"""

import importlib.util
import inspect
import math
import numbers
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# What every backend takes: on torch the states of Keras's seeds are int32.
LARGEST_SEED = 2**31 - 1
_BYTES = {
    **{f"{letter}B": 10 ** (3 * n) for n, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 2 ** (10 * n) for n, letter in enumerate("KMGT", 1)},
}


def check_choice(name: str, value: Any, known: Iterable) -> Any:
    """Raises `ValueError` unless `value` is one of `known`: words, or `None`.

    Args:
        name: Of the argument.
        value: What was given.
        known: What there is to choose from.

    Example:
        >>> check_choice("side", "left", ("left", "right"))
        'left'
    """
    known = list(known)
    # Only words are compared: an array would answer entry by entry.
    word = isinstance(value, str | None)
    if not word or value not in known:
        raise ValueError(
            f"`{name}` must be one of {known}. Received: {name}={value!r}"
            f"{'' if word else f' of type {type(value).__name__}'}."
        )
    return None if value is None else str(value)


def check_flag(name: str, value: Any) -> bool:
    """Raises `TypeError` unless `value` is a `bool`, Python's or NumPy's.

    Example:
        >>> check_flag("gated", np.True_)
        True
    """
    value = _out_of_array(value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r} of "
            f"type {type(value).__name__}."
        )
    return bool(value)


def check_count(name: str, value: Any) -> int:
    """Raises unless `value` is an integer of at least 1.

    Example:
        >>> check_count("top_k", np.int64(2))
        2
    """
    value = check_integer(name, value)
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1. Received: {name}={value}."
        )
    return value


def check_integer(name: str, value: Any) -> int:
    """Raises `TypeError` unless `value` is an integer."""
    if not is_integer(value):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, Python's or NumPy's; `bool` is none."""
    value = _out_of_array(value)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_seed(name: str, value: Any) -> Any:
    """Raises unless `value` is a seed, or `None` to draw one.

    Example:
        >>> check_seed("seed", np.int64(3))
        3
    """
    if value is None:
        return None
    if not is_integer(value):
        raise TypeError(
            f"`{name}` must be an integer, or `None` to draw one. Received: "
            f"{name}={value!r} of type {type(value).__name__}."
        )
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(
            f"`{name}` must be from 0 to {LARGEST_SEED}, or `None` to draw "
            f"one. Received: {name}={value}."
        )
    return int(value)


def check_number(name: str, value: Any, at_least: float) -> int | float:
    """Raises unless `value` is a finite number of at least `at_least`.

    Example:
        >>> check_number("z_loss", np.float32(0.5), at_least=0.0)
        0.5
    """
    value = _out_of_array(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number:
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        finite = False
    if not finite or value < at_least:
        limit = "" if math.isinf(at_least) else f" and at least {at_least}"
        raise ValueError(
            f"`{name}` must be finite{limit}. Received: {name}={value}."
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_factor(name: str, value: Any, optional: bool = False) -> Any:
    """Raises unless `value` is positive, or `None` where that is allowed."""
    if value is None and optional:
        return None
    value = check_number(name, value, at_least=float("-inf"))
    if value <= 0:
        remedy = " Pass `None` for dropless routing." if optional else ""
        raise ValueError(
            f"`{name}` must be positive. Received: {name}={value}.{remedy}"
        )
    return value


def check_bytes(name: str, value: Any) -> int:
    """Bytes, from a positive number or a text such as `"16GB"`."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]i?B)\s*", value)
        if match:
            number = check_factor(name, float(match[1]))
            return int(number * _BYTES[match[2]])
        raise ValueError(
            f"`{name}` must be bytes, or a text such as '16GB' or '80GiB'. "
            f"Received: {name}={value!r}."
        )
    return int(check_factor(name, value))


def check_installed(what: str, module: str, package: str) -> None:
    """Raises `ImportError` unless a package, and extra, is installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"`{what}` needs {module}. Install with `pip install {package}`, "
            f"or this package with its extra `[{package}]`."
        )


def check_share(name: str, value: Any) -> int | float:
    """Raises unless `value` is a number from 0 to 1."""
    value = check_number(name, value, at_least=0.0)
    if value > 1:
        raise ValueError(
            f"`{name}` must be a share in [0, 1], from 0 to 1. Received: "
            f"{name}={value}."
        )
    return value


def check_rate(name: str, value: Any) -> int | float:
    """Raises unless `value` is a number from 0 to below 1."""
    if _is_outside(value):
        # Of a rate the limits say more than that it must be finite.
        raise ValueError(
            f"`{name}` must be a rate in [0, 1). Received: {name}={value}."
        )
    return check_number(name, value, at_least=0.0)


def check_verbose(name: str, value: Any) -> int:
    """Raises `TypeError` unless `value` is 0, 1 or a `bool`."""
    if is_integer(value) or isinstance(value, bool | np.bool_):
        return int(value)
    raise TypeError(
        f"`{name}` must be 0 or 1. Received: {name}={value!r} of type "
        f"{type(value).__name__}."
    )


def check_path(name: str, value: Any) -> Any:
    """Raises `TypeError` unless `value` is a path: a string or `PathLike`."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"`{name}` must be a path. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    return value


def check_file(name: str, value: Any, remedy: str) -> Any:
    """Raises unless `value` is the path of a file that is there.

    Args:
        name: Of the argument.
        value: What was given.
        remedy: What makes such a file.
    """
    path = pathlib.Path(check_path(name, value))
    if path.is_dir():
        raise IsADirectoryError(
            f"`{name}` must be the path of a file. Received: "
            f"{name}={str(value)!r}, which is a folder. {remedy}"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"`{name}` must be the path of a file. Received: "
            f"{name}={str(value)!r}, where there is none. {remedy}"
        )
    return value


def check_output(name: str, value: Any) -> Any:
    """Raises unless a file can be written there: its folder is there.

    Args:
        name: Of the argument.
        value: What was given.
    """
    path = pathlib.Path(check_path(name, value))
    if path.is_dir():
        raise IsADirectoryError(
            f"`{name}` must be the path of a file. Received: "
            f"{name}={str(value)!r}, which is a folder. Add a file's name."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`{name}` must be in a folder that is there. Received: "
            f"{name}={str(value)!r}. Make the folder {str(path.parent)!r} "
            "first."
        )
    return value


def check_instance(
    name: str, value: Any, kind: Any, shown: str, remedy: str = ""
) -> Any:
    """Raises `TypeError` unless `value` is an instance of `kind`.

    Args:
        name: Of the argument.
        value: What was given.
        kind: A class, or several.
        shown: What such an instance is, such as `"a Keras model"`.
        remedy: More to say.
    """
    if not isinstance(value, kind):
        received = repr(value)
        if len(received) > 80:
            received = f"{received[:77]}..."
        raise TypeError(
            f"`{name}` must be {shown}. Received: {name}={received} of type "
            f"{type(value).__name__}.{' ' if remedy else ''}{remedy}"
        )
    return value


def check_known(name: str, value: Any, known: Callable, kind: str) -> Any:
    """What Keras knows by that name, config or object, such as an activation.

    Args:
        name: Of the argument.
        value: What was given.
        known: A `get` of Keras's.
        kind: What it finds, such as `"an activation"`.

    Raises:
        ValueError: If Keras knows none.
    """
    try:
        return known(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{name}` must be {kind} as Keras takes it: a name, a config, or "
            f"an object. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        ) from error


def dtype_name(value: Any) -> str:
    """The name of an array's or tensor's dtype, whoever made it.

    Example:
        >>> dtype_name(np.zeros(3)), dtype_name([1, 2]), dtype_name(None)
        ('float64', 'int64', 'object')
    """
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        try:
            dtype = np.asarray(value).dtype
        except ValueError:  # lists of unequal lengths
            return "object"
    name = getattr(dtype, "name", None) or str(dtype)
    return name.rpartition(".")[2]  # "torch.float32"


def array_of(value: Any) -> np.ndarray:
    """An array of what was given; of objects where NumPy makes none.

    As of lists of unequal lengths, and tensors that only a backend reads.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return np.asarray(None)


def check_no_class(name: str, value: Any, kind: str) -> None:
    """Raises `TypeError` for a class in the place of an instance.

    Args:
        name: Of the argument.
        value: What was given.
        kind: What an instance would be, such as ``"`Router`"``.
    """
    if inspect.isclass(value):
        raise TypeError(
            f"`{name}` must be a {kind}, not its class. Received: {name}="
            f"{value.__name__}. Make one: `{value.__name__}(...)`."
        )


def check_takes(
    name: str, function: Callable, arguments: str, remedy: str = ""
) -> None:
    """Raises `TypeError` unless a function can be called with so many.

    Args:
        name: Of the argument that the function was given as.
        function: Not called.
        arguments: What it is called with, such as `"value, name"`.
        remedy: More to say.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(*arguments.split(", ") if arguments else ())
    except TypeError as error:
        shown = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"`{name}` must be a function ({arguments}). Received: {shown}"
            f"{signature}, which cannot be called so: {error}.{remedy}"
        ) from None


def _is_outside(value):
    value = _out_of_array(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return not 0 <= value < 1  # NaN too


def _out_of_array(value):
    """The number in an array of NumPy's that has no axes."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    return value

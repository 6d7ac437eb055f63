"""Checks of settings: what was expected, what came, what to do."""

import numbers
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, known: Iterable) -> None:
    """Raises `ValueError` unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(
            f"`{name}` must be one of {list(known)}. Received: "
            f"{name}={value!r}."
        )


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1. Received: {name}={value}."
        )


def check_number(name: str, value: Any, at_least: float) -> None:
    """Raises unless `value` is a finite number of at least `at_least`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number:
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} of type "
            f"{type(value).__name__}."
        )
    if not at_least <= value < float("inf"):
        raise ValueError(
            f"`{name}` must be finite and at least {at_least}. Received: "
            f"{name}={value}."
        )


def check_rate(name: str, value: Any) -> None:
    """Raises unless `value` is a number in `[0, 1)`."""
    check_number(name, value, at_least=0.0)
    if value >= 1:
        raise ValueError(
            f"`{name}` must be a rate in [0, 1). Received: {name}={value}."
        )


def check_factor(name: str, value: Any, optional: bool = False) -> None:
    """Raises unless `value` is positive, or `None` where that is allowed."""
    if value is None and optional:
        return
    check_number(name, value, at_least=float("-inf"))
    if value <= 0:
        remedy = " Pass `None` for dropless routing." if optional else ""
        raise ValueError(
            f"`{name}` must be positive. Received: {name}={value}.{remedy}"
        )

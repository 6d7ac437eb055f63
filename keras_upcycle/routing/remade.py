"""Routers that are made again, of whose settings people have been told."""

import contextlib
import contextvars
from collections.abc import Iterator

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

"""Routers by name: each says its own, by `named`."""

from collections.abc import Callable
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.routing.router import Router

# From a name to the class, or a function without arguments, that makes one.
ROUTERS: dict[str, Callable[[], Router]] = {}


def named(name: str) -> Callable[[type], type]:
    """Decorates a router so that `router=name` means it, with its defaults.

    Args:
        name: As users write it.

    Example:
        ```python
        @named("nearest")
        class NearestRouter(Router):
            def choose(self, logits, mask, training): ...
        ```
    """

    def add(made: type) -> type:
        ROUTERS[name] = made
        return made

    return add


def get_router(identifier: Any) -> Router:
    """A router from its name, its config, or itself.

    Args:
        identifier: A key of `ROUTERS`, a serialized router, or a router.

    Returns:
        A `Router`, not built unless it was.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is nothing a router can be made from.

    Example:
        >>> get_router("top_k").top_k
        2
    """
    if isinstance(identifier, Router):
        return identifier
    if isinstance(identifier, str):
        if identifier not in ROUTERS:
            raise ValueError(
                f"`router` must be one of {sorted(ROUTERS)} or a `Router`. "
                f"Received: router={identifier!r}."
            )
        return ROUTERS[identifier]()
    if isinstance(identifier, dict):
        router = keras.saving.deserialize_keras_object(identifier)
        if isinstance(router, Router):
            return router
    checks.check_no_class("router", identifier, "`Router`")
    raise TypeError(
        f"`router` must be one of {sorted(ROUTERS)} or a `Router`. Received: "
        f"router={identifier!r} of type {type(identifier).__name__}."
    )

"""Routers by name: each says its own, by `named`."""

from collections.abc import Callable
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.named import Named
from keras_upcycle.routing.router import Router

# From a name to the class, or a function without arguments, that makes one.
ROUTERS: Named[Callable[[], Router]] = Named("router", " or a `Router`")


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
    return ROUTERS.named(name)


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
        return ROUTERS.find(identifier)()
    if isinstance(identifier, dict):
        router = keras.saving.deserialize_keras_object(identifier)
        if isinstance(router, Router):
            return router
    checks.check_no_class("router", identifier, "`Router`")
    raise ROUTERS.refusal(identifier)

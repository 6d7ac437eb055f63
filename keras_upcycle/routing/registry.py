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


def in_config(router: Router) -> dict[str, Any]:
    """A router as the config of the layer that holds it has it."""
    config = keras.saving.serialize_keras_object(router)
    # A router is built by its layer, which tells it `num_experts`.
    config.pop("build_config", None)
    return config


def check_is_free(router: Router, holder: str = "layer") -> None:
    """Raises `ValueError` for a router that another layer holds.

    Args:
        router: A router.
        holder: What may hold it, for the message.
    """
    if router.num_experts is not None:
        raise ValueError(
            "A router's weights belong to one layer. Received: router "
            f"{router.name!r}, which another {holder} with "
            f"num_experts={router.num_experts} holds. Make a new router for "
            "each layer."
        )


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

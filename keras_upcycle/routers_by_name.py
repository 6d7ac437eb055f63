"""The table of routers: a new one is a file and a row here."""

from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.methods.default_moe import DefaultMoERouter
from keras_upcycle.methods.ds_moe import DSMoERouter
from keras_upcycle.routing.routers import ExpertChoiceRouter, Router, TopKRouter

ROUTERS = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "default_moe": DefaultMoERouter,
    "ds_moe": DSMoERouter,
}


def get(identifier: Any) -> Router:
    """A router from its name, its config, or itself.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is nothing a router can be made from.
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

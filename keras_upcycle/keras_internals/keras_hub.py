"""KerasHub's inner classes, which it does not export, and how they answer.

A class that the installed version has not is `None`. KerasHub 0.32.
"""

import importlib
import inspect
from typing import Any

import keras
import keras_hub

_INSIDE = "keras_hub.src"


def inner_class(path: str) -> type | None:
    """A class by where KerasHub keeps it: `"models.vit.vit_layers.MLP"`.

    A name without dots is one of `keras_hub.models`, or of its layers.
    """
    module, _, name = path.rpartition(".")
    if not module:
        for public in (keras_hub.models, keras_hub.layers):
            if hasattr(public, name):
                return getattr(public, name)
        return None
    try:
        return getattr(importlib.import_module(f"{_INSIDE}.{module}"), name)
    except (ImportError, AttributeError):
        return None


def subclasses_for(base: type, backbone: type) -> list[type]:
    """KerasHub's own subclasses of `base` that say they are for a backbone.

    Tasks, preprocessors, tokenizers and converters all say it by
    `backbone_cls`. Subclasses of a user are none of KerasHub's.
    """
    found: dict[type, None] = {}

    def walk(kind):
        for below in kind.__subclasses__():
            if below.__module__.startswith(_INSIDE) and (
                vars(below).get("backbone_cls") is backbone
            ):
                found[below] = None
            walk(below)

    walk(base)
    return list(found)


def config_of(layer: keras.Layer, stock: type) -> dict[str, Any]:
    """What `get_config` of a stock class says of one of its subclass.

    Where the stock class leaves its config to Keras, Keras leaves it out for
    a subclass that has a `get_config` of its own. `Layer._auto_config`, Keras
    3.15.
    """
    config = stock.get_config(layer)  # type: ignore[attr-defined]
    if "get_config" in _defined_by_keras_hub(stock):
        return config
    automatic = getattr(layer, "_auto_config", None)
    return {**config, **(automatic.config if automatic is not None else {})}


def _defined_by_keras_hub(kind):
    return {
        name
        for base in inspect.getmro(kind)
        if not base.__module__.startswith("keras.")
        for name in vars(base)
    }

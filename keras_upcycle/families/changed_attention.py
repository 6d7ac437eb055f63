"""Stock attention layers that become of a class with experts."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_upcycle import keras_internals


class ChangedAttention(keras.layers.Layer):
    """Mixed into a stock attention layer that is one with experts."""

    stock_attention: type

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # A second run would add the router's losses twice.
        return layer_call


def build_in(layer: keras.Layer, new: keras.Layer, shape: tuple) -> None:
    """Builds a part of an attention layer, under its path if it has one."""
    if layer.path:
        keras_internals.build_inside(layer.path, new, shape)
    else:
        new.build(shape)


def is_frozen(layer: keras.Layer) -> bool:
    """Whether nothing of an attention layer trains: nor is its router to."""
    return bool(layer.variables) and not layer.trainable_variables


@functools.cache
def changed_class(
    stock: Any,
    run: Callable[[Any, Callable[[], Any], Any, Mapping[str, Any]], Any],
    what: str,
) -> type:
    """A subclass of a stock attention layer whose call is another.

    Args:
        stock: The class.
        run: Called with the layer, the stock call without arguments, what
            attention is called on, and all arguments by name.
        what: What its layers have, for people.
    """
    call = stock.call
    signature = inspect.signature(call)
    tokens = list(signature.parameters)[1]

    # `Layer.__init__` reads the call's signature, to know its arguments.
    @functools.wraps(call)
    def changed(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments

        def stock_call():
            return call(self, *args, **kwargs)

        return run(self, stock_call, given[tokens], given)

    return type(
        stock.__name__,
        (ChangedAttention, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` {what}.",
            "stock_attention": stock,
            "call": changed,
        },
    )

"""Attention layers whose heads are routed, put into blocks that have them."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import copied_attention
from keras_upcycle.families.attention_sites import (
    heads_of,
    mixture_of,
    places_in,
    stock_attention,
)
from keras_upcycle.families.copied_attention import ChangedAttention
from keras_upcycle.families.rows import part
from keras_upcycle.layers.attention_mixture import KIND
from keras_upcycle.layers.call_context import attention_inputs
from keras_upcycle.layers.routed_heads import RoutedHeads


class RoutedAttention(ChangedAttention):
    """Mixed into a stock attention layer: it says what it is called on."""


def heads_in(block: keras.Layer) -> dict[str, RoutedHeads]:
    """A block's `RoutedHeads`, by where their attention layers are."""
    found = {}
    for place, layer in places_in(block).items():
        row: Any = stock_attention(layer)
        output = getattr(layer, row.output, None)
        if isinstance(output, RoutedHeads):
            found[place] = output
    return found


def settings_in(block: keras.Layer) -> dict[str, dict[str, Any]]:
    """What `route` takes to make the same of another such block."""
    found = {
        place: mixture.settings()
        for place, layer in places_in(block).items()
        if (mixture := mixture_of(layer)) is not None
    }
    routed = heads_in(block)
    return found | {place: one.settings() for place, one in routed.items()}


def route(block: keras.Layer, settings: Mapping[str, Any]) -> None:
    """Makes heads of attention experts, or attention several experts.

    Puts `RoutedHeads` in front of output projections, which they hold; or,
    where the settings say that they are of that kind, does what
    `copied_attention.copy` does.

    Args:
        block: A built block.
        settings: From where an attention layer is to the arguments of its
            `RoutedHeads` or `AttentionMixture`, its router an object or what
            a file says.
    """
    for place, arguments in settings.items():
        layer: Any = part(block, place)
        if arguments.get("kind") == KIND:
            own = {k: v for k, v in arguments.items() if k != "kind"}
            copied_attention.copy(layer, own)
            continue
        row: Any = stock_attention(layer)
        heads, key_value_heads = heads_of(layer)
        projection = getattr(layer, row.output)
        frozen = layer.variables and not layer.trainable_variables
        routed = RoutedHeads(
            projection,
            heads,
            num_key_value_heads=key_value_heads,
            dtype=layer.dtype_policy,
            name="routed_heads",
            **arguments,
        )
        if frozen:
            routed.router.trainable = False
        if layer.path:
            keras_internals.build_inside(
                layer.path, routed, _shape_for(projection)
            )
        else:
            routed.build(_shape_for(projection))
        keras_internals.wrap_sublayer(layer, row.output, routed)
        stock: Any = type(layer)
        layer.__class__ = _routed_class(stock)


def _shape_for(projection):
    taken = projection.kernel.shape[:-1]
    return (None, None, *taken)


@functools.cache
def _routed_class(stock):
    call = stock.call
    signature = inspect.signature(call)
    tokens = list(signature.parameters)[1]

    @functools.wraps(call)
    def told(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        with attention_inputs(given[tokens]):
            return call(self, *args, **kwargs)

    return type(
        stock.__name__,
        (RoutedAttention, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` with routed heads.",
            "stock_attention": stock,
            "call": told,
        },
    )

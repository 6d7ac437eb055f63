"""Attention layers whose heads are routed, put into blocks that have them."""

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
from keras_upcycle.families.changed_attention import (
    build_in,
    changed_class,
    is_frozen,
)
from keras_upcycle.families.rows import part
from keras_upcycle.layers.attention_mixture import KIND
from keras_upcycle.layers.call_context import attention_inputs
from keras_upcycle.layers.routed_heads import RoutedHeads


def heads_in(block: keras.Layer) -> list[RoutedHeads]:
    """A block's `RoutedHeads`."""
    found = [_heads_of(layer) for layer in places_in(block).values()]
    return [routed for routed in found if routed is not None]


def _heads_of(layer):
    output = getattr(layer, stock_attention(layer).output, None)
    return output if isinstance(output, RoutedHeads) else None


def settings_in(block: keras.Layer) -> dict[str, dict[str, Any]]:
    """What `route` takes to make the same of another such block."""
    found = {}
    for place, layer in places_in(block).items():
        routing = mixture_of(layer) or _heads_of(layer)
        if routing is not None:
            found[place] = routing.settings()
    return found


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
        frozen = is_frozen(layer)
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
        build_in(layer, routed, (None, None, *projection.kernel.shape[:-1]))
        keras_internals.wrap_sublayer(layer, row.output, routed)
        stock: Any = type(layer)
        layer.__class__ = changed_class(stock, _told, "with routed heads")


def _told(layer, stock_call, tokens, given):
    """The stock call, of which `RoutedHeads` know what it is called on."""
    del layer, given
    with attention_inputs(tokens):
        return stock_call()

"""Attention layers that are several experts, put into blocks."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families.attention_sites import (
    MIXTURE,
    mixture_of,
    projections_of,
    stock_attention,
)
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.call_context import expert_of_attention
from keras_upcycle.layers.expert_projection import ExpertProjection


class ChangedAttention(keras.layers.Layer):
    """Mixed into a stock attention layer that is one with experts."""

    stock_attention: type

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # A second run would add the router's losses twice.
        return layer_call


def copy(layer: Any, arguments: Mapping[str, Any]) -> None:
    """Makes an attention layer several experts, which start as it is.

    Args:
        layer: A built attention layer that `why_not_copied` has nothing
            against. It is changed.
        arguments: Of its `AttentionMixture`.
    """
    row: Any = stock_attention(layer)
    frozen = layer.variables and not layer.trainable_variables
    mixture = AttentionMixture(
        **arguments, dtype=layer.dtype_policy, name=MIXTURE
    )
    if frozen:
        mixture.router.trainable = False
    width = getattr(layer, row.output).kernel.shape[-1]
    _build(layer, mixture, (None, None, width))
    shared = mixture.shared_key_values
    names = row.projections(shared)
    made = {}
    for role, projection in projections_of(layer, shared).items():
        new = ExpertProjection.copies_of(projection, mixture.num_experts, role)
        _build(layer, new, (None,))
        new.trainable = projection.trainable
        for part in ("kernel", "bias"):
            if getattr(new, part) is not None:
                flag = getattr(projection, part).trainable
                getattr(new, part).trainable = flag
        keras_internals.wrap_sublayer(layer, names[role], new)
        made[role] = new
    mixture.hold(made)
    keras_internals.set_attribute(layer, MIXTURE, mixture)
    stock: Any = type(layer)
    layer.__class__ = _copied_class(stock)


def _build(layer, new, shape):
    if layer.path:
        keras_internals.build_inside(layer.path, new, shape)
    else:
        new.build(shape)


@functools.cache
def _copied_class(stock):
    call = stock.call
    signature = inspect.signature(call)
    tokens = list(signature.parameters)[1]

    @functools.wraps(call)
    def mixed(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        mixture = mixture_of(self)
        if not mixture.shared_key_values:
            _check_no_cache(self, given)
        # Once: its losses are of the layer, not of each expert.
        weights = mixture(given[tokens])
        total, others = 0.0, ()
        for expert in range(mixture.num_experts):
            # Keys and values that experts share are computed each time. They
            # are the same expressions, of which XLA keeps one; their kernels'
            # gradients, and torch, take a product for each expert.
            with expert_of_attention(expert):
                found = call(self, *args, **kwargs)
            several = isinstance(found, (tuple, list))
            output, *rest = found if several else (found,)
            if expert == 0:
                # Caches, position biases: alike for all, or the first one's.
                others = tuple(rest)
            weight = weights[..., expert : expert + 1]
            # Added up in float32: copies give their own value back.
            total = total + weight * ops.cast(output, weight.dtype)
        total = ops.cast(total, output.dtype)
        return (total, *others) if several else total

    return type(
        stock.__name__,
        (ChangedAttention, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` that is several experts.",
            "stock_attention": stock,
            "call": mixed,
        },
    )


def _check_no_cache(layer, given):
    named = dict(given)
    for value in given.values():  # what a signature gathers in `**kwargs`
        if isinstance(value, Mapping):
            named |= value
    held = [
        name
        for name, value in named.items()
        # A merged attention is handed a pair, of which both may be `None`.
        if name.endswith("cache")
        and any(one is not None for one in keras.tree.flatten(value))
    ]
    if held:
        raise UpcycleError(
            "Experts with keys and values of their own have no room in a "
            "cache, which holds one attention's. Received: "
            f"{held[0]} in {layer.path!r}, of an attention with "
            "shared_key_values=False, as `generate` passes it. Upcycle with "
            "`CopiedAttention(shared_key_values=True)` to generate."
        )

"""Attention layers that are several experts, put into blocks."""

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
from keras_upcycle.families.changed_attention import (
    build_in,
    changed_class,
    is_frozen,
)
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.call_context import expert_of_attention
from keras_upcycle.layers.expert_projection import ExpertProjection


def copy(layer: Any, arguments: Mapping[str, Any]) -> None:
    """Makes an attention layer several experts, which start as it is.

    Args:
        layer: A built attention layer that `why_not_copied` has nothing
            against. It is changed.
        arguments: Of its `AttentionMixture`.
    """
    row: Any = stock_attention(layer)
    frozen = is_frozen(layer)
    mixture = AttentionMixture(
        **arguments, dtype=layer.dtype_policy, name=MIXTURE
    )
    if frozen:
        mixture.router.trainable = False
    width = getattr(layer, row.output).kernel.shape[-1]
    build_in(layer, mixture, (None, None, width))
    shared = mixture.shared_key_values
    names = row.projections(shared)
    made = {}
    for role, projection in projections_of(layer, shared).items():
        new = ExpertProjection.copies_of(projection, mixture.num_experts, role)
        build_in(layer, new, (None,))
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
    layer.__class__ = changed_class(stock, _mixed, "that is several experts")


def _mixed(layer, stock_call, tokens, given):
    """The stock call once for each expert, added up."""
    mixture = mixture_of(layer)
    if not mixture.shared_key_values:
        _check_no_cache(layer, given)
    # Once: its losses are of the layer, not of each expert.
    weights = mixture(tokens)
    total, others = 0.0, ()
    for expert in range(mixture.num_experts):
        # Keys and values that experts share are computed each time. They are
        # the same expressions, of which XLA keeps one; their kernels'
        # gradients, and torch, take a product for each expert.
        with expert_of_attention(expert):
            found = stock_call()
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

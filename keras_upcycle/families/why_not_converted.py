"""What is said of layers that compute as feed-forward blocks do, unread.

Only pairs of `Dense` layers are converted. A user whose model has none, but
has their work done by other layers, is told which these are and what would
make them convertible.
"""

import keras

from keras_upcycle.families import surgery
from keras_upcycle.families.plain_layers import (
    CONVOLUTIONS,
    is_on_last_axis,
    is_pointwise,
    named,
    not_exactly,
)
from keras_upcycle.keras_internals import all_layers
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward

_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)
_REGISTER = "teach the whole model with `keras_upcycle.register_family`"


def why_unread(layer):
    """Why a layer that does what a `Dense` does is in no block.

    Args:
        layer: A layer of a functional model that is no `Dense` itself.

    Returns:
        The reason, with a remedy; `None` where the layer looks like no part
        of a feed-forward block.
    """
    if not isinstance(layer, keras.Layer) or _is_of_no_concern(layer):
        return None
    if isinstance(layer, keras.layers.Dense):
        return not_exactly(layer, keras.layers.Dense)
    if isinstance(layer, keras.layers.EinsumDense):
        return _of_einsum(layer)
    if isinstance(layer, CONVOLUTIONS):
        return _of_convolution(layer) if is_pointwise(layer) else None
    inside = _projections(layer)
    if not inside:
        return None
    if isinstance(layer, keras.layers.TimeDistributed):
        return _of_time_distributed(layer, inside)
    if isinstance(layer, keras.layers.Wrapper):
        return (
            f"is a {type(layer).__name__} around {named(layer.layer)}, and "
            "what a wrapper makes of it is not known. Use the layer without "
            f"the wrapper, or {_REGISTER}"
        )
    if isinstance(layer, keras.Model):
        return (
            f"is a {type(layer).__name__}, a class of its own, and holds "
            f"{_listed(inside)}, which its own `call` uses in a way that "
            "cannot be read. Make it a functional or `Sequential` model, or "
            f"{_REGISTER}"
        )
    return (
        f"is a {type(layer).__name__} and holds {_listed(inside)}, which its "
        "own `call` uses in a way that cannot be read. Put these layers into "
        f"the functional model itself, or {_REGISTER}"
    )


def why_no_candidate(layer):
    """What a layer is that looks related, for models where nothing is found.

    Args:
        layer: As for `why_unread`, which has said nothing of it.

    Returns:
        What it is, and why it is no part of a block; or `None`.
    """
    if _is_attention(layer):
        return (
            f"is a {type(layer).__name__}: the projections of attention are "
            "not converted, feed-forward blocks alone are"
        )
    if isinstance(layer, CONVOLUTIONS):
        return (
            f"is a {type(layer).__name__} with kernel_size="
            f"{layer.kernel_size}, which mixes neighbouring positions, while "
            "an expert sees one at a time"
        )
    if isinstance(layer, _RECURRENT):
        return (
            f"is a {type(layer).__name__}, which goes from position to "
            "position, while an expert sees one at a time"
        )
    return None


def _is_of_no_concern(layer):
    return (
        type(layer) is keras.layers.Dense
        or surgery.is_plain_model(layer)
        or isinstance(layer, MoEFeedForward)
        or _is_attention(layer)
        or isinstance(layer, _RECURRENT)
    )


def _is_attention(layer):
    return "Attention" in type(layer).__name__


def _of_einsum(layer):
    if type(layer) is not keras.layers.EinsumDense:
        return not_exactly(layer, keras.layers.EinsumDense)
    if is_on_last_axis(layer.equation):
        return (
            f"is an EinsumDense with equation {layer.equation!r}, which a "
            "`Dense` does as well. Put a `Dense` with the same weights in its "
            "place"
        )
    return (
        f"is an EinsumDense with equation {layer.equation!r}, which is not a "
        "product over the last axis. Where it comes down to one, use `Dense`"
    )


def _of_convolution(layer):
    kind = type(layer).__name__
    if layer.data_format != "channels_last":
        return (
            f"is a {kind} with kernel_size=1 and data_format="
            f"{layer.data_format!r}. With the channels on the last axis a "
            "`Dense` does the same: move them there and use `Dense`"
        )
    return not_exactly(
        layer, next(one for one in CONVOLUTIONS if isinstance(layer, one))
    )


def _of_time_distributed(layer, inside):
    inner = layer.layer
    if type(inner) is keras.layers.Dense:
        return (
            "is a TimeDistributed(Dense). Replace it by a `Dense` with the "
            "same weights, which already works on the last axis"
        )
    return (
        f"is a TimeDistributed around {named(inner)}, with {_listed(inside)} "
        "in it, which is not read. Layers that work on the last axis, as "
        "`Dense` does, need no TimeDistributed: call them without it"
    )


def _projections(layer):
    return [
        below
        for below in all_layers(layer)
        if below is not layer
        and isinstance(below, (keras.layers.Dense, keras.layers.EinsumDense))
    ]


def _listed(layers):
    names = [named(layer) for layer in layers[:3]]
    if len(layers) > 3:
        names.append(f"{len(layers) - 3} more")
    return ", ".join(names)

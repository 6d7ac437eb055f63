"""MoE layers made anew with other experts, and all that they keep."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.router import clone
from keras_upcycle.state import layer_state
from keras_upcycle.types import Tensor


def like(
    layer: MoEFeedForward, values: Mapping[str, Callable], **changes: Any
) -> MoEFeedForward:
    """An unbuilt MoE layer of the same kind, told what it starts from.

    Args:
        layer: A built one.
        values: As for `MoEFeedForward.start_from`.
        **changes: Settings that differ.
    """
    settings = {**layer.settings(), "router": clone(layer.router), **changes}
    new = type(layer)(**settings, dtype=layer.dtype_policy, name=layer.name)
    new.start_from(values)
    return new


def carry(
    old: keras.Layer,
    new: keras.Layer,
    told: Collection[int] = (),
    adapt: Callable[[keras.Variable, tuple], Tensor] | None = None,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Flags, weights and random states, of a layer and all below it.

    Args:
        old: A built layer.
        new: Built, of the same structure.
        told: Ids of layers below `old` whose weights were told already.
        adapt: From a variable of `old` and a shape to what the new one is to
            hold; `None` for the same.

    Returns:
        `(variable of new, variable of old)` of all that both have.
    """
    found = []
    layers = (keras_internals.all_layers(each) for each in (old, new))
    for a, b in zip(*layers, strict=True):
        b.trainable = a.trainable
        for source, target in zip(
            keras_internals.own_variables(a),
            keras_internals.own_variables(b),
            strict=True,
        ):
            layer_state.copy_flag(source, target)
            found.append((target, source))
            if id(a) in told:
                continue
            if adapt is None:
                target.assign(ops.copy(source.value))
            else:
                target.assign(adapt(source, target.shape))
    return found

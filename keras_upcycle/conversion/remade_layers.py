"""MoE layers made anew with other experts, and all that they keep."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import Family, surgery
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.remade import value_of
from keras_upcycle.routing.router import Router, clone
from keras_upcycle.state import layer_state
from keras_upcycle.types import Tensor

# `(variable of new, variable of old)`.
Pairs = list[tuple[keras.Variable, keras.Variable]]
# A layer of the old model, and a variable of it, and a shape: what the new
# one is to hold.
Adapt = Callable[[keras.Layer, keras.Variable, tuple], Tensor]


def check_blocks(
    argument: str,
    given: Any,
    mixtures: Mapping[str, MoEFeedForward],
    values: str,
) -> None:
    """Raises unless an argument is a mapping from blocks that there are.

    Args:
        argument: Its name.
        given: What was passed.
        mixtures: The MoE layers by name.
        values: What it is to say of each block, for the message.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{argument}` must be a mapping from a block's name to {values}. "
            f"Received: {argument}={given!r} of type {type(given).__name__}. "
            f"The blocks are {list(mixtures)}."
        )
    unknown = [name for name in given if name not in mixtures]
    if unknown:
        raise ValueError(
            f"`{argument}` must name blocks of the model: {list(mixtures)}. "
            f"Received: {argument} for {unknown}. Leave out whom it is not "
            "about."
        )


def with_experts(
    family: Family,
    moe: keras.Model,
    mixtures: Mapping[str, MoEFeedForward],
    index: Mapping[str, Sequence[int]],
    routers: Callable[[str, MoEFeedForward], Mapping[str, Any]] | None = None,
) -> tuple[keras.Model, Pairs]:
    """A copy of a sparse model, whose experts are some of those it has.

    Args:
        family: Of the model.
        moe: The model. Not changed.
        mixtures: Its MoE layers by name.
        index: By name, for each expert of the copy which one it is.
        routers: Gives settings that a router is to have in the copy beside
            those that follow from `index`. `None` for none.

    Returns:
        `(model, pairs)`, not compiled; a pair for every weight of its MoE
        layers.

    Raises:
        UpcycleError: If a layer of which experts change cannot be replaced.
    """
    new = {}
    for name, layer in mixtures.items():
        settings = {} if routers is None else routers(name, layer)
        new[layer] = _of_experts(layer, list(index[name]), settings)
    result = replaced(family, moe, new)
    inside = set(keras_internals.all_layers(result))
    pairs: Pairs = []
    for name, layer in mixtures.items():
        if new[layer] in inside:
            experts = {id(each) for each in layer.experts.projections.values()}
            adapt = functools.partial(_adapted, list(index[name]))
            pairs += carry(layer, new[layer], experts, adapt)
        elif list(index[name]) != list(range(layer.num_experts)):
            raise UpcycleError(
                f"The MoE layer {name!r} stands inside a layer that makes it "
                f"anew from its own config. Received: {moe.name!r}, of which "
                "the experts of MoE layers can be changed that a known "
                "backbone holds or that are layers of the functional model. "
                "Leave this one whole, or register a family for the model."
            )
    return result, pairs


def replaced(
    family: Family,
    moe: keras.Model,
    new: Mapping[MoEFeedForward, MoEFeedForward],
) -> keras.Model:
    """A copy of a sparse model with other MoE layers, which are to be filled.

    Raises:
        UpcycleError: If the family does not tell the model's structure.
    """
    result = family.replace_moe_layers(moe, new)
    if result is None:
        raise UpcycleError(
            f"The family {family.name!r} must define `build_dense`, from which "
            "a model with other experts is made. Received: a family whose "
            "`build_dense` gives None."
        )
    surgery.copy_added(moe, result)
    return result


def _of_experts(
    layer: MoEFeedForward, index: list[int], settings: Mapping[str, Any]
) -> MoEFeedForward:
    """The unbuilt MoE layer of such experts, told what they start from."""
    rows = np.array(index, "int32")

    def rows_of(variable):
        def value(shape, dtype=None):
            return ops.cast(ops.take(variable.value, rows, axis=0), dtype)

        return value

    values = {}
    for role, projection in layer.experts.projections.items():
        values[f"{role}_kernel"] = rows_of(projection.kernel)
        if projection.bias is not None:
            values[f"{role}_bias"] = rows_of(projection.bias)
    settings = {**layer.router.settings_of(index), **settings}
    return like(
        layer,
        values,
        num_experts=len(index),
        router=clone(layer.router, **settings),
    )


def _adapted(index, layer, source, shape):
    if isinstance(layer, Router):
        return layer.value_of(source, shape, index)
    return value_of(source, shape, index)


def like(
    layer: MoEFeedForward, values: Mapping[str, Callable], **changes: Any
) -> MoEFeedForward:
    """An unbuilt MoE layer of the same kind, told what it starts from.

    Args:
        layer: A built one.
        values: As for `MoEFeedForward.start_from`.
        **changes: Settings that differ.
    """
    settings = {**layer.settings(), **changes}
    if "router" not in changes:
        settings["router"] = clone(layer.router)
    new = type(layer)(**settings, dtype=layer.dtype_policy, name=layer.name)
    new.start_from(values)
    return new


def carry(
    old: keras.Layer,
    new: keras.Layer,
    told: Collection[int] = (),
    adapt: Adapt | None = None,
) -> Pairs:
    """Flags, weights and random states, of a layer and all below it.

    Args:
        old: A built layer.
        new: Built, of the same structure.
        told: Ids of layers below `old` whose weights were told already.
        adapt: From a layer, a variable of it and a shape to what the new one
            is to hold; `None` for the same.

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
                target.assign(adapt(a, source, target.shape))
    return found

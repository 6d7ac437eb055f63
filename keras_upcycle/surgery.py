"""Puts layers in the place of others, in a copy of the model.

Knows nothing of experts. A copy is made in two steps, so that each can be
checked alone: `rebuild` makes a model of new layers, some of them given;
`copy_state` brings the weights, random states and `trainable` flags across.
"""

from collections.abc import Callable, Collection
from typing import Any

import keras
from keras import ops

from keras_upcycle import first_values, keras_internals
from keras_upcycle.errors import UpcycleError


class _Removed:
    """What `replace` answers for a layer whose work another one took over."""


REMOVED = _Removed()


def rebuild(
    model: keras.Model, replace: Callable[[Any], Any]
) -> tuple[keras.Model, list[tuple[keras.Layer, keras.Layer]]]:
    """A new model of new layers, with the same graph.

    Nested plain models are entered.

    Args:
        model: A built plain functional or `Sequential` model.
        replace: From an old layer to the layer that takes its place, to
            `REMOVED` (its input is passed on), or to `None` (a new layer is
            made from its config).

    Returns:
        `(new_model, pairs)`: `pairs` lists the old and new layers that are
        equal and whose state is still to be copied.

    Raises:
        UpcycleError: If a layer cannot be made anew from its config.
    """
    pairs: list[tuple[keras.Layer, keras.Layer]] = []
    made: dict[int, Any] = {}

    def renew(layer):
        if id(layer) not in made:
            made[id(layer)] = _renew(layer)
        return made[id(layer)]

    def _renew(layer):
        new = replace(layer)
        if new is REMOVED:
            # Takes the layer's place in the walk; `call` skips it.
            return keras.layers.Identity(name=f"{layer.name}_removed")
        if new is not None:
            return new
        if is_plain_model(layer):
            return _rebuild_one(layer)
        new = _from_config(layer)
        if isinstance(layer, keras.Layer):
            pairs.append((layer, new))
        return new

    def _rebuild_one(plain):
        if isinstance(plain, keras.Sequential):
            new_layers = [
                renew(layer)
                for layer in plain.layers
                if replace(layer) is not REMOVED
            ]
            first = plain.inputs[0]
            new = keras.Sequential(
                [
                    keras.Input(batch_shape=first.shape, dtype=first.dtype),
                    *new_layers,
                ],
                name=plain.name,
            )
        else:
            removed = set()

            def make(layer):
                new = renew(layer)
                if replace(layer) is REMOVED:
                    removed.add(id(new))
                return new

            def call(layer, *args, **kwargs):
                if id(layer) in removed:
                    return args[0]
                return layer(*args, **kwargs)

            # A model over the same graph that was never compiled:
            # `clone_model` would build the optimizer's slots for the clone.
            bare = keras.Model(plain.input, plain.output, name=plain.name)
            new = keras.models.clone_model(
                bare, clone_function=make, call_function=call
            )
        new.trainable = plain.trainable
        return new

    return _rebuild_one(model), pairs


def copy_model(
    model: keras.Model, replace: Callable[[Any], Any]
) -> keras.Model:
    """`rebuild`, and the state of every layer that was not replaced."""
    new, pairs = rebuild(model, replace)
    for pair in pairs:
        copy_state(*pair)
    return new


def copy_state(
    old: keras.Layer,
    new: keras.Layer,
    replaced: Collection[keras.Layer] = (),
    given: Collection[keras.Layer] = (),
) -> None:
    """Copies weights, random states and `trainable` flags, layer by layer.

    Both trees are walked side by side. Names and paths would not do: KerasHub
    numbers its norm layers automatically, and some of its paths collide.

    Args:
        old: A built layer or model.
        new: One of the same structure, but for the layers in `replaced` (of
            the old tree) and `given` (of the new one), which are left alone.

    Raises:
        UpcycleError: If the two do not match; the message names both places.
    """
    replaced_ids = {id(layer) for layer in replaced}
    given_ids = {id(layer) for layer in given}
    seen = set()

    def walk(a, b):
        if id(a) in seen:
            return
        seen.add(id(a))
        if not isinstance(b, type(a)):
            raise _mismatch(a, b, "types differ")
        b.trainable = a.trainable
        _copy_own(a, b)
        below_a = _without(keras_internals.sublayers(a), replaced_ids)
        below_b = _without(keras_internals.sublayers(b), given_ids)
        if len(below_a) != len(below_b):
            raise _mismatch(
                a, b, f"{len(below_a)} and {len(below_b)} sub-layers"
            )
        for pair in zip(below_a, below_b, strict=True):
            walk(*pair)

    walk(old, new)


def is_plain_model(layer: Any) -> bool:
    """Whether the layer is a functional or `Sequential` model, not a subclass.

    A subclass may override `train_step`, `call` or anything else, and the
    copy, being plain, would lose it.
    """
    return type(layer) in (keras.Sequential, keras_internals.Functional)


def _from_config(layer):
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:
        raise UpcycleError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be made "
            "anew from its own `get_config()`, so Keras can neither clone nor "
            "reload this model, dense or sparse. Received the error: "
            f"{type(error).__name__}: {error}. If the layer is your own, "
            "complete its `get_config`. If the graph was extended from "
            "`backbone.output`, call the backbone as a layer instead: "
            "`keras.Model(inputs, head(backbone(inputs)))`."
        ) from error


def _copy_own(a, b):
    old = keras_internals.own_variables(a)
    new = keras_internals.own_variables(b)
    if [tuple(v.shape) for v in old] != [tuple(v.shape) for v in new]:
        raise _mismatch(a, b, "weights differ in number or shape")
    for source, target in zip(old, new, strict=True):
        # A copy: on JAX the two would share a buffer, and the first training
        # step of either would donate it and leave the other without.
        if keras_internals.has_value(target):
            target.assign(ops.copy(source.value))
        else:
            keras_internals.set_first_value(
                target, first_values.laid_out(_copier(source))
            )
        copy_flag(source, target)


def copy_flag(source: keras.Variable, target: keras.Variable) -> None:
    """Freezes one variable as another is, which its layer may not be."""
    if target.trainable != source.trainable:
        target.trainable = source.trainable


def _copier(source):
    def copy(shape, dtype=None):
        return ops.copy(ops.cast(source.value, dtype))

    return copy


def _without(layers, ids):
    return [layer for layer in layers if id(layer) not in ids]


def _mismatch(a, b, why):
    return UpcycleError(
        "The copy of the model does not have the structure of the original: "
        f"{a.name!r} ({type(a).__name__}) against {b.name!r} "
        f"({type(b).__name__}): {why}. A layer whose structure depends on "
        "more than its `get_config()` cannot be copied; complete its config."
    )

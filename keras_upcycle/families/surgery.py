"""Puts layers in the place of others, in a copy of the model.

Knows nothing of experts. A copy is made in two steps, so that each can be
checked alone: `rebuild` makes a model of new layers, some of them given;
`copy_state` brings across what the layers hold, and their `trainable` flags.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families.copy_checks import check_methods, check_settings
from keras_upcycle.state import layer_state

# Models that list their layers by name.
_GRAPHS = (keras_internals.Functional, keras.Sequential)


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
    copies: dict[int, Any] = {}

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
        copies[id(new)] = layer
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
            inputs = keras.Input(batch_shape=first.shape, dtype=first.dtype)
            with _named_where_it_fails(plain):
                new = keras.Sequential([inputs, *new_layers], name=plain.name)
            for layer in new_layers:
                if id(layer) in copies:
                    _check_shapes(copies[id(layer)], layer)
        else:
            removed = set()

            def make(layer):
                new = renew(layer)
                if replace(layer) is REMOVED:
                    removed.add(id(new))
                return new

            def call(layer, *args, **kwargs):
                if id(layer) in removed:
                    # Of a product, what stands at its first operand.
                    first = args[0]
                    return first[0] if isinstance(first, list) else first
                old = copies.get(id(layer))
                if old is None:
                    return layer(*args, **kwargs)
                with _named_where_it_fails(old):
                    result = layer(*args, **kwargs)
                _check_shapes(old, layer)
                return result

            # A model over the same graph that was never compiled:
            # `clone_model` would build the optimizer's slots for the clone.
            bare = keras.Model(plain.input, plain.output, name=plain.name)
            new = keras.models.clone_model(
                bare, clone_function=make, call_function=call
            )
        check_methods(plain, new)
        # Alone: layers inside have flags of their own, which `copy_state`
        # copies, and a model inside may differ from the one around it.
        keras_internals.set_trainable_alone(new, plain.trainable)
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
    *,
    from_config: bool = False,
    variables_only: bool = False,
) -> None:
    """Copies what layers hold and their `trainable` flags, layer by layer.

    Weights, random states, and what `layer_state` counts among state.

    Both trees are walked side by side. Names and paths would not do: KerasHub
    numbers its norm layers automatically, and some of its paths collide.

    Args:
        old: A built layer or model.
        new: One of the same structure, but for the layers in `replaced` (of
            the old tree) and `given` (of the new one), which are left alone.
        from_config: Whether the config of the outermost layer alone made what
            is in `new`, so that a setting changed on a layer inside is lost.
        variables_only: Whether `new` keeps what it holds besides variables.

    Raises:
        UpcycleError: If the two do not match, or if a layer holds what cannot
            be copied; the message names the place.
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
        check_methods(a, b)
        # A block with experts has its stock block's settings.
        same = type(a) in (type(b), getattr(b, "stock", None))
        if from_config and same:
            check_settings(a, b)
        b.trainable = a.trainable
        if variables_only:
            layer_state.carry_variables(a, b)
        else:
            layer_state.carry(a, b)
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


def copy_unsaved(old: keras.Layer, new: keras.Layer) -> None:
    """What `copy_state` copies and no variable holds, where two models agree.

    Args:
        old: A built model.
        new: A model with the same layers but for some; has its variables.

    Raises:
        UpcycleError: If a layer holds what cannot be copied; it is named.
    """
    for pair in matched(old, new):
        layer_state.carry_unsaved(*pair)


def copy_added(old: keras.Model, new: keras.Model) -> None:
    """What a user put on the object of a model, or of a plain one inside it.

    Args:
        old: A built model.
        new: One that was made of it, of whatever class.

    Raises:
        UpcycleError: If it cannot be copied; the model is named.
    """
    layer_state.carry_added(old, new)
    if not (isinstance(old, _GRAPHS) and isinstance(new, _GRAPHS)):
        return
    by_name = {layer.name: layer for layer in new.layers}
    for layer in old.layers:
        other = by_name.get(layer.name)
        if isinstance(layer, _GRAPHS) and isinstance(other, _GRAPHS):
            copy_added(layer, other)


def matched(
    old: keras.Layer, new: keras.Layer
) -> Iterator[tuple[keras.Layer, keras.Layer]]:
    """Layers of the same class at the same place of two models, each once.

    Matched by name where a model lists its layers, by order elsewhere. What
    is of another class in the two, as what holds a mixture is, is left out
    with all below it, and so is what has more sub-layers.
    """
    seen = set()

    def walk(a, b):
        if id(a) in seen:
            return
        seen.add(id(a))
        if isinstance(a, _GRAPHS) and isinstance(b, _GRAPHS):
            by_name = {layer.name: layer for layer in b.layers}
            for layer in a.layers:
                if layer.name in by_name:
                    yield from walk(layer, by_name[layer.name])
            return
        if type(a) is not type(b):
            return
        yield a, b
        below = keras_internals.sublayers(a), keras_internals.sublayers(b)
        if len(below[0]) == len(below[1]):
            for pair in zip(*below, strict=True):
                yield from walk(*pair)

    yield from walk(old, new)


@contextlib.contextmanager
def _named_where_it_fails(layer):
    """An error in calling a new layer says which old one it was made for."""
    try:
        yield
    except UpcycleError:
        raise
    except Exception as error:
        raise UpcycleError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be carried "
            "over: what was made anew from its `get_config()` fails when it "
            f"is called, with {type(error).__name__}: {error}. A layer whose "
            "call needs more than its config must have it there; complete its "
            "`get_config`."
        ) from error


def _check_shapes(old, new):
    """That a new layer gives what the old one gave, in some of its calls."""
    made = keras_internals.output_shapes(new)
    known = keras_internals.output_shapes(old)
    if not made or not known:
        return
    if not any(_may_be_equal(made[-1], shapes) for shapes in known):
        raise UpcycleError(
            f"Layer {old.name!r} ({type(old).__name__}) cannot be carried "
            "over: what was made anew from its `get_config()` gives the shape "
            f"{_words(made[-1])}, where the layer gives {_words(known[-1])}. "
            "What decides on its shape must be in its config; complete its "
            "`get_config`."
        )


def _may_be_equal(some, others):
    """Whether shapes agree but for the batch, where both are known."""
    if len(some) != len(others):
        return False
    for a, b in zip(some, others, strict=True):
        if len(a) != len(b):
            return False
        for one, other in zip(a[1:], b[1:], strict=True):
            if None not in (one, other) and one != other:
                return False
    return True


def _words(shapes):
    return ", ".join(map(str, shapes))


def _from_config(layer):
    if type(layer) is keras.layers.Lambda:
        return keras_internals.lambda_like(layer)
    try:
        new = type(layer).from_config(layer.get_config())
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
    _keep_beside_config(layer, new)
    return new


def _keep_beside_config(layer, new):
    """Settings of every Keras layer that its own config may leave out.

    `SpatialDropout1D` writes the dtype of its variables and not its policy.
    """
    if not isinstance(layer, keras.Layer):
        return
    if (new.compute_dtype, new.variable_dtype) != (
        layer.compute_dtype,
        layer.variable_dtype,
    ):
        new.dtype_policy = layer.dtype_policy
    new.autocast = layer.autocast
    if new.supports_masking != layer.supports_masking:
        new.supports_masking = layer.supports_masking


def _without(layers, ids):
    return [layer for layer in layers if id(layer) not in ids]


def _mismatch(a, b, why):
    return UpcycleError(
        "The copy of the model does not have the structure of the original: "
        f"{a.name!r} ({type(a).__name__}) against {b.name!r} "
        f"({type(b).__name__}): {why}. A layer whose structure depends on "
        "more than its `get_config()` cannot be copied; complete its config."
    )

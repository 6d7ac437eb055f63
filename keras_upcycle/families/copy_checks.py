"""What a copy of a layer, made from its config, would be without."""

import inspect

import keras

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError


def check_methods(old: keras.Layer, new: keras.Layer) -> None:
    """Raises `UpcycleError` if `old` itself has methods that `new` has not.

    Such as a `call` assigned to the object, of which no config tells.
    """
    lost = sorted(
        set(keras_internals.own_methods(old))
        - set(keras_internals.own_methods(new))
    )
    if lost:
        raise UpcycleError(
            f"Layer {old.name!r} ({type(old).__name__}) has a `{lost[0]}` of "
            "its own, put on this very object, which a copy made from its "
            "config would be without. Write a subclass that overrides it, "
            "registered with Keras, or take it off and put it on the result."
        )


def check_settings(a: keras.Layer, b: keras.Layer) -> None:
    """Raises `UpcycleError` if a layer has settings that its copy has not.

    Changed on the layer itself, where the config of a model around it made
    the copy.
    """
    old, new = map(keras_internals.plain_settings, (a, b))
    for name in old.keys() & new.keys():
        if old[name] != new[name] and not _same_code(old[name], new[name]):
            raise UpcycleError(
                f"Layer {(a.path or a.name)!r} ({type(a).__name__}) has {name}="
                f"{old[name]!r}, while the config of the model around it makes "
                f"one with {name}={new[name]!r}: it was changed afterwards, "
                "and a copy, which the config makes, would lose that. Undo "
                "the change, upcycle, and make it again on the result; or "
                "make the model with this setting."
            )


def _same_code(a, b):
    """Whether two functions are one, made twice inside an `__init__`."""
    if not (inspect.isfunction(a) and inspect.isfunction(b)):
        return False
    return (a.__code__, a.__defaults__, _closure(a)) == (
        b.__code__,
        b.__defaults__,
        _closure(b),
    )


def _closure(function):
    return [cell.cell_contents for cell in function.__closure__ or ()]

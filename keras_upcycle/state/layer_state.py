"""All that a layer holds and its config does not tell, for another like it."""

import pathlib
import tempfile

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.state import first_values
from keras_upcycle.state.attributes import (
    attributes,
    copier,
    copy_attributes,
    lost,
)
from keras_upcycle.state.sameness import (
    save_the_same,
    saved,
    saves,
    variables_saved,
)


def carry(old: keras.Layer, new: keras.Layer) -> None:
    """Brings everything that `old` itself holds to `new`.

    Sub-layers are not looked at. Nothing is shared afterwards: on JAX two
    variables with one buffer would take it from each other in training.

    Args:
        old: A built layer.
        new: A built one of the same class and config, or of a subclass, of
            which attributes are its own affair.

    Raises:
        UpcycleError: If `new` does not hold the same afterwards; names `old`.
    """
    problem = None
    if keras_internals.saves_more_than_variables(old):
        if _shapes(old) == _shapes(new):
            _copy_variables(old, new)
        problem = _load(old, new)
    if type(old) is type(new):
        copy_attributes(old, new, attributes(old))
    if _shapes(old) != _shapes(new):
        why = _differing_weights(old, new)
        raise lost(old, f"{why}, and {problem}" if problem else why)
    _copy_variables(old, new)
    # What could not be loaded may have been copied with the attributes.
    if problem and not save_the_same(old, new):
        raise lost(old, problem)


def carry_variables(old: keras.Layer, new: keras.Layer) -> None:
    """`carry` for the variables alone; what else `new` holds stays.

    Raises:
        UpcycleError: As `carry`.
    """
    if _shapes(old) != _shapes(new):
        raise lost(old, _differing_weights(old, new))
    _copy_variables(old, new)
    refresh(new)


def carry_unsaved(old: keras.Layer, new: keras.Layer) -> None:
    """`carry` for all but the variables, which `new` has already.

    Raises:
        UpcycleError: As `carry`.
    """
    problem = None
    if keras_internals.saves_more_than_variables(old):
        problem = _load(old, new)
    if type(old) is type(new):
        copy_attributes(old, new, attributes(old))
    if problem and not save_the_same(old, new):
        raise lost(old, problem)
    pairs = zip(
        keras_internals.metric_variables(old),
        keras_internals.metric_variables(new),
        strict=False,
    )
    for source, target in pairs:
        target.assign(ops.copy(source.value))


def carry_added(old: keras.Model, new: keras.Model) -> None:
    """Brings what a user put on a model's object, of which no config tells.

    Public attributes that `new` has not; the two may be of two classes.

    Raises:
        UpcycleError: For one that cannot be copied; names `old`.
    """
    added = [
        (name, value)
        for name, value in vars(old).items()
        if not name.startswith("_")
        and name not in vars(new)
        and name not in keras_internals.TRAINING
    ]
    copy_attributes(old, new, added)


def refresh(layer: keras.Layer) -> None:
    """Lets a layer see that its variables were written to.

    A `Normalization`, for one, computes with tensors that it made of its
    variables when it last loaded them.
    """
    if keras_internals.own_variables(
        layer
    ) and keras_internals.saves_more_than_variables(layer):
        layer.load_own_variables(variables_saved(layer))


def check_values(model: keras.Layer) -> None:
    """Raises `UpcycleError` for a model that Keras left without its weights.

    On JAX the values are out of the model while `predict` or `evaluate` runs,
    and are not put back where it fails.
    """
    without = keras_internals.lost_variables(model)
    if without:
        raise UpcycleError(
            f"The weights of {model.name!r} must have values. Received: "
            f"{len(without)} of {len(model.variables)} without, such as "
            f"{without[0].path!r}. On JAX, Keras takes the values out of a "
            "model while `predict`, `evaluate` or `fit` runs, and does not put "
            "them back when `predict` or `evaluate` fails, as for an input of "
            "the wrong width; they are gone, and the model itself predicts no "
            "more. Load it again: `keras.saving.load_model(path)`, or "
            "`model.load_weights(path)`; or make it anew."
        )


def _load(old, new):
    """Lets `new` read what `old` writes; why it could not, or `None`."""
    try:
        expected = saved(old)
    except Exception as error:
        return f"saving it failed with {type(error).__name__}: {error}"
    if saves(new, expected):
        return None
    try:
        new.load_own_variables(dict(expected.variables))
        if hasattr(new, "load_assets"):
            with tempfile.TemporaryDirectory() as folder:
                for name, content in expected.assets.items():
                    path = pathlib.Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                new.load_assets(folder)
    except Exception as error:
        return (
            f"loading what it saves failed with {type(error).__name__}: {error}"
        )
    if not saves(new, expected):
        return "what it saves is not what its copy saves after loading it"
    return None


# Variables.


def _shapes(layer):
    return [tuple(v.shape) for v in _variables(layer)]


def _differing_weights(old, new):
    return (
        f"its copy, {new.name!r}, made from its config, has weights that "
        f"differ in number or shape, {_described(new)} where it has "
        f"{_described(old)}"
    )


def _described(layer):
    return [f"{v.name} {tuple(v.shape)}" for v in _variables(layer)]


def _variables(layer):
    return [
        *keras_internals.own_variables(layer),
        *keras_internals.metric_variables(layer),
    ]


def _copy_variables(old, new):
    for source, target in zip(_variables(old), _variables(new), strict=True):
        # A copy: on JAX the two would share a buffer, and the first training
        # step of either would donate it and leave the other without.
        if keras_internals.has_value(target):
            target.assign(ops.copy(source.value))
        else:
            keras_internals.set_first_value(
                target, first_values.laid_out(copier(source))
            )
        copy_flag(source, target)
        # Where they were put on the variable, and no config has them.
        target.regularizer = source.regularizer
        target.constraint = source.constraint


def copy_flag(source: keras.Variable, target: keras.Variable) -> None:
    """Freezes one variable as another is, which its layer may not be."""
    if target.trainable != source.trainable:
        target.trainable = source.trainable

"""What a model was compiled with, for a model that was made of it."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import Family
from keras_upcycle.optimizers import variable_settings
from keras_upcycle.optimizers.variable_settings import Pairs
from keras_upcycle.state.remaking import CannotRemake, remake, same


def carry(
    family: Family,
    old: keras.Model,
    new: keras.Model,
    pairs: Callable[[], Pairs],
    stacklevel: int = 3,
) -> None:
    """Compiles `new` as `old` is, with an optimizer of its own.

    Metrics hold what they counted, so they are made anew; losses too where
    their config tells all of them, else they are the same objects, as plain
    functions are. What cannot be carried is left out, with a warning of one
    line, and the rest is carried.

    Args:
        family: Of both models.
        old: Compiled or not. Not changed.
        new: What was made of it. Not compiled where `old` is not.
        pairs: Gives `(new, old)` for every weight of `new`.
        stacklevel: For the warnings: by default the line that called whoever
            called this.
    """
    if not old.compiled:
        # KerasHub's tasks compile themselves.
        new.compiled = False
        return
    said: list[str] = []
    arguments = keras_internals.compiled_with(old)
    names = _renamed_outputs(old, new, arguments, said)
    objects: dict[int, Any] = {}
    for argument, one in (
        ("loss", _loss),
        ("loss_weights", None),
        ("metrics", _metric),
        ("weighted_metrics", _metric),
    ):
        value = _with_names(arguments[argument], names)
        if one is not None:
            one = functools.partial(
                _once, objects, functools.partial(one, old, said)
            )
            value = _each(value, one)
        arguments[argument] = value
    arguments["optimizer"] = _optimizer(old, new, pairs, said)
    try:
        new.compile(
            **arguments,
            # A loss scale is carried with the optimizer, or was declined.
            auto_scale_loss=False,
            **family.compile_arguments(old),
        )
    except Exception as error:  # any custom object may fail in its own way
        new.compiled = False
        said = [
            "The compile settings could not be carried over "
            f"({type(error).__name__}: {error}). Call `compile` on the result "
            "before training."
        ]
    for line in said:
        warnings.warn(line, stacklevel=stacklevel)


def read(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `compile` from what a file says of them, as far as it goes.

    Keras reads all of them or none.

    Args:
        config: As `get_compile_config` gives.

    Returns:
        `(arguments, lines)`; the lines name optimizers and metrics that were
        left out since they cannot be read.

    Raises:
        Exception: As Keras does, where a loss or a setting cannot be read.
    """
    said: list[str] = []
    arguments = {}
    for name, value in config.items():
        if name == "optimizer":
            value = _read_or(None, "optimizer", value, said)
        elif name in ("metrics", "weighted_metrics"):
            value = _read_metrics(value, said)
        else:
            value = keras.saving.deserialize_keras_object(value)
        arguments[name] = value
    return arguments, said


def _read_metrics(value, said):
    if isinstance(value, Mapping) and "class_name" not in value:
        return {k: _read_metrics(each, said) for k, each in value.items()}
    if isinstance(value, list):
        return [_read_metrics(each, said) for each in value]
    return _read_or([], "metric", value, said)


def _read_or(default, what, value, said):
    try:
        return keras.saving.deserialize_keras_object(value)
    except Exception as error:  # a user's class may fail in its own way
        name = value.get("config") if isinstance(value, Mapping) else value
        name = name.get("name", value) if isinstance(name, Mapping) else name
        reason = " ".join(str(error).split())[:200]
        said.append(
            f"The {what} {name!r} could not be read and is left out "
            f"({type(error).__name__}: {reason}). Call `compile` on the result "
            "before training."
        )
        return default


# Optimizers.


def _optimizer(old, new, pairs, said):
    optimizer = getattr(old, "optimizer", None)
    if optimizer is None:
        return None
    try:
        found = pairs()
    except Exception as error:  # a family of the user's may not tell
        found = [(variable, None) for variable in new.weights]
        said.append(
            "Which variables came from which is not known "
            f"({type(error).__name__}: {error}). What the optimizer "
            f"{optimizer.name!r} was told of single variables is carried by "
            "their names and paths alone."
        )
    try:
        return variable_settings.like(optimizer, found)
    except Exception as error:  # a user's class may fail in its own way
        reason = str(error)
        if not isinstance(error, CannotRemake):
            reason = f"{type(error).__name__}: {error}"
        said.append(
            f"The optimizer {optimizer.name!r} ({type(optimizer).__name__}) "
            f"could not be made anew ({reason}), so the result has none. Call "
            "`compile` on the result before training."
        )
        return None


# Losses and metrics.


def _loss(old, said, loss):
    result = loss
    if isinstance(loss, keras.losses.Loss):
        if _holds_variables(loss):
            said.append(
                f"The loss {loss.name!r} holds variables, and is the same "
                "object in both models: training one changes it for the other. "
                "Compile the result with one of its own."
            )
        else:
            try:
                result = remake(loss)
            except CannotRemake:
                result = loss
            # It has no state: what differs is a setting.
            if not same(vars(result), vars(loss)):
                result = loss
    _warn_if_bound(old, said, "loss", result)
    return result


def _metric(old, said, metric):
    result = metric
    if isinstance(metric, keras.metrics.Metric):
        try:
            result = remake(metric)
        except CannotRemake as error:
            said.append(
                f"The metric {metric.name!r} ({type(metric).__name__}) could "
                f"not be made anew ({error}) and is left out. Give it a "
                "`get_config`, or compile the result with one of its own."
            )
            # Nothing, but in its place: a list may have one for each output.
            return []
    _warn_if_bound(old, said, "metric", result)
    return result


def _once(objects, make, value):
    """What was made of an object before: one in two places stays one."""
    if value is None or isinstance(value, str):
        return value
    if id(value) not in objects:
        objects[id(value)] = make(value)
    return objects[id(value)]


def _each(structure, make):
    """The same structure of losses or metrics."""
    if isinstance(structure, Mapping):
        return {key: _each(value, make) for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        made = [_each(value, make) for value in structure]
        return made if isinstance(structure, list) else tuple(made)
    return make(structure)


def _holds_variables(loss):
    found = keras.tree.flatten(list(vars(loss).values()))
    return any(isinstance(value, keras.Variable) for value in found)


def _warn_if_bound(old, said, what, value):
    """Says that a function reads the model that the result is made of."""
    parts = {id(old)}
    parts |= {id(layer) for layer in keras_internals.all_layers(old)}
    parts |= {id(variable) for variable in old.variables}
    if any(id(found) in parts for found in _referred(value)):
        name = getattr(value, "name", getattr(value, "__name__", value))
        said.append(
            f"The {what} {name!r} reads {old.name!r}, the model that was "
            "given, or a part of it, and goes on doing so. Compile the result "
            "with one that reads the result."
        )


def _referred(value) -> Iterable[Any]:
    """Objects that a function or an object finds without its arguments."""
    found = []
    while isinstance(value, functools.partial):
        found += [*value.args, *value.keywords.values()]
        value = value.func
    found.append(getattr(value, "__self__", None))
    if inspect.ismethod(value):
        value = value.__func__
    if inspect.isfunction(value):
        found += value.__defaults__ or ()
        try:
            seen = inspect.getclosurevars(value)
            found += [*seen.nonlocals.values(), *seen.globals.values()]
        except ValueError:  # of a name that has no value yet
            pass
    elif not isinstance(value, str) and hasattr(value, "__dict__"):
        found += vars(value).values()
    for each in list(found):
        if isinstance(each, list | tuple):
            found += each
        elif isinstance(each, Mapping):
            found += each.values()
    return found


# Outputs that are called otherwise.


def _renamed_outputs(old, new, arguments, said):
    """From an output's name in `old` to that in `new`, where they differ."""
    before, after = (getattr(m, "output_names", None) for m in (old, new))
    if not before or not after or len(before) != len(after):
        return {}
    if isinstance(old.output, Mapping):
        return {}  # called by the keys, which are the same
    names = {a: b for a, b in zip(before, after, strict=True) if a != b}
    named = any(
        isinstance(arguments[name], Mapping)
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics")
    )
    if names and (named or len(before) > 1):
        changed = ", ".join(f"{a!r} is {b!r}" for a, b in names.items())
        said.append(
            "Outputs are called as the layer that gives them, in logs and in "
            f"targets given by name too: {changed} in the result. Compile "
            "settings follow."
        )
    return names


def _with_names(structure, names):
    if not isinstance(structure, Mapping):
        return structure
    return {names.get(key, key): value for key, value in structure.items()}

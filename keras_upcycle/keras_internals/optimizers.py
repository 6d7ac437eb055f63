"""Slots, counters and settings of optimizers, of compiled models too."""

import re
import sys
from typing import Any

import keras
from keras import ops


def optimizer_slots(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, list[keras.Variable | None]]:
    """An optimizer's variables that belong to model variables.

    Attribute by attribute, in the order of the model variables that it was
    built with: Keras's optimizers hold them in lists. Keras 3.15.
    """
    count = len(optimizer._trainable_variables)
    return {
        name: list(value)
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and name not in ("_variables", "_trainable_variables")
        and len(value) == count
        and all(isinstance(v, keras.Variable | None) for v in value)
    }


def optimizer_scalars(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, keras.Variable]:
    """An optimizer's variables that belong to no model variable.

    Such as `iterations`, a learning rate, the scale of a loss. Keras 3.15.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, keras.Variable)
    }


def optimizer_of_step() -> keras.optimizers.Optimizer | None:
    """The optimizer of the model whose `train_step` is running, if one is.

    Nothing tells a layer. Keras's call context knows the outermost layer that
    was called, but on JAX `Model.stateless_call` starts below the model. So
    the model is looked for among the callers, as the first argument of a
    `train_step`: the outermost, which holds the others. Where a step is
    compiled this runs when it is traced. Keras 3.15.
    """
    found = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # AutoGraph calls its version of a function `tf__train_step`.
        if code.co_name.endswith("train_step") and code.co_argcount:
            model = frame.f_locals.get(code.co_varnames[0])
            if isinstance(model, keras.Model):
                found = getattr(model, "optimizer", None) or found
        frame = frame.f_back
    return found


def whole(counter: keras.Variable) -> int:
    """The value of a counter such as `optimizer.iterations`.

    `int` does not read what `tf.distribute` mirrors over devices. Keras 3.15.
    """
    return int(ops.convert_to_numpy(counter))


def optimizer_targets(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """The model variables that an optimizer was built with. Keras 3.15."""
    return list(optimizer._trainable_variables)


def decays(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> bool:
    """Whether the optimizer's weight decay, if any, is for this variable.

    `exclude_from_weight_decay` is in no optimizer's config. Keras 3.15.
    """
    return optimizer._use_weight_decay(variable)


def copy_decay_exclusions(
    old: keras.optimizers.Optimizer, new: keras.optimizers.Optimizer
) -> None:
    """Lets `new` spare from weight decay what `old`, its like, spares.

    `exclude_from_weight_decay` is in no optimizer's config. Keras 3.15.
    """
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def compiled_with(model: keras.Model) -> dict:
    """What `compile` was given, as live objects, and what was set since.

    Keras's own record, `get_compile_config`, holds serialised copies: a plain
    function does not come back from one. A later `compile` without a loss or
    without metrics keeps the earlier ones, which the record does not know.
    `Trainer._compile_loss` and `_compile_metrics`, 3.15.

    Returns:
        Arguments of `compile`; the optimizer is the one that trains, with a
        loss scale where Keras added it.
    """
    loss, metrics = model._compile_loss, model._compile_metrics
    given = {
        "optimizer": getattr(model, "optimizer", None),
        "loss": None,
        "loss_weights": None,
        "metrics": None,
        "weighted_metrics": None,
        "run_eagerly": model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "jit_compile": model.jit_compile and not model.run_eagerly,
    }
    if loss is not None:
        given["loss"] = loss._user_loss
        given["loss_weights"] = loss._user_loss_weights
    if metrics is not None:
        given["metrics"] = metrics._user_metrics
        given["weighted_metrics"] = metrics._user_weighted_metrics
    return given


def spared_from_decay(
    optimizer: keras.optimizers.Optimizer,
    variable: keras.Variable,
    by_name_only: bool = False,
) -> bool:
    """Whether `exclude_from_weight_decay` names the variable.

    As `decays`, but leaves nothing in the optimizer's cache, which goes by
    `id` and must not hold variables of another model. Keras 3.15.

    Args:
        optimizer: Built or not.
        variable: Of any model.
        by_name_only: Whether `var_names` alone count; for a variable that the
            optimizer cannot have been given.
    """
    spared = getattr(optimizer, "_exclude_from_weight_decay", ())
    if not by_name_only and optimizer._var_key(variable) in spared:
        return True
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return pattern is not None and bool(re.search(pattern, variable.name))


def learning_rate_of(optimizer: keras.optimizers.Optimizer):
    """A schedule or function as it was given; a constant one as a float.

    The public `learning_rate` gives its present value. Keras 3.15.
    """
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable) or ops.is_tensor(rate):
        return float(ops.convert_to_numpy(rate))
    return rate


def without_rate(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """A view of an optimizer whose `get_config` does not ask for the rate.

    A schedule of the user's may have no config. Only for reading: it has the
    optimizer's own variables. Past Keras's `__setattr__`, which would track.
    Keras 3.15.
    """
    view = object.__new__(type(optimizer))
    view.__dict__.update(vars(optimizer), _learning_rate=None)
    return view


def wrapped_function(metric: keras.metrics.Metric):
    """`(function, its arguments)` of a `MeanMetricWrapper`. Keras 3.15."""
    return metric._fn, dict(metric._fn_kwargs)


def optimizers_by_path(optimizer: keras.optimizers.MultiOptimizer):
    """A `MultiOptimizer`'s `(map, default, {path: optimizer})`.

    `None` where a function chooses, of which nothing is known. 3.15.
    """
    chosen = optimizer._optimizer_map
    if not hasattr(chosen, "default_optimizer"):
        return None
    return chosen, chosen.default_optimizer, dict(chosen._optimizer_map)


def not_built_for_training(model: keras.Model) -> list[str]:
    """Which of a model's optimizer and metrics have no variables yet.

    `Model._compile_metrics`, which `compile` makes and the first batch builds.
    Keras 3.15.

    Returns:
        Words; all that `compile` makes, if it was not called.
    """
    found = []
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        found.append("optimizer")
    metrics = getattr(model, "_compile_metrics", None)
    if metrics is not None and not metrics.built:
        found.append("metrics")
    return found

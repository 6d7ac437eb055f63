"""What an optimizer was told of single variables, told to another one."""

from collections.abc import Iterable

import keras

from keras_upcycle import keras_internals
from keras_upcycle.optimizers import scaled_optimizer
from keras_upcycle.state.remaking import CannotRemake, remake

# `(new, old)`: which variable of the old model each of the new one came from;
# `None` for what is new.
Pairs = Iterable[tuple[keras.Variable, keras.Variable | None]]


def like(
    optimizer: keras.optimizers.Optimizer, pairs: Pairs
) -> keras.optimizers.Optimizer:
    """A new optimizer of the same settings, for variables of another model.

    Without slots and step count. What `exclude_from_weight_decay` spared stays
    spared, factors of `scale_learning_rate` and the choice of a
    `MultiOptimizer` hold for what came of their variables.

    Args:
        optimizer: Any, built or not. Not changed.
        pairs: `(new, old)` for every weight of the new model.

    Returns:
        An optimizer of the same class, not built.

    Raises:
        CannotRemake: If its class says too little of itself.
    """
    pairs = list(pairs)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(
            like(optimizer.inner_optimizer, pairs),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return _choosing_like(optimizer, pairs)
    known = keras_internals.without_rate(optimizer)
    given = {"learning_rate": _rate_like(optimizer)}
    if isinstance(optimizer, keras_internals.FreshSlots):
        # All slots are new, and count the same steps.
        given |= {"fresh": [], "fresh_since": 0}
    if isinstance(optimizer, scaled_optimizer.ScaledOptimizer):
        result = scaled_optimizer.scaled_from_config(
            optimizer.plain,
            known.plain_config() | given,
            scaled_optimizer.same_factors(
                optimizer.learning_rate_factors, pairs
            ),
            scaled_optimizer.same_factors(optimizer.gradient_factors, pairs),
        )
    else:
        result = remake(optimizer, known.get_config() | given)
    carry_exclusions(optimizer, result, pairs)
    return result


def carry_exclusions(
    old: keras.optimizers.Optimizer,
    new: keras.optimizers.Optimizer,
    pairs: Pairs,
) -> None:
    """Spares from `new`'s weight decay what came of what `old` spares.

    `exclude_from_weight_decay` is in no optimizer's config. A variable that
    came of none is spared where its name is.

    Args:
        old: Built or not. Not changed.
        new: Not built.
        pairs: `(new, old)` variables.
    """
    spared = [
        variable
        for variable, source in pairs
        if keras_internals.spared_from_decay(
            old,
            variable if source is None else source,
            by_name_only=source is None,
        )
    ]
    if spared:
        new.exclude_from_weight_decay(var_list=spared)


def _rate_like(optimizer):
    """A rate as it is now; a schedule anew, and what cannot be as it is."""
    rate = keras_internals.learning_rate_of(optimizer)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        try:
            return remake(rate)
        except CannotRemake:
            return rate
    return rate


def _choosing_like(optimizer, pairs):
    parts = keras_internals.optimizers_by_path(optimizer)
    if parts is None:
        raise CannotRemake("a function chooses from optimizers of its own")
    chosen, default, by_path = parts
    made = {}
    for old in (default, *by_path.values()):
        if id(old) not in made:
            made[id(old)] = like(old, pairs)
    choose = type(chosen)(
        made[id(default)], {key: made[id(old)] for key, old in by_path.items()}
    )
    for new, source in pairs:
        # A key that is the path itself goes before expressions.
        expected = made[id(chosen(new if source is None else source))]
        try:
            found = choose(new)
        except ValueError:  # more than one expression now fits
            found = None
        if found is not expected and new.path not in by_path:
            choose[new.path] = expected
    return type(optimizer)(
        choose,
        loss_scale_factor=optimizer.loss_scale_factor,
        name=optimizer.name,
    )

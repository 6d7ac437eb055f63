"""Settings of routers that may follow a schedule, and the step they are at.

An optimizer hands its schedules the step. A layer's call does not see it: on
JAX an optimizer's `iterations` are not among what a layer's program is given.
So a router counts the training steps itself, in a weight that it has only where
a setting follows a schedule.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.routing import training_steps
from keras_upcycle.routing.remade import is_remade
from keras_upcycle.types import Tensor

Schedule = keras.optimizers.schedules.LearningRateSchedule


def check(name: str, value: Any, of_number: Callable[..., Any]) -> Any:
    """A number, or a schedule that starts with one.

    Args:
        name: Of the argument.
        value: What was given; of a config, a schedule's own.
        of_number: Checks a name and a number, such as `checks.check_factor`.

    Raises:
        TypeError: If it is neither, or a schedule that no file could hold.
        ValueError: If it is out of range, a schedule at step 0. Later steps
            are not looked at: there is no end to them. For one of Keras's that
            begins with an integer.
    """
    checks.check_no_class(name, value, "number or schedule")
    if isinstance(value, Mapping):
        value = checks.check_known(
            name,
            value,
            keras.optimizers.schedules.deserialize,
            "a number or a learning-rate schedule",
        )
    if not isinstance(value, Schedule):
        try:
            return of_number(name, value)
        except TypeError as error:
            raise TypeError(
                f"{error} A `keras.optimizers.schedules.LearningRateSchedule` "
                "is taken as well."
            ) from None
    kind = type(value).__name__
    if is_remade():  # and was checked when it was made
        return value
    _check_floats(name, value)
    try:
        keras.optimizers.schedules.serialize(value)
    except NotImplementedError as error:
        raise TypeError(
            f"`{name}` must be a schedule that files can hold. Received: "
            f"{name} of type {kind}, which has no config. Give it a "
            "`get_config`."
        ) from error
    try:
        of_number(name, value_at(value, 0))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{error} This is what {kind} gives at step 0. Pass a schedule "
            "that is in range at every step."
        ) from error
    return value


def _check_floats(name: str, schedule: Any) -> None:
    """Raises `ValueError` where Keras would compute in whole numbers.

    It does in the dtype of the first value: `ExponentialDecay(2, 10, 0.5)` is 0
    from its second step on, as a rate of 0.5 is then 0.
    """
    if type(schedule).__module__.partition(".")[0] != "keras":
        return
    for argument in ("initial_learning_rate", "values"):
        given = getattr(schedule, argument, ())
        several = isinstance(given, list | tuple)
        if any(map(checks.is_integer, given if several else [given])):
            raise ValueError(
                f"`{name}` must be a schedule of floats: Keras computes with "
                "integers where it is given one, and 0.5 becomes 0. Received: "
                f"{name} of type {type(schedule).__name__} with {argument}="
                f"{given!r}. Write 2.0 for 2."
            )


def value_at(setting: Any, step: int) -> float:
    """What a setting is at a step, outside of compiled steps."""
    if not isinstance(setting, Schedule):
        return setting
    return float(ops.convert_to_numpy(setting(step)))


def in_config(setting: Any) -> Any:
    """A setting as a config holds it."""
    if isinstance(setting, Schedule):
        return keras.optimizers.schedules.serialize(setting)
    return setting


class FollowsSchedules(keras.layers.Layer):
    """A layer with a temperature, some of whose settings may be schedules.

    Args:
        temperature: A number above 0, or a schedule.
        batches_per_step: How many training calls make one step; `None` for
            what the optimizer says.
        **kwargs: Keyword arguments of `keras.layers.Layer`.
    """

    # Names of the settings that may be schedules.
    may_follow: tuple[str, ...] = ("temperature",)

    def __init__(self, *, temperature=1.0, batches_per_step=None, **kwargs):
        super().__init__(**kwargs)
        self.temperature = check(
            "temperature", temperature, checks.check_factor
        )
        if batches_per_step is not None:
            batches_per_step = checks.check_count(
                "batches_per_step", batches_per_step
            )
        self.batches_per_step = batches_per_step
        self.training_step = None

    @property
    def scheduled(self) -> dict[str, Any]:
        """The settings that follow a schedule, by name."""
        found = {name: getattr(self, name) for name in self.may_follow}
        return {
            name: setting
            for name, setting in found.items()
            if isinstance(setting, Schedule)
        }

    def build_count(self) -> None:
        """Makes the weight that counts steps, where a schedule asks for it."""
        if not self.scheduled:
            return
        self.training_step = self.add_weight(
            name="training_step",
            shape=(),
            initializer="zeros",
            dtype="int",
            trainable=False,
            # The replicas of `tf.distribute` assign the same.
            aggregation="only_first_replica",
        )
        # Without sums: how many batches of a step are over.
        self.gathered_calls = training_steps.GatheredOverStep(
            (), "gathered_calls"
        )

    def count_step(self) -> None:
        """A training call is over; every so many of them are a step."""
        count = self.training_step
        if count is None or not self.trainable:
            return
        _, last = self.gathered_calls.add(
            (), training_steps.batches_per_step(self.batches_per_step)
        )
        count.assign_add(1 if last is True else ops.cast(last, count.dtype))

    def setting(self, name: str) -> Tensor | float:
        """A setting at the present step, for a call: a number, or a scalar."""
        found = getattr(self, name)
        if not isinstance(found, Schedule):
            return found
        step = ops.convert_to_tensor(self.training_step)
        return ops.cast(found(step), "float32")

    def setting_now(self, name: str) -> float:
        """A setting at the present step, outside of compiled steps."""
        count = self.training_step
        step = 0 if count is None else keras_internals.whole(count)
        return value_at(getattr(self, name), step)

    def scheduled_now(self) -> dict[str, float]:
        """What the settings are that follow a schedule, by name."""
        return {name: self.setting_now(name) for name in self.scheduled}

    def get_config(self):
        return {
            **super().get_config(),
            "temperature": in_config(self.temperature),
            "batches_per_step": self.batches_per_step,
        }


def is_one(setting: Any) -> bool:
    """Whether a setting is the number 1, now and later."""
    return isinstance(setting, int | float) and setting == 1

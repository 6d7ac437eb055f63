"""Other learning rates for routers or experts; scaled gradients."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks, keras_internals


def scale_learning_rate(
    optimizer: keras.optimizers.Optimizer, factors: Mapping[str, float]
) -> keras.optimizers.Optimizer:
    """The same optimizer with other learning rates for some variables.

    Each of these variables trains as if the optimizer's `learning_rate`,
    constant or scheduled, were `factor` times what it is: its updates and its
    decoupled weight decay become `factor` times as large. Clipping, loss
    scaling and gradient accumulation come before and are the same for all; a
    moving average of the weights comes after. Adafactor bounds its learning
    rate by the step, so there the update itself is multiplied.

    A factor of 0 holds the weights still while the optimizer's memory goes on
    as if they trained, so that a later factor finds it warm. Other than
    frozen ones, these variables still count in a `global_clipnorm`.

    Args:
        optimizer: A Keras optimizer, any but `MultiOptimizer`, or your own; a
            `LossScaleOptimizer` too. New, trained, loaded or from
            `upcycle_optimizer`: what it remembers is copied. Not changed.
        factors: Mapping from a regular expression to a finite factor of at
            least 0. A variable gets that of the first expression found in its
            `path`, such as
            `"vit_encoder/transformer_block_2/moe/router/kernel"`; 1 where none
            is. In upcycled models `"/router/"` finds the routers and
            `"/experts/"` the experts. They take the place of factors given
            before; `{}` takes them away.

    Returns:
        A new optimizer of a subclass of the same class and with the same
        settings, saved and loaded as any. Pass it to `compile`.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer, or `factors` no
            mapping from strings to numbers.
        ValueError: For a `MultiOptimizer`, a factor out of range, or an
            expression that is none. For one that decides for no variable:
            now, if the optimizer is built; else when `fit` builds it.

    Example:
        >>> adam = keras.optimizers.Adam(1e-3)
        >>> adam = scale_learning_rate(adam, {"/router/": 0.1, "/experts/": 2})
        >>> moe = keras.Sequential([
        ...     keras.Input((8,)), MoEFeedForward(4, 32, name="moe"),
        ... ])
        >>> moe.compile(adam, "mse")
    """
    _check(optimizer, factors)
    return _with_factors(optimizer, learning_rate=factors)


def scale_gradients(
    optimizer: keras.optimizers.Optimizer, factors: Mapping[str, float]
) -> keras.optimizers.Optimizer:
    """The same optimizer, which multiplies some variables' gradients first.

    The gradients are multiplied where they come in, after a loss scale is
    divided out and before they are accumulated and clipped.

    Under Adam and everything else that divides by the size of past gradients
    (RMSprop, Adagrad, Adafactor, Lamb, ...), and under Lion and Muon, which
    keep no size at all, this changes next to nothing but clipping: use
    `scale_learning_rate` there. It is for SGD, and for weighing variables in
    a `global_clipnorm`.

    Args:
        optimizer: A Keras optimizer, any but `MultiOptimizer`, or your own; a
            `LossScaleOptimizer` too; see `scale_learning_rate`. Not changed.
        factors: Mapping from a regular expression to a finite factor of at
            least 0. A variable gets that of the first expression found in its
            `path`; 1 where none is. They take the place of factors on gradients
            given before; `{}` takes them away.

    Returns:
        As `scale_learning_rate`, whose factors it keeps.

    Raises:
        TypeError, ValueError: As `scale_learning_rate`.

    Example:
        >>> sgd = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
        >>> sgd = scale_gradients(sgd, {"/experts/": 8.0})
        >>> sgd.get_config()["gradient_factors"]
        {'/experts/': 8.0}
    """
    _check(optimizer, factors)
    return _with_factors(optimizer, gradients=factors)


@keras.saving.register_keras_serializable("keras_upcycle")
class ScaledOptimizer(keras_internals.FactorsByVariable):
    """Stands before an optimizer's class in what the functions above return.

    A class for each class of optimizer, made when asked for, so that your own
    serve too. All are saved under the name of this one, whose `from_config`
    finds the optimizer's class.

    Attributes:
        plain: The class without factors.
        learning_rate_factors: As `scale_learning_rate` was given.
        gradient_factors: As `scale_gradients` was given.
    """

    plain: Any = None
    learning_rate_factors: Mapping[str, float] = {}
    gradient_factors: Mapping[str, float] = {}

    def build(self, variables):
        if not self.built:
            self.rate_scales = _by_variable(
                self.learning_rate_factors, variables
            )
            self.gradient_scales = _by_variable(
                self.gradient_factors, variables
            )
        super().build(variables)

    def without_factors(self):
        """An optimizer of the same settings, not built."""
        return self.plain.from_config(super().get_config())

    def plain_config(self):
        """The config of an optimizer of the same settings without factors."""
        return super().get_config()

    def get_config(self):
        plain = keras.saving.serialize_keras_object(self.without_factors())
        if plain["module"].startswith("keras.src"):
            # On torch Keras makes a subclass of the same name, which no other
            # backend knows.
            plain |= {"module": "keras.optimizers", "registered_name": None}
        return {
            "optimizer": plain,
            "learning_rate_factors": dict(self.learning_rate_factors),
            "gradient_factors": dict(self.gradient_factors),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        plain = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return _scaled(
            plain, config["learning_rate_factors"], config["gradient_factors"]
        )


@functools.cache
def _subclass(plain):
    register = keras.saving.register_keras_serializable(
        "keras_upcycle", "ScaledOptimizer"
    )
    made = type(
        f"Scaled{plain.__name__}",
        (ScaledOptimizer, plain),
        {
            "__doc__": f"{plain.__name__} with factors on some variables.",
            "__module__": __name__,
            "plain": plain,
            "proportional": not issubclass(plain, keras.optimizers.Adafactor),
        },
    )
    register(made)  # gives it the name
    register(ScaledOptimizer)  # takes the name back for who loads
    return made


def _scaled(plain, rates, gradients):
    """An optimizer like `plain`, not built, with these factors."""
    config = plain.get_config()
    if not rates and not gradients:
        return type(plain).from_config(config)
    return scaled_from_config(type(plain), config, rates, gradients)


def scaled_from_config(
    plain: type,
    config: Mapping[str, Any],
    rates: Mapping[str, float],
    gradients: Mapping[str, float],
) -> ScaledOptimizer:
    """An optimizer of a class and its config, not built, with factors."""
    made = _subclass(plain)
    result = super(ScaledOptimizer, made).from_config(dict(config))
    result.learning_rate_factors = {k: float(v) for k, v in rates.items()}
    result.gradient_factors = {k: float(v) for k, v in gradients.items()}
    return result


def _with_factors(optimizer, **factors):
    """A copy of an optimizer, memory and all, with other factors."""
    result = _unbuilt(optimizer, factors)
    if optimizer.built:
        result.build(keras_internals.optimizer_targets(optimizer))
        for new, old in zip(result.variables, optimizer.variables, strict=True):
            new.assign(ops.copy(old.value))
    return result


def _unbuilt(optimizer, factors):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(
            _unbuilt(optimizer.inner_optimizer, factors),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    plain, known = optimizer, {"learning_rate": {}, "gradients": {}}
    if isinstance(optimizer, ScaledOptimizer):
        plain = optimizer.without_factors()
        known = {
            "learning_rate": optimizer.learning_rate_factors,
            "gradients": optimizer.gradient_factors,
        }
    known |= factors
    result = _scaled(plain, known["learning_rate"], known["gradients"])
    keras_internals.copy_decay_exclusions(optimizer, result)
    return result


def factor_of(factors: Mapping[str, float], path: str) -> float:
    """The factor of a variable: that of the first expression found."""
    return factors.get(_deciding(factors, path), 1.0)


def _deciding(factors, path):
    return next((key for key in factors if re.search(key, path)), None)


def same_factors(
    factors: Mapping[str, float],
    pairs: Iterable[tuple[keras.Variable, keras.Variable | None]],
) -> dict[str, float]:
    """Factors that give other variables what these give those they came from.

    Args:
        factors: As `scale_learning_rate` was given.
        pairs: `(new, old)`, with `None` for what is new: it gets the factor of
            its own path.

    Returns:
        The same factors, after those of single paths that need one. What
        decides for none of the new variables is left out: such an expression
        is an error when the optimizer is built.
    """
    single = {}
    paths = []
    for new, old in pairs:
        paths.append(new.path)
        expected = factor_of(factors, (new if old is None else old).path)
        if factor_of(factors, new.path) != expected:
            single[f"^{re.escape(new.path)}$"] = expected
    found = single | dict(factors)
    deciding = {_deciding(found, path) for path in paths}
    return {key: value for key, value in found.items() if key in deciding}


def _by_variable(factors, variables):
    """The factor of each variable."""
    paths = [variable.path for variable in variables]
    deciding = [_deciding(factors, path) for path in paths]
    idle = [key for key in factors if key not in deciding]
    if idle:
        raise ValueError(
            "Each expression in `factors` must be found in the path of a "
            "trainable variable, where none before it is. Received: "
            f"{', '.join(map(repr, idle))}, which decides for none of "
            f"{len(paths)} variables, such as {paths[:: len(paths) // 4 + 1]}. "
            "Take them out, or put them before what decides for them."
        )
    return tuple(factors.get(key, 1.0) for key in deciding)


def _check(optimizer: Any, factors: Any) -> None:
    checks.check_instance(
        "optimizer",
        optimizer,
        keras.optimizers.Optimizer,
        "a Keras optimizer, such as `keras.optimizers.Adam(1e-3)`",
    )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "A `MultiOptimizer` has an optimizer for each group of variables "
            "already. Received: "
            f"optimizer={optimizer.name!r}. Set their learning rates, or "
            "scale each before it goes in."
        )
    if not isinstance(factors, Mapping):
        raise TypeError(
            "`factors` must be a mapping from regular expressions to numbers, "
            'such as {"/router/": 0.1}. Received: '
            f"factors={factors!r} of type {type(factors).__name__}."
        )
    for key, factor in factors.items():
        if not isinstance(key, str):
            raise TypeError(
                "The keys of `factors` must be regular expressions, as "
                f"strings. Received: {key!r} of type {type(key).__name__}."
            )
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                "The keys of `factors` must be regular expressions. "
                f"Received: {key!r}, of which Python says: {error}."
            ) from error
        checks.check_number(f"factors[{key!r}]", factor, at_least=0.0)

"""Optimizers that take every expert of a stack for a weight of its own.

Most do so anyway, since they look at numbers one by one.
"""

import warnings
import weakref
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.errors import UpcycleError


def _continued(base, *extra):
    """`base` with late slots, registered so that it can be saved."""
    name = f"Upcycled{base.__name__}"
    bases = (*extra, keras_internals.FreshSlots, base)
    doc = (
        f"Keras's {base.__name__}, some of whose slots may have started late; "
        "made by `upcycle_optimizer` and `per_expert`."
    )
    made = type(name, bases, {"__doc__": doc, "__module__": __name__})
    return keras.saving.register_keras_serializable("keras_upcycle")(made)


# Those that look at a whole weight, what makes them look at an expert, and
# what Keras's would do.
_WHOLE = {
    keras.optimizers.Adafactor: (
        keras_internals.AdafactorOfExperts,
        "scales and clips the update of all experts by one size",
    ),
    keras.optimizers.Lamb: (
        keras_internals.LambOfExperts,
        "scales the update of all experts by one norm",
    ),
    keras.optimizers.Muon: (
        keras_internals.MuonOfExperts,
        "leaves kernels of three axes, as experts have, to its AdamW",
    ),
}
# Those whose update counts steps or looks at a whole weight. Others need no
# class of their own.
CONTINUED = {
    base: _continued(base, *(_WHOLE[base][:1] if base in _WHOLE else ()))
    for base in (
        keras.optimizers.Adam,
        keras.optimizers.AdamW,
        keras.optimizers.Adamax,
        keras.optimizers.Nadam,
        keras.optimizers.Adafactor,
        keras.optimizers.Lamb,
        keras.optimizers.Muon,
    )
}
_told: weakref.WeakSet = weakref.WeakSet()


def per_expert(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """The same optimizer, for which each expert is a weight of its own.

    The kernels of a layer's experts are one variable `(E, D, F)`. Keras's
    Adafactor takes the size of the parameters and of the update, by which it
    scales and clips, over all of it, and Lamb its norms: one expert's update
    would depend on the others'. Muon would hand a kernel of three axes to its
    AdamW. The result does what Keras's optimizer does with the `E` kernels
    `(D, F)` one by one, and so with biases. Other weights are updated as ever.

    `upcycle_optimizer` does this by itself; this is for a new optimizer.
    `clipnorm` is still by variable, of all experts together.

    References: Shazeer and Stern, Adafactor (arXiv 1804.04235), sections 6
    and 8, for a matrix; T5X, where the experts are a batch of matrices.

    Args:
        optimizer: A Keras optimizer, any, or a `LossScaleOptimizer` around one.
            Not changed.

    Returns:
        For Adafactor, Lamb and Muon a new optimizer of a subclass, with the
        same settings and memory. For others, which look at every number by
        itself, `optimizer`.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        UpcycleError: For a class of your own that derives from one of the
            three, one with factors on rates or gradients, and a Muon that was
            built, whose memory of experts is AdamW's.

    Example:
        >>> adafactor = per_expert(keras.optimizers.Adafactor(1e-2))
        >>> isinstance(adafactor, keras.optimizers.Adafactor)
        True
        >>> moe = keras.Sequential([keras.Input((8,)), MoEFeedForward(4, 32)])
        >>> moe.compile(adafactor, "mse")
    """
    checks.check_instance(
        "optimizer",
        optimizer,
        keras.optimizers.Optimizer,
        "a Keras optimizer, such as `keras.optimizers.Adafactor(1e-3)`",
    )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _around(optimizer, per_expert(optimizer.inner_optimizer))
    base = _takes_stacks_whole(optimizer)
    if base is None:
        return optimizer
    if isinstance(optimizer, keras_internals.FactorsByVariable):
        raise UpcycleError(
            "Factors come last. Received: "
            f"optimizer={optimizer.name!r} with factors. Take them off, by "
            "`scale_learning_rate` and `scale_gradients` with `{}`, and scale "
            "the result of `per_expert`."
        )
    if not is_kerass(optimizer, base):
        raise UpcycleError(
            f"A class of your own may do anything with {base.__name__}'s "
            f"update. Received: {type(optimizer).__name__}. Put "
            f"`keras_upcycle.per_expert(keras.optimizers.{base.__name__}(...))`"
            " in its place, or compile with an optimizer that looks at every "
            "number by itself, such as Adam."
        )
    if optimizer.built and base is keras.optimizers.Muon:
        raise UpcycleError(
            "A Muon that was built has AdamW's memory of experts. Received: "
            f"optimizer={optimizer.name!r}, built. Call `per_expert` before "
            "training, or make a new Muon."
        )
    result = CONTINUED[base].from_config(optimizer.get_config())
    keras_internals.copy_decay_exclusions(optimizer, result)
    if optimizer.built:
        result.build(keras_internals.optimizer_targets(optimizer))
        for new, old in zip(result.variables, optimizer.variables, strict=True):
            new.assign(ops.copy(old.value))
    return result


def is_kerass(optimizer: Any, base: type) -> bool:
    """Whether it is exactly that class of Keras.

    On torch Keras makes a subclass of the same name.
    """
    kind = type(optimizer)
    return (
        isinstance(optimizer, base)
        and kind.__name__ == base.__name__
        and kind.__module__.startswith("keras.")
    )


def warn_of_whole_stacks() -> None:
    """Warns, once an optimizer, if that of the running step mixes experts."""
    optimizer = keras_internals.optimizer_of_step()
    optimizer = getattr(optimizer, "inner_optimizer", None) or optimizer
    parts = [optimizer]
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        parts = list(optimizer.optimizers)
    for part in parts:
        base = _takes_stacks_whole(part)
        if base is None or part in _told:
            continue
        _told.add(part)
        warnings.warn(
            f"Keras's {base.__name__} {_WHOLE[base][1]}. Compile with "
            f"`keras_upcycle.per_expert(keras.optimizers.{base.__name__}(...))"
            "`, which takes every expert for itself.",
            stacklevel=2,
        )


def _takes_stacks_whole(optimizer):
    """Which of the classes in `_WHOLE` it is, if it is not cured already."""
    for base, (cure, _) in _WHOLE.items():
        if isinstance(optimizer, base) and not isinstance(optimizer, cure):
            return base
    return None


def _around(optimizer, inner):
    """A loss scale like `optimizer`, memory and all, around another."""
    if inner is optimizer.inner_optimizer:
        return optimizer
    result = keras.optimizers.LossScaleOptimizer(
        inner,
        initial_scale=optimizer.initial_scale,
        dynamic_growth_steps=optimizer.dynamic_growth_steps,
        name=optimizer.name,
    )
    if optimizer.built:
        result.build(
            keras_internals.optimizer_targets(optimizer.inner_optimizer)
        )
        old = keras_internals.optimizer_scalars(optimizer)
        for name, variable in keras_internals.optimizer_scalars(result).items():
            variable.assign(ops.copy(old[name].value))
    return result

"""What an optimizer remembers, for a mixture with more experts."""

import warnings
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.conversion import upcycle_optimizer
from keras_upcycle.errors import UpcycleError
from keras_upcycle.optimizers.variable_settings import Pairs
from keras_upcycle.routing.remade import value_of


def carry(
    old: keras.Model,
    new: keras.Model,
    pairs: Pairs,
    copies: Mapping[int, Sequence[int]],
) -> None:
    """Fills the slots of `new`'s optimizer with those of `old`'s.

    A copy of an expert will meet its share of the expert's tokens: of `c`
    copies each gets `1 / c` of what adds up over tokens, which first moments
    and the variances that second ones are made of both do.

    Args:
        old: Compiled or not; nothing happens where its optimizer has no slots.
        new: Compiled as `old` is, with a new optimizer.
        pairs: `(new, old)` for every weight of `new`.
        copies: From the `id` of a weight of an MoE layer of `new` to which
            expert each of its experts was.
    """
    pair = [getattr(model, "optimizer", None) for model in (old, new)]
    source, target = map(_inner, pair)
    if source is None or target is None or not source.built:
        return
    sources = {id(a): b for a, b in pairs}
    try:
        if isinstance(source, keras.optimizers.MultiOptimizer):
            raise UpcycleError("a `MultiOptimizer` chooses for itself")
        upcycle_optimizer.check_placed(source)
    except UpcycleError as error:
        warnings.warn(
            f"What the optimizer {source.name!r} remembers could not be "
            f"carried over ({error}), so the result's starts anew.",
            stacklevel=3,
        )
        return
    if isinstance(target, keras_internals.FreshSlots):
        # The same variables in the same order, so the same are late.
        target.fresh, target.fresh_since = source.fresh, source.fresh_since
    new.optimizer.build(new.trainable_variables)
    for a, b in dict.fromkeys(((pair[0], pair[1]), (source, target))):
        upcycle_optimizer.copy_scalars(a, b)
    numbers = {
        id(v): n
        for n, v in enumerate(keras_internals.optimizer_targets(source))
    }
    before = keras_internals.optimizer_slots(source)
    for name, slots in keras_internals.optimizer_slots(target).items():
        for slot, variable in zip(slots, new.trainable_variables, strict=True):
            number = numbers.get(id(sources[id(variable)]))
            if slot is None or number is None:
                continue
            index = copies.get(id(variable))
            slot.assign(_grown(name, before[name][number], slot.shape, index))


def _grown(name, source, shape, index):
    """A slot's value for more experts, each with its share."""
    if index is None:
        return ops.copy(source.value)
    value = value_of(source, shape, index)
    share = _share(name, 1.0 / np.bincount(index)[np.array(index)])
    for axis, (before, after) in enumerate(
        zip(source.shape, shape, strict=True)
    ):
        if before != after:
            along = [1] * len(shape)
            along[axis] = len(index)
            value = value * ops.cast(share.reshape(along), value.dtype)
    return value


def _share(name, share):
    if name in upcycle_optimizer.SIZES:
        return np.sqrt(share)
    if name in upcycle_optimizer.ADDED_UP:
        return share
    return np.ones_like(share)


def _inner(optimizer):
    """Whose slots they are: a loss scale's are its inner optimizer's."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer

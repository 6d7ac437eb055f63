"""`densify_model`: the way back, from a mixture to one dense block each."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_upcycle import converted, families, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.types import Tensor

AVERAGE = "average"


def densify_model(
    moe: keras.Model,
    experts: Any = AVERAGE,
    *,
    dense: keras.Model | None = None,
) -> keras.Model:
    """The dense model again, each mixture reduced to one feed-forward block.

    The inverse of `upcycle_model`: right after it, the result is the dense
    model exactly. After training it is a start for more dense training, for
    distillation, or for comparing with a model average; routers are dropped,
    and with them the choice that made the mixture better.

    Args:
        moe: What `upcycle_model` made, trained since perhaps, or loaded. It
            is not changed.
        experts: What becomes of a block's experts. `"average"` (default) takes
            the mean of their weights; an integer takes that expert of every
            block; a function `(values, name, layer) -> value` gets stacked
            weights `(E, ...)`, `"up_kernel"`, `"down_bias"` and the like, and
            the `MoEFeedForward`.
        dense: A model of the wanted structure, such as the one that was
            upcycled; only its structure is read. Needed for models of `Dense`
            pairs alone: a mixture does not remember the two layers.

    Returns:
        A new, uncompiled dense model: a KerasHub task or backbone of the stock
        class with its preprocessor, or a functional model.

    Raises:
        TypeError: If `experts` is none of these.
        ValueError: For an expert that a block does not have.
        UpcycleError: If `moe` holds no mixture, or needs `dense` and has none.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> again = densify_model(moe, dense=dense)
        >>> x = keras.ops.ones((1, 8))
        >>> bool(keras.ops.all(again(x) == dense(x)))
        True
    """
    reduce = _reduction(experts)
    result = families.family_of(moe).skeleton(moe)
    if result is None:
        result = _like(dense, moe)
    origins = [
        origin
        for origin in converted.origins(result, moe)
        if origin.source is not None
    ]
    if isinstance(experts, int):
        _check_index(experts, origins)
    for origin in origins:
        _fill(origin, reduce)
    keras_internals.draw_first_values(result)
    return result


def _like(dense, moe):
    """A copy of the dense model that was given."""
    if dense is None:
        raise UpcycleError(
            "A mixture in a plain model does not remember the two `Dense` "
            f"layers it stands for. Received: {moe.name!r} and dense=None. "
            "Pass `dense`, a model of the structure to go back to."
        )
    family = families.family_of(dense)
    return family.rebuild(dense, family.find(dense).sites, {})


def _fill(origin, reduce):
    target, source = origin.source, origin.variable

    def value(shape, dtype=None):
        found = source.value
        if origin.layer is not None:
            found = reduce(found, origin.name, origin.layer)
        # A copy: on JAX training one model would take the other's buffer.
        return ops.reshape(ops.cast(ops.copy(found), dtype), shape)

    if keras_internals.has_value(target):
        target.assign(value(target.shape, target.dtype))
    else:
        keras_internals.set_first_value(target, value)
    if target.trainable != source.trainable:
        target.trainable = source.trainable


def _reduction(experts) -> Callable[[Tensor, str, Any], Tensor]:
    if experts == AVERAGE:
        return _average
    if isinstance(experts, int) and not isinstance(experts, bool):
        return lambda values, name, layer: values[experts]
    if callable(experts):
        return experts
    raise TypeError(
        "`experts` must be 'average', the number of an expert, or a function "
        f"(values, name, layer) -> value. Received: experts={experts!r} of "
        f"type {type(experts).__name__}."
    )


def _average(values, name, layer):
    del name, layer
    # Around the first, so that the mean of equal experts is that expert to the
    # last bit, whatever their number.
    first = values[:1]
    return first[0] + ops.mean(values - first, axis=0)


def _check_index(index, origins):
    for origin in origins:
        if origin.layer is None:
            continue
        count = origin.layer.num_experts
        if not 0 <= index < count:
            raise ValueError(
                f"`experts` must be a number from 0 to {count - 1}, or the "
                f"block {origin.layer.path!r} has no such expert. Received: "
                f"experts={index}."
            )

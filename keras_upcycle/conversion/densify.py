"""The way back: from an MoE layer to one dense block each, or to one expert."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import (
    compile_settings,
    model_checks,
    pairing,
)
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import surgery
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import named_mixtures
from keras_upcycle.layers.user_values import checked_tensor, telling_where
from keras_upcycle.state import first_values, half_precision, layer_state
from keras_upcycle.types import Tensor

AVERAGE = "average"


def densify_model(
    moe: keras.Model,
    experts: Any = AVERAGE,
    *,
    dense: keras.Model | None = None,
) -> keras.Model:
    """The dense model again, each MoE layer reduced to one feed-forward block.

    The inverse of `upcycle_model`: right after it, the result is the dense
    model exactly. After training it is a start for more dense training, for
    distillation, or for comparing with a model average; routers are dropped,
    and with them the choice that made the mixture better. Attention's experts
    (`CopiedAttention`) become the mean of their weights, except by a function.

    Args:
        moe: A Keras model, what `upcycle_model` made, trained since perhaps, or
            loaded. It is not changed.
        experts: String, integer, list, mapping or callable: what becomes of a
            block's experts. `"average"` (default) takes the mean of their
            weights; an integer takes that expert of every block; a list of
            integers has one for each block, inputs first, and a mapping has
            them by the blocks' names, as in a `RouterReading`; a function
            `(values, name, layer) -> value` gets stacked weights `(E, ...)`,
            `"up_kernel"`, `"down_bias"` and the like, `"query_kernel"` of
            attention's, and the layer that routes them.
        dense: A Keras model of the structure to have, such as the one that was
            upcycled; only its structure is read, all that its layers hold comes
            from `moe`. Defaults to `None`; needed for models of `Dense` pairs
            alone: an MoE layer does not remember the two layers.

    Returns:
        A new dense model: a KerasHub task or backbone of the stock class with
        its preprocessor, or a functional model. Compiled as `moe` is, with a
        new optimizer; see `upcycle_model`.

    Raises:
        TypeError: If `moe` is no Keras model, or `experts` none of these, or
            gives no floats.
        ValueError: For an expert that a block does not have, and for a list
            or mapping that does not name one for each block.
        UpcycleError: If `moe` holds no MoE layer, is quantized or holds LoRA
            adapters, or needs `dense` and has none.

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
    return _densified(moe, experts, dense)


def extract_expert(
    moe: keras.Model | MoEFeedForward,
    expert: Any,
    *,
    dense: keras.Model | None = None,
) -> keras.Model:
    """One expert by itself: a whole dense model, or one layer's network.

    Of a model, each MoE layer is reduced to one of its experts. Experts of
    different blocks have nothing to do with each other, whatever their
    numbers: a list or mapping chooses for each block, the most used ones for
    instance. Of one `MoEFeedForward`, what an expert computes, for study or
    for use elsewhere.

    Args:
        moe: A Keras model, what `upcycle_model` made, or one built
            `MoEFeedForward`, of any model. It is not changed.
        expert: Integer, the number of an expert, from 0. Of a model also a
            list, one number for each block, inputs first, or a mapping from the
            blocks' names, as in a `RouterReading`.
        dense: A Keras model of the structure to have, such as the one that was
            upcycled; only its structure is read. Defaults to `None`; needed for
            models of `Dense` pairs alone, and not used for a single layer.

    Returns:
        A new model without weights in common. Of a model, a dense one; see
        `densify_model`. Of a layer, a functional model of stock `Dense`
        layers, `"gate"` where gated, `"up"` and `"down"`, from `(..., D)` to
        `(..., D)`: what the layer gives a token that this expert alone
        processes with a combine weight of 1.

    Raises:
        TypeError: If `expert` is no number, nor a list or mapping of numbers.
        ValueError: For an expert that an MoE layer does not have, and for a
            layer that is not built.
        UpcycleError: As `densify_model`.

    Example:
        >>> layer = MoEFeedForward(num_experts=4, intermediate_dim=16)
        >>> layer.build((None, None, 8))
        >>> expert = extract_expert(layer, 2)
        >>> [below.name for below in expert.layers[1:]]
        ['up', 'down']
        >>> tuple(expert(keras.ops.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """
    if not isinstance(moe, MoEFeedForward):
        if isinstance(expert, str) or callable(expert):
            raise TypeError(
                "`expert` must be a number, or a list or mapping of numbers. "
                f"Received: expert={expert!r}. `densify_model` also averages "
                "and takes functions."
            )
        return _densified(moe, expert, dense)
    if not moe.built:
        raise ValueError(
            "`moe` must be built, or it has no experts yet. Received: layer "
            f"{moe.name!r}, not built. Call it, or its model, on a batch first."
        )
    layer_state.check_values(moe)
    model_checks.check_floats(moe, "`moe`", "Extract from")
    _check_number(moe, expert, "expert")
    return _block(moe, int(expert))


def _densified(moe, experts, dense):
    """Called by what a user called, for the line of warnings."""
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    model_checks.check_floats(moe, "`moe`", "Densify")
    reduce = _reduction(experts, moe)
    result = families.family_of(moe).build_dense(moe)
    if result is None:
        result = _like(dense, moe)
    pairs = [
        pair
        for pair in pairing.of_whole_experts(result, moe)
        if pair.relation != pairing.NEW
    ]
    _copy_flags(moe, result)
    for pair in pairs:
        _fill(pair, reduce)
    keras_internals.draw_first_values(result)
    surgery.copy_unsaved(moe, result)
    surgery.copy_added(moe, result)
    compile_settings.carry(
        families.family_of(moe),
        moe,
        result,
        lambda: [(pair.dense, pair.sparse) for pair in pairs],
        stacklevel=4,
    )
    half_precision.warn_of_more_training(moe, stacklevel=4)
    return result


def _like(dense, moe):
    """A copy of the dense model that was given."""
    if dense is None:
        raise UpcycleError(
            "An MoE layer in a plain model does not remember the two `Dense` "
            f"layers it stands for. Received: {moe.name!r} and dense=None. "
            "Pass `dense`, a model of the structure to go back to."
        )
    checks.check_instance("dense", dense, keras.Model, "a Keras model")
    family = families.family_of(dense)
    return family.rebuild(dense, family.find(dense).sites, {})


def _copy_flags(old, new):
    """The `trainable` of layers that both have, by name, containers first.

    Weights bring their own, which is not enough: a `BatchNormalization`
    updates its statistics unless the layer itself is frozen.
    """
    new.trainable = old.trainable
    by_name = {layer.name: layer for layer in getattr(new, "layers", ())}
    for layer in getattr(old, "layers", ()):
        if layer.name in by_name:
            _copy_flags(layer, by_name[layer.name])


def _fill(pair, reduce):
    target, source = pair.dense, pair.sparse

    def value(shape, dtype=None):
        found = source.value
        if pair.relation == pairing.STACKED:
            found = reduce(found, pair.name, pair.layer)
        # A copy: on JAX training one model would take the other's buffer.
        return ops.reshape(ops.cast(ops.copy(found), dtype), shape)

    if keras_internals.has_value(target):
        target.assign(value(target.shape, target.dtype))
    else:
        keras_internals.set_first_value(target, first_values.laid_out(value))
    layer_state.copy_flag(source, target)


def _reduction(experts, moe) -> Callable[[Tensor, str, Any], Tensor]:
    if isinstance(experts, str) and experts == AVERAGE:
        return _average
    numbered = _numbered(experts, moe)
    if numbered is not None:
        # Of attention's experts nobody says a number.
        return lambda values, name, layer: (
            values[numbered[layer]]
            if layer in numbered
            else _average(values, name, layer)
        )
    # A model is callable too: `densify_model(moe, dense)` means `dense=`.
    if callable(experts) and not isinstance(experts, keras.Layer):
        checks.check_takes("experts", experts, "values, name, layer")
        return lambda *given: _by_user(experts, *given)
    raise TypeError(
        "`experts` must be 'average', the number of an expert, a list or "
        "mapping of numbers, or a function (values, name, layer) -> value. "
        f"Received: experts={experts!r} of type {type(experts).__name__}. A "
        "dense model is passed as `dense=`."
    )


def _by_user(function, values, name, layer):
    """What a user's function makes of stacked weights, checked."""
    place = f"{name!r} of block {layer.path!r}"
    with telling_where("experts", place):
        value = function(values, name, layer)
    shape = tuple(values.shape[1:])
    shapes = {shape, shape[-1:]} if shape[0] == 1 else {shape}  # a bias
    return checked_tensor(
        value, shapes, values.dtype, shape, "experts", place, "of one expert"
    )


def _numbered(experts, moe) -> dict[MoEFeedForward, int] | None:
    """The expert of each MoE layer, where `experts` are numbers."""
    if isinstance(experts, np.ndarray) and experts.ndim:
        experts = list(experts)
    several = isinstance(experts, (Mapping, list, tuple))
    if not several and not checks.is_integer(experts):
        return None
    named = named_mixtures(moe)
    if not several:
        experts = dict.fromkeys(named, experts)
    if not isinstance(experts, Mapping):
        if len(experts) != len(named):
            raise ValueError(
                f"`experts` must list {len(named)} numbers, one for each of "
                f"the blocks {list(named)}. Received: experts={experts!r}. "
                "Pass one number to have it in all of them."
            )
        experts = dict(zip(named, experts, strict=True))
    if set(experts) != set(named):
        raise ValueError(
            "`experts` must name an expert for each of the blocks "
            f"{list(named)}. Received: experts={dict(experts)!r}. Pass one "
            "number to have it in all of them."
        )
    for name, layer in named.items():
        _check_number(layer, experts[name], "experts")
    return {layer: int(experts[name]) for name, layer in named.items()}


def _average(values, name, layer):
    del name, layer
    # Around the first, so that the mean of equal experts is that expert to the
    # last bit, whatever their number.
    first = values[:1]
    return first[0] + ops.mean(values - first, axis=0)


def _check_number(layer, number, name):
    if not checks.is_integer(number):
        raise TypeError(
            f"`{name}` must hold integers. Received: {name}={number!r} of "
            f"type {type(number).__name__} for {layer.path!r}."
        )
    if not 0 <= number < layer.num_experts:
        raise ValueError(
            f"`{name}` must hold numbers from 0 to {layer.num_experts - 1}. "
            f"Received: {name}={number} for {layer.path!r}."
        )


def _block(layer, number):
    """One expert of an MoE layer in stock layers, its weights copied."""
    experts = layer.experts
    policy = {"dtype": layer.dtype_policy}

    def project(role, units, activation=None):
        return keras.layers.Dense(
            units,
            activation=activation,
            use_bias=experts.use_bias,
            name=role,
            **policy,
        )

    # As the MoE layer was built, but for lengths.
    *leading, width = layer.get_build_config()["input_shape"]
    x = inputs = keras.Input((*[None] * (len(leading) - 1), width))
    inner, activation = experts.intermediate_dim, experts.activation
    dense = {"down": project("down", width)}
    if hasattr(activation, "gated"):
        dense["gate"], dense["up"] = (
            project("gate", inner),
            project("up", inner),
        )
        hidden = activation.gated(dense["gate"](x), dense["up"](x))
    elif experts.gated:
        dense["gate"] = project("gate", inner, activation)
        dense["up"] = project("up", inner)
        hidden = keras.layers.Multiply(name="gated", **policy)(
            [dense["gate"](x), dense["up"](x)]
        )
    else:
        dense["up"] = project("up", inner, activation)
        hidden = dense["up"](x)
    if experts.dropout:
        drop = keras.layers.Dropout(experts.dropout, name="dropout", **policy)
        hidden = drop(hidden)
    outputs = dense["down"](hidden)
    if layer.output_dropout:
        outputs = keras.layers.Dropout(
            layer.output_dropout, name="output_dropout", **policy
        )(outputs)
    for role, projection in experts.projections.items():
        dense[role].kernel.assign(projection.kernel[number])
        if projection.bias is not None:
            dense[role].bias.assign(projection.bias[number, 0])
    if layer.output_bias is not None:
        dense["down"].bias.assign(ops.copy(layer.output_bias.bias.value))
    return keras.Model(inputs, outputs, name=f"{layer.name}_expert_{number}")

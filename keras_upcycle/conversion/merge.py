"""`merge_experts`: whole experts from low-rank ones."""

import functools

import keras
from keras import ops

from keras_upcycle import checks, families
from keras_upcycle.conversion import compile_settings, pairing
from keras_upcycle.conversion.remade_layers import carry, like, replaced
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.expert_init import SHARED
from keras_upcycle.layers.low_rank import float_kernel
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import moe_layers_in


def merge_experts(moe: keras.Model) -> keras.Model:
    """A copy of a sparse model whose low-rank experts are whole networks.

    Each expert's kernel becomes the shared one plus its own difference; int8
    kernels become floats. The result computes the same to rounding, takes `E`
    times the memory of the shared block, and can be exported, made dense, or
    trained as a whole: experts train where their adapters did.

    Args:
        moe: A Keras model with low-rank experts, what `upcycle_model(...,
            experts=LowRankExperts(...))` made. It is not changed.

    Returns:
        A new model of the same kind, without compile settings for what the
        optimizer held of single adapters.

    Raises:
        TypeError: If `moe` is no Keras model.
        UpcycleError: If it has no low-rank experts, or stands in a model whose
            structure is not told.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, experts=keras_upcycle.LowRankExperts(rank=2)
        ... )
        >>> tuple(merge_experts(moe).layers[0].experts.expert_up.kernel.shape)
        (4, 8, 16)
    """
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    layers = moe_layers_in(moe)
    if all(layer.low_rank is None for layer in layers):
        raise UpcycleError(
            "`moe` must hold low-rank experts. Received: "
            f"{moe.name!r} with none: its experts are whole already."
        )
    new = {
        layer: like(layer, {}) if layer.low_rank is None else _whole(layer)
        for layer in layers
    }
    family = families.family_of(moe)
    result = replaced(family, moe, new)
    known = []
    for old, made in new.items():
        if old.low_rank is None:
            known += carry(old, made)
        else:
            known += _carry(old, made)
    compile_settings.carry(
        family,
        moe,
        result,
        lambda: pairing.copies(moe, result, known),
    )
    return result


def _whole(layer: MoEFeedForward) -> MoEFeedForward:
    """The unbuilt MoE layer of whole experts, told what they start from."""
    values = {
        f"{role}_{part}": functools.partial(_value, projection, part)
        for role, projection in layer.experts.projections.items()
        for part in ("kernel", "bias")
        if getattr(projection, part) is not None
    }
    if _has_integers(layer.shared):
        values |= {
            SHARED + name: functools.partial(_float, layer.shared, name)
            for name in layer.shared.weights_by_name()
        }
    return like(
        layer,
        values,
        low_rank=None,
        low_rank_alpha=None,
        quantization_configs=None,
    )


def _value(projection, part, shape, dtype=None):
    value = ops.cast(ops.copy(getattr(projection, part)), dtype)
    return ops.reshape(value, shape)


def _float(networks, name, shape, dtype=None):
    value = ops.cast(ops.copy(networks.weights_by_name()[name]), dtype)
    return ops.reshape(value, shape)


def _has_integers(networks):
    return networks is not None and networks.are_quantized


def _carry(old, new):
    """All but what experts are; the pairs that are known by that."""
    pairs = []
    parts = [
        (old.router, new.router),
        (old.output_bias, new.output_bias),
        (old.output_drop, new.output_drop),
        (old.experts.hidden_dropout, new.experts.hidden_dropout),
    ]
    gate = old.shared_gate
    if gate is not None and gate.quantization_mode is not None:
        new.shared_gate.kernel.assign(float_kernel(gate))
        pairs.append((new.shared_gate.kernel, gate.kernel))
    else:
        parts.append((gate, new.shared_gate))
    if not _has_integers(old.shared):
        parts.append((old.shared, new.shared))
    for source, target in parts:
        if source is not None:
            pairs += carry(source, target)
    for role, projection in new.experts.projections.items():
        own = old.experts.projections[role]
        projection.trainable = own.trainable and bool(own.trainable_variables)
        pairs.append((projection.kernel, own.base.kernel))
        if projection.bias is not None:
            pairs.append((projection.bias, own.base.bias))
    return pairs

"""`merge_experts`: whole experts from low-rank ones."""

import keras
from keras import ops

from keras_upcycle import checks, families
from keras_upcycle.conversion import compile_settings, pairing
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import surgery
from keras_upcycle.layers.expert_init import whole
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import moe_layers_in
from keras_upcycle.routing.router import clone
from keras_upcycle.state import layer_state


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
    layers = [each for each in moe_layers_in(moe) if each.low_rank is not None]
    if not layers:
        raise UpcycleError(
            "`moe` must hold low-rank experts. Received: "
            f"{moe.name!r} with none: its experts are whole already."
        )
    new = {
        layer: _whole(layer) if layer in layers else _same(layer)
        for layer in moe_layers_in(moe)
    }
    result = families.family_of(moe).replace_moe_layers(moe, new)
    if result is None:
        raise UpcycleError(
            "A model must tell the structure that it came from. Received: "
            f"{moe.name!r}, whose family does not. Register a family with "
            "`build_dense`."
        )
    surgery.copy_added(moe, result)
    known = []
    for old, made in new.items():
        known += _carry(old, made)
    compile_settings.carry(
        families.family_of(moe),
        moe,
        result,
        lambda: pairing.copies(moe, result, known),
    )
    return result


def _settings(layer):
    return {
        **layer.settings(),
        "low_rank": None,
        "low_rank_alpha": None,
        "quantization_configs": None,
        "router": clone(layer.router),
    }


def _whole(layer):
    new = type(layer)(
        **_settings(layer), dtype=layer.dtype_policy, name=layer.name
    )
    values = {}
    for role, projection in layer.experts.projections.items():
        for part in ("kernel", "bias"):
            if getattr(projection, part) is not None:
                values[f"{role}_{part}"] = _value(projection, part)
    if layer.output_bias is not None:
        values["output_bias"] = whole(layer.output_bias.bias)
    if layer.shared is not None:
        for role, projection in layer.shared.projections.items():
            values[f"shared_{role}_kernel"] = whole(projection.kernel)
            if projection.bias is not None:
                values[f"shared_{role}_bias"] = whole(projection.bias)
    new.start_from(values)
    return new


def _same(layer: MoEFeedForward) -> MoEFeedForward:
    settings = {**layer.settings(), "router": clone(layer.router)}
    new = type(layer)(**settings, dtype=layer.dtype_policy, name=layer.name)
    values = {}
    for role, projection in layer.experts.projections.items():
        values[f"{role}_kernel"] = whole(projection.kernel)
        if projection.bias is not None:
            values[f"{role}_bias"] = whole(projection.bias)
    new.start_from(values)
    return new


def _value(projection, part):
    def value(shape, dtype=None):
        found = ops.cast(ops.copy(getattr(projection, part)), dtype)
        return ops.reshape(found, shape)

    return value


def _carry(old, new):
    """The router's weights, and flags; the pairs that are known by that."""
    pairs = []
    for source, target in zip(
        old.router.weights, new.router.weights, strict=True
    ):
        target.assign(ops.copy(source.value))
        layer_state.copy_flag(source, target)
        pairs.append((target, source))
    new.router.trainable = old.router.trainable
    for role, projection in new.experts.projections.items():
        own = old.experts.projections[role]
        projection.trainable = own.trainable and bool(own.trainable_variables)
        base = getattr(own, "base", own)
        pairs.append((projection.kernel, base.kernel))
        if projection.bias is not None:
            pairs.append((projection.bias, base.bias))
    return pairs

"""`prune_experts`: a smaller mixture, without the experts that are not used."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families
from keras_upcycle.conversion import (
    compile_settings,
    model_checks,
    pairing,
)
from keras_upcycle.conversion.prune_report import LayerPruning, PruneReport
from keras_upcycle.conversion.remade_layers import check_blocks, with_experts
from keras_upcycle.layers.moe_layers import (
    calls_of,
    check_reached,
    named_mixtures,
)
from keras_upcycle.routing import functional
from keras_upcycle.routing.router import clone
from keras_upcycle.state import half_precision
from keras_upcycle.types import TokenChoice


def prune_experts(
    moe: keras.Model,
    inputs: Any = None,
    *,
    keep: Mapping[str, Any] | None = None,
    min_share: float | None = None,
    num_experts: int | None = None,
) -> tuple[keras.Model, PruneReport]:
    """A smaller copy of a sparse model, without the experts it hardly uses.

    Who is used is measured on `inputs`: an expert's share is that of all
    assignments of tokens to experts in its layer. An Expert Choice layer
    gives every expert equally many tokens, so there it is the share of all
    combine weights. Each layer keeps `top_k` experts at least, and one.

    Predictions on `inputs` stay what they were, up to rounding, if no token
    chose a removed expert, in layers of a `TopKRouter` that has
    `normalize=True` or `softmax="after_top_k"`, no `eval_capacity_factor` and
    no `bias_update_rate`. Otherwise they change: the probabilities of the
    experts that are left rise, which shows in weights that are not
    renormalised and against a bias; buffers, and in Expert Choice every
    expert's slots, grow as experts become fewer.

    Args:
        moe: A Keras model, what `upcycle_model` made, trained since perhaps, or
            loaded; or a functional model that has `MoEFeedForward`s as layers.
            It is not changed and shares no weights with the result.
        inputs: Array, tensor or structure of them: a batch as the model is
            called on, after preprocessing; or a list or iterator of batches.
            They run eagerly, at inference. Defaults to `None`, for which `keep`
            is needed.
        keep: Mapping from a block's name, as in a `RouterReading`, to the
            numbers of the experts to keep, in place of measuring. Blocks not
            named stay whole. With `inputs` shares are measured for the report.
            Defaults to `None`.
        min_share: Float in `[0, 1]` or `None`: experts whose share is below it
            go; `1 / E` is a fair share. Defaults to `None`: experts that
            nothing chose go.
        num_experts: Integer, at least 1, or `None`: each layer keeps this many,
            the most used ones; fewer if it has no more. Not together with
            `min_share`. Defaults to `None`.

    Returns:
        `(model, report)`: a model of the same kind, compiled as `moe` is with
        a new optimizer, and a `PruneReport`. Layers may differ in their
        number of experts; it is saved and loaded as before.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: If it is not clear what to keep, for experts or MoE layers
            that do not exist, or if a router needs more experts.
        UpcycleError: If `moe` holds no MoE layer, one inside a layer that makes
            it anew from a config of its own, is quantized or holds LoRA
            adapters.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> x = keras.random.normal((32, 8), seed=0)
        >>> smaller, report = prune_experts(moe, x, num_experts=2)
        >>> smaller.layers[0].num_experts
        2
        >>> report.parameters_before, report.parameters_after
        (1152, 576)
        >>> print(report)
        576 parameters in place of 1,152: 50.0% fewer.
        block ...
    """
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    family = families.family_of(moe)
    mixtures = named_mixtures(moe)
    model_checks.check_floats(moe, "`moe`", "Prune")
    _check_arguments(inputs, keep, min_share, num_experts)
    kept = None if keep is None else _listed(keep, mixtures)
    shares = None
    if inputs is not None:
        shares = _shares(family, moe, mixtures, inputs)
    if kept is None:
        kept = {
            name: _most_used(
                layer, (shares or {})[name], min_share, num_experts
            )
            for name, layer in mixtures.items()
        }
    for name, layer in mixtures.items():
        _check_router(name, layer, kept[name])
    result, pairs = with_experts(family, moe, mixtures, kept)
    compile_settings.carry(
        family, moe, result, lambda: pairing.copies(moe, result, pairs)
    )
    half_precision.warn_of_more_training(moe)
    layers = tuple(
        LayerPruning(
            name=name,
            num_experts=layer.num_experts,
            kept=tuple(kept[name]),
            shares=None if shares is None else tuple(shares[name].tolist()),
        )
        for name, layer in mixtures.items()
    )
    report = PruneReport(moe.count_params(), result.count_params(), layers)
    return result, report


# What to keep.


def _check_arguments(inputs, keep, min_share, num_experts):
    if inputs is None and keep is None:
        raise ValueError(
            "`prune_experts` must know what to keep. Received: inputs=None "
            "and keep=None. Pass a batch of `inputs`, on which use is "
            "measured, or `keep`, a mapping from a block's name to the "
            "numbers of its experts."
        )
    rules = {"min_share": min_share, "num_experts": num_experts, "keep": keep}
    given = [f"{k}={v!r}" for k, v in rules.items() if v is not None]
    if len(given) > 1:
        raise ValueError(
            "At most one of `keep`, `min_share` and `num_experts` must be "
            f"given. Received: {', '.join(given)}. Leave the others out."
        )
    if num_experts is not None:
        checks.check_count("num_experts", num_experts)
    if min_share is not None:
        checks.check_share("min_share", min_share)


def _listed(keep, mixtures):
    """`keep`, checked, for all MoE layers."""
    check_blocks("keep", keep, mixtures, "the numbers of its experts")
    kept = {}
    for name, layer in mixtures.items():
        count = layer.num_experts
        numbers = np.asarray(keep.get(name, range(count)))
        valid = (
            numbers.ndim == 1
            and numbers.size > 0
            and np.issubdtype(numbers.dtype, np.integer)
            and len(set(numbers.tolist())) == numbers.size
            and numbers.min() >= 0
            and numbers.max() < count
        )
        if not valid:
            raise ValueError(
                "`keep` must list at least one expert of a block, each once "
                f"and by a number from 0 to {count - 1}. Received: "
                f"keep={{{name!r}: {keep[name]!r}}}. Leave a block out to "
                "keep all of its experts."
            )
        kept[name] = sorted(numbers.tolist())
    return kept


def _shares(family, moe, mixtures, inputs) -> dict[str, np.ndarray]:
    """What each expert does, as shares of its layer: float64 `(E,)`."""
    sums = {layer: np.zeros(layer.num_experts) for layer in mixtures.values()}

    def checked(batch):
        family.check_inputs(moe, batch)
        return batch

    for call in calls_of(moe, inputs, checked):
        sums[call.layer] += ops.convert_to_numpy(
            _use(call.routing, call.layer.num_experts)
        )
    check_reached(mixtures, {layer for layer, use in sums.items() if use.any()})
    return {
        name: sums[layer] / sums[layer].sum()
        for name, layer in mixtures.items()
    }


def _use(chosen, num_experts):
    """What the experts did, in numbers that add up: float32 `(E,)`."""
    if isinstance(chosen, TokenChoice):
        return functional.expert_load(chosen, num_experts)
    return ops.sum(chosen.weights, axis=(0, 2))


def _most_used(layer, shares, min_share, num_experts):
    if num_experts is not None:
        count = min(num_experts, layer.num_experts)
    else:
        used = shares > 0 if min_share is None else shares >= min_share
        fewest = getattr(layer.router, "top_k", None) or 1
        count = max(int(np.sum(used)), fewest)
    # Of equally used ones those with the lower numbers.
    return sorted(np.argsort(-shares, kind="stable")[:count].tolist())


def _check_router(name, layer, kept):
    try:
        router = clone(layer.router, **layer.router.settings_of(kept))
        router.check(len(kept))
    except ValueError as error:
        raise ValueError(
            f"The router of {name!r} cannot choose from the experts to be "
            f"left, {len(kept)} of {layer.num_experts}: {error} Keep more "
            "experts."
        ) from error

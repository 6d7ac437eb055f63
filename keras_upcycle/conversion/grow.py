"""`grow_experts`: from one mixture to a larger one."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families
from keras_upcycle.conversion import (
    compile_settings,
    grown_slots,
    model_checks,
    pairing,
)
from keras_upcycle.conversion.grow_report import GrowthReport, LayerGrowth
from keras_upcycle.conversion.remade_layers import check_blocks, with_experts
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import named_mixtures
from keras_upcycle.routing.router import clone
from keras_upcycle.state import half_precision

GROUPS, COPY = "groups", "copy"
ROUTERS = (GROUPS, COPY)


def grow_experts(
    moe: keras.Model,
    num_experts: int,
    *,
    usefulness: Mapping[str, Any] | None = None,
    router: str = GROUPS,
    split: float = 0.02,
    seed: int | None = None,
) -> tuple[keras.Model, GrowthReport]:
    """A larger mixture from a trained one: expert upcycling.

    Experts are copied and the router gets a row for each copy, while a token
    still meets `top_k` experts: more parameters at the same cost a token.
    Training goes on and tells copies apart.

    Copies of one expert put out the same, so that a Top-K router that chose
    two of them would lose its second choice. With `router="groups"` the
    copies of an expert are a group of which a token meets one
    (`TopKRouter(expert_groups=...)`), chosen among themselves by rows that
    are split by noise: the grown model computes at inference what `moe` does,
    to rounding, as long as its router is dropless there. With `router="copy"`
    it stays a plain Top-K router of copied rows that are split by the same
    noise, as the paper has it: other formats can hold it, predictions change
    at once, and training has to bring back what was lost.

    What the optimizer remembers goes on: copies get their expert's slots, for
    the share of its tokens that each will meet (`1 / copies`).

    References: Dwivedi et al., Expert Upcycling (arXiv 2604.19835): copies by
    usefulness, router rows copied, `top_k` held. Choosing one of each group,
    which makes the start exact, is ours.

    Args:
        moe: A Keras model, what `upcycle_model` or `adopt_model` made, trained
            since; or a functional model that has `MoEFeedForward`s as layers.
            It is not changed and shares no weights with the result.
        num_experts: Integer, how many experts each MoE layer is to have; those
            that have as many stay.
        usefulness: Mapping from a block's name to a number for each of its
            experts `(E,)`, at least 0, such as `expert_usefulness` gives: the
            next copy is always of the expert that has the largest share of it
            a copy. Blocks not named, and `None` (default), copy all experts
            alike.
        router: String, `"groups"` (default) or `"copy"`; see above.
        split: Float, at least 0: the standard deviation of the noise that
            splits the rows of an expert's copies, whose mean stays the
            expert's row. Defaults to 0.02, that of a new router. With 0 all
            but the first copy of each expert would never be chosen.
        seed: Integer or `None`, the seed of the noise. Defaults to `None`, a
            new one.

    Returns:
        `(model, report)`: a model of the same kind, compiled as `moe` is, with
        an optimizer that goes on, and a `GrowthReport`.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a number of experts below what a layer has, or that all
            have already; usefulness of other blocks or experts.
        UpcycleError: If `moe` holds no MoE layer, one inside a layer that makes
            it anew from a config of its own, is quantized or holds LoRA
            adapters or low-rank experts, or has a router that knows no groups.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> larger, report = grow_experts(moe, 6)
        >>> larger.layers[0].router.expert_groups
        (0, 0, 1, 1, 2, 3)
        >>> print(report)
        1,728 parameters in place of 1,152: 1.5 times as many.
        block ...
    """
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    family = families.family_of(moe)
    mixtures = named_mixtures(moe)
    model_checks.check_floats(moe, "`moe`", "Grow")
    num_experts = checks.check_count("num_experts", num_experts)
    checks.check_choice("router", router, ROUTERS)
    split = checks.check_number("split", split, at_least=0.0)
    seed = checks.check_seed("seed", seed)
    _check_larger(mixtures, num_experts)
    scores = _checked(usefulness, mixtures)
    index = {
        name: copied_from(scores[name], num_experts)
        if layer.num_experts < num_experts
        else list(range(num_experts))
        for name, layer in mixtures.items()
    }
    settings = {
        name: _router_settings(name, layer, router, index[name])
        for name, layer in mixtures.items()
    }
    result, pairs = with_experts(
        family, moe, mixtures, index, lambda name, layer: settings[name]
    )
    pairs = pairing.copies(moe, result, pairs)
    compile_settings.carry(family, moe, result, lambda: pairs)
    generator = np.random.default_rng(seed)
    copies: dict[int, list[int]] = {}
    for name, layer in named_mixtures(result).items():
        _split(layer.router, index[name], split, generator)
        copies.update((id(v), index[name]) for v in layer.weights)
    grown_slots.carry(moe, result, pairs, copies)
    half_precision.warn_of_more_training(moe)
    if router == COPY:
        warnings.warn(
            'router="copy" lets a token choose two copies of one expert, so '
            "that predictions differ from those of the mixture until training "
            'goes on. router="groups" starts where it was.',
            stacklevel=2,
        )
    layers = tuple(
        LayerGrowth(name, layer.num_experts, tuple(index[name]))
        for name, layer in mixtures.items()
    )
    report = GrowthReport(moe.count_params(), result.count_params(), layers)
    return result, report


def copied_from(usefulness: Any, num_experts: int) -> list[int]:
    """Which expert each of a larger number is a copy of, ascending.

    One of each, and every further one of the expert whose usefulness for each
    copy it has is largest: the largest that is left is as small as can be.

    Args:
        usefulness: Float `(E,)`, at least 0.
        num_experts: Integer, at least `E`.

    Returns:
        `num_experts` integers.

    Example:
        >>> copied_from([1.0, 5.0, 1.5], 6)
        [0, 1, 1, 1, 1, 2]
    """
    usefulness = np.asarray(usefulness, "float64")
    count = np.ones(len(usefulness), int)
    for _ in range(num_experts - len(usefulness)):
        count[np.argmax(usefulness / count)] += 1
    return np.repeat(np.arange(len(usefulness)), count).tolist()


def _check_larger(mixtures, num_experts):
    before = {name: layer.num_experts for name, layer in mixtures.items()}
    if max(before.values()) > num_experts or set(before.values()) == {
        num_experts
    }:
        raise ValueError(
            "`num_experts` must be larger than what the MoE layers have. "
            f"Received: num_experts={num_experts}, for layers of {before}. "
            "`prune_experts` makes a mixture smaller."
        )


def _checked(usefulness, mixtures):
    """A float64 `(E,)` for each block: those given, ones for the others."""
    given = {} if usefulness is None else usefulness
    check_blocks("usefulness", given, mixtures, "a number for each expert")
    found = {}
    for name, layer in mixtures.items():
        count = layer.num_experts
        found[name] = np.ones(count)
        if name in given:
            numbers = checks.array_of(given[name])
            if (
                numbers.shape != (count,)
                or numbers.dtype.kind not in "fiu"
                or not np.all(np.isfinite(numbers))
                or numbers.min() < 0
            ):
                raise ValueError(
                    f"`usefulness` must hold a finite number of at least 0 for "
                    f"each of {count} experts. Received: usefulness="
                    f"{{{name!r}: {given[name]!r}}}."
                )
            if numbers.any():
                found[name] = numbers.astype("float64")
    return found


def _router_settings(name, layer, router, index):
    """Settings of a grown router; raises if it cannot be grown."""
    if len(index) == layer.num_experts:
        return {}
    config = layer.router.get_config()
    if "expert_groups" not in config:
        if router == COPY:
            return {}
        raise UpcycleError(
            "A router must know groups of experts to choose one of each. "
            f"Received: block {name!r} with a {type(layer.router).__name__}. "
            'Pass router="copy", with which predictions change at once.'
        )
    if config["expert_groups"] is not None:
        raise UpcycleError(
            "Experts that are copies in groups already cannot be copied "
            f"exactly once more. Received: block {name!r} with expert_groups="
            f"{config['expert_groups']}. Grow the mixture that it came from "
            "to the number that you want."
        )
    settings = {} if router == COPY else {"expert_groups": tuple(index)}
    try:
        clone(layer.router, **settings)
    except (TypeError, ValueError) as error:
        # Keras says the config and then what was wrong with it.
        cause = error.__context__ or error
        raise UpcycleError(
            f"The router of block {name!r} cannot choose one of each group: "
            f'{cause} Or pass router="copy", with which predictions change at '
            "once."
        ) from error
    return settings


def _split(router, index, split, generator):
    """Rows of an expert's copies apart, their mean where it was."""
    index = np.array(index)
    kernel = ops.convert_to_numpy(router.kernel)
    noise = generator.normal(0.0, split, kernel.shape)
    for expert in set(index.tolist()):
        here = index == expert
        noise[:, here] -= noise[:, here].mean(axis=1, keepdims=True)
    router.kernel.assign(kernel + noise.astype(kernel.dtype))

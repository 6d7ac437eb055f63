"""How many experts a trained model runs: chosen anew, and counted."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families, keras_internals, tables
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import (
    calls_of,
    check_reached,
    mixtures_in,
    named_mixtures,
)
from keras_upcycle.methods import ds_moe
from keras_upcycle.routing import functional


def set_active_experts(
    model: keras.Model,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    batch_threshold: float | None = None,
) -> int:
    """Chooses which experts of a DS-MoE model run at inference.

    After training, and as often as you like: no weight changes, and training
    goes on with all experts. `predict`, `evaluate` and `generate` are compiled
    anew when they are called next; calls of a model or function of yours that
    holds this one, and that is compiled already, are not. Files keep the
    choice.

    References: Pan et al., DS-MoE (arXiv 2404.05567): its three selectors.

    Args:
        model: A model with `DSMoERouter`s; other routers in it stay as they
            are. Give the very model that you call `predict` on, not a backbone
            inside it.
        top_k: Every token meets its `top_k` likeliest experts.
        threshold: Every token meets the experts whose probability is more than
            `threshold` times the uniform one, and its likeliest.
        batch_threshold: Every token meets as many experts as that threshold
            keeps on average in the batch. Not for causal stacks, as far as
            the model's family knows them.

    With none of these every token meets all experts.

    Returns:
        How many routers were set.

    Raises:
        TypeError, ValueError: For a bad argument, several of them, or more
            experts than a mixture has. Nothing was changed then.
        UpcycleError: If `model` holds no `DSMoERouter`, or one in a causal
            stack that would see later tokens.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16, router="ds_moe"),
        ... ])
        >>> set_active_experts(model, top_k=1)
        1
        >>> report = measure_active_experts(model, keras.ops.ones((2, 6, 8)))
        >>> report.expert_share
        0.25
    """
    asked = {
        ds_moe.TOP_K: top_k,
        ds_moe.THRESHOLD: threshold,
        ds_moe.BATCH_THRESHOLD: batch_threshold,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            "At most one of `top_k`, `threshold` and `batch_threshold` must be "
            f"given. Received: {told}."
        )
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    mixtures = [
        layer
        for layer in mixtures_in(model)
        if isinstance(layer.router, ds_moe.DSMoERouter)
    ]
    if not mixtures:
        raise UpcycleError(
            "`model` must hold a mixture whose router is a `DSMoERouter`. "
            f"Received: {model.name!r} with none. Upcycle with "
            'recipe="ds_moe", or with router="ds_moe".'
        )
    (selection,) = given or (ds_moe.ALL,)
    own = {}
    if selection == ds_moe.TOP_K:
        own = {"top_k": checks.check_count("top_k", top_k)}
    elif given:
        value = given[selection]
        own = {"threshold": checks.check_number(selection, value, 0.0)}
    trial = ds_moe.DSMoERouter(selection, **own)
    for layer in mixtures:
        trial.check(layer.num_experts)
    if trial.mixes_tokens:
        _check_not_causal(model, mixtures)
    for layer in mixtures:
        layer.router.select(selection, **own)
    keras_internals.drop_compiled_inference(model)
    return len(mixtures)


@dataclass(frozen=True)
class LayerActivity:
    """What the tokens of one mixture met.

    Attributes:
        name: Of the block, as in a `RouterReading`.
        num_experts: `E`.
        tokens: Real tokens that were counted.
        experts_per_token: Experts that processed a token, on average.
        expert_parameters: Of one expert.
    """

    name: str
    num_experts: int
    tokens: int
    experts_per_token: float
    expert_parameters: int

    @property
    def expert_share(self) -> float:
        """Share of the experts that processed a token, on average."""
        return self.experts_per_token / self.num_experts


@dataclass(frozen=True)
class ActiveExpertsReport:
    """What `measure_active_experts` counted. Print it.

    Attributes:
        parameters: Of the model.
        layers: A `LayerActivity` for each mixture, inputs first.
    """

    parameters: int
    layers: tuple[LayerActivity, ...]

    @property
    def expert_share(self) -> float:
        """Share of the experts' parameters that a token met, on average."""
        owned = [a.num_experts * a.expert_parameters for a in self.layers]
        shares = [a.expert_share for a in self.layers]
        return float(np.average(shares, weights=owned))

    @property
    def active_parameters(self) -> int:
        """Parameters of the model that a token met, on average."""
        idle = sum(
            (a.num_experts - a.experts_per_token) * a.expert_parameters
            for a in self.layers
        )
        return round(self.parameters - idle)

    @property
    def active_share(self) -> float:
        """The same as a share of all parameters."""
        return self.active_parameters / self.parameters

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.experts_per_token:.2f} of {layer.num_experts}",
                f"{layer.expert_share:.1%}",
            )
            for layer in self.layers
        ]
        table = tables.text(("block", "experts for a token", "share"), rows)
        return (
            f"{self.active_parameters:,} of {self.parameters:,} parameters "
            f"are active for a token ({self.active_share:.1%}), "
            f"{self.expert_share:.1%} of those of experts.\n{table}"
        )


def measure_active_experts(
    model: keras.Model, inputs: Any
) -> ActiveExpertsReport:
    """Counts the experts that tokens meet at inference.

    With any router. Padding is not counted.

    Args:
        model: A sparse model.
        inputs: A batch as the model is called on, after preprocessing; or a
            list or iterator of batches. They run eagerly, at inference.

    Returns:
        An `ActiveExpertsReport`.

    Raises:
        UpcycleError: If the model holds no mixture.
        ValueError: If no real token reaches one of its mixtures.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16, name="moe"),
        ... ])
        >>> print(measure_active_experts(model, keras.ops.ones((2, 6, 8))))
        592 of 1,152 parameters are active for a token (51.4%), 50.0% of ...
        ...
    """
    named = named_mixtures(model)
    met = dict.fromkeys(named.values(), 0.0)
    seen = dict.fromkeys(met, 0)

    def tensors(batch):
        return keras.tree.map_structure(ops.convert_to_tensor, batch)

    for call in calls_of(model, inputs, tensors):
        counts, real = _counts(call)
        met[call.layer] += counts
        seen[call.layer] += real
    check_reached(named, {layer for layer, count in seen.items() if count})
    return ActiveExpertsReport(
        parameters=model.count_params(),
        layers=tuple(
            LayerActivity(
                name=name,
                num_experts=layer.num_experts,
                tokens=seen[layer],
                experts_per_token=met[layer] / seen[layer],
                expert_parameters=layer.experts.count_params()
                // layer.num_experts,
            )
            for name, layer in named.items()
        ),
    )


def _counts(call) -> tuple[float, int]:
    """Assignments of real tokens, and how many real tokens there are."""
    number = functional.experts_per_token(
        call.routing, call.length, call.layer.num_experts
    )
    real = call.num_tokens
    if call.mask is not None:
        real = int(ops.convert_to_numpy(call.mask).sum())
    # In double precision: float32 no longer counts beyond 2 ** 24.
    total = ops.convert_to_numpy(number).astype("float64").sum()
    return float(total), real


def _check_not_causal(model, mixtures):
    causal = _causal_places(model)
    for layer in mixtures:
        if id(layer) in causal:
            raise UpcycleError(
                "With `batch_threshold` a token's experts depend on the whole "
                "batch, later tokens too, which a causal decoder must not "
                f"see. Received: {model.name!r}, whose mixture "
                f"{layer.path!r} stands in a causal stack. Pass `top_k` or "
                "`threshold`."
            )


def _causal_places(model) -> set[int]:
    """Ids of the layers in causal stacks, as far as a family knows."""
    try:
        family = families.family_of(model)
        dense = family.skeleton(model)
    except (TypeError, UpcycleError):
        return set()
    if dense is None:
        return set()
    sites = family.find(dense).sites
    places = zip(sites, family.places(model, sites), strict=True)
    return {id(layer) for site, layer in places if site.causal}

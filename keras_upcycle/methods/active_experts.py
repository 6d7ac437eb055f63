"""How many experts a trained DS-MoE model runs: chosen anew."""

from typing import Any

import keras

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import moe_layers_in, routed_heads_in
from keras_upcycle.methods import ds_moe

EXPERTS, HEADS = "experts", "heads"
PARTS = (EXPERTS, HEADS)


def set_active_experts(
    model: keras.Model,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    batch_threshold: float | None = None,
    part: str | None = None,
) -> int:
    """Chooses which experts of a DS-MoE model run at inference.

    Feed-forward experts, and heads of attention where they are routed. In the
    paper Top-K leaves heads alone, all of which run, and thresholds are for
    both; `part` says otherwise.

    After training, and as often as you like: no weight changes, and training
    goes on with all experts. `predict`, `evaluate` and `generate` are compiled
    anew when they are called next; calls of a model or function of yours that
    holds this one, and that is compiled already, are not. Files keep the
    choice.

    References: Pan et al., DS-MoE (arXiv 2404.05567): its three selectors.

    Args:
        model: A Keras model with `DSMoERouter`s; other routers in it stay as
            they are. Give the very model that you call `predict` on, not a
            backbone inside it.
        top_k: Integer in `[1, num_experts]` or `None`: every token meets its
            `top_k` likeliest experts. Defaults to `None`.
        threshold: Float, at least 0, or `None`: every token meets the experts
            whose probability is more than `threshold` times the uniform one,
            and its likeliest. Defaults to `None`.
        batch_threshold: Float, at least 0, or `None`: every token meets as many
            experts as that threshold keeps on average in the batch. Not for
            causal stacks, as far as the model's family knows them. Defaults to
            `None`.
        part: String, `"experts"` or `"heads"`: which of them alone are set.
            Defaults to `None`: both, but with `top_k` the experts, if any.

    With none of the first three every token meets all experts.

    Returns:
        How many routers were set.

    Raises:
        TypeError, ValueError: For a bad argument, several of them, or more
            experts than an MoE layer has. Nothing was changed then.
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
            f"given. Received: {told}. Leave the others out."
        )
    checks.check_instance("model", model, keras.Layer, "a Keras model or layer")
    if part is not None:
        checks.check_choice("part", part, PARTS)
    found: dict[str, list[Any]] = {
        EXPERTS: [each for each in moe_layers_in(model) if _is_ds_moe(each)],
        HEADS: [each for each in routed_heads_in(model) if _is_ds_moe(each)],
    }
    if part is None and top_k is not None and found[EXPERTS]:
        part = EXPERTS
    mixtures = found[part] if part else found[EXPERTS] + found[HEADS]
    if not mixtures:
        where = "heads" if part == HEADS else "an MoE layer"
        raise UpcycleError(
            f"`model` must hold {where} whose router is a `DSMoERouter`. "
            f"Received: {model.name!r} with none. Upcycle with "
            'recipe="ds_moe", or with router="ds_moe".'
        )
    (selection,) = given or (ds_moe.ALL,)
    own: dict[str, int | float] = {}
    if selection == ds_moe.TOP_K:
        own = {"top_k": checks.check_count("top_k", top_k)}
    elif given:
        value = given[selection]
        own = {"threshold": checks.check_number(selection, value, 0.0)}
    trial = ds_moe.DSMoERouter(selection, **own)
    for layer in mixtures:
        trial.check(layer.router.num_experts)
    if trial.mixes_tokens:
        _check_not_causal(model, mixtures)
    for layer in mixtures:
        layer.router.select(selection, **own)
    keras_internals.drop_compiled_inference(model)
    return len(mixtures)


def _check_not_causal(model, mixtures):
    causal = _causal_places(model)
    for layer in mixtures:
        if id(layer) in causal or layer in _causal_heads(model):
            raise UpcycleError(
                "With `batch_threshold` a token's experts depend on the whole "
                "batch, later tokens too, which a causal decoder must not "
                f"see. Received: {model.name!r}, whose layer "
                f"{layer.path!r} stands in a causal stack. Pass `top_k` or "
                "`threshold`."
            )


def _is_ds_moe(layer):
    return isinstance(layer.router, ds_moe.DSMoERouter)


def _causal_heads(model):
    try:
        return families.family_of(model).causal_heads(model)
    except (TypeError, UpcycleError):
        return []


def _causal_places(model) -> set[int]:
    """Ids of the layers in causal stacks, as far as a family knows."""
    try:
        family = families.family_of(model)
        dense = family.build_dense(model)
    except (TypeError, UpcycleError):
        return set()
    if dense is None:
        return set()
    sites = family.find(dense).sites
    places = zip(sites, family.current_layers(model, sites), strict=True)
    return {id(layer) for site, layer in places if site.causal}

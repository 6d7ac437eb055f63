"""Attention heads as experts: which, by what router, in what model."""

import warnings
from typing import Any, TypeAlias

import keras

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import (
    compile_settings,
    copied_attention,
    model_checks,
    pairing,
)
from keras_upcycle.conversion.attention_experts import AttentionExperts
from keras_upcycle.conversion.copied_attention import (
    CopiedAttention,
    CopiesPlan,
)
from keras_upcycle.conversion.heads_plan import HeadsPlan
from keras_upcycle.conversion.plan import Plan
from keras_upcycle.conversion.recipe import get_recipe
from keras_upcycle.conversion.selection import Asked, by_stack, choose
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import AttentionSite, Family
from keras_upcycle.families.surgery import copy_added
from keras_upcycle.layers import moe_layers
from keras_upcycle.layers.attention_mixture import SOFT, attention_router
from keras_upcycle.layers.head_router import head_router
from keras_upcycle.layers.routed_heads import (
    check_shared,
    count_experts,
)
from keras_upcycle.routing.router import clone

AttentionPlan: TypeAlias = HeadsPlan | CopiesPlan


def find_attention(
    model: keras.Model, explain: bool = False
) -> list[AttentionSite]:
    """The self-attention layers whose heads `upcycle_attention` could route.

    Args:
        model: A Keras model, built, of a kind that `upcycle_model` takes.
        explain: Boolean, whether to print every candidate too, and why it was
            taken or turned down. Defaults to `False`.

    Returns:
        The sites, inputs first.

    Raises:
        TypeError, UpcycleError: As `upcycle_model`, except that finding none is
            no error.

    Example:
        >>> backbone = keras_hub.models.ViTBackbone(
        ...     image_shape=(8, 8, 3), patch_size=4, num_layers=1,
        ...     num_heads=2, hidden_dim=8, mlp_dim=16,
        ... )
        >>> [site.path for site in find_attention(backbone, explain=True)]
        ViTBackbone in 'vi_t_backbone...': 1 attention layers, 0 turned down.
          0    encoder/0/mha (encoder): 2 heads, 2 key-value heads
        ['encoder/0/mha']
    """
    explain = checks.check_flag("explain", explain)
    family = families.family_of(model)
    findings = family.find_attention(model)
    if explain:
        print(
            f"{family.name} in {model.name!r}: {len(findings.sites)} attention "
            f"layers, {len(findings.rejected)} turned down."
        )
        for site in findings.sites:
            print(
                f"  {site.index:<4} {site.path} ({site.stack}): "
                f"{site.num_heads} heads, {site.num_key_value_heads} key-value "
                "heads"
            )
        for path, reason in findings.rejected:
            print(f"  no   {path}: {reason}")
    return findings.sites


def upcycle_attention(
    model: keras.Model,
    experts: AttentionExperts | CopiedAttention | None = None,
    *,
    seed: int | None = None,
) -> keras.Model:
    """A copy of a model whose attention is experts: its heads, or copies.

    Of a dense model, or of one that `upcycle_model` made. Weights are those of
    the model; a router for each attention layer is new. With a router that
    gives all experts to equal scores (`"ds_moe"`) it starts at zeros, and the
    copy computes what the model does; another starts without the heads that
    it leaves out. `generate` and its cache stay what they are. Going back by
    `densify_model` leaves the routers out: every head counts fully.

    With a `CopiedAttention` each attention layer becomes several, as in BAM.
    `densify_model` then takes the mean of their weights.

    Args:
        model: A Keras model: a Transformer of KerasHub, its backbone or a task,
            or a functional model that holds one, built. It is not changed.
        experts: An `AttentionExperts` or `CopiedAttention`. Defaults to `None`:
            the defaults of `AttentionExperts`.
        seed: Integer or `None`, the seed of routers that do not start at
            zeros. `None` (default) draws one.

    Returns:
        The model, built; compiled as `model` is, with a new optimizer.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If no attention layer is found, or attention is routed
            already; of a `CopiedAttention`, for a layer whose queries, keys and
            values are one kernel. Nothing was changed or built then.

    Example:
        >>> backbone = keras_hub.models.ViTBackbone(
        ...     image_shape=(8, 8, 3), patch_size=4, num_layers=1,
        ...     num_heads=2, hidden_dim=8, mlp_dim=16,
        ... )
        >>> routed = upcycle_attention(backbone)
        >>> routed.count_params() - backbone.count_params()
        16
    """
    family = families.family_of(model)
    seed = checks.check_seed("seed", seed)
    if experts is None:
        experts = AttentionExperts()
    plans = plan(model, family, experts, name="experts")
    model_checks.check_donor(model)
    result = family.copy_for_heads(model)
    copy_added(model, result)
    install(family, result, plans, seed)
    compile_settings.carry(
        family, model, result, lambda: pairing.alike(model, result)
    )
    return result


def plan(
    model: keras.Model,
    family: Family,
    experts: AttentionExperts | CopiedAttention,
    name: str = "attention",
) -> list[AttentionPlan]:
    """What is to be done, checked, before anything is built.

    Args:
        model: The model.
        family: That knows it.
        experts: What is asked for.
        name: Of the argument that asks.

    Raises:
        TypeError, ValueError, UpcycleError: As `upcycle_attention`.
    """
    checks.check_no_class(
        name, experts, "`AttentionExperts` or `CopiedAttention`"
    )
    flags = "True, False, " if name == "attention" else ""
    checks.check_instance(
        name,
        experts,
        (AttentionExperts, CopiedAttention),
        f"{flags}an `AttentionExperts` or a `CopiedAttention`",
        "A router goes into one: `AttentionExperts(router)`.",
    )
    if keras_internals.remat_is_asked_for(keras.layers.Identity(name="asks")):
        raise ValueError(
            "Attention cannot be routed under a `keras.RematScope`, which "
            "would run its router a second time. Received: attention="
            f"{experts!r} within one. Convert outside of it; `remat=True` "
            "recomputes the hidden layers of experts."
        )
    routed = moe_layers.attention_routing_in(model)
    if routed:
        raise UpcycleError(
            "`model` must have dense attention. Received: "
            f"{model.name!r}, whose {routed[0].path!r} is routed already. "
            "Convert all attention at once, of the model that it came from."
        )
    findings = family.find_attention(model)
    sites = findings.sites
    if not sites:
        reasons = "; ".join(f"{path}: {why}" for path, why in findings.rejected)
        raise UpcycleError(
            "`model` must have self-attention whose heads can be routed: a "
            "Transformer of KerasHub, or a functional model that holds one. "
            f"Received: {model.name!r} ({type(model).__name__}) with none"
            f"{': ' + reasons if reasons else ''}. "
            "`find_attention(model, explain=True)` tells of each."
        )
    routers = by_stack("router", experts.router, sites)
    chosen = choose(
        sites, by_stack("layers", experts.layers, sites), routers, None
    )
    if not chosen:
        raise UpcycleError(
            "`layers` and `router` must leave at least one of the "
            f"{len(sites)} attention layers found. Received: layers="
            f"{experts.layers!r} and router={experts.router!r}, which selects "
            "none."
        )
    if isinstance(experts, CopiedAttention):
        donors = copied_attention.donors_of(model, family, experts, len(sites))
        return [
            _copies(site, routers[site.stack], experts, donors)
            for site in chosen
        ]
    return [_plan(site, routers[site.stack], experts) for site in chosen]


def _copies(site, asked, experts, donors):
    count = checks.check_count("num_experts", experts.num_experts)
    router = attention_router(SOFT if asked is Asked.DEFAULT else asked)
    _check_router(router, count, site, asked)
    return copied_attention.plan_of(site, router, experts, donors)


def _plan(site, asked, experts):
    router = head_router("ds_moe" if asked is Asked.DEFAULT else asked)
    count = count_experts(
        experts.num_experts, site.num_heads, site.num_key_value_heads
    )
    made = HeadsPlan(
        site, router, count, check_shared(experts.shared_heads, count)
    )
    _check_router(router, made.routed, site, asked)
    return made


def _check_router(router, num_experts, site, asked):
    """That a router suits, its own defaults lowered to what there is."""
    if isinstance(asked, str) or asked is Asked.DEFAULT:
        router.limit(num_experts)
    router.check(num_experts)
    if site.causal and router.mixes_tokens:
        raise UpcycleError(
            f"A {type(router).__name__} like this compares a token with later "
            "ones, which a causal decoder must not see. Received: router="
            f"{asked!r} for {site.path!r} of a causal stack. Choose by "
            '`selection="threshold"` or `"top_k"`.'
        )


def install(
    family: Family,
    model: keras.Model,
    plans: list[AttentionPlan],
    seed: int | None,
) -> None:
    """Does what is planned to a model that nobody else has yet, in place."""
    heads: dict[AttentionSite, dict[str, Any]] = {}
    for order, made in enumerate(plans):
        own = seed
        if seed is not None:  # of every layer its own, and still a seed
            own = (seed + order) % (checks.LARGEST_SEED + 1)
        router = clone(made.router, own)
        made.first_kernel(router)
        heads[made.site] = {"router": router, **made.arguments}
    family.route_heads(model, heads)
    layers = family.attention_layers(model)
    for made in plans:
        made.fill(layers[made.site.path])


def asked(
    model: keras.Model,
    decided: Plan,
    attention: Any,
    recipe: Any,
    target: str | None = None,
) -> list[AttentionPlan]:
    """What `upcycle_model` is to do to attention; nothing where it is dense.

    Where a recipe asks for what a model has not, its attention stays dense,
    and if there is some that cannot be routed, a warning says so.

    Args:
        model: The dense model.
        decided: What will be done to its feed-forward blocks.
        attention: As `upcycle_model` takes it.
        recipe: As `upcycle_model` takes it.
        target: As `upcycle_model` takes it.

    Raises:
        TypeError, ValueError, UpcycleError: As `upcycle_attention`.
    """
    family, chosen = decided.family, None
    if attention is None and recipe is not None:
        recipe = get_recipe(recipe)
        chosen = recipe.value(decided.chosen[0].modality, "attention")
    elif attention is not None and attention is not False:
        chosen = AttentionExperts() if attention is True else attention
    if chosen is None:
        return []
    if target is not None:
        raise ValueError(
            f"A model for target={target!r} has dense attention. Received: "
            f"attention={attention!r}, recipe={recipe!r}. Pass "
            "attention=False, or no target."
        )
    if attention is not None:
        return plan(model, family, chosen)
    findings = family.find_attention(model)
    if findings.sites:
        return plan(model, family, chosen)
    if findings.rejected:
        shown = "; ".join(f"{p}: {why}" for p, why in findings.rejected[:3])
        warnings.warn(
            f"Recipe {recipe.name!r} routes attention heads too, and here "
            f"attention stays dense ({shown}). Pass `attention=False` if you "
            "mean it.",
            stacklevel=3,
        )
    return []

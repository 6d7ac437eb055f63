"""What will be converted, and into what: checked before anything is built."""

from dataclasses import dataclass
from typing import Any

from keras_upcycle import checks, families
from keras_upcycle.conversion import target_reasons, targets
from keras_upcycle.conversion.arguments import (
    ExpertInitLike,
    LayersLike,
    RecipeLike,
    RouterLike,
)
from keras_upcycle.conversion.block_plan import BlockPlan
from keras_upcycle.conversion.model_checks import (
    check_floats,
    check_not_upcycled,
    check_site,
    nothing_found,
)
from keras_upcycle.conversion.recipe import Required, get_recipe
from keras_upcycle.conversion.selection import Asked, by_stack, choose
from keras_upcycle.distribution import placement
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import Family, FeedForwardSite, Findings
from keras_upcycle.layers import moe_settings
from keras_upcycle.layers.expert_init import ExpertInit, get_init
from keras_upcycle.routing.registry import get_router
from keras_upcycle.routing.router import Router, clone


@dataclass(frozen=True)
class Plan:
    """A conversion, decided and checked.

    Attributes:
        family: The family that knows the model.
        findings: All blocks found, and what was turned down.
        blocks: What will be converted, in order.
        num_experts: As asked for.
        init: The expert initialisation.
        seed: Seed of the routers' kernels, or `None`.
        first_blocks: Paths of chosen blocks that are the first of a stack and
            that the family protects, where the caller named them and no
            recipe: worth a warning.
    """

    family: Family
    findings: Findings
    blocks: tuple[BlockPlan, ...]
    num_experts: int
    init: ExpertInit
    seed: int | None
    first_blocks: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[FeedForwardSite, ...]:
        """The sites to convert, in order."""
        return tuple(block.site for block in self.blocks)

    @property
    def routers(self) -> dict[int, Router]:
        """From a site's index to the router of its new layer."""
        return {block.site.index: block.router for block in self.blocks}


def make(
    model: Any,
    num_experts: Any,
    *,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    init: ExpertInitLike | None = None,
    dispatch: str = "auto",
    remat: bool = False,
    expert_dropout: float | None = None,
    seed: int | None = None,
    recipe: RecipeLike | None = None,
    target: str | None = None,
) -> Plan:
    """Decides a conversion; see `upcycle_model` for the arguments.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If the model cannot be converted.
    """
    family = families.family_of(model)
    num_experts = checks.check_count("num_experts", num_experts)
    dispatch = moe_settings.check_dispatch(dispatch)
    remat = checks.check_flag("remat", remat)
    seed = checks.check_seed("seed", seed)
    if expert_dropout is not None:
        expert_dropout = checks.check_rate("expert_dropout", expert_dropout)
    check_not_upcycled(model)
    findings = family.find(model)
    if not findings.sites:
        check_floats(model, "The donor", "Upcycle")
        raise nothing_found(model, findings)
    if recipe is not None:
        recipe = get_recipe(recipe)
        _check_modalities(recipe, findings.sites)
    named = layers is not None
    if target is not None:
        router, layers = targets.choose(model, target, router, layers, recipe)
    asked = by_stack("router", router, findings.sites)
    layers_of = by_stack("layers", layers, findings.sites)
    chosen = choose(findings.sites, layers_of, asked, recipe)
    if not chosen:
        whose = "" if recipe is None else f", recipe={recipe.name!r}"
        raise UpcycleError(
            "`layers` and `router` must leave at least one of the "
            f"{len(findings.sites)} feed-forward blocks found to convert. "
            f"Received: layers={layers!r} and router={router!r}{whose}, which "
            "selects none. The first block is converted only when asked for: "
            'pass `layers=[0]`, or `layers="all"`, if you mean it.'
        )
    starts: dict[str, FeedForwardSite] = {}
    for site in findings.sites:
        starts.setdefault(site.stack, site)
    for site in chosen:
        check_site(site)
    init = get_init(_init(init, recipe, chosen))
    init.prepare(model)
    layouts = {
        site.index: init.layout(num_experts, site.intermediate_dim)
        for site in chosen
    }
    for site in chosen:
        placement.check_experts(layouts[site.index][0], site.path)
    by_site = _routers(chosen, asked, layouts, recipe, init)
    for site in chosen:
        _check_slices(site, by_site[site.index], layouts[site.index], init)
        init.check(site, by_site[site.index], layouts[site.index][0])
    decided = Plan(
        family=family,
        findings=findings,
        blocks=tuple(
            BlockPlan(
                site=site,
                num_experts=layouts[site.index][0],
                intermediate_dim=layouts[site.index][1],
                router=by_site[site.index],
                settings={
                    "dispatch": dispatch,
                    "remat": remat,
                    "dropout": site.dropout
                    if expert_dropout is None
                    else expert_dropout,
                    **init.layer_settings(site),
                },
            )
            for site in chosen
        ),
        num_experts=num_experts,
        init=init,
        seed=seed,
        first_blocks=tuple(
            site.path
            for site in chosen
            if site.protects_first
            and site is starts[site.stack]
            # A paper that converts it found no harm in that.
            and (recipe is None or layers_of[site.stack] is not Asked.DEFAULT)
            and (target is None or named)
            and len(findings.sites) > 1
        ),
    )
    if target is not None:
        target_reasons.check_plan(target, model, decided.blocks)
    return decided


def init_of(expert_init: Any, experts: Any) -> Any:
    """What experts start from, by whichever of two arguments it was given.

    Raises:
        ValueError: For both.
        TypeError: For `experts` that say nothing of what experts are.
    """
    if experts is None:
        return expert_init
    checks.check_instance(
        "experts", experts, ExpertInit, "an `ExpertInit`, as LowRankExperts(8)"
    )
    if expert_init is not None:
        raise ValueError(
            "`experts` and `expert_init` say the same thing. Received: experts="
            f"{experts!r} and expert_init={expert_init!r}. Leave one of them "
            "out."
        )
    return experts


def _routers(chosen, asked, layouts, recipe, init):
    result = {}
    for site in chosen:
        num_experts = layouts[site.index][0]
        requested = asked[site.stack]
        ours = isinstance(requested, str)
        if requested is Asked.DEFAULT:
            ours, requested = True, None
            if recipe is not None:
                requested = recipe.router(
                    site.modality,
                    site.causal,
                    num_layers=len(chosen),
                    num_experts=num_experts,
                )
            if requested is None:
                requested = site.default_router
        made = get_router(requested)
        if ours:
            made.limit(num_experts)
        made.check(num_experts)
        if site.causal and made.mixes_tokens:
            raise UpcycleError(
                f"A {type(made).__name__} like this compares a token with "
                "later ones, as Expert Choice does, which a causal decoder "
                f"must not see. Received: router={requested!r} for block "
                f'{site.path!r} of a causal stack. Use router="top_k", or '
                f'{{{site.stack!r}: "top_k"}} beside another for other stacks.'
            )
        own = init.router_settings(site, made)
        result[site.index] = clone(made, **own) if own else made
    return result


def _init(init, recipe, chosen):
    if init is not None:
        return init
    if recipe is None:
        return "copy"
    own = recipe.value(chosen[0].modality, "expert_init") or "copy"
    if isinstance(own, Required):
        raise ValueError(
            f"Recipe {recipe.name!r} needs {own.what} that only you have. "
            "Received: expert_init=None. Pass them, such as "
            f"expert_init={own.example}."
        )
    return own


def _check_slices(site, router, layout, init):
    """A sum of whole blocks would be as many times too large."""
    count, width = layout
    if router.adds_slices and count > 1 and width == site.intermediate_dim:
        raise ValueError(
            f"A {type(router).__name__} adds experts up as slices of a block, "
            f"each with the weight 1. Received: {init!r}, whose experts are as "
            f"wide as block {site.path!r}. Pass expert_init=Carving(inputs), "
            "or another router."
        )


def _check_modalities(recipe, sites):
    for site in sites:
        if not recipe.covers(site.modality):
            raise ValueError(
                f"Recipe {recipe.name!r} covers {list(recipe.choices)}. "
                f"Received: block {site.path!r} of a model that is neither, "
                "as far as its family knows. Pass `router` and `layers` "
                "instead of `recipe`."
            )

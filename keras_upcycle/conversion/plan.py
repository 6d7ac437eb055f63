"""What will be converted, and into what: checked before anything is built."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion.recipe import Required, get_recipe
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import Family, FeedForwardSite, Findings
from keras_upcycle.layers import moe_feed_forward
from keras_upcycle.layers.expert_init import ExpertInit, get_init
from keras_upcycle.routing.router import Router, get_router

LAYER_CHOICES = ("last_half", "every_other", "all", "all_but_first")
# Of what was turned down, in an error.
_SHOWN = 8
_LISTS = (list, tuple, range, set, frozenset)


@dataclass(frozen=True)
class Plan:
    """A conversion, decided and checked.

    Attributes:
        family: The family that knows the model.
        findings: All blocks found, and what was turned down.
        chosen: The sites to convert, in order.
        routers: Site index to a router holding the settings for that site.
        num_experts: As asked for.
        layouts: Site index to `E` and `F` of the new layer.
        extras: Site index to more arguments of the new layer.
        dispatch: Engine of every new layer.
        remat: Whether the new layers recompute hidden layers.
        expert_dropout: Rate on the new hidden layers; `None` for each dense
            block's own.
        init: The expert initialisation.
        seed: Seed of the routers' kernels, or `None`.
        first_blocks: Paths of chosen blocks that are the first of a stack and
            that the family protects, where the caller named them and no
            recipe: worth a warning.
    """

    family: Family
    findings: Findings
    chosen: tuple[FeedForwardSite, ...]
    routers: Mapping[int, Router]
    num_experts: int
    layouts: Mapping[int, tuple[int, int]]
    extras: Mapping[int, Mapping[str, Any]]
    dispatch: str
    remat: bool
    expert_dropout: float | None
    init: ExpertInit
    seed: int | None
    first_blocks: tuple[str, ...] = ()

    def shared_width(self, site: FeedForwardSite) -> int:
        """Hidden width of a new layer's shared expert; 0 without one."""
        return self.extras[site.index].get("shared_intermediate_dim") or 0

    def bias_is_outside(self, site: FeedForwardSite) -> bool:
        """Whether a new layer has one output bias, and its experts none."""
        return bool(self.extras[site.index].get("output_bias"))

    def network_size(self, site: FeedForwardSite, width: int) -> int:
        """Parameters of an expert of a new layer, or of its shared network."""
        size = feed_forward_size(site, width)
        return size - site.hidden_dim if self.bias_is_outside(site) else size

    def always_size(self, site: FeedForwardSite) -> int:
        """Parameters of a new layer that all tokens meet, less the router's."""
        width = self.shared_width(site)
        size = self.network_size(site, width) if width else 0
        return size + (site.hidden_dim if self.bias_is_outside(site) else 0)


def make(
    model: Any,
    num_experts: Any,
    *,
    router: Any = None,
    layers: Any = None,
    init: Any = None,
    dispatch: str = "auto",
    remat: bool = False,
    expert_dropout: float | None = None,
    seed: int | None = None,
    recipe: Any = None,
) -> Plan:
    """Decides a conversion; see `upcycling.upcycle_model` for the arguments.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If the model cannot be converted.
    """
    family = families.family_of(model)
    num_experts = checks.check_count("num_experts", num_experts)
    dispatch = moe_feed_forward.check_dispatch(dispatch)
    remat = checks.check_flag("remat", remat)
    seed = checks.check_seed("seed", seed)
    if expert_dropout is not None:
        expert_dropout = checks.check_rate("expert_dropout", expert_dropout)
    _check_not_upcycled(model)
    findings = family.find(model)
    if not findings.sites:
        check_floats(model, "The donor", "Upcycle")
        raise _nothing_found(model, findings)
    if recipe is not None:
        recipe = get_recipe(recipe)
        _check_modalities(recipe, findings.sites)
    asked = _by_stack("router", router, findings.sites)
    layers_of = _by_stack("layers", layers, findings.sites)
    chosen = _choose(findings.sites, layers_of, asked, recipe)
    if not chosen:
        whose = "" if recipe is None else f", recipe={recipe.name!r}"
        raise UpcycleError(
            "`layers` and `router` must leave at least one of the "
            f"{len(findings.sites)} feed-forward blocks found to convert. "
            f"Received: layers={layers!r} and router={router!r}{whose}, which "
            "selects none. The first block is converted only when asked for: "
            'pass `layers=[0]`, or `layers="all"`, if you mean it.'
        )
    starts = {}
    for site in findings.sites:
        starts.setdefault(site.stack, site)
    for site in chosen:
        _check_site(site)
    init = get_init(_init(init, recipe, chosen))
    init.prepare(model)
    layouts = {
        site.index: init.layout(num_experts, site.intermediate_dim)
        for site in chosen
    }
    by_site = _routers(chosen, asked, layouts, recipe)
    for site in chosen:
        init.check(site, by_site[site.index], layouts[site.index][0])
    return Plan(
        family=family,
        findings=findings,
        chosen=chosen,
        routers=by_site,
        num_experts=num_experts,
        layouts=layouts,
        extras={site.index: init.layer_settings(site) for site in chosen},
        dispatch=dispatch,
        remat=remat,
        expert_dropout=expert_dropout,
        init=init,
        seed=seed,
        first_blocks=tuple(
            site.path
            for site in chosen
            if site.protects_first
            and site is starts[site.stack]
            # A paper that converts it found no harm in that.
            and (recipe is None or layers_of[site.stack] is not _Asked.DEFAULT)
            and len(findings.sites) > 1
        ),
    )


def check_donor(model: keras.Model, whose: str = "The donor") -> None:
    """Raises `UpcycleError` for weights that must not be copied.

    Adapters and integer kernels would not survive the copy, and one NaN would
    spread to every expert.

    Args:
        model: A dense model.
        whose: What it is to the caller.
    """
    check_floats(model, whose, "Upcycle")
    for variable in model.weights:
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        if not bool(ops.all(ops.isfinite(variable.value))):
            raise UpcycleError(
                f"{whose}'s weights must be finite. Received: "
                f"{variable.path!r} of shape {tuple(variable.shape)} with NaN "
                "or infinity. Go back to a checkpoint from before the "
                "training diverged."
            )


def check_floats(layer: keras.Layer, whose: str, action: str) -> None:
    """Raises `UpcycleError` for integer kernels and for LoRA adapters.

    Args:
        layer: A layer or model.
        whose: What it is to the caller, such as `"The donor"`.
        action: What the caller does with it, such as `"Upcycle"`.
    """
    for below in keras_internals.all_layers(layer):
        mode = below.quantization_mode
        if mode is not None:
            raise UpcycleError(
                f"{whose}'s weights must be floats. Received: layer "
                f"{below.path!r}, quantized to {mode!r}. {action} the model "
                f"before it is quantized, then call `quantize({mode!r})` on "
                "the result."
            )
        if keras_internals.has_lora(below):
            raise UpcycleError(
                f"{whose} must not hold LoRA adapters. Received: layer "
                f"{below.path!r} with adapters enabled. Merge them first: "
                "`model.save_weights(path)` writes merged kernels, which "
                "`load_weights(path)` reads into a fresh model of the same "
                "structure."
            )


def _check_not_upcycled(model):
    for layer in keras_internals.all_layers(model):
        if isinstance(layer, moe_feed_forward.MoEFeedForward):
            raise UpcycleError(
                "`model` must be dense. Received: "
                f"{model.name!r}, whose layer {layer.path or layer.name!r} is "
                f"a mixture of {layer.num_experts} experts already. Upcycle "
                "the dense model that it came from."
            )


def _nothing_found(model, findings):
    inside = [
        layer.name
        for layer in model.layers
        if type(layer).__name__.removeprefix("Upcycled")
        in ("ViTEncoder", "T5TransformerLayer")
    ]
    if inside:
        hint = (
            f"Layer {inside[0]!r} belongs to a backbone whose graph was "
            "extended from `backbone.output`, which Keras itself can neither "
            "clone nor reload. Call the backbone as a layer instead: "
            "`keras.Model(inputs, head(backbone(inputs)))`."
        )
    else:
        hint = (
            "Looked for a known backbone, and for two `Dense` layers in a row "
            "whose second one returns to the width of the first one's input. "
            "Register your model with `keras_upcycle.register_family`; "
            "`keras_upcycle.find_feed_forwards(model, explain=True)` prints "
            "why each candidate was turned down "
            f"({len(findings.rejected)} here)"
        )
        shown = findings.rejected[:_SHOWN]
        if shown:
            hint += ": " + "; ".join(f"{path}: {why}" for path, why in shown)
        rest = len(findings.rejected) - len(shown)
        hint += f"; and {rest} more." if rest else "."
    return UpcycleError(
        f"No feed-forward block found in model {model.name!r} "
        f"({type(model).__name__}, {len(model.layers)} layers). Known "
        f"families: {', '.join(families.known_families())}. {hint}"
    )


class _Asked(enum.Enum):
    """What a stack gets that the caller named no setting for."""

    DEFAULT = "the family's or recipe's own"
    DENSE = "nothing: it stays dense"


def _by_stack(name, value, sites):
    """A setting for each stack, from one value for all or from a mapping.

    In a mapping a stack that is not named gets its default, and `None` leaves
    a stack dense. A name may leave out the backbone's where that is clear.
    """
    stacks = list(dict.fromkeys(site.stack for site in sites))
    if not isinstance(value, Mapping):
        value = _without_array(value)
        if isinstance(value, _LISTS) and len(stacks) > 1:
            raise ValueError(
                f"`{name}` must say whose blocks a list counts, since the "
                f"model has the stacks {stacks}. Received: {name}={value!r}. "
                f"Pass a mapping, such as {{{stacks[0]!r}: "
                f"{list(value)!r}}}; a stack left out gets its default, and "
                "`None` leaves one dense."
            )
        default = _Asked.DEFAULT if value is None else value
        return dict.fromkeys(stacks, default)
    result = dict.fromkeys(stacks, _Asked.DEFAULT)
    unknown = []
    for key, setting in value.items():
        meant = [s for s in stacks if s == key] or [
            s for s in stacks if s.endswith(f"/{key}")
        ]
        if len(meant) != 1:
            unknown.append(key)
            continue
        setting = _without_array(setting)
        result[meant[0]] = _Asked.DENSE if setting is None else setting
    if unknown:
        raise ValueError(
            f"`{name}` names stacks that the model does not have. Received: "
            f"{name} for {unknown}. The stacks are {stacks}."
        )
    return result


def _choose(sites, layers, router, recipe):
    chosen = []
    for stack, choice in layers.items():
        own = [site for site in sites if site.stack == stack]
        if _Asked.DENSE in (choice, router[stack]):
            continue
        if choice is _Asked.DEFAULT:
            choice = None
            if recipe is not None:
                choice = recipe.value(own[0].modality, "layers")
            if choice is None:
                # The family's, which leaves out what it protects.
                chosen += _open(own, _by_rule(own, own[0].default_layers))
                continue
        if isinstance(choice, _LISTS):
            chosen += _by_indices(own, list(choice))
        else:
            chosen += _by_rule(own, choice)
    return tuple(sorted(chosen, key=lambda site: site.index))


def _without_array(value):
    """A list where it is an array; nothing else compares entry by entry."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    return value


def _by_indices(sites, indices):
    by_index = dict(enumerate(sites))
    for index in indices:
        if not checks.is_integer(index):
            raise TypeError(
                "`layers` must list integers. Received: "
                f"layers={indices!r}, with {index!r} of type "
                f"{type(index).__name__}."
            )
        if not -len(sites) <= index < len(sites):
            raise ValueError(
                f"`layers` must list block numbers from 0 to {len(sites) - 1}"
                f". Received: layers={indices!r}, with {index}. "
                "`find_feed_forwards(model)` lists the blocks."
            )
    positions = sorted({int(index) % len(sites) for index in indices})
    return [by_index[position] for position in positions]


def _by_rule(sites, rule):
    if callable(rule):
        checks.check_takes("layers", rule, "site")
        return [site for site in sites if rule(site)]
    if rule == "last_half":
        # Of one block the half is none, if that block is protected.
        return _open(sites, sites[-max(1, len(sites) // 2) :])
    if rule == "every_other":
        return sites[1::2]
    if rule == "all":
        return list(sites)
    if rule == "all_but_first":
        return sites[1:]
    raise ValueError(
        f"`layers` must be one of {list(LAYER_CHOICES)}, a list of block "
        "numbers, or a function from a FeedForwardSite to a bool. Received: "
        f"layers={rule!r}."
    )


def _open(sites, chosen):
    """Those chosen that may be converted without being asked for."""
    protected = sites[0] if sites[0].protects_first else None
    return [site for site in chosen if site is not protected]


def _routers(chosen, asked, layouts, recipe):
    result = {}
    for site in chosen:
        num_experts = layouts[site.index][0]
        wanted = asked[site.stack]
        ours = isinstance(wanted, str)
        if wanted is _Asked.DEFAULT:
            ours, wanted = True, None
            if recipe is not None:
                wanted = recipe.router(
                    site.modality,
                    site.causal,
                    num_layers=len(chosen),
                    num_experts=num_experts,
                )
            if wanted is None:
                wanted = site.default_router
        made = get_router(wanted)
        if ours:
            made.limit(num_experts)
        made.check(num_experts)
        if site.causal and made.mixes_tokens:
            raise UpcycleError(
                f"A {type(made).__name__} like this compares a token with "
                "later ones, as Expert Choice does, which a causal decoder "
                f"must not see. Received: router={wanted!r} for block "
                f'{site.path!r} of a causal stack. Use router="top_k", or '
                f'{{{site.stack!r}: "top_k"}} beside another for other stacks.'
            )
        result[site.index] = made
    return result


def _init(init, recipe, chosen):
    if init is not None:
        return init
    if recipe is None:
        return "copy"
    own = recipe.value(chosen[0].modality, "expert_init") or "copy"
    if isinstance(own, Required):
        raise ValueError(
            f"Recipe {recipe.name!r} needs models that only you have. "
            "Received: expert_init=None. Pass them, such as "
            f"expert_init={own.example}."
        )
    return own


def _check_modalities(recipe, sites):
    for site in sites:
        if not recipe.covers(site.modality):
            raise ValueError(
                f"Recipe {recipe.name!r} covers {list(recipe.choices)}. "
                f"Received: block {site.path!r} of a model that is neither, "
                "as far as its family knows. Pass `router` and `layers` "
                "instead of `recipe`."
            )


def _check_site(site):
    shapes = {
        name: tuple(variable.shape) for name, variable in site.kernels.items()
    }
    missing = {"up_kernel", "down_kernel"} - set(shapes)
    known = {
        f"{role}_{part}"
        for role in ("gate", "up", "down")
        for part in ("kernel", "bias")
    }
    problem = None
    if missing:
        problem = f"{sorted(missing)} missing"
    elif set(shapes) - known:
        problem = f"unknown names {sorted(set(shapes) - known)}"
    elif len(shapes["up_kernel"]) != 2:
        problem = "an up kernel that is no matrix"
    else:
        wide, hidden = shapes["up_kernel"]
        expected = {"up_kernel": (wide, hidden), "down_kernel": (hidden, wide)}
        if site.gated:
            expected["gate_kernel"] = (wide, hidden)
        if any(name.endswith("bias") for name in shapes):
            expected |= {"up_bias": (hidden,), "down_bias": (wide,)}
            if site.gated:
                expected["gate_bias"] = (hidden,)
        if shapes != expected:
            problem = f"kernels that do not fit together, expected {expected}"
    if problem:
        raise UpcycleError(
            "A family must describe a block by kernels (D, F) up and (F, D) "
            f"down. Received for block {site.path!r}: {problem}; got "
            f"{shapes}. This is a mistake in the family that found it."
        )


def feed_forward_size(
    site: FeedForwardSite, intermediate_dim: int | None = None
) -> int:
    """Parameters of one dense block, or of an expert of another width."""
    own = site.intermediate_dim
    width = own if intermediate_dim is None else intermediate_dim
    return sum(
        math.prod(v.shape) // own * width
        if name != "down_bias"
        else site.hidden_dim
        for name, v in site.kernels.items()
    )

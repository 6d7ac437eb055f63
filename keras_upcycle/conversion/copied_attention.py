"""Attention layers that become several experts: settings and plan."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks, families
from keras_upcycle.conversion import model_checks
from keras_upcycle.conversion.arguments import LayersLike, RouterLike
from keras_upcycle.conversion.counts import bytes_of, router_params
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import AttentionSite, Family, attention_sites
from keras_upcycle.layers.attention_mixture import KIND, SOFT
from keras_upcycle.layers.moe_layers import attention_routing_in
from keras_upcycle.routing.router import Router


@dataclass(frozen=True)
class CopiedAttention:
    """Each attention layer becomes several, which every token uses softly.

    `y = sum_i S_i(x) Attention_i(x)`, with `S` the softmax of a router over
    what the layer is called on. Copies start as the dense model whatever the
    router says, since `S` sums to 1; a router of yours whose weights do not
    (`normalize=False`) starts elsewhere. All experts run: the paper found
    choosing some of them worse for attention. They cost as many times the
    projections that are theirs, and the scores, which `estimate_upcycle`
    leaves out, of attention that is not copied too.

    The paper's blocks run attention and feed-forward experts side by side;
    here a block's order stays what it is.

    References: Zhang et al., BAM (arXiv 2408.08274), section 4.

    Args:
        num_experts: Integer, at least 1: how many attentions a layer becomes.
        router: String, `Router` or mapping by stack: `"soft"` (default), the
            softmax over all experts, without a loss; `"ds_moe"`, the same with
            its mutual-information loss; a `TopKRouter` with
            `capacity_factor=None`; or one of your own. In a mapping `None`
            leaves a stack's attention dense.
        shared_key_values: Boolean, whether experts have queries and outputs of
            their own alone, and share keys and values: caches are as large as
            they were. Defaults to `True`. `False` gives each expert all four
            projections; `generate`, which needs a cache, then refuses.
        donors: List of Keras models, dense ones of the class and architecture
            of the upcycled one: expert `i` starts as the attention of donor
            `i * n // num_experts`, with `n` donors, in what is its own. All
            else is the upcycled model's; with `upcycle_model` an
            `expert_init=BranchTrainMix(models)` makes it their mean. Defaults
            to `None`: copies.
        layers: String, integer, slice, list, callable or mapping: which blocks'
            attention, as in `upcycle_model`; a function gets an
            `AttentionSite`. Defaults to `"all"`.

    Raises:
        TypeError, ValueError: When it is used, for what does not fit.

    Example:
        >>> CopiedAttention(4).shared_key_values
        True
    """

    num_experts: int
    router: RouterLike = SOFT
    shared_key_values: bool = True
    donors: Iterable[keras.Model] | None = None
    layers: LayersLike = "all"

    def __post_init__(self):
        if isinstance(self.donors, Iterator):
            # It gives its models once, and settings are used more often.
            object.__setattr__(self, "donors", list(self.donors))


@dataclass(frozen=True)
class CopiesPlan:
    """One attention layer that is to become several.

    Attributes:
        site: Where it is.
        router: The router that is asked for; each layer gets a clone.
        num_experts: `N`.
        shared_key_values: Whether keys and values are not the experts' own.
        sources: The attention layer that each expert starts as; none where it
            is the site's own.
    """

    site: AttentionSite
    router: Router
    num_experts: int
    shared_key_values: bool
    sources: tuple[keras.Layer, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the `AttentionMixture`, but for its router."""
        return {
            "kind": KIND,
            "num_experts": self.num_experts,
            "shared_key_values": self.shared_key_values,
        }

    def first_kernel(self, router: Router) -> None:
        """A router may start as it will: its weights sum to 1."""

    def fill(self, layer: keras.Layer) -> None:
        """Writes the donors' values into what became of the site's layer."""
        mixture: Any = attention_sites.mixture_of(layer)
        if self.sources:
            for role, projection in mixture.projections.items():
                projection.start_from(
                    [self._owned(source)[role] for source in self.sources]
                )

    @property
    def dense_params(self) -> int:
        """Parameters of what each expert has of its own."""
        return sum(each.count_params() for each in self._projections)

    @property
    def added_params(self) -> int:
        """Parameters that the dense attention has not."""
        return (self.num_experts - 1) * self.dense_params + self._router_params

    @property
    def active_params(self) -> int:
        """Of experts that count for a token, on average, and the router."""
        met = self.router.average_experts_per_token(self.num_experts)
        return round(met * self.dense_params) + self._router_params

    @property
    def dense_flops(self) -> int:
        """Forward operations for a token of what experts have of their own."""
        return 2 * sum(math.prod(p.kernel.shape) for p in self._projections)

    @property
    def flops(self) -> int:
        """Those that dense attention has not; all experts run."""
        router = 2 * self.site.hidden_dim * self.num_experts
        return (self.num_experts - 1) * self.dense_flops + router

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Of new weights, of old ones that train, of those that will."""
        router = 4 * self._router_params  # float32 under any policy
        every = [v for each in self._projections for v in each.variables]
        trained = sum(bytes_of(v) for v in every if v.trainable)
        added = (self.num_experts - 1) * sum(map(bytes_of, every)) + router
        will = self.num_experts * trained
        if self.site.layer.trainable_variables:
            will += router
        return added, trained, will

    @property
    def _projections(self):
        return self._owned(self.site.layer).values()

    def _owned(self, layer):
        return attention_sites.projections_of(layer, self.shared_key_values)

    @property
    def _router_params(self):
        width = self.site.hidden_dim
        return router_params(self.router, self.num_experts, width)


def plan_of(
    site: AttentionSite,
    router: Router,
    experts: CopiedAttention,
    donors: list[list[AttentionSite]],
) -> CopiesPlan:
    """What is to be done to one attention layer, checked.

    Args:
        site: Where it is.
        router: What `attention_router` gave.
        experts: The settings.
        donors: What `donors_of` gave.

    Raises:
        TypeError, ValueError, UpcycleError: As `upcycle_attention`.
    """
    count = checks.check_count("num_experts", experts.num_experts)
    shared = checks.check_flag("shared_key_values", experts.shared_key_values)
    reason = attention_sites.why_not_copied(site.layer, shared)
    if reason is not None:
        raise UpcycleError(
            "Attention that becomes several must have plain projections of "
            f"its queries, keys and values. Received: {site.path!r}: {reason}. "
            "Leave it out by `layers`, or route its heads: `AttentionExperts`."
        )
    if donors and count % len(donors):
        raise ValueError(
            "`num_experts` must be a multiple of the number of donors, so that "
            "each makes equally many experts. Received: num_experts="
            f"{count} with {len(donors)} donors."
        )
    sources = []
    for expert in range(count if donors else 0):
        number = expert * len(donors) // count
        sources.append(donors[number][site.index].layer)
        _check_alike(site, sources[-1], shared, number)
    return CopiesPlan(site, router, count, shared, tuple(sources))


def donors_of(
    model: keras.Model,
    family: Family,
    experts: CopiedAttention,
    num_sites: int,
) -> list[list[AttentionSite]]:
    """The attention layers of each donor, in the model's order.

    Raises:
        TypeError, UpcycleError: For what is no dense model of the same kind.
    """
    if experts.donors is None:
        return []
    donors: Any = experts.donors
    if isinstance(donors, keras.Model):
        donors = [donors]
    if isinstance(donors, str) or not isinstance(donors, Iterable):
        raise TypeError(
            "`donors` must be a list of Keras models. Received: "
            f"donors={donors!r} of type {type(donors).__name__}."
        )
    found = []
    for number, donor in enumerate(donors):
        name = f"Donor {number}"
        if not isinstance(donor, keras.Model):
            raise TypeError(
                "Each of `donors` must be a Keras model. Received: number "
                f"{number} of type {type(donor).__name__}."
            )
        sites = []
        if type(donor) is type(model) and not attention_routing_in(donor):
            sites = families.family_of(donor).find_attention(donor).sites
        if len(sites) != num_sites:
            raise UpcycleError(
                f"{name} must be a dense model of the class and architecture "
                f"of the upcycled one, a {type(model).__name__} with "
                f"{num_sites} dense attention layers. Received: "
                f"{donor.name!r}, a {type(donor).__name__} with {len(sites)}."
            )
        model_checks.check_donor(donor, name)
        found.append(sites)
    if not found:
        raise ValueError(
            "`donors` must hold at least one model. Received: an empty list. "
            "Leave it out for copies of the model's own attention."
        )
    return found


def _check_alike(site, source, shared, number):
    def looks(layer):
        owned = attention_sites.projections_of(layer, shared)
        return type(layer).__name__, {
            role: (
                getattr(each, "equation", None),
                tuple(each.kernel.shape),
                each.bias is not None,
                keras.activations.serialize(each.activation),
            )
            for role, each in owned.items()
        }

    reason = attention_sites.why_not_copied(source, shared)
    own, others = looks(site.layer), looks(source)
    if reason is None and own != others:
        reason = f"{others}, where the model has {own}"
    if reason is not None:
        raise UpcycleError(
            f"Donor {number} must have the attention of the upcycled model. "
            f"Received: {site.path!r} as {reason}. Take models of one "
            "architecture."
        )

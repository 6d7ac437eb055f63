"""How heads of attention become experts: what users say of it."""

from dataclasses import dataclass
from typing import TypeAlias

from keras_upcycle.conversion.arguments import LayersLike, RouterLike
from keras_upcycle.conversion.copied_attention import CopiedAttention


@dataclass(frozen=True)
class AttentionExperts:
    """How heads of attention become experts; see `RoutedHeads`.

    References: Pan et al., DS-MoE (arXiv 2404.05567), section 2.1; Jin et al.,
    MoH (arXiv 2410.11842), for `shared_heads`.

    Args:
        router: String, `Router` or mapping by stack: `"ds_moe"` (default), all
            heads in training and as many at inference as `set_active_experts`
            says; `"top_k"`; a `TopKRouter` with `capacity_factor=None`; or one
            of your own. In a mapping `None` leaves a stack's attention dense.
        num_experts: Integer: into how many experts an attention layer's heads
            are divided. Defaults to `None`: each head is one, or where query
            heads share key-value heads, one query head of each.
        shared_heads: Integer, at least 0: how many of the experts, the first,
            every token has. Defaults to 0.
        layers: String, integer, slice, list, callable or mapping: which blocks'
            attention, as in `upcycle_model`; a function gets an
            `AttentionSite`. Defaults to `"all"`.

    Raises:
        TypeError, ValueError: When it is used, for what does not fit.

    Example:
        >>> AttentionExperts("ds_moe", shared_heads=1).shared_heads
        1
    """

    router: RouterLike = "ds_moe"
    num_experts: int | None = None
    shared_heads: int = 0
    layers: LayersLike = "all"


# As asked for; `True` for the defaults, `False` for dense attention.
AttentionLike: TypeAlias = AttentionExperts | CopiedAttention | bool

"""Routers that choose heads: which can, and what their weights mean."""

from typing import Any

from keras import ops

from keras_upcycle.routing import functional
from keras_upcycle.routing.expert_choice_router import ExpertChoiceRouter
from keras_upcycle.routing.registry import get_router
from keras_upcycle.routing.router import Router
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import Routing, Tensor


def head_router(router: Any) -> Router:
    """The router that is meant, if it is one that heads can be chosen by.

    Heads have no buffers, so no head is ever full, and every head has run
    when the router is asked, so none needs a stand-in.

    Args:
        router: String, the name of a router, or a `Router`.

    Raises:
        TypeError, ValueError: For what is no router, or one that heads cannot
            be chosen by.
    """
    if router == "top_k":
        router = TopKRouter(capacity_factor=None)
    found = get_router(router)
    reason = None
    if isinstance(found, ExpertChoiceRouter):
        reason = "lets experts choose tokens"
    elif type(found).run not in (Router.run, TopKRouter.run):
        reason = "does more than choose, which is about feed-forward experts"
    elif found.adds_slices:
        reason = "weighs slices of a feed-forward block, whose sum it is"
    elif getattr(found, "router_gradient", "top_k") != "top_k":
        reason = f"has router_gradient={found.router_gradient!r}"
    elif getattr(found, "expert_groups", None) is not None:
        reason = f"has expert_groups={found.expert_groups!r}"
    else:
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(found, name, None) is not None:
                reason = (
                    f"has {name}={getattr(found, name)}, and heads have no "
                    "slots that could be full"
                )
    if reason is not None:
        raise ValueError(
            "Heads are chosen by tokens, with nothing between: `router` must "
            "be a `TopKRouter` with capacity_factor=None, a `DSMoERouter`, or "
            "one of your own that returns a `TokenChoice`. Received: "
            f"{type(found).__name__} that {reason}."
        )
    return found


def factors(router: Router, chosen: Routing, length: Any) -> Tensor:
    """What each routed expert's heads are multiplied with.

    Where a router's weights sum to 1 over the experts that a token has, the
    weight times how many these are; else the weight times how many experts
    there are. Either way equal weights of all are a factor of 1: the dense
    attention.

    Args:
        router: A router that `head_router` gave.
        chosen: What it chose.
        length: `S`.

    Returns:
        float32 `(G, S, E)`, 0 for experts that a token does not have.
    """
    num_experts: Any = router.num_experts
    weights = functional.combine_matrix(chosen, length, num_experts)
    normalized = router.sums_to_one
    if not isinstance(router, TopKRouter):
        normalized = normalized and getattr(router, "normalize", True)
    if not normalized:
        return weights * num_experts
    count = functional.experts_per_token(chosen, length, num_experts)
    return weights * ops.expand_dims(count, -1)

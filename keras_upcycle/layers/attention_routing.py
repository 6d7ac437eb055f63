"""What layers have in common that route attention: heads, or copies of it."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_upcycle.layers.call_context import fitting_mask, note_heads
from keras_upcycle.routing import token_groups
from keras_upcycle.routing.registry import check_is_free
from keras_upcycle.routing.router import Router
from keras_upcycle.state.random_state import KeepsRandomState
from keras_upcycle.types import Routing, Tensor


class RoutesAttention(KeepsRandomState, keras.layers.Layer):
    """A layer with a router that looks at what attention is called on."""

    router: Router

    def take_router(self, router: Router, num_experts: int) -> None:
        """Makes a router this layer's, of so many experts.

        Args:
            router: A `Router`.
            num_experts: Integer, how many it chooses from.

        Raises:
            ValueError: If another layer holds it, or it does not suit.
        """
        check_is_free(router)
        router.check(num_experts)
        self.router = router
        router.num_experts = num_experts

    def routed(
        self,
        tokens: Tensor,
        training: Any,
        factors: Callable[[Routing, Tensor], Tensor],
        at_padding: float,
    ) -> Tensor:
        """What each expert counts for each token: float32 `(batch, ..., N)`.

        Args:
            tokens: Tensor, float `(batch, ..., D)`.
            training: Boolean, whether the model trains.
            factors: Callable, from a routing and the grouped tokens
                `(G, S, D)` to `(G, S, N)`.
            at_padding: Float. Nobody reads padding; with this it stays what the
                dense model makes of it.
        """
        shape = tuple(ops.shape(tokens))
        grouped, real = token_groups.grouped(
            tokens, fitting_mask(tokens), self.router.group
        )
        chosen = self.router(grouped, mask=real, training=training)
        found = factors(chosen, grouped)
        note_heads(self, found, real)
        if real is not None:
            found = ops.where(ops.expand_dims(real, -1), found, at_padding)
        return token_groups.ungrouped(found, (*shape[:-1], found.shape[-1]))

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # A second run would add the router's losses twice.
        return layer_call

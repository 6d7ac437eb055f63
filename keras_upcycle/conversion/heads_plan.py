"""One attention layer whose heads are to be routed: what it will be."""

import math
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle.conversion.counts import router_params
from keras_upcycle.families import AttentionSite
from keras_upcycle.layers.routed_heads import shared_scores
from keras_upcycle.routing.router import Router


@dataclass(frozen=True)
class HeadsPlan:
    """One attention layer whose heads are to be routed.

    Attributes:
        site: Where it is.
        router: The router that is asked for; each layer gets a clone.
        num_experts: `E` of its `RoutedHeads`, shared ones included.
        shared_heads: How many of these every token has.
    """

    site: AttentionSite
    router: Router
    num_experts: int
    shared_heads: int

    @property
    def routed(self) -> int:
        """How many experts the router chooses from."""
        return self.num_experts - self.shared_heads

    @property
    def added_params(self) -> int:
        """Parameters that the dense attention has not."""
        width = self.site.hidden_dim
        beside = shared_scores(self.shared_heads) * width
        return router_params(self.router, self.routed, width) + beside

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the `RoutedHeads`, but for its router."""
        return {
            "num_experts": self.num_experts,
            "shared_heads": self.shared_heads,
        }

    def first_kernel(self, router: Router) -> None:
        """All heads, with equal scores, are the dense attention."""
        if router.meets_all_of_equals(self.routed):
            router.kernel_initializer = keras.initializers.Zeros()

    def fill(self, layer: keras.Layer) -> None:
        """Nothing is to be written: heads are the dense attention's."""

    @property
    def dense_params(self) -> int:
        """Weights of the output projection, which the experts share out."""
        projection = getattr(self.site.layer, self.site.output)
        return math.prod(projection.kernel.shape)

    @property
    def active_params(self) -> int:
        """Of these and of the router, those that a token meets on average."""
        met = self.router.average_experts_per_token(self.routed)
        share = (met + self.shared_heads) / self.num_experts
        return round(share * self.dense_params) + self.added_params

    @property
    def dense_flops(self) -> int:
        """Forward operations for a token of the output projection."""
        return 2 * self.dense_params

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Of new weights, of old ones that train, of those that will."""
        size = 4 * self.added_params  # float32 under any policy
        return size, 0, size if self.site.layer.trainable_variables else 0

    @property
    def flops(self) -> int:
        """Forward operations for a token that dense attention has not."""
        beside = shared_scores(self.shared_heads)
        return 2 * self.site.hidden_dim * (self.routed + beside)

"""One block to be converted: the layer that takes its place, and its size."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from keras_upcycle import keras_internals
from keras_upcycle.conversion import counts
from keras_upcycle.families import FeedForwardSite
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.router import Router, clone


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What a dense block becomes.

    Attributes:
        site: The dense block.
        num_experts: `E` of the new layer.
        intermediate_dim: `F` of the new layer.
        router: A router with the new layer's settings; it stays unbuilt.
        settings: More arguments of the new layer.
    """

    site: FeedForwardSite
    num_experts: int
    intermediate_dim: int
    router: Router
    settings: Mapping[str, Any]

    def layer(self, router: Router) -> MoEFeedForward:
        """The new layer, unbuilt.

        Args:
            router: One like `router`, which will be the layer's.
        """
        site = self.site
        return MoEFeedForward(
            self.num_experts,
            self.intermediate_dim,
            router=router,
            activation=site.activation,
            gated=site.gated,
            use_bias=site.use_bias,
            output_dropout=site.output_dropout,
            dtype=site.dtype_policy,
            name=site.replacement,
            **self.settings,
        )

    @functools.cached_property
    def counted(self) -> MoEFeedForward:
        """The new layer itself, built, but of variables without values."""
        with keras_internals.without_values():
            layer = self.layer(clone(self.router))
            layer.build((None, None, self.site.hidden_dim))
        return layer

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert; 0 without one."""
        return self.counted.shared_intermediate_dim or 0

    @property
    def dense_params(self) -> int:
        """Parameters of the dense block."""
        return sum(math.prod(v.shape) for v in self.site.kernels.values())

    @property
    def total_params(self) -> int:
        """Parameters of the new layer, its router's among them."""
        return self.counted.count_params()

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return counts.expert_params(self.counted)

    @property
    def always_params(self) -> int:
        """Parameters of the new layer that every token meets."""
        return counts.always_params(self.counted)

    @property
    def dense_flops(self) -> int:
        """Forward operations of the dense block's products, for a token."""
        return 2 * sum(
            math.prod(variable.shape)
            for name, variable in self.site.kernels.items()
            if name.endswith("kernel")
        )

    def flops(self, length: int | None = None) -> float:
        """Forward operations of the new layer in training, for a token.

        Router and empty slots of buffers included.

        Args:
            length: Tokens of an example, where known: slots are whole.
        """
        slots = self.router.average_slots_per_token(
            self.num_experts, length=length
        )
        return counts.flops(self.counted, slots)

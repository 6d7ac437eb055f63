"""Whole attentions as experts: how much each counts for a token."""

from typing import Any

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers import head_router
from keras_upcycle.layers.attention_routing import RoutesAttention
from keras_upcycle.layers.expert_projection import ExpertProjection
from keras_upcycle.routing import functional
from keras_upcycle.routing.registry import get_router, in_config
from keras_upcycle.routing.router import Router, clone

SOFT = "soft"
# In settings, where those of `RoutedHeads` have nothing.
KIND = "copied_attention"


def attention_router(router: Any) -> Router:
    """The router that is meant, if it is one for whole attentions.

    Raises:
        TypeError, ValueError: As `head_router`.
    """
    if router == SOFT:
        # The softmax over all, in training and at inference, and no loss.
        return clone(get_router("ds_moe"), mutual_information_loss=0.0)
    return head_router.head_router(router)


@keras.saving.register_keras_serializable(package="keras_upcycle")
class AttentionMixture(RoutesAttention):
    """The router of an attention layer that is several experts.

    `y = sum_i S_i(x) Attention_i(x)`, with `S` the softmax over all experts of
    a projection of what the attention layer is called on. The attention layer
    holds this layer, and `ExpertProjection`s where experts differ.

    References: Zhang et al., BAM (arXiv 2408.08274), section 4.

    Args:
        num_experts: Integer, at least 1: attentions (`N`).
        router: String, `"soft"` (default), or a `Router`, as `RoutedHeads`
            takes them.
        shared_key_values: Boolean, whether all experts have the same keys and
            values. Defaults to `True`.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: Float tensor `(batch, ..., D)`, what attention is called on.
        training: Boolean, whether the layer trains.

    Output shape:
        float32 `(batch, ..., N)`: the experts' weights.

    Example:
        >>> layer = AttentionMixture(4)
        >>> weights = layer(keras.ops.ones((1, 5, 8)))
        >>> tuple(weights.shape), round(float(weights[0, 0].sum()), 3)
        ((1, 5, 4), 1.0)
    """

    def __init__(
        self, num_experts, router=SOFT, *, shared_key_values=True, **kwargs
    ):
        super().__init__(**kwargs)
        self.num_experts = checks.check_count("num_experts", num_experts)
        self.shared_key_values = checks.check_flag(
            "shared_key_values", shared_key_values
        )
        self.take_router(attention_router(router), self.num_experts)
        self.supports_masking = True
        self._held = Held({})

    def build(self, input_shape):
        if not self.router.built:
            self.router.build((None, None, input_shape[-1]))
        self.built = True

    def hold(self, projections: dict[str, ExpertProjection]) -> None:
        """Tells it the experts' projections, which another layer holds."""
        self._held = Held(projections)

    @property
    def projections(self) -> dict[str, ExpertProjection]:
        """By role: `"query"`, `"output"`, and perhaps `"key"` and `"value"`."""
        return self._held.projections

    @property
    def expert_params(self) -> int:
        """Parameters of one expert that are its own."""
        held = sum(each.count_params() for each in self.projections.values())
        return held // self.num_experts

    def call(self, tokens, training=None):
        return self.routed(
            tokens, training, self._weights, 1.0 / self.num_experts
        )

    def _weights(self, chosen, tokens):
        length = ops.shape(tokens)[1]
        return functional.combine_matrix(chosen, length, self.num_experts)

    def settings(self) -> dict[str, Any]:
        """What makes an equal layer of an equal attention layer."""
        return {
            "kind": KIND,
            "num_experts": self.num_experts,
            "router": in_config(self.router),
            "shared_key_values": self.shared_key_values,
        }

    def get_config(self):
        # As `RoutedHeads`, without what only blocks need.
        settings = self.settings()
        del settings["kind"]
        return {**super().get_config(), **settings}


class Held:
    """Layers that another layer has among its own: none of this one's."""

    def __init__(self, projections: dict[str, ExpertProjection]):
        self.projections = projections

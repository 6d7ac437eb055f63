"""Top-K by normalised tokens, each expert's output scaled: Gemma 4's router."""

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.routing.top_k_router import TopKRouter


@keras.saving.register_keras_serializable(package="keras_upcycle")
class RescaledTopKRouter(TopKRouter):
    """`TopKRouter` that normalises what it looks at, as Gemma 4 does.

    Logits are `(s * x / (rms(x) * sqrt(D))) @ kernel` with a scale `s` for each
    dimension, and what an expert puts out is multiplied by a scale of its own
    after weights were made to sum to 1. Both scales train and start at 1.

    Args:
        top_k: Integer, at least 1: experts of a token.
        epsilon: Float, above 0, added to the mean square. Defaults to 1e-6.
        **kwargs: Keyword arguments of `TopKRouter`.

    Example:
        >>> router = RescaledTopKRouter(2)
        >>> layer = keras_upcycle.MoEFeedForward(4, 8, router)
        >>> tuple(layer(ops.ones((2, 5, 16))).shape)
        (2, 5, 16)
    """

    def __init__(self, top_k=2, *, epsilon=1e-6, **kwargs):
        super().__init__(top_k, **kwargs)
        if self.router_gradient != "top_k":
            raise ValueError(
                "Outputs are scaled for each expert after weights sum to 1, "
                "of which `router_gradient` knows nothing. Received: "
                f"router_gradient={self.router_gradient!r}. Leave it out."
            )
        self.epsilon = checks.check_factor("epsilon", epsilon)

    @property
    def sums_to_one(self):
        return False

    def build(self, input_shape):
        super().build(input_shape)
        self.token_scale, self.expert_scale = (
            self.add_weight(
                name=name, shape=(size,), initializer="ones", dtype="float32"
            )
            for name, size in (
                ("token_scale", input_shape[-1]),
                ("expert_scale", self.num_experts),
            )
        )

    def call(self, inputs, mask=None, training=None):
        inputs = ops.cast(inputs, "float32")
        square = ops.mean(ops.square(inputs), axis=-1, keepdims=True)
        inputs = inputs * ops.rsqrt(square + self.epsilon)
        width = inputs.shape[-1]
        seen = inputs * self.token_scale * width**-0.5
        chosen = super().call(seen, mask=mask, training=training)
        # Nowhere is one past the last expert, with a weight of 0.
        scale = ops.append(self.expert_scale, 0.0)
        return chosen._replace(
            weights=chosen.weights * ops.take(scale, chosen.experts)
        )

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}

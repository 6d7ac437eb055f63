"""Attention heads as experts: a router in front of the output projection."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers import head_router
from keras_upcycle.layers.attention_routing import RoutesAttention
from keras_upcycle.layers.call_context import attended_tokens
from keras_upcycle.routing.registry import in_config
from keras_upcycle.types import Tensor

# Scores of shared heads, and of shared against routed, as MoH's code.
_SHARED, _BALANCE = "shared_kernel", "balance_kernel"


@keras.saving.register_keras_serializable(package="keras_upcycle")
class RoutedHeads(RoutesAttention):
    """Weighs what attention heads put out, token by token.

    Stands where an attention layer's output projection `W_O` stands, and holds
    it. Multi-head attention is a sum over heads, `O = sum_h H_h W_O[h]`, so a
    factor for each head and token makes heads experts, whatever computed
    them: keys, values and caches are what they were. With all heads on and
    equal scores every factor is 1, the dense attention.

    An expert of attention is one head, or, where several query heads share a
    key-value head (grouped-query attention), one query head of each group, as
    in DS-MoE: then all experts share all keys and values.

    The factor is `N * S_e`, with `S` the softmax over the `N` experts, and 0
    for experts that a token does not have. Of a router whose weights sum to 1
    over a token's `K` experts it is `K` times the weight, as in MoH's code.

    All heads are computed. DS-MoE too runs attention densely: skipping heads
    was slower at 60 % of them and more (section 4.4). What becomes sparse is
    what an output depends on.

    References: Pan et al., DS-MoE (arXiv 2404.05567), equations 7 and 8; Jin
    et al., MoH (arXiv 2410.11842), equations 5 and 6, for `shared_heads`.

    Args:
        projection: A `Dense` or `EinsumDense` layer, the output projection.
        num_heads: Integer, at least 1: query heads (`H`).
        router: String, `"ds_moe"` (default: all heads in training) or
            `"top_k"`, or a `Router`: a `TopKRouter` with
            `capacity_factor=None`, a `DSMoERouter`, or one of your own.
        num_experts: Integer, how many experts the heads are: `H`, or a number
            that divides `H / G` if `G` key-value heads are fewer, else `H`.
            Defaults to `None`: `H / G` of grouped heads, else `H`.
        num_key_value_heads: Integer, key-value heads (`G`). Defaults to `None`:
            as many as heads.
        shared_heads: Integer, at least 0: how many of the experts, the first
            ones, every token has. They have scores of their own, and two more
            weigh them against the routed ones; all start at 0, factors of 1.
            Defaults to 0.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Float tensor, what heads put out: `(batch, ..., H, head_dim)`,
            or `(batch, ..., H * head_dim)`, as the projection takes it.
        router_inputs: Float tensor `(batch, ..., D)`, what the attention layer
            was called on. Defaults to `None`: what the enclosing routed
            attention layer says.
        training: Boolean, whether the layer trains.

    Output shape:
        That of the projection.

    Raises:
        TypeError, ValueError: For a setting outside its range; when called,
            without `router_inputs` outside of a routed attention layer.

    Example:
        >>> projection = keras.layers.EinsumDense("abcd,cde->abe", (None, 8))
        >>> layer = RoutedHeads(projection, num_heads=2)
        >>> heads = keras.ops.ones((1, 5, 2, 4))
        >>> x = keras.ops.ones((1, 5, 8))
        >>> tuple(layer(heads, router_inputs=x).shape)
        (1, 5, 8)
    """

    def __init__(
        self,
        projection,
        num_heads,
        router="ds_moe",
        *,
        num_experts=None,
        num_key_value_heads=None,
        shared_heads=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.check_instance(
            "projection", projection, keras.layers.Layer, "a Keras layer"
        )
        self.num_heads = checks.check_count("num_heads", num_heads)
        if num_key_value_heads is None:
            num_key_value_heads = self.num_heads
        self.num_key_value_heads = checks.check_count(
            "num_key_value_heads", num_key_value_heads
        )
        self.num_experts = count_experts(
            num_experts, self.num_heads, self.num_key_value_heads
        )
        self.shared_heads = check_shared(shared_heads, self.num_experts)
        self.projection = projection
        self.take_router(
            head_router.head_router(router),
            self.num_experts - self.shared_heads,
        )
        self.supports_masking = True

    def build(self, input_shape):
        if not self.projection.built:
            self.projection.build(input_shape)
        width = self.projection.kernel.shape[-1]
        if not self.router.built:
            self.router.build((None, None, width))
        self.shared_kernel = self.balance_kernel = None
        if self.shared_heads:
            if self.shared_heads > 1:  # the softmax of one score is 1
                self.shared_kernel = self._scores(
                    _SHARED, width, self.shared_heads
                )
            self.balance_kernel = self._scores(_BALANCE, width, 2)
        self.built = True

    def _scores(self, name, width, count):
        return self.add_weight(
            name=name,
            shape=(width, count),
            initializer="zeros",
            dtype="float32",
            trainable=self.router.trainable,
        )

    def call(self, inputs, router_inputs=None, training=None):
        tokens = attended_tokens() if router_inputs is None else router_inputs
        if tokens is None:
            raise ValueError(
                "`router_inputs` must be what the attention layer was called "
                f"on. Received: router_inputs=None in {self.name!r}, outside "
                "of an attention layer whose heads `upcycle_attention` routed. "
                "Pass it."
            )
        factors = self.factors(tokens, training=training)
        shape = ops.shape(inputs)
        if self._merged:
            head_dim = inputs.shape[-1] // self.num_heads
            inputs = ops.reshape(
                inputs, (*shape[:-1], self.num_heads, head_dim)
            )
        factors = ops.cast(ops.expand_dims(factors, -1), inputs.dtype)
        inputs = ops.reshape(inputs * factors, shape)
        return self.projection(inputs)

    def factors(self, tokens: Tensor, training: Any = None) -> Tensor:
        """What each head is multiplied with: float32 `(batch, ..., H)`.

        Args:
            tokens: Tensor, float `(batch, ..., D)`, what attention is called
                on.
            training: Boolean, whether the model trains.
        """
        by_expert = self.routed(tokens, training, self._of_experts, 1.0)
        return ops.take(by_expert, self._expert_of_head(), axis=-1)

    def _of_experts(self, chosen, tokens):
        length = ops.shape(tokens)[1]
        found = head_router.factors(self.router, chosen, length)
        return self._with_shared(tokens, found) if self.shared_heads else found

    def _with_shared(self, tokens, routed):
        tokens = ops.cast(tokens, "float32")
        shared = ops.ones_like(routed[..., :1])
        if self.shared_kernel is not None:
            shared = self.shared_heads * ops.softmax(
                ops.matmul(tokens, self.shared_kernel)
            )
        balance = 2 * ops.softmax(ops.matmul(tokens, self.balance_kernel))
        return ops.concatenate(
            [shared * balance[..., :1], routed * balance[..., 1:]], axis=-1
        )

    @property
    def new_weights(self) -> list[keras.Variable]:
        """What the dense attention has not: all but the projection's."""
        of_projection = {id(v) for v in self.projection.weights}
        return [v for v in self.weights if id(v) not in of_projection]

    @property
    def _merged(self):
        """Whether the projection takes heads side by side in one axis."""
        equation = getattr(self.projection, "equation", None)
        if equation is None:
            return True
        left, _, output = equation.partition("->")
        taken, kernel = left.split(",")
        return len(set(taken) & set(kernel) - set(output)) == 1

    def _expert_of_head(self):
        """int32 `(H,)`."""
        return expert_of_head(
            self.num_experts, self.num_heads, self.num_key_value_heads
        )

    def compute_output_spec(self, inputs, router_inputs=None, training=None):
        return self.projection.compute_output_spec(inputs)

    def compute_output_shape(self, input_shape):
        return self.projection.compute_output_shape(input_shape)

    def settings(self) -> dict[str, Any]:
        """What makes an equal layer of an equal attention layer."""
        return {
            "router": in_config(self.router),
            "num_experts": self.num_experts,
            "shared_heads": self.shared_heads,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        projection = config.pop("projection")
        if isinstance(projection, Mapping):
            projection = keras.saving.deserialize_keras_object(projection)
        return cls(projection, **config)

    def get_config(self):
        return {
            **super().get_config(),
            "projection": keras.saving.serialize_keras_object(self.projection),
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            **self.settings(),
        }


def expert_of_head(
    num_experts: int, num_heads: int, num_key_value_heads: int
) -> np.ndarray:
    """Which expert each head belongs to: int32 `(H,)`.

    Query heads that share a key-value head stand side by side.

    Example:
        >>> expert_of_head(2, num_heads=4, num_key_value_heads=2).tolist()
        [0, 1, 0, 1]
        >>> expert_of_head(2, num_heads=4, num_key_value_heads=4).tolist()
        [0, 0, 1, 1]
    """
    heads = np.arange(num_heads)
    in_group = num_heads // num_key_value_heads
    if in_group > 1 and num_experts != num_heads:
        place = heads % in_group
        return (place // (in_group // num_experts)).astype("int32")
    return (heads // (num_heads // num_experts)).astype("int32")


def count_experts(
    num_experts: int | None, num_heads: int, num_key_value_heads: int
) -> int:
    """How many experts the heads are.

    Raises:
        ValueError: If heads cannot be divided like that.
    """
    if num_heads % num_key_value_heads:
        raise ValueError(
            "`num_key_value_heads` must divide `num_heads`. Received: "
            f"num_heads={num_heads}, num_key_value_heads="
            f"{num_key_value_heads}."
        )
    in_group = num_heads // num_key_value_heads
    if num_experts is None:
        return num_heads if in_group == 1 else in_group
    num_experts = checks.check_count("num_experts", num_experts)
    several = num_heads if in_group == 1 else in_group
    if num_experts != num_heads and several % num_experts:
        of = f"num_heads={num_heads}"
        if in_group > 1:
            of += f" with num_key_value_heads={num_key_value_heads}"
        raise ValueError(
            "`num_experts` of attention must divide the heads of a key-value "
            f"head, or be all heads: {num_heads}, or what divides {several}. "
            f"Received: num_experts={num_experts} for {of}."
        )
    return num_experts


def shared_scores(shared_heads: int) -> int:
    """Scores of a token that shared heads need beside the router's."""
    if not shared_heads:
        return 0
    return 2 + (shared_heads if shared_heads > 1 else 0)


def check_shared(shared_heads: Any, num_experts: int) -> int:
    """How many experts every token has; at least one must be routed."""
    if checks.is_integer(shared_heads) and 0 <= shared_heads < num_experts:
        return int(shared_heads)
    raise ValueError(
        "`shared_heads` must be an integer from 0 to one less than the "
        f"experts of attention, here {num_experts - 1}. Received: "
        f"shared_heads={shared_heads!r}."
    )

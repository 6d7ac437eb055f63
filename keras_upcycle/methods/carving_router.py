"""CMoE's router: a neuron of each expert says whether the expert is wanted."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, checks
from keras_upcycle.layers.activations import activation_of
from keras_upcycle.routing.registry import named
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.state import first_values
from keras_upcycle.types import Tensor, TokenChoice

# What is fixed, and to what: experts are parts of a block.
_FIXED = {
    "normalize": False,
    "softmax": "before_top_k",
    "router_gradient": "top_k",
    "expert_groups": None,
}


@named("carving")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class CarvingRouter(TopKRouter):
    """Top-K by the activations of one hidden neuron for each expert.

    An expert's logit is the absolute activation of its representative neuron:
    `|act(x w + b)|`, or `|act(x g + b) (x w + c)|` in a gated block. `Carving`
    says which neurons these are and what the router starts from; without it
    the router's kernels are drawn as others' are.

    Experts are slices of a block, so that a token's `K` experts are added as
    they are: expert `e` has the weight `1 + s_e u_e`, where `s` is the softmax
    of the logits over all experts and `u` a vector that trains and starts at
    0. At first, then, the task teaches `u` alone; with it the kernels learn.

    References: Pei et al., CMoE (arXiv 2502.04416), the differentiable router
    and its load balancing; the authors' code is that of the weights.

    Args:
        top_k: Integer in `[1, num_experts]`: experts that a token chooses
            (`K`). With all of them the layer is the dense block. Defaults to
            2.
        activation: String or callable, the activation of the neurons; that of
            the block, where `Carving` is used. Defaults to `"silu"`.
        gated: Boolean, whether a neuron is an activated projection times a
            linear one, with a second kernel `(D, E)`; as the block is, where
            `Carving` is used. Defaults to `False`.
        capacity_factor: Float above 0 or `None`; see `TopKRouter`. Defaults to
            `None`, dropless.
        load_balance_loss: Float, at least 0; see `TopKRouter`. Defaults to 0.
        bias_update_rate: Float, at least 0; see `TopKRouter`. Defaults to 0:
            the paper balances by 0.001, which costs much of what was carved
            where neurons are often 0, as with ReLU: equal logits are for the
            first expert, the most active one, until a bias parts them
            (`guides/methods.md`).
        **kwargs: Keyword arguments of `TopKRouter`. `normalize`, `softmax`,
            `router_gradient` and `expert_groups` have no other value than
            `False`, `"before_top_k"`, `"top_k"` and `None`; `use_bias` is
            whether neurons have biases.

    Raises:
        TypeError, ValueError: For a setting outside its range, or another
            value of these four.

    Example:
        >>> layer = MoEFeedForward(8, 32, router=CarvingRouter(top_k=2))
        >>> y = layer(keras.random.normal((2, 5, 16), seed=0))
        >>> tuple(layer.router.scale.shape)
        (8,)
    """

    def __init__(
        self,
        top_k=2,
        *,
        activation="silu",
        gated=False,
        capacity_factor=None,
        load_balance_loss=0.0,
        bias_update_rate=0.0,
        **kwargs,
    ):
        for name, value in _FIXED.items():
            given = kwargs.pop(name, value)
            if type(given) is not type(value) or given != value:
                raise ValueError(
                    "Experts are slices of one block and added as they are, "
                    f"so `{name}` must be {value!r}. Received: {name}="
                    f"{given!r}. Leave it out, or use a `TopKRouter`."
                )
        super().__init__(
            top_k,
            _FIXED["normalize"],
            capacity_factor=capacity_factor,
            load_balance_loss=load_balance_loss,
            bias_update_rate=bias_update_rate,
            **kwargs,
        )
        self.activation = activation_of(activation)
        self.gated = checks.check_flag("gated", gated)
        self.up_kernel = self.up_bias = None
        self._first_values = {}

    @property
    def sums_to_one(self):
        return False

    @property
    def adds_slices(self):
        return True

    def meets_all_of_equals(self, num_experts):
        return False  # each with 1, not with a share

    def start_from(self, values: Mapping[str, Any]) -> None:
        """Says what weights hold when the router is built.

        Args:
            values: Mapping from `"kernel"`, `"logits_bias"`, `"up_kernel"`
                and `"up_bias"` to functions `(shape, dtype)` that give their
                values, as initializers do.

        Raises:
            RuntimeError: If the router is built already.
        """
        if self.built:
            raise RuntimeError(
                "`start_from` must be called before the router is built. "
                f"Received: router {self.name!r}, built. Assign to its "
                "weights instead."
            )
        self._first_values = {
            name: first_values.laid_out(value) for name, value in values.items()
        }

    def add_weight(self, *args, name=None, **kwargs):
        # Not assigned once it is built: a copy may be drawn later.
        first = self._first_values.get(name)
        if first is not None:
            kwargs["initializer"] = first
        return super().add_weight(*args, name=name, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        count = self.num_experts
        if self.gated:
            self.up_kernel = self.add_weight(
                name="up_kernel",
                shape=(input_shape[-1], count),
                initializer=self.kernel_initializer,
                dtype="float32",
            )
            if self.use_bias:
                self.up_bias = self.add_weight(
                    name="up_bias",
                    shape=(count,),
                    initializer="zeros",
                    dtype="float32",
                )
        self.scale = self.add_weight(
            name="scale", shape=(count,), initializer="zeros", dtype="float32"
        )
        self._first_values = {}  # the donor's arrays are let go

    def scores_of(self, inputs):
        neurons, gate = super().scores_of(inputs), None
        if self.gated:
            gate, neurons = neurons, ops.matmul(inputs, self.up_kernel)
            if self.up_bias is not None:
                neurons = neurons + self.up_bias
        return ops.abs(backend.activated(self.activation, neurons, gate))

    def choose_by(
        self, noisy: Tensor, logits: Tensor, mask: Tensor | None, training: Any
    ) -> TokenChoice:
        chosen = super().choose_by(noisy, logits, mask, training)
        # Nowhere is one past the last expert, and stays without a weight.
        scale = ops.take(ops.append(self.scale, 0.0), chosen.experts)
        kept = chosen.experts < self.num_experts
        return chosen._replace(
            weights=ops.where(kept, 1.0 + chosen.weights * scale, 0.0)
        )

    def get_config(self):
        config = super().get_config()
        for name in _FIXED:
            del config[name]
        return {
            **config,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
        }

"""The layer: a router, its experts, and an engine between them."""

from collections.abc import Callable, Mapping

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.layers import (
    dispatch,
    moe_settings,
    networks,
    quantization,
)
from keras_upcycle.layers.call_context import (
    LayerCall,
    hand_on,
    note_call,
    outer_mask,
)
from keras_upcycle.layers.experts import Experts
from keras_upcycle.layers.output_bias import OutputBias
from keras_upcycle.layers.set_when_built import SetWhenBuilt
from keras_upcycle.optimizers import per_expert
from keras_upcycle.routing import token_groups
from keras_upcycle.state.first_values import initializer_of
from keras_upcycle.state.random_state import KeepsRandomState
from keras_upcycle.types import Tensor

OUTPUT_BIAS = "output_bias"


@keras.saving.register_keras_serializable(package="keras_upcycle")
class MoEFeedForward(
    SetWhenBuilt,
    moe_settings.SettingsInFiles,
    quantization.FloatPolicy,
    KeepsRandomState,
    keras.layers.Layer,
):
    """A sparsely activated mixture of feed-forward networks.

    Stands wherever a Transformer's feed-forward block stands, and in place of
    any `Dense -> activation -> Dense` that returns to its input's width. A
    router sends each token to a few of `num_experts` networks of the same
    shape and adds up their outputs, weighted. Auxiliary losses reach `fit`
    through `add_loss`, in training only.

    References: Shazeer et al. (arXiv 1701.06538), section 2; Sparse
    Upcycling (arXiv 2212.05055).

    Args:
        num_experts: Integer, at least 1: how many experts there are (`E`).
        intermediate_dim: Integer, at least 1: each expert's hidden width
            (`F`).
        router: String, one of `"top_k"` (default), `"expert_choice"`,
            `"default_moe"` and `"ds_moe"`, or a `Router`, which holds its own
            settings and then belongs to this layer.
        activation: String or callable, the activation of the hidden layer, as
            Keras takes it. Defaults to `"gelu"`.
        gated: Boolean, whether the hidden layer is
            `activation(gate(x)) * up(x)`, as in T5 1.1 or Llama, and not
            `activation(up(x))`. Defaults to `False`.
        use_bias: Boolean, whether kernels have biases. Defaults to `True`.
        output_bias: Boolean, whether the bias of the output is one for all,
            added once and whole to every real token outside the experts,
            whatever their number, in place of one in each expert and in the
            shared network. For experts that are slices of a block, as in
            DS-MoE; needs `use_bias`. Defaults to `False`.
        dropout: Float in `[0, 1)`, the dropout rate on the hidden layer.
            Defaults to 0.
        output_dropout: Float in `[0, 1)`, the dropout rate on the output.
            Defaults to 0.
        shared_intermediate_dim: Integer, at least 1, or `None`: the hidden
            width of one more network of the same kind, which every token meets
            and whose output is added without a weight. Several shared experts
            are one as wide as all of them. DeepSeekMoE (arXiv 2401.06066),
            section 3.2. Defaults to `None`: there is none.
        shared_gate: Boolean, whether a sigmoid of the token, with a kernel
            `(D, 1)`, multiplies what the shared network gives it, as in
            Qwen2-MoE. Defaults to `False`.
        low_rank: Integer, at least 1, or `None`: experts are one network that
            all share and that is frozen, and a difference of this rank for each
            expert and projection, which trains and starts at 0; see
            `LowRankExperts`. Defaults to `None`: whole experts.
        low_rank_alpha: Float, above 0, or `None`: differences are multiplied by
            `low_rank_alpha / low_rank`. Defaults to `None`: by 1.
        dispatch: String, one of `"capacity"`, `"dropless"` and `"dense"`, which
            compute the same and cost differently (see `dispatch`), or `"auto"`
            (default), which chooses by shape and by whether the layer trains
            (see `dispatch.choose`).
        trainable_experts: Boolean, whether the experts train; a router has a
            flag of its own. `freeze` sets them. Defaults to `True`.
        frozen_projections: List or tuple of strings, some of `"up"`, `"gate"`
            and `"down"`: what does not train in any expert, as in a dense block
            one of whose layers was frozen. Defaults to `()`.
        remat: Boolean, whether training recomputes the experts' hidden layers
            in the backward pass instead of keeping them, for the cost of one
            forward product more. Routing, losses and dropout are what they are
            without. `python -m benchmarks.growth` shows time and memory.
            Defaults to `False`, or `True` under a `keras.RematScope` that
            covers the layer.
        kernel_initializer: String or initializer, that of the expert kernels.
            It is called for each expert and projection by itself, with the
            shape of a `Dense` kernel, `(D, F)` or `(F, D)`, so that its scale
            is that of a `Dense`. A seed gives each of them its own numbers, the
            same every time. Defaults to `"glorot_uniform"`.
        bias_initializer: String or initializer, that of the expert biases,
            `(F,)` or `(D,)`, in the same way. Defaults to `"zeros"`.
        quantization_configs: Mapping from `"up"`, `"shared_up"` and so on to
            the `QuantizationConfig` that `quantize` was given; for files.
            Defaults to `None`: the mode's default for all.
        **kwargs: Keyword arguments of `keras.layers.Layer`. `dtype` may be any
            float policy; the router computes in float32 under all of them.

    Call arguments:
        inputs: Float tensor, see below.
        mask: Boolean tensor of the shape of `inputs` without its last axis,
            `True` at real tokens. Padding takes no slot, adds to no loss and
            gets the output 0. Where none is given, a Keras mask attached to
            `inputs` is used, or what the enclosing block hands down.
        training: Boolean, whether the layer trains.
        router_inputs: Float tensor of the shape of `inputs`, what the router
            looks at where that is not what experts compute on, as in Gemma 4.
            Defaults to `None`: it looks at `inputs`.

    Input shape:
        `(batch, ..., D)`. Lengths may be unknown. The tokens of one example
        are all its positions; with `(batch, D)` an example is one token.

    Output shape:
        That of `inputs`.

    Raises:
        ValueError, TypeError: When constructed, for a setting outside its
            range; when built, if `D` is unknown or there is no batch axis.

    Example:
        >>> layer = MoEFeedForward(num_experts=4, intermediate_dim=32)
        >>> tuple(layer(keras.ops.ones((2, 10, 16))).shape)
        (2, 10, 16)
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        router="top_k",
        *,
        activation="gelu",
        gated=False,
        use_bias=True,
        output_bias=False,
        dropout=0.0,
        output_dropout=0.0,
        shared_intermediate_dim=None,
        shared_gate=False,
        low_rank=None,
        low_rank_alpha=None,
        dispatch=moe_settings.AUTO,
        trainable_experts=True,
        frozen_projections=(),
        remat=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        quantization_configs=None,
        **kwargs,
    ):
        if "trainable" in kwargs:
            flag = checks.check_flag("trainable", kwargs["trainable"])
            kwargs["trainable"] = flag
        super().__init__(**kwargs)
        quantization.check_policy(self.dtype_policy, self.name)
        num_experts = checks.check_count("num_experts", num_experts)
        intermediate_dim = checks.check_count(
            "intermediate_dim", intermediate_dim
        )
        gated = checks.check_flag("gated", gated)
        use_bias = checks.check_flag("use_bias", use_bias)
        output_bias = checks.check_flag("output_bias", output_bias)
        trainable_experts = checks.check_flag(
            "trainable_experts", trainable_experts
        )
        remat = checks.check_flag("remat", remat)
        dropout = checks.check_rate("dropout", dropout)
        output_dropout = checks.check_rate("output_dropout", output_dropout)
        if shared_intermediate_dim is not None:
            shared_intermediate_dim = checks.check_count(
                "shared_intermediate_dim", shared_intermediate_dim
            )
        moe_settings.check_output_bias(output_bias, use_bias)
        moe_settings.check_shared_gate(shared_gate, shared_intermediate_dim)
        self.low_rank, self.low_rank_alpha = moe_settings.check_low_rank(
            low_rank, low_rank_alpha
        )
        dispatch = moe_settings.check_dispatch(dispatch)
        moe_settings.check_frozen_projections(frozen_projections, gated)
        self.router = moe_settings.adopted(router, num_experts)
        self.router.check(num_experts)
        self.router.num_experts = num_experts
        if not self.trainable:
            self.router.trainable = False
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.activation = moe_settings.activation_of(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = dropout
        self.output_dropout = output_dropout
        self.shared_intermediate_dim = shared_intermediate_dim
        self.dispatch = dispatch
        self.kernel_initializer = initializer_of(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = initializer_of(
            "bias_initializer", bias_initializer
        )
        self.supports_masking = True
        remat = remat or keras_internals.remat_is_asked_for(self)
        # The scope's own way would run the router, its losses and its noise
        # a second time; this layer does better, see `Experts`.
        with keras.RematScope(None):
            self.experts, self.shared, self.shared_gate = networks.made(
                self,
                shared_gate,
                trainable=self.trainable and trainable_experts,
                down_bias=not output_bias,
                remat=remat,
                frozen_projections=frozen_projections,
                kernel_initializer=kernel_initializer,
                bias_initializer=bias_initializer,
                quantization_configs=moe_settings.check_quantization_configs(
                    quantization_configs, gated
                ),
            )
            self.output_bias = None
            if output_bias:
                self.output_bias = OutputBias(
                    bias_initializer,
                    trainable=self.trainable and trainable_experts,
                    dtype=self.dtype_policy,
                    name=OUTPUT_BIAS,
                )
            self.output_drop = None
            if output_dropout:
                self.output_drop = self._made_output_dropout()

    def start_from(self, values: Mapping[str, Callable[..., Tensor]]) -> None:
        """Says what the experts hold when they are built.

        Args:
            values: Mapping from the name of a weight, `"up_kernel"`,
                `"down_bias"` and so on, to a callable `(shape, dtype)` that
                returns its value, as an initializer does; what the shared
                network holds goes by the same names after `"shared_"`, and with
                `output_bias` that bias `(D,)` is `"output_bias"`.

        Raises:
            RuntimeError: If the layer is built already.
        """
        routed = moe_settings.of_experts(values)
        if self.output_bias is not None:
            self.output_bias.start_from(routed.pop(OUTPUT_BIAS, None))
        self.experts.start_from(routed)
        if self.shared is not None:
            self.shared.start_from(moe_settings.of_shared(values))

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the kernels of all experts; the router stays as it is.

        `quantize` of a model does the same for its layers.

        Args:
            mode: String, `"int8"`. Keras's other modes cannot take stacked
                kernels. Defaults to `None`, for which `config` is needed.
            type_check: Boolean, as Keras has it; not used. Defaults to `True`.
            config: A `keras.quantizers.Int8QuantizationConfig` without a weight
                quantizer, in the place of a mode. Defaults to `None`.

        Raises:
            ValueError: For another mode, before anything is changed; on a
                model too, by Keras's own `Model.quantize`.

        Example:
            >>> layer = MoEFeedForward(num_experts=4, intermediate_dim=32)
            >>> layer.build((None, 10, 16))
            >>> layer.quantize("int8")
            >>> layer.experts.expert_up.quantization_mode
            'int8'
        """
        del type_check
        projections = [
            layer
            for each in self.networks
            for layer in each.projections.values()
        ]
        quantization.check(mode, config, projections)
        for layer in projections:
            layer.quantize(mode, config=config)

    @property
    def networks(self) -> tuple[Experts, ...]:
        """The experts, and the shared network where there is one."""
        if self.shared is None:
            return (self.experts,)
        return (self.experts, self.shared)

    @property
    def with_experts(self) -> tuple[keras.Layer, ...]:
        """What trains as experts do: all but the router."""
        beside = (self.shared_gate, self.output_bias)
        return (*self.networks, *(layer for layer in beside if layer))

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call

    def build(self, input_shape):
        if not _is_of_tokens(input_shape):
            raise ValueError(
                "`inputs` must have the shape (batch, ..., hidden_dim) with a "
                f"known hidden_dim. Received: input_shape={input_shape}. "
                "Flatten to at least (batch, hidden_dim) and fix the last "
                "axis."
            )
        hidden_dim = input_shape[-1]
        with keras.RematScope(None):
            self.router.build((None, None, hidden_dim))
            for each in self.networks:
                each.build((each.num_experts, None, hidden_dim))
            if self.shared_gate is not None:
                self.shared_gate.build((None, hidden_dim))
            if self.output_bias is not None:
                self.output_bias.build((None, hidden_dim))
        self.built = True

    def call(self, inputs, mask=None, training=None, router_inputs=None):
        shape = ops.shape(inputs)
        if 0 in [size for size in shape if isinstance(size, int)]:
            return hand_on(inputs, inputs)
        if training:
            per_expert.warn_of_whole_stacks()
        if mask is None:
            mask = outer_mask()
        placement = self.experts.placement
        shards = 1 if placement is None else placement.shards
        group, of_inputs = self.router.group, mask
        tokens, mask = token_groups.grouped(inputs, of_inputs, group, shards)
        seen = tokens
        if router_inputs is not None:
            seen, _ = token_groups.grouped(
                router_inputs, of_inputs, group, shards
            )
        groups, length, _ = ops.shape(tokens)
        # A batch that is no multiple is whole on each device.
        spread = shards > 1 and not shape[0] % shards
        if training and spread and groups % shards:
            raise token_groups.uneven(self, groups, shape[0], shards)
        chosen = self.router(seen, mask=mask, training=training)
        name = self.dispatch
        if name == moe_settings.AUTO:
            name = dispatch.choose(
                chosen, groups * length, self.num_experts, training
            )
        engine = dispatch.ENGINES[name]
        outputs = self.router.run(
            tokens, chosen, engine, self.experts, training
        )
        if self.shared is not None:
            outputs = outputs + networks.from_shared(
                self, tokens, mask, training
            )
        if self.output_bias is not None:
            outputs = self.output_bias(outputs, mask=mask)
        outputs = token_groups.ungrouped(outputs, shape)
        if self.output_drop is not None:
            outputs = self.output_drop(outputs, training=training)
        note_call(LayerCall(self, inputs, outputs, mask, chosen, length))
        return hand_on(inputs, outputs)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs, mask=None, training=None, router_inputs=None
    ):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)


def _is_of_tokens(shape):
    """Whether `(batch, ..., hidden_dim)`: of one tensor, its width known."""
    return (
        isinstance(shape, tuple | list)
        and len(shape) >= 2
        and shape[-1] is not None
        and not any(isinstance(size, tuple | list) for size in shape)
    )

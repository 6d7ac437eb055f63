"""The layer: a router, its experts, and an engine between them."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.layers import dispatch, quantization
from keras_upcycle.layers.expert_init import SHARED
from keras_upcycle.layers.experts import FORMAT, Experts, read_settings
from keras_upcycle.layers.output_bias import OutputBias
from keras_upcycle.optimizers import per_expert
from keras_upcycle.routing import token_groups
from keras_upcycle.routing.router import get_router
from keras_upcycle.state.random_state import KeepsRandomState
from keras_upcycle.types import Routing, Tensor

AUTO = "auto"
OUTPUT_BIAS = "output_bias"


class LayerCall(NamedTuple):
    """One call of a `MoEFeedForward`, as `record_calls` keeps it.

    `inputs` and `outputs` have the layer's shape; `mask` and `routing` are
    grouped, `(G, S)` and as in `types`, and `length` is `S`. Groups may have
    more places than there are tokens: those at the end are nobody's.
    """

    layer: "MoEFeedForward"
    inputs: Tensor
    outputs: Tensor
    mask: Tensor | None
    routing: Routing
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the inputs, padding included."""
        return math.prod(self.inputs.shape[:-1])


_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "keras_upcycle_record", default=None
)


_PADDING_MASK: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar(
    "keras_upcycle_padding_mask", default=None
)


@contextlib.contextmanager
def padding_mask(mask: Tensor | None):
    """Hands a mask down to the `MoEFeedForward`s called inside the block.

    For blocks that call their feed-forward network with the tokens alone, as
    KerasHub's T5 does: a mask on the tensor is lost in the normalisation
    before it.

    Args:
        mask: `(batch, ...)`, nonzero at real tokens, or `None`.
    """
    token = _PADDING_MASK.set(mask)
    try:
        yield
    finally:
        _PADDING_MASK.reset(token)


@contextlib.contextmanager
def record_calls():
    """Keeps what every `MoEFeedForward` sees and decides, in call order.

    For eager calls, `model(x)`; a compiled step would leave traced values in
    the list.

    Yields:
        A list that fills with `LayerCall`s.
    """
    calls: list[LayerCall] = []
    token = _RECORD.set(calls)
    try:
        yield calls
    finally:
        _RECORD.reset(token)


@keras.saving.register_keras_serializable(package="keras_upcycle")
class MoEFeedForward(
    quantization.FloatPolicy, KeepsRandomState, keras.layers.Layer
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
        num_experts: Integer, at least 1 (`E`).
        intermediate_dim: Integer, at least 1: each expert's hidden width
            (`F`).
        router: `"top_k"` (default), `"expert_choice"`, or a `Router`, which
            holds its own settings and then belongs to this layer.
        activation: Activation of the hidden layer. Defaults to `"gelu"`.
        gated: Whether the hidden layer is `activation(gate(x)) * up(x)`, as
            in T5 1.1 or Llama, and not `activation(up(x))`. Defaults to
            `False`.
        use_bias: Whether kernels have biases. Defaults to `True`.
        output_bias: Whether the bias of the output is one for all, added once
            and whole to every real token outside the experts, whatever
            their number, in place of one in each expert and in the shared
            network. For experts that are slices of a block, as in DS-MoE;
            needs `use_bias`. Defaults to `False`.
        dropout: Dropout rate on the hidden layer. Defaults to 0.
        output_dropout: Dropout rate on the output. Defaults to 0.
        shared_intermediate_dim: Integer: the hidden width of one more network
            of the same kind, which every token meets and whose output is
            added without a weight. Several shared experts are one as wide as
            all of them. DeepSeekMoE (arXiv 2401.06066), section 3.2. Defaults
            to `None`: there is none.
        dispatch: `"capacity"`, `"dropless"` or `"dense"`, which compute the
            same and cost differently (see `dispatch`), or `"auto"` (default),
            which chooses by shape and by whether the layer trains (see
            `dispatch.choose`).
        trainable_experts: Whether the experts train; a router has a flag of
            its own. `freeze` sets them. Defaults to `True`.
        frozen_projections: Some of `"up"`, `"gate"` and `"down"`: what does
            not train in any expert, as in a dense block one of whose layers
            was frozen. Defaults to `()`.
        remat: Whether training recomputes the experts' hidden layers in the
            backward pass instead of keeping them, for the cost of one forward
            product more. Routing, losses and dropout are what they are
            without. `python -m benchmarks.growth` shows time and memory.
            Defaults to `False`, or `True` under a `keras.RematScope` that
            covers the layer.
        kernel_initializer: Initializer of the expert kernels. It is called
            for each expert and projection by itself, with the shape of a
            `Dense` kernel, `(D, F)` or `(F, D)`, so that its scale is that of
            a `Dense`. A seed gives each of them its own numbers, the same
            every time. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of the expert biases, `(F,)` or `(D,)`,
            in the same way. Defaults to `"zeros"`.
        quantization_configs: From `"up"`, `"shared_up"` and so on to the
            `QuantizationConfig` that `quantize` was given; for files. Defaults
            to `None`: the mode's default for all.
        **kwargs: Of `keras.layers.Layer`. `dtype` may be any float policy; the
            router computes in float32 under all of them.

    Call arguments:
        inputs: Float tensor, see below.
        mask: Boolean tensor of the shape of `inputs` without its last axis,
            `True` at real tokens. Padding takes no slot, adds to no loss and
            gets the output 0. Where none is given, a Keras mask attached to
            `inputs` is used, or what the enclosing block hands down.
        training: Whether the layer trains.

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
        dispatch=AUTO,
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
        if output_bias and not use_bias:
            raise ValueError(
                "`output_bias` takes the place of the experts' output biases, "
                f"so it needs `use_bias=True`. Received: output_bias="
                f"{output_bias!r} and use_bias={use_bias!r}."
            )
        dispatch = check_dispatch(dispatch)
        roles = ("up", "gate", "down") if gated else ("up", "down")
        if not isinstance(frozen_projections, list | tuple):
            raise TypeError(
                f"`frozen_projections` must be a list of some of {roles}. "
                f"Received: frozen_projections={frozen_projections!r} of type "
                f"{type(frozen_projections).__name__}."
            )
        for role in frozen_projections:
            checks.check_choice("frozen_projections", role, roles)
        named = isinstance(router, str)
        self.router = get_router(router)
        if named:
            self.router.limit(num_experts)
        taken = self.router.num_experts
        if taken is not None:
            raise ValueError(
                "A router's weights belong to one layer. Received: router "
                f"{self.router.name!r}, which another `MoEFeedForward` with "
                f"num_experts={taken} holds. Make a new router for each layer."
            )
        self.router.check(num_experts)
        self.router.num_experts = num_experts
        if not self.trainable:
            self.router.trainable = False
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = dropout
        self.output_dropout = output_dropout
        self.shared_intermediate_dim = shared_intermediate_dim
        self.dispatch = dispatch
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.supports_masking = True
        remat = remat or keras_internals.remat_is_asked_for(self)
        # The scope's own way would run the router, its losses and its noise
        # a second time; this layer does better, see `Experts`.
        with keras.RematScope(None):
            networks = functools.partial(
                Experts,
                activation=activation,
                gated=gated,
                use_bias=use_bias,
                down_bias=not output_bias,
                dropout=dropout,
                remat=remat,
                frozen_projections=frozen_projections,
                kernel_initializer=kernel_initializer,
                bias_initializer=bias_initializer,
                trainable=self.trainable and trainable_experts,
                dtype=self.dtype_policy,
            )
            configs = quantization_configs or {}
            self.experts = networks(
                num_experts,
                intermediate_dim,
                quantization_configs=_routed(configs),
                name="experts",
            )
            self.shared = None
            if shared_intermediate_dim is not None:
                self.shared = networks(
                    1,
                    shared_intermediate_dim,
                    stream=SHARED,
                    quantization_configs=_shared(configs),
                    name="shared",
                )
                self.experts.width_beside = shared_intermediate_dim
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
            values: As for `Experts.start_from`; what the shared network holds
                goes by the same names after `"shared_"`, and with
                `output_bias` that bias `(D,)` is `"output_bias"`.

        Raises:
            RuntimeError: If the layer is built already.
        """
        routed = _routed(values)
        if self.output_bias is not None:
            self.output_bias.start_from(routed.pop(OUTPUT_BIAS, None))
        self.experts.start_from(routed)
        if self.shared is not None:
            self.shared.start_from(_shared(values))

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the kernels of all experts; the router stays as it is.

        `quantize` of a model does the same for its layers.

        Args:
            mode: `"int8"`. Keras's other modes cannot take stacked kernels.
            type_check: As Keras has it; not used.
            config: A `keras.quantizers.Int8QuantizationConfig` without a
                weight quantizer, in the place of a mode.

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
            for networks in self.networks
            for layer in networks.projections.values()
        ]
        quantization.check(mode, config, projections)
        for layer in projections:
            layer.quantize(mode, config=config)

    @property
    def remat(self) -> bool:
        """Whether training recomputes hidden layers; may be set any time.

        A compiled step keeps what it was compiled with: set it before `fit`,
        or call `compile` again.
        """
        return self.experts.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        value = checks.check_flag("remat", value)
        for networks in self.networks:
            networks.remat = value

    @property
    def networks(self) -> tuple[Experts, ...]:
        """The experts, and the shared network where there is one."""
        if self.shared is None:
            return (self.experts,)
        return (self.experts, self.shared)

    def set_dropout(
        self, hidden: float | None = None, output: float | None = None
    ) -> None:
        """Other rates for a layer that is built already, from 0 too.

        A compiled step keeps its rates; `set_dropout` of a model drops it.

        Args:
            hidden: On the networks' hidden layers; `None` leaves it.
            output: On the output; `None` leaves it.
        """
        if hidden is not None:
            self.dropout = hidden
            for networks in self.networks:
                networks.set_dropout(hidden)
        if output is None:
            return
        self.output_dropout = output
        if self.output_drop is not None:
            keras_internals.set_rate(self.output_drop, output)
        elif output:
            keras_internals.add_dropout(
                self, "output_drop", self._made_output_dropout()
            )

    def _made_output_dropout(self):
        return keras.layers.Dropout(
            self.output_dropout, dtype=self.dtype_policy, name="output_dropout"
        )

    @property
    def with_experts(self) -> tuple[keras.Layer, ...]:
        """What trains as experts do: all but the router."""
        if self.output_bias is None:
            return self.networks
        return (*self.networks, self.output_bias)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "`inputs` must have the shape (batch, ..., hidden_dim) with a "
                f"known hidden_dim. Received: input_shape={input_shape}. "
                "Flatten to at least (batch, hidden_dim) and fix the last "
                "axis."
            )
        hidden_dim = input_shape[-1]
        with keras.RematScope(None):
            self.router.build((None, None, hidden_dim))
            for networks in self.networks:
                networks.build((networks.num_experts, None, hidden_dim))
            if self.output_bias is not None:
                self.output_bias.build((None, hidden_dim))
        self.built = True

    def call(self, inputs, mask=None, training=None):
        shape = ops.shape(inputs)
        if 0 in [size for size in shape if isinstance(size, int)]:
            return inputs
        if training:
            per_expert.warn_of_whole_stacks()
        if mask is None:
            mask = _PADDING_MASK.get()
        tokens, mask = token_groups.grouped(inputs, mask, self.router.group)
        groups, length, _ = ops.shape(tokens)
        chosen = self.router(tokens, mask=mask, training=training)
        name = self.dispatch
        if name == AUTO:
            name = dispatch.choose(
                chosen, groups * length, self.num_experts, training
            )
        engine = dispatch.ENGINES[name]
        outputs = self.router.run(
            tokens, chosen, engine, self.experts, training
        )
        if self.shared is not None:
            outputs = outputs + self._from_shared(tokens, mask, training)
        if self.output_bias is not None:
            outputs = self.output_bias(outputs, mask=mask)
        outputs = token_groups.ungrouped(outputs, shape)
        if self.output_drop is not None:
            outputs = self.output_drop(outputs, training=training)
        record = _RECORD.get()
        if record is not None:
            record.append(
                LayerCall(self, inputs, outputs, mask, chosen, length)
            )
        return outputs

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(self, inputs, mask=None, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    @classmethod
    def from_config(cls, config):
        return super().from_config(read_settings(config))

    def get_config(self):
        return {
            **super().get_config(),
            **self.saved_settings(),
            "dtype": keras.dtype_policies.serialize(
                keras_internals.policy_of_tree(self)
            ),
        }

    def saved_settings(self) -> dict[str, Any]:
        """`settings`, and what their names mean: `experts.read_settings`."""
        return {**self.settings(), "format": FORMAT}

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal layer, less name and dtype."""
        router = keras.saving.serialize_keras_object(self.router)
        # A router is built by its layer, which tells it `num_experts`.
        router.pop("build_config", None)
        return {
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "router": router,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "output_bias": self.output_bias is not None,
            "dropout": self.dropout,
            "output_dropout": self.output_dropout,
            "shared_intermediate_dim": self.shared_intermediate_dim,
            "dispatch": self.dispatch,
            "trainable_experts": self.experts.trainable,
            "frozen_projections": self.experts.frozen_projections,
            "remat": self.remat,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            **self._quantization_settings(),
        }

    def _quantization_settings(self):
        configs = dict(self.experts.quantization_configs)
        if self.shared is not None:
            for role, config in self.shared.quantization_configs.items():
                configs[SHARED + role] = config
        return {"quantization_configs": configs} if configs else {}

    def _from_shared(self, tokens, mask, training):
        """`(G, S, D)`; 0 at padding, as everything here."""
        shape = ops.shape(tokens)
        flat = ops.reshape(tokens, (1, shape[0] * shape[1], shape[2]))
        outputs = self.shared.apply_slots(flat, training)
        outputs = ops.reshape(outputs, shape)
        if mask is None:
            return outputs
        return ops.where(ops.expand_dims(mask, -1), outputs, 0.0)


def _routed(values):
    """Of what is named by role, what is of the experts."""
    return {n: v for n, v in values.items() if not n.startswith(SHARED)}


def _shared(values):
    """Of what is named by role, what is of the shared network."""
    return {
        name.removeprefix(SHARED): value
        for name, value in values.items()
        if name.startswith(SHARED)
    }


def check_dispatch(name: Any) -> str:
    """Raises `ValueError` unless an engine, or `"auto"`, has that name."""
    return checks.check_choice("dispatch", name, (AUTO, *dispatch.ENGINES))

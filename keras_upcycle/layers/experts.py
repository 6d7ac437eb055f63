"""The stacked feed-forward networks: `E` of them, one kernel each for all."""

from collections.abc import Callable, Mapping

import keras

from keras_upcycle import keras_internals
from keras_upcycle.distribution.placement import Placement, placement_of
from keras_upcycle.layers import quantization
from keras_upcycle.layers.expert_arithmetic import ExpertArithmetic
from keras_upcycle.layers.expert_files import (
    DOWN,
    FORMAT,
    GATE,
    UP,
    FilesOfExperts,
    read_settings,
)
from keras_upcycle.state import first_values
from keras_upcycle.types import Tensor


@keras.saving.register_keras_serializable(package="keras_upcycle")
class Experts(
    quantization.FloatPolicy,
    ExpertArithmetic,
    FilesOfExperts,
    keras.layers.Layer,
):
    """`num_experts` feed-forward networks of the same shape.

    Plain: `down(activation(up(x)))`. Gated: `down(activation(gate(x)) *
    up(x))`, the names of Llama, Mixtral and KerasHub. Each kernel is an
    `EinsumDense` sub-layer whose weight carries a leading expert axis, so
    Keras's own `enable_lora` (by the names `"expert_gate"`, `"expert_up"`,
    `"expert_down"`) and `quantize` reach it.

    Args:
        num_experts: Integer, `E`.
        intermediate_dim: Integer, `F`.
        activation: Activation of the hidden layer.
        gated: Whether the activated projection, the gate, multiplies a linear
            one.
        use_bias: Whether all kernels have biases.
        down_bias: Whether the output kernels have, too. `False` where one
            bias for all is added outside. Defaults to `True`.
        dropout: Rate of the dropout on the hidden layer.
        remat: Whether training keeps no hidden layer for the backward pass,
            but computes it once more there.
        frozen_projections: Roles, such as `("up",)`, whose kernels and biases
            do not train.
        kernel_initializer: Initializer of the kernels, called for each expert
            and projection by itself: `(D, F)` and `(F, D)`. A seed gives each
            its own numbers, the same every time.
        bias_initializer: Initializer of the biases, `(F,)` and `(D,)`, in the
            same way.
        stream: Networks with the same initializer and another `stream` draw
            other numbers.
        quantization_configs: From a role, `"up"`, to the `QuantizationConfig`
            that `quantize` was given for it; for files.
        **kwargs: Of `keras.layers.Layer`, such as `name` and `dtype`.

    Input shape:
        `(E, N, D)`: slots, expert by expert.

    Output shape:
        `(E, N, D)`.

    Example:
        >>> experts = Experts(num_experts=4, intermediate_dim=16)
        >>> tuple(experts(keras.ops.ones((4, 3, 8))).shape)
        (4, 3, 8)
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        *,
        activation="gelu",
        gated=False,
        use_bias=True,
        down_bias=True,
        dropout=0.0,
        remat=False,
        frozen_projections=(),
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        stream="",
        quantization_configs=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        quantization.check_policy(self.dtype_policy, self.name)
        self._quantization_configs = {
            role: quantization.config_of(config)
            for role, config in (quantization_configs or {}).items()
        }
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.down_bias = down_bias
        self.dropout = dropout
        self.remat = remat
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self._made_frozen = tuple(frozen_projections)
        self.stream = stream
        self._first_values = {}
        # Of the network that stands beside this one and meets all tokens.
        self.width_beside, self.gate_beside = 0, False

    @property
    def placement(self) -> Placement | None:
        """Where experts lie, if they are spread over devices."""
        if keras.distribution.distribution() is None:
            return None
        return placement_of(
            self, keras_internals.kernel_variable(self.expert_down)
        )

    @property
    def frozen_projections(self) -> list[str]:
        """Roles that do not train while others of the same experts may."""
        if not self.built:
            return list(self._made_frozen)
        if not self.trainable:
            return []  # all are, by one flag
        return [
            role
            for role, layer in self.projections.items()
            if not any(
                layer.trainable and variable.trainable
                for variable in keras_internals.made_to_train(layer)
            )
        ]

    def start_from(self, values: Mapping[str, Callable[..., Tensor]]) -> None:
        """Says what the weights hold when they are built.

        Keeps a conversion from drawing random kernels only to overwrite them.
        To be called before the layer is built; the values are dropped then.

        Args:
            values: From `"gate_kernel"`, `"up_kernel"`, `"up_bias"`, ... to a
                function `(shape, dtype) -> tensor`, as an initializer is.

        Raises:
            RuntimeError: If the layer is built already.
        """
        if self.built:
            raise RuntimeError(
                "`start_from` must be called before the layer is built. "
                f"Received: layer {self.name!r}, built. Assign to its "
                "weights instead."
            )
        self._first_values = {
            name: first_values.laid_out(value) for name, value in values.items()
        }

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        self._hidden_dim = hidden_dim
        hidden_shape = (self.num_experts, None, self.intermediate_dim)
        slots_shape = (self.num_experts, None, hidden_dim)
        self.expert_gate = None
        if self.gated:
            self.expert_gate = self._kernel(GATE, "gate", self.intermediate_dim)
            self.expert_gate.build(slots_shape)
        self.expert_up = self._kernel(UP, "up", self.intermediate_dim)
        self.expert_up.build(slots_shape)
        self.expert_down = self._kernel(DOWN, "down", hidden_dim)
        self.expert_down.build(hidden_shape)
        for layer in self.projections.values():
            # What a copy of the layer would start from; and the donor's
            # arrays are let go.
            layer.kernel_initializer = self.kernel_initializer
            layer.bias_initializer = self.bias_initializer
        self._first_values = {}
        self.hidden_dropout = None
        if self.dropout:
            self.hidden_dropout = self._made_dropout()
        self.built = True

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes every kernel; see `MoEFeedForward.quantize`."""
        del type_check
        projections = self.projections.values()
        quantization.check(mode, config, projections)
        for layer in projections:
            layer.quantize(mode, config=config)

    def set_dropout(self, rate: float) -> None:
        """Another rate for the hidden dropout, also where there was none.

        Args:
            rate: In `[0, 1)`.
        """
        self.dropout = rate
        if not self.built:
            return
        if self.hidden_dropout is None:
            if rate:
                keras_internals.add_dropout(
                    self, "hidden_dropout", self._made_dropout()
                )
            return
        keras_internals.set_rate(self.hidden_dropout, rate)

    def _made_dropout(self):
        return keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="dropout"
        )

    @property
    def projections(self) -> dict[str, keras.layers.EinsumDense]:
        """The stacked layers by role, `"gate"` where gated, `"up"`, `"down"`.

        A role is the first part of a dense block's names: `"up_kernel"`.
        """
        layers = {
            "gate": self.expert_gate,
            "up": self.expert_up,
            "down": self.expert_down,
        }
        return {r: layer for r, layer in layers.items() if layer is not None}

    def call(self, inputs, training=None):
        return self.apply_slots(inputs, training)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    @classmethod
    def from_config(cls, config):
        return super().from_config(read_settings(config))

    def sizes(self) -> dict[str, int]:
        """What weights must agree in to be loaded, in a file's order."""
        return {
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "hidden_dim": self._hidden_dim,
            "gated": int(self.gated),
            "use_bias": int(self.use_bias),
            "output_bias": int(self.use_bias and not self.down_bias),
            "shared_intermediate_dim": self.width_beside,
            "shared_gate": int(self.gate_beside),
            "rank": 0,
        }

    def get_config(self):
        return {
            **super().get_config(),
            "format": FORMAT,
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "down_bias": self.down_bias,
            "dropout": self.dropout,
            "remat": self.remat,
            "frozen_projections": self.frozen_projections,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "stream": self.stream,
            "quantization_configs": self.quantization_configs,
        }

    @property
    def quantization_configs(self):
        """Serialized, by role, where they are not the mode's defaults."""
        if not self.built:
            return {
                role: keras.saving.serialize_keras_object(config)
                for role, config in self._quantization_configs.items()
            }
        return quantization.own_configs(self.projections)

    def _kernel(self, name, role, units):
        first = {
            f"{role}_{part}": first_values.by_expert(
                initializer, f"{self.stream}{role}_{part}"
            )
            for part, initializer in (
                ("kernel", self.kernel_initializer),
                ("bias", self.bias_initializer),
            )
        }
        first |= self._first_values
        use_bias = self.use_bias and (self.down_bias or role != "down")
        return keras.layers.EinsumDense(
            "end,edf->enf",
            output_shape=(None, units),
            bias_axes="ef" if use_bias else None,
            kernel_initializer=first[f"{role}_kernel"],
            bias_initializer=first[f"{role}_bias"],
            trainable=self.trainable and role not in self._made_frozen,
            quantization_config=self._quantization_configs.get(role),
            dtype=self.dtype_policy,
            name=name,
        )


def _refuse_modes(model, mode, config, chosen):
    """Asked by Keras's `Model.quantize` before it changes a layer."""
    projections = [
        layer
        for experts in keras_internals.all_layers(model)
        if isinstance(experts, Experts) and experts.built
        for layer in experts.projections.values()
        if chosen(layer)
    ]
    quantization.check(mode, config, projections)


keras_internals.look_before_quantizing(_refuse_modes)

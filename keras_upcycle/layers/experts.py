"""The stacked feed-forward networks: `E` of them, one kernel each for all."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import backend, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers import activations, quantization
from keras_upcycle.routing import functional
from keras_upcycle.state import first_values
from keras_upcycle.types import Tensor

UP = "expert_up"
GATE = "expert_gate"
DOWN = "expert_down"
# Under which a file has what `Experts._sizes` says.
_SIZES = "sizes"
_FORMAT = "format"

# Of what files hold. 1: the linear kernel of a gated unit was called gate.
FORMAT = 2


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer from a config, if their names mean the same.

    Args:
        config: With a `"format"`; one without is of format 1.

    Raises:
        UpcycleError: For gated experts of format 1: kernels have the same
            names and shapes, and would be taken for each other.
    """
    arguments = dict(config)
    found = arguments.pop("format", 1)
    if found != FORMAT and arguments.get("gated"):
        raise _other_format(found)
    return arguments


def _other_format(found):
    return UpcycleError(
        f"Gated experts are read from files of format {FORMAT}, in which the "
        "activated kernel is called gate and the linear one up. Received: "
        f"format {found}, in which they are the other way round, so that they "
        "would be exchanged without a word. Convert the dense model again, or "
        "load the file with the version of keras_upcycle that wrote it. "
        f'(Settings written by hand say "format": {FORMAT}.)'
    )


@keras.saving.register_keras_serializable(package="keras_upcycle")
class Experts(quantization.FloatPolicy, keras.layers.Layer):
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
        # A file that was refused, and why.
        self._refused_file, self._refusal = None, ""
        # Of the network that stands beside this one and meets all tokens.
        self.width_beside = 0

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

    def apply_slots(self, slots: Tensor, training: Any = None) -> Tensor:
        """Expert `e` on `slots[e]`.

        Args:
            slots: `(E, N, D)`.
            training: Whether dropout drops.

        Returns:
            `(E, N, D)`.
        """
        if training or self._quantized:
            return self._feed_forward((slots,), training, _on_slots)[0]
        slots = ops.cast(slots, self.compute_dtype)
        return backend.infer_slots(slots, self._weights(), self.activation)

    def apply_groups(
        self,
        slots: Tensor,
        blocks: Tensor,
        owners: Tensor,
        used: Tensor,
        training: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Expert `e` on `slots[e]`, and expert `owners[n]` on `blocks[n]`.

        Args:
            slots: `(E, C, D)`; `C` may be 0.
            blocks: `(N, M, D)`; `N` may be 0.
            owners: int32 `(N,)`, ascending, each in `[0, E]`.
            used: int32 scalar. Blocks from there on are spare, of owner `E`,
                and what comes of them is not to be read.
            training: Whether dropout drops.

        Returns:
            `(E, C, D)` and `(N, M, D)`.
        """
        count = blocks.shape[0]
        few = isinstance(count, int) and count < self.num_experts
        if self._quantized and few and slots.shape[1] == 0:

            def on_blocks(layer, groups):
                return (_on_quantized(layer, *groups, owners),)

            (outputs,) = self._feed_forward((blocks,), training, on_blocks)
            return ops.zeros_like(slots), outputs
        remat = self.remat and training
        seeds = [self._dropout_seed(training, remat) for _ in range(2)]

        def compute(*groups):
            return backend.grouped_feed_forward(
                *groups,
                owners,
                used,
                self._weights(),
                self.activation,
                tuple(
                    self._kept(group, seed)
                    for group, seed in zip(groups, seeds, strict=True)
                ),
                bool(training),
            )

        if remat:
            compute = backend.remat(compute)
        return compute(
            ops.cast(slots, self.compute_dtype),
            ops.cast(blocks, self.compute_dtype),
        )

    @property
    def are_narrow(self) -> bool:
        """Whether `apply_as_one` serves: fewer hidden units than a token has.

        What all experts put out would then be larger than their hidden
        layers. int8 kernels are multiplied by their own layers, and an
        activation such as softmax is of one expert's hidden layer.
        """
        return (
            self.intermediate_dim < self._hidden_dim
            and not self._quantized
            and activations.is_known_elementwise(self.activation)
        )

    def apply_as_one(
        self, tokens: Tensor, weights: Tensor, training: Any = None
    ) -> Tensor:
        """Every expert on every token, as one network of `E * F` hidden units.

        A token's weights go into the hidden layer, so that outputs are added
        up by the product with all output kernels.

        Args:
            tokens: `(T, D)`.
            weights: float32 `(T, E)`.
            training: Whether dropout drops.

        Returns:
            `(T, D)`, the sum of all experts' outputs times their weights.
        """
        remat = self.remat and training
        seed = self._dropout_seed(training, remat)
        count, inner = self.num_experts, self.intermediate_dim

        def compute(tokens, weights):
            own = self._weights()
            width = tokens.shape[-1]

            def hidden(role):
                kernel = ops.transpose(own[f"{role}_kernel"], (1, 0, 2))
                kernel = ops.reshape(kernel, (width, count * inner))
                rows = backend.multiply(tokens, kernel)
                rows = ops.reshape(rows, (-1, count, inner))
                bias = own.get(f"{role}_bias")
                return rows if bias is None else rows + bias[:, 0]

            gate = hidden("gate") if self.gated else None
            rows = self._hidden(gate, hidden("up"), seed)
            # Products in float32, so that a weight is not rounded first.
            wide = ops.cast(rows, "float32") * ops.expand_dims(weights, -1)
            rows = ops.cast(wide, rows.dtype)
            outputs = backend.multiply(
                ops.reshape(rows, (-1, count * inner)),
                ops.reshape(own["down_kernel"], (count * inner, width)),
            )
            bias = own.get("down_bias")
            if bias is None:
                return outputs
            biases = ops.matmul(weights, ops.cast(bias[:, 0], "float32"))
            return outputs + ops.cast(biases, outputs.dtype)

        if remat:
            compute = backend.remat(compute)
        return compute(
            ops.cast(tokens, self.compute_dtype), ops.cast(weights, "float32")
        )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.built:
            store[_SIZES] = np.array(list(self._sizes().values()), "int64")
        # What a file of weights alone has no config to say.
        if self.gated:
            store[_FORMAT] = np.array(FORMAT, "int32")

    def load_own_variables(self, store):
        keys = list(store.keys())
        # Before the kernels are asked: of them Keras would say that a shape
        # differs, and nothing of what the file has and the layer has not.
        if self.built:
            sizes = store[_SIZES] if _SIZES in keys else None
            problem = _other_sizes(self, self._sizes(), sizes)
            if sizes is None and keras_internals.file_holds(store, DOWN):
                # Of before there were sizes: the kernels are asked. But a
                # gate's file would fill a plain network in silence.
                problem = None
                if keras_internals.file_holds(store, GATE):
                    problem = str(_other_format(1))
            if not problem and keys and self.gated and _FORMAT not in keys:
                problem = str(_other_format(1))
            again = self._refused_file and self._refused_file() is store
            if again and not keys:
                # Keras comes again to what was refused, by each attribute
                # that leads here, with nothing; the last error is what it
                # tells.
                problem = self._refusal
            if problem:
                self._refused_file = _reference(store)
                self._refusal = problem
                raise ValueError(problem)
        ours = (_SIZES, _FORMAT)
        super().load_own_variables({k: store[k] for k in keys if k not in ours})

    @classmethod
    def from_config(cls, config):
        return super().from_config(read_settings(config))

    def _sizes(self) -> dict[str, int]:
        """What weights must agree in to be loaded, in a file's order."""
        return {
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "hidden_dim": self._hidden_dim,
            "gated": int(self.gated),
            "use_bias": int(self.use_bias),
            "output_bias": int(self.use_bias and not self.down_bias),
            "shared_intermediate_dim": self.width_beside,
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

    def _feed_forward(self, groups, training, apply):
        """The network on each array of rows.

        `apply(kernel, groups)` multiplies all of them.
        """
        remat = self.remat and training
        seeds = [self._dropout_seed(training, remat) for _ in groups]

        def compute(*groups):
            gates = [None] * len(groups)
            if self.gated:
                gates = apply(self.expert_gate, groups)
            ups = apply(self.expert_up, groups)
            hidden = [
                self._hidden(*each)
                for each in zip(gates, ups, seeds, strict=True)
            ]
            return apply(self.expert_down, hidden)

        if remat:
            compute = backend.remat(compute)
        return compute(*(ops.cast(g, self.compute_dtype) for g in groups))

    def _hidden(self, gate, up, seed):
        """The hidden layer from what leads to it.

        `gate` and `seed` are `None` where nothing gates or drops.
        """
        if gate is None:
            rows = self.activation(up)
        else:
            rows = self.activation(gate) * up
        if seed is None:
            return rows
        return keras.random.dropout(rows, self.dropout, seed=seed)

    @property
    def _quantized(self):
        return any(
            layer.quantization_mode is not None
            for layer in self.projections.values()
        )

    def _weights(self):
        """All kernels and biases by name, in the dtype of the arithmetic.

        int8 kernels as floats.
        """
        found = {}
        for role, layer in self.projections.items():
            if layer.quantization_mode is None:
                kernel = layer.kernel
            else:
                kernel = keras_internals.rows_of_quantized(
                    layer, ops.arange(self.num_experts, dtype="int32")
                )
            found[f"{role}_kernel"] = kernel
            if layer.bias is not None:
                found[f"{role}_bias"] = layer.bias
        return {n: ops.cast(w, self.compute_dtype) for n, w in found.items()}

    def _dropout_seed(self, training, remat):
        """What the hidden dropout draws from; `None` where none drops.

        What is computed twice must drop the same, and a seed's state must not
        change inside a rematerialised function, which JAX forbids: the seed is
        drawn here then.
        """
        if not self.dropout or not training:
            return None
        generator = self.hidden_dropout.seed_generator
        return keras_internals.DrawnSeed(generator) if remat else generator

    def _kept(self, rows, seed):
        """The factors of the hidden dropout, of the shape of its layer."""
        if seed is None:
            return None
        shape = (*ops.shape(rows)[:2], self.intermediate_dim)
        ones = ops.ones(shape, self.compute_dtype)
        return keras.random.dropout(ones, self.dropout, seed=seed)

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


def _reference(store):
    """A weak reference; `None` where there is none, as to a `dict`."""
    try:
        return weakref.ref(store)
    except TypeError:
        return None


def _other_sizes(layer, expected, received):
    """Why weights of these sizes are another mixture's, or `None`."""
    received = () if received is None else np.asarray(received).tolist()
    if len(received) != len(expected):
        return (
            "Weights of a mixture must come from a mixture, saved by this "
            f"version. Received: a file that holds none for {layer.path!r}, a "
            f"mixture of {_experts(layer.num_experts)}. Of a dense model's "
            "weights `upcycle_model` makes a mixture: load them into the dense "
            "model first."
        )
    if received == list(expected.values()):
        return None
    both = {
        name: (here, there)
        for (name, here), there in zip(expected.items(), received, strict=True)
        if here != there
    }
    differ = ", ".join(
        f"{name}={_shown(name, there)} in the file and "
        f"{name}={_shown(name, here)} in the layer"
        for name, (here, there) in both.items()
    )
    remedy = (
        "Make the model as the saved one was made, with these arguments, and "
        "load into that."
    )
    if "num_experts" in both:
        remedy += " `prune_experts` then makes one of fewer experts."
    return (
        "Weights must come from a mixture of the same sizes. Received: weights "
        f"of {_experts(received[0])} for {layer.path!r}, a mixture of "
        f"{_experts(layer.num_experts)}: {differ}. {remedy}"
    )


def _experts(count):
    return f"{count} expert" if count == 1 else f"{count} experts"


def _shown(name, value):
    if name in ("gated", "use_bias", "output_bias"):
        return bool(value)
    return value or None


def _on_slots(layer, groups):
    """One stacked `EinsumDense` on slots, expert by expert.

    The layer's own call serves quantized kernels; for floats it is an einsum,
    which TensorFlow runs a little slower than the same product.
    """
    (slots,) = groups
    if layer.quantization_mode is not None:
        return (layer(slots),)
    outputs = backend.multiply(slots, ops.cast(layer.kernel, slots.dtype))
    return (_add_bias(layer, outputs),)


def _on_quantized(layer, blocks, owners):
    """One stacked int8 layer on blocks, whose owners' kernels become floats."""
    outputs = ops.matmul(
        blocks, keras_internals.rows_of_quantized(layer, owners)
    )
    if layer.bias is None:
        return outputs
    # A product, not `take`, whose gradient would be sparse on TensorFlow.
    owned = functional.membership(owners, layer.bias.shape[0], outputs.dtype)
    bias = ops.matmul(owned, ops.cast(layer.bias[:, 0], outputs.dtype))
    return outputs + ops.expand_dims(bias, 1)


def _add_bias(layer, outputs):
    if layer.bias is None:
        return outputs
    return outputs + ops.cast(layer.bias, outputs.dtype)


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

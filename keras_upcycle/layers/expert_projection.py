"""One projection of an attention layer, once for each of its experts."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.layers.call_context import attention_expert
from keras_upcycle.state import first_values

# Before a role ("query", "key", "value", "output"). Optimizers that look at a
# whole weight tell stacks of experts by it.
PREFIX = "expert_attention_"


@keras.saving.register_keras_serializable(package="keras_upcycle")
class ExpertProjection(keras.layers.Layer):
    """What a `Dense` or `EinsumDense` does, with the current expert's weights.

    Which expert that is the attention layer around it says
    (`call_context.expert_of_attention`).

    Args:
        num_experts: Integer, at least 1.
        kernel_shape: List of integers, of one expert's kernel.
        equation: String, an `EinsumDense`'s; `None` (default) for a `Dense`.
        bias_shape: List of integers, of one expert's bias. Defaults to `None`:
            no bias.
        activation: As of the layer that it stands for. Defaults to `None`.
        stands_for: String, the name of that layer. Defaults to `""`.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Example:
        >>> from keras_upcycle.layers.call_context import expert_of_attention
        >>> layer = ExpertProjection(4, (8, 6))
        >>> with expert_of_attention(2):
        ...     tuple(layer(keras.ops.ones((1, 5, 8))).shape)
        (1, 5, 6)
    """

    def __init__(
        self,
        num_experts,
        kernel_shape,
        equation=None,
        bias_shape=None,
        activation=None,
        stands_for="",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = checks.check_count("num_experts", num_experts)
        self.kernel_shape = tuple(kernel_shape)
        self.equation = equation
        self.bias_shape = None if bias_shape is None else tuple(bias_shape)
        self.activation = keras.activations.get(activation)
        self.stands_for = stands_for
        self.kernel = self.bias = None
        self._starts: dict[str, Callable[..., Any]] = {}

    @classmethod
    def copies_of(
        cls, projection: Any, num_experts: int, role: str
    ) -> "ExpertProjection":
        """Unbuilt: experts that start as a built layer's weights.

        Args:
            projection: A `Dense` or `EinsumDense`. It is not held.
            num_experts: How many.
            role: `"query"`, `"key"`, `"value"` or `"output"`.
        """
        bias = projection.bias
        made = cls(
            num_experts,
            projection.kernel.shape,
            equation=getattr(projection, "equation", None),
            bias_shape=None if bias is None else bias.shape,
            activation=projection.activation,
            stands_for=projection.name,
            dtype=projection.dtype_policy,
            name=PREFIX + role,
        )
        starts = {
            "kernel": _copies(projection.kernel, projection.kernel_initializer)
        }
        if bias is not None:
            starts["bias"] = _copies(bias, projection.bias_initializer)
        made.start_with(starts)
        return made

    def start_with(self, starts: dict[str, Callable[..., Any]]) -> None:
        """Says by initializers what weights hold when they are built."""
        self._starts = starts

    def build(self, input_shape):
        del input_shape
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_experts, *self.kernel_shape),
            initializer=self._starts.get("kernel", "glorot_uniform"),
        )
        if self.bias_shape is not None:
            own = self.bias_shape
            # As experts' biases are: a row, so that it has factors in
            # Adafactor as a matrix has, and one's own.
            shape = (1, *own) if len(own) == 1 else own
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts, *shape),
                initializer=self._starts.get("bias", "zeros"),
            )
        self._starts = {}  # the dense layer is let go
        self.built = True

    def start_from(self, projections: Sequence[Any]) -> None:
        """Writes the weights of one built layer for each expert."""
        for name in ("kernel", "bias"):
            variable = getattr(self, name)
            if variable is not None:
                values = [
                    ops.reshape(
                        ops.cast(getattr(one, name).value, variable.dtype),
                        variable.shape[1:],
                    )
                    for one in projections
                ]
                variable.assign(ops.stack(values))

    def call(self, inputs, training=None):
        expert = attention_expert()
        if expert is None:
            raise ValueError(
                "A projection of attention's experts must be called by its "
                f"attention layer. Received: a call of {self.path!r} alone, "
                "which says no expert. Call the attention layer."
            )
        kernel = self.kernel[expert]
        if self.equation is None:
            outputs = ops.matmul(inputs, kernel)
        else:
            outputs = ops.einsum(self.equation, inputs, kernel)
        if self.bias is not None:
            bias = ops.reshape(self.bias[expert], self.bias_shape)
            outputs = ops.add(outputs, bias)
        return self.activation(outputs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # A second run, in the backward pass, would know of no expert.
        return layer_call

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "kernel_shape": list(self.kernel_shape),
            "equation": self.equation,
            "bias_shape": self.bias_shape and list(self.bias_shape),
            "activation": keras.activations.serialize(self.activation),
            "stands_for": self.stands_for,
        }


def _copies(variable, initializer):
    """A first value: the variable's for every expert."""
    shape_of_one = tuple(variable.shape)

    def value(shape, dtype=None):
        if keras_internals.has_value(variable):
            one = ops.cast(ops.copy(variable.value), dtype)
        else:  # a model of which only the shapes are wanted yet
            one = initializer(shape_of_one, dtype)
        flat = ops.reshape(one, (1, -1))
        return ops.reshape(ops.tile(flat, (shape[0], 1)), shape)

    return first_values.laid_out(value)

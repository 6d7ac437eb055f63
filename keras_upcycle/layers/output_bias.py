"""The one bias of experts that are slices: added once, whoever runs.

A slice of a dense block's hidden layer brings a part of its output, but the
output bias has no parts. Inside experts it would be counted as often as slices
run, each time with a weight.
"""

import keras
from keras import ops

from keras_upcycle.state import first_values


@keras.saving.register_keras_serializable(package="keras_upcycle")
class OutputBias(keras.layers.Layer):
    """Adds a trained vector to every real token.

    Args:
        bias_initializer: Initializer of the vector. Defaults to `"zeros"`.
        **kwargs: Of `keras.layers.Layer`, such as `name` and `dtype`.

    Input shape:
        `(..., D)`; optionally a mask `(...)`, `True` at real tokens.

    Output shape:
        `(..., D)`: 0 is added at padding.

    Example:
        >>> layer = OutputBias("ones")
        >>> float(keras.ops.sum(layer(keras.ops.zeros((2, 3)))))
        6.0
    """

    def __init__(self, bias_initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.supports_masking = True
        self._first_value = None

    def start_from(self, value) -> None:
        """Says what the vector holds when it is built.

        Args:
            value: A function `(shape, dtype) -> tensor`, as an initializer
                is; `None` for the initializer itself.

        Raises:
            RuntimeError: If the layer is built already.
        """
        if self.built:
            raise RuntimeError(
                "`start_from` must be called before the layer is built. "
                f"Received: layer {self.name!r}, built. Assign to its `bias` "
                "instead."
            )
        if value is not None:
            value = first_values.laid_out(value)
        self._first_value = value

    def build(self, input_shape):
        self.bias = self.add_weight(
            name="bias",
            shape=(input_shape[-1],),
            initializer=self._first_value or self.bias_initializer,
        )
        self._first_value = None  # the donor's arrays are let go

    def call(self, inputs, mask=None):
        bias = ops.cast(self.bias, inputs.dtype)
        if mask is not None:
            real = ops.cast(ops.expand_dims(mask, -1), inputs.dtype)
            bias = real * bias
        return inputs + bias

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
        }

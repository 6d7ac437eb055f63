"""What stands in a sparse block where the dense one had a layer."""

import keras
from keras import ops

from keras_upcycle.layers.call_context import take_held


class PassOn(keras.layers.Layer):
    """Hands on what it gets, where a sparse block needs no layer any more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.built = True  # nobody calls `build`, and `quantize` asks

    def call(self, inputs, training=None):
        return inputs

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)


class Flattened(PassOn):
    """Hands on tokens as experts that stand beside their router get them."""

    def call(self, inputs, training=None):
        return ops.reshape(inputs, (-1, inputs.shape[-1]))

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor((None, inputs.shape[-1]), dtype=inputs.dtype)


class HeldOutput(PassOn):
    """At a block's last projection: what its MoE layer held back."""

    def call(self, inputs, training=None):
        return take_held()

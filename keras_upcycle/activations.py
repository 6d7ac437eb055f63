"""Activations that experts need and Keras does not have."""

from typing import Any

import keras
from keras import ops

from keras_upcycle.types import Tensor


@keras.saving.register_keras_serializable(package="keras_upcycle")
class Float32Activation:
    """An activation that is computed in float32 whatever comes in.

    Under `mixed_bfloat16` KerasHub's Llama, Mistral, Qwen and Phi-3 blocks
    cast the gate to float32, activate it and cast it back; experts that
    activate in bfloat16 would round where the dense block does not. Give it
    as `activation` of a `FeedForwardSite` or a `MoEFeedForward`. T5 activates
    in the dtype of its block, as experts do by themselves.

    Args:
        activation: As Keras takes it: a name, a function or a config.

    Example:
        >>> silu = Float32Activation("silu")
        >>> x = keras.ops.ones((2,), "bfloat16")
        >>> keras.backend.standardize_dtype(silu(x).dtype)
        'bfloat16'
    """

    def __init__(self, activation: Any):
        self.activation = keras.activations.get(activation)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.cast(self.activation(ops.cast(x, "float32")), x.dtype)

    # Equal ones are one to a compiler, and to who compares two models.
    def __eq__(self, other):
        same = type(other) is type(self)
        return same and other.activation == self.activation

    def __hash__(self):
        return hash((type(self), self.activation))

    def __repr__(self):
        name = getattr(self.activation, "__name__", repr(self.activation))
        return f"{type(self).__name__}({name!r})"

    def get_config(self) -> dict[str, Any]:
        return {"activation": keras.activations.serialize(self.activation)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Float32Activation":
        return cls(**config)

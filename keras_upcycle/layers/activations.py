"""Activations that experts need, and what may be done with any."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.types import Tensor

_STOCK = {
    id(value): name
    for name, value in vars(keras.activations).items()
    if callable(value) and not isinstance(value, type)
}
# Of Keras's, computed over the whole hidden layer; the others give each number
# by itself.
_WHOLE = ("softmax", "log_softmax", "sparsemax", "glu")


@keras.saving.register_keras_serializable(package="keras_upcycle")
class Float32Activation:
    """An activation that is computed in float32 whatever comes in.

    Under `mixed_bfloat16` KerasHub's Llama, Mistral, Qwen and Phi-3 blocks
    cast the gate to float32, activate it and cast it back; experts that
    activate in bfloat16 would round where the dense block does not. Give it
    as `activation` of a `FeedForwardSite` or a `MoEFeedForward`. T5 activates
    in the dtype of its block, as experts do by themselves.

    Args:
        activation: String, callable or config: an activation as Keras takes it.

    Raises:
        TypeError, ValueError: If it is none.

    Example:
        >>> silu = Float32Activation("silu")
        >>> x = keras.ops.ones((2,), "bfloat16")
        >>> keras.backend.standardize_dtype(silu(x).dtype)
        'bfloat16'
    """

    def __init__(self, activation: Any):
        self.activation = activation_of(activation)

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


@keras.saving.register_keras_serializable(package="keras_upcycle")
class ActivationWith:
    """One of Keras's activations, with settings that are not its defaults.

    Args:
        name: String, of a function in `keras.activations`.
        **settings: Keyword arguments of the function, numbers or `None`.

    Example:
        >>> leaky = ActivationWith("leaky_relu", negative_slope=0.3)
        >>> float(leaky(keras.ops.convert_to_tensor(-10.0)))
        -3.0
    """

    def __init__(self, name: str, **settings: Any):
        self.name = name
        self.settings = settings

    def __call__(self, x: Tensor) -> Tensor:
        return getattr(keras.activations, self.name)(x, **self.settings)

    # Equal ones are one to a compiler, and to who compares two models.
    def __eq__(self, other):
        return (
            type(other) is type(self)
            and other.get_config() == self.get_config()
        )

    def __hash__(self):
        return hash((self.name, *sorted(self.settings)))

    def __repr__(self):
        settings = "".join(f", {k}={v!r}" for k, v in self.settings.items())
        return f"{type(self).__name__}({self.name!r}{settings})"

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ActivationWith":
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_upcycle")
class ClippedSwiGLU:
    """How gate and up meet in gpt-oss: both clipped, and one added.

    `(clip(up, -limit, limit) + 1) * swish(min(gate, limit))`, where
    `swish(x) = x * sigmoid(alpha * x)`. Without a gate it is `swish` alone.

    References: gpt-oss model card (arXiv 2508.10925), section 2.2.

    Args:
        alpha: Float. Defaults to 1.702.
        limit: Float, above 0. Defaults to 7.

    Example:
        >>> swiglu = ClippedSwiGLU()
        >>> float(swiglu.gated(keras.ops.array(0.0), keras.ops.array(9.0)))
        0.0
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0):
        self.alpha = float(alpha)
        self.limit = float(limit)

    def __call__(self, x: Tensor) -> Tensor:
        x = ops.minimum(x, ops.cast(self.limit, x.dtype))
        return x * ops.sigmoid(self.alpha * x)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return (ops.clip(up, -self.limit, self.limit) + 1) * self(gate)

    # Equal ones are one to a compiler, and to who compares two models.
    def __eq__(self, other):
        same = type(other) is type(self)
        return same and other.get_config() == self.get_config()

    def __hash__(self):
        return hash((type(self), self.alpha, self.limit))

    def __repr__(self):
        return f"ClippedSwiGLU(alpha={self.alpha}, limit={self.limit})"

    def get_config(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "limit": self.limit}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ClippedSwiGLU":
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_upcycle")
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh form, as Gemma and GPT-2 have it (arXiv 1606.08415)."""
    return keras.activations.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="keras_upcycle")
def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, as CLIP has it (arXiv 1606.08415, section 2)."""
    return x * ops.sigmoid(1.702 * x)


@keras.saving.register_keras_serializable(package="keras_upcycle")
def relu_squared(x: Tensor) -> Tensor:
    """`relu(x) ** 2`, as RWKV has it (Primer, arXiv 2109.08668)."""
    return ops.square(ops.relu(x))


_OURS = (gelu_tanh, quick_gelu, relu_squared)


def is_stock(activation: Any) -> bool:
    """Whether it is a function of Keras's, or `None`, which does nothing."""
    return activation is None or id(activation) in _STOCK


def is_known_elementwise(activation: Any) -> bool:
    """Whether it is one of Keras's that give each number by itself.

    Hidden layers of several networks may then be activated as one.

    Args:
        activation: A function.
    """
    if isinstance(activation, Float32Activation):
        return is_known_elementwise(activation.activation)
    if activation in _OURS or isinstance(activation, ClippedSwiGLU):
        return True
    if isinstance(activation, ActivationWith):
        return activation.name not in _WHOLE
    return is_stock(activation) and _STOCK.get(id(activation)) not in _WHOLE


def is_elementwise(activation: Any) -> bool:
    """Whether hidden units may be parted: by name, or by trying it.

    Args:
        activation: As Keras takes it.

    Example:
        >>> is_elementwise("relu"), is_elementwise("softmax")
        (True, False)
        >>> is_elementwise(lambda x: x / (1 + ops.mean(x**2, -1, True)))
        False
    """
    activation = keras.activations.get(activation)
    if is_known_elementwise(activation):
        return True
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    try:
        whole, part = (
            ops.convert_to_numpy(activation(ops.convert_to_tensor(values)))
            for values in (x, x[:, ::2])
        )
    except Exception:  # anybody's function: it may know its width
        return False
    return whole.shape == x.shape and np.allclose(
        whole[:, ::2], part, 1e-4, 1e-5
    )


def activation_of(value: Any) -> Any:
    """An activation as Keras takes it, made a function.

    Raises:
        TypeError: For a class, which Keras would call on tensors.
        ValueError: If Keras knows none of that name.
    """
    checks.check_no_class("activation", value, "function")
    return checks.check_known(
        "activation", value, keras.activations.get, "an activation"
    )

"""What may stand between two projections: activations, a dropout, a product.

As layers, and as calls of `keras.ops` and `keras.activations` in the graph.
"""

import re

import keras

from keras_upcycle.families import plain_layers
from keras_upcycle.layers.activations import ActivationWith, gelu_tanh

_DROPS = "while experts drop single values, as a Dropout does"
_OTHER_NOISE = "which is noise of another kind than a Dropout's"
# What is said of layers between the two that only look like known ones.
_BETWEEN = {
    keras.layers.SpatialDropout1D: f"which drops whole channels, {_DROPS}",
    keras.layers.SpatialDropout2D: f"which drops whole channels, {_DROPS}",
    keras.layers.SpatialDropout3D: f"which drops whole channels, {_DROPS}",
    keras.layers.GaussianDropout: _OTHER_NOISE,
    keras.layers.GaussianNoise: _OTHER_NOISE,
    keras.layers.AlphaDropout: _OTHER_NOISE,
    keras.layers.Softmax: (
        "which normalises over the hidden layer, so that its units are not "
        "each by itself. Give the Dense a function that takes each number by "
        "itself: `activation=`"
    ),
    keras.layers.PReLU: (
        "an activation with weights of its own, which experts do not have. "
        "Use a LeakyReLU with a fixed slope"
    ),
}
# Operations of `keras.ops` that are functions of `keras.activations`.
_OPERATIONS = (
    *("Relu", "Relu6", "Sigmoid", "Silu", "Softplus", "Softsign", "Tanh"),
    *("HardSigmoid", "HardSilu", "HardTanh", "LogSigmoid", "Selu"),
    *("SoftShrink", "TanhShrink", "Squareplus", "SparsePlus", "Exponential"),
)
_ITS_OWN = {"LeakyRelu": "negative_slope", "Elu": "alpha", "Celu": "alpha"}


def is_dropout(layer) -> bool:
    """Whether it is a `Dropout` itself."""
    return type(layer) is keras.layers.Dropout


def is_linear(activation) -> bool:
    """Whether an activation does nothing."""
    return activation is None or activation is keras.activations.linear


def is_product(operation) -> bool:
    """Whether it multiplies two tensors, as the layer or as `a * b` does."""
    if type(operation) is keras.layers.Multiply:
        return True
    return _is_operation(operation) and type(operation).__name__ == "Multiply"


def function_of(operation):
    """The function that an activation in the graph applies, or `None`."""
    if _is_operation(operation):
        return _of_operation(operation)
    if type(operation) is keras.layers.Activation:
        return operation.activation
    if type(operation) is keras.layers.ReLU:
        settings = {
            "negative_slope": float(operation.negative_slope),
            "max_value": operation.max_value,
            "threshold": float(operation.threshold),
        }
        if settings == {
            "negative_slope": 0.0,
            "max_value": None,
            "threshold": 0.0,
        }:
            return keras.activations.relu
        return ActivationWith("relu", **settings)
    if type(operation) is keras.layers.LeakyReLU:
        slope = float(operation.negative_slope)
        return ActivationWith("leaky_relu", negative_slope=slope)
    if type(operation) is keras.layers.ELU:
        return ActivationWith("elu", alpha=float(operation.alpha))
    return None


def why_not_between(layer) -> str | None:
    """Why experts could not do what stands between two projections does."""
    if is_dropout(layer) or function_of(layer) is not None:
        return None
    if not isinstance(layer, keras.Layer):
        return (
            "which is an operation, neither a Dense, an activation nor a "
            "Dropout. An activation can be given to the Dense: `activation=`"
        )
    for kind, reason in _BETWEEN.items():
        if type(layer) is kind:
            return reason
    for kind in (
        keras.layers.Dense,
        keras.layers.Dropout,
        keras.layers.Activation,
        keras.layers.ReLU,
    ):
        if isinstance(layer, kind):
            return f"which {plain_layers.not_exactly(layer, kind)}"
    return "which is neither a Dense, an activation nor a Dropout"


def _is_operation(operation):
    return not isinstance(operation, keras.Layer) and type(
        operation
    ).__module__.startswith("keras.src.ops.")


def _of_operation(operation):
    name = type(operation).__name__
    if name == "Gelu":
        return gelu_tanh if operation.approximate else keras.activations.gelu
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if name in _ITS_OWN:
        setting = _ITS_OWN[name]
        value = float(getattr(operation, setting))
        return ActivationWith(snake, **{setting: value})
    if name not in _OPERATIONS:
        return None
    return getattr(keras.activations, snake, None)

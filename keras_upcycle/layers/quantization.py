"""Which quantization modes experts have, said before a layer is changed.

Keras changes a model layer by layer, in an order of its own: what one layer
refuses comes after others were changed. So a whole model is looked at first
(`keras_internals.look_before_quantizing`), and a layer as a whole.
"""

from collections.abc import Iterable
from typing import Any

import keras

# Keras's `EinsumDense` takes a stack of kernels in int8 alone: its int4 would
# mix the scales of experts, its float8 counts on every kernel being called
# once a step, and GPTQ and AWQ take three axes for a matrix of heads.
MODES = ("int8",)


def check_policy(policy: Any, name: str) -> None:
    """Raises `ValueError` for a dtype policy of integers.

    One that quantizes a whole layer, too: Keras would build kernels of zeros
    under it, for a file to fill, and neither a dropout nor a router has a
    quantized form.

    Args:
        policy: The layer's. A map that names sub-layers, as files hold it,
            has a float default, and passes.
        name: Of the layer, for the message.
    """
    floats = keras.backend.is_float_dtype(policy.compute_dtype)
    if policy.quantization_mode is None and floats:
        return
    raise ValueError(
        "`dtype` must be a float policy, such as 'float32' or "
        f"'mixed_bfloat16'. Received: dtype={policy.name!r} for layer "
        f"{name!r}. Build the layer in floats, load or train its weights, and "
        f'then call `quantize("{MODES[0]}")` on the model.'
    )


class FloatPolicy:
    """A mixin for layers that `check_policy` holds for, later on too."""

    @property
    def dtype_policy(self):
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, value):
        check_policy(keras.dtype_policies.get(value), self.name)
        super(FloatPolicy, type(self)).dtype_policy.fset(self, value)


def check(mode: str, config: Any, projections: Iterable[keras.Layer]) -> None:
    """Raises `ValueError` unless these kernels of experts can take the mode.

    Args:
        mode: As Keras's `quantize` resolved it.
        config: The `QuantizationConfig` that belongs to it.
        projections: Stacked layers of experts that are to be quantized.
    """
    projections = list(projections)
    paths = [layer.path for layer in projections]
    if not paths:
        return
    shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    spared = (
        "leave the experts as they are by `filters=lambda layer: not "
        'layer.name.startswith("expert_")`'
    )
    if mode not in MODES:
        raise ValueError(
            f"The kernels of experts can be quantized in mode {MODES[0]!r} "
            f"only. Received: mode={mode!r} for {shown}. Nothing was changed. "
            f'Call `quantize("{MODES[0]}")`, or {spared}.'
        )
    for layer in projections:
        if layer.quantization_mode is not None:
            raise ValueError(
                "A kernel can be quantized once. Received: mode="
                f"{mode!r} for {layer.path}, which has mode "
                f"{layer.quantization_mode!r}. Nothing was changed. Name the "
                "layers that are left by `filters`."
            )
    if getattr(config, "weight_quantizer", None) is not None:
        raise ValueError(
            "The kernels of experts are stacked, (experts, inputs, outputs), "
            "and are quantized with a scale for each expert and output. "
            f"Received: weight_quantizer={config.weight_quantizer!r} for "
            f"{shown}. Nothing was changed. Leave `weight_quantizer` out of "
            f"the config, or {spared}."
        )


def config_of(value: Any) -> Any:
    """A `QuantizationConfig`, given as one or as a file holds it."""
    if isinstance(value, keras.quantizers.QuantizationConfig):
        return value
    return keras.saving.deserialize_keras_object(value)


def own_configs(projections: dict[str, keras.Layer]) -> dict[str, Any]:
    """Settings of quantized layers that no dtype policy tells a file.

    Args:
        projections: From a role to its stacked layer.

    Returns:
        From a role to its serialized `QuantizationConfig`, where that is not
        the mode's default.
    """
    found = {}
    for role, layer in projections.items():
        config = layer.quantization_config
        if layer.quantization_mode is None or config is None:
            continue
        if config.get_config() != type(config)().get_config():
            found[role] = keras.saving.serialize_keras_object(config)
    return found

"""The networks of a MoE layer: experts, and the one that every token meets."""

import functools
from typing import Any

import keras
from keras import ops

from keras_upcycle.layers import moe_settings
from keras_upcycle.layers.expert_init import SHARED
from keras_upcycle.layers.experts import Experts
from keras_upcycle.layers.low_rank import LowRankNetworks
from keras_upcycle.types import Tensor


def made(
    layer: keras.Layer,
    shared_gate: bool,
    quantization_configs: Any,
    **settings: Any,
) -> tuple[Experts, Experts | None, keras.Layer | None]:
    """A MoE layer's networks, unbuilt.

    Args:
        layer: A `MoEFeedForward`, whose own settings are read.
        shared_gate: Whether the shared network has a gate.
        quantization_configs: Of the layer.
        **settings: Further ones of `Experts`.

    Returns:
        The experts; the shared network and its gate, `None` where there is
        none.
    """
    networks = functools.partial(
        Experts,
        activation=layer.activation,
        gated=layer.gated,
        use_bias=layer.use_bias,
        dropout=layer.dropout,
        dtype=layer.dtype_policy,
        **settings,
    )
    routed: Any = networks
    if layer.low_rank is not None:
        routed = functools.partial(
            LowRankNetworks,
            rank=layer.low_rank,
            alpha=layer.low_rank_alpha,
            **networks.keywords,
        )
    experts = routed(
        num_experts=layer.num_experts,
        intermediate_dim=layer.intermediate_dim,
        quantization_configs=moe_settings.of_experts(quantization_configs),
        name="experts",
    )
    width = layer.shared_intermediate_dim
    if width is None:
        return experts, None, None
    shared = networks(
        num_experts=1,
        intermediate_dim=width,
        stream=SHARED,
        quantization_configs=moe_settings.of_shared(quantization_configs),
        name="shared",
    )
    experts.width_beside, experts.gate_beside = width, shared_gate
    if not shared_gate:
        return experts, shared, None
    gate = keras.layers.Dense(
        1,
        activation="sigmoid",
        use_bias=False,
        trainable=settings["trainable"],
        dtype=layer.dtype_policy,
        name="shared_gate",
    )
    return experts, shared, gate


def from_shared(
    layer: Any, tokens: Tensor, mask: Tensor | None, training: Any
) -> Tensor:
    """What a MoE layer's shared network gives; 0 at padding.

    Args:
        layer: The layer.
        tokens: `(G, S, D)`.
        mask: Bool `(G, S)`, or `None`.
        training: Whether dropout drops.

    Returns:
        `(G, S, D)`.
    """
    shape = ops.shape(tokens)
    flat = ops.reshape(tokens, (1, shape[0] * shape[1], shape[2]))
    outputs = layer.shared.apply_slots(flat, training)
    if layer.shared_gate is not None:
        outputs = outputs * layer.shared_gate(flat)
    outputs = ops.reshape(outputs, shape)
    if mask is None:
        return outputs
    return ops.where(ops.expand_dims(mask, -1), outputs, 0.0)

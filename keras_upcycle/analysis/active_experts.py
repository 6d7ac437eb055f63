"""How many experts a token meets, counted."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import tables
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.call_context import record_heads
from keras_upcycle.layers.moe_layers import (
    calls_of,
    check_reached,
    named_routing_layers,
)
from keras_upcycle.layers.routed_heads import RoutedHeads
from keras_upcycle.routing import functional


@dataclass(frozen=True)
class LayerActivity:
    """What the tokens of one MoE layer met.

    Attributes:
        name: Of the block, as in a `RouterReading`.
        num_experts: `E`.
        tokens: Real tokens that were counted.
        experts_per_token: Experts that processed a token, on average.
        expert_parameters: Of one expert.
    """

    name: str
    num_experts: int
    tokens: int
    experts_per_token: float
    expert_parameters: int

    @property
    def expert_share(self) -> float:
        """Share of the experts that processed a token, on average."""
        return self.experts_per_token / self.num_experts


@dataclass(frozen=True)
class ActiveExpertsReport:
    """What `measure_active_experts` counted. Print it.

    Attributes:
        parameters: Of the model.
        layers: A `LayerActivity` for each MoE layer, inputs first.

    Example:
        >>> layer = LayerActivity(
        ...     "moe", num_experts=4, tokens=12, experts_per_token=2.0,
        ...     expert_parameters=280,
        ... )
        >>> report = ActiveExpertsReport(1152, (layer,))
        >>> report.active_parameters, report.expert_share
        (592, 0.5)
    """

    parameters: int
    layers: tuple[LayerActivity, ...]

    @property
    def expert_share(self) -> float:
        """Share of the experts' parameters that a token met, on average."""
        owned = [a.num_experts * a.expert_parameters for a in self.layers]
        shares = [a.expert_share for a in self.layers]
        return float(np.average(shares, weights=owned))

    @property
    def active_parameters(self) -> int:
        """Parameters of the model that a token met, on average."""
        idle = sum(
            (a.num_experts - a.experts_per_token) * a.expert_parameters
            for a in self.layers
        )
        return round(self.parameters - idle)

    @property
    def active_share(self) -> float:
        """The same as a share of all parameters."""
        return self.active_parameters / self.parameters

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.experts_per_token:.2f} of {layer.num_experts}",
                f"{layer.expert_share:.1%}",
            )
            for layer in self.layers
        ]
        table = tables.text(("block", "experts for a token", "share"), rows)
        return (
            f"{self.active_parameters:,} of {self.parameters:,} parameters "
            f"are active for a token ({self.active_share:.1%}), "
            f"{self.expert_share:.1%} of those of experts.\n{table}"
        )


def measure_active_experts(
    model: keras.Model, inputs: Any
) -> ActiveExpertsReport:
    """Counts the experts that tokens meet at inference.

    With any router. Padding is not counted. Of routed heads (`RoutedHeads`) an
    expert's parameters are its part of the output projection alone, though
    its queries are left out with it.

    Args:
        model: A Keras model, sparse.
        inputs: Array, tensor or structure of them: a batch as the model is
            called on, after preprocessing; or a list or iterator of batches.
            They run eagerly, at inference.

    Returns:
        An `ActiveExpertsReport`.

    Raises:
        TypeError: If `model` is no Keras layer.
        UpcycleError: If the model holds no MoE layer and no routed heads.
        ValueError: If no real token reaches one of its MoE layers.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16, name="moe"),
        ... ])
        >>> print(measure_active_experts(model, keras.ops.ones((2, 6, 8))))
        592 of 1,152 parameters are active for a token (51.4%), 50.0% of ...
        ...
    """
    named = named_routing_layers(model)
    met = dict.fromkeys(named.values(), 0.0)
    seen = dict.fromkeys(met, 0)

    def tensors(batch):
        return keras.tree.map_structure(ops.convert_to_tensor, batch)

    with record_heads() as of_heads:
        for call in calls_of(model, inputs, tensors):
            counts, real = _counts(call)
            met[call.layer] += counts
            seen[call.layer] += real
    for call in of_heads:
        counts, real = _counts_of_heads(call)
        met[call.layer] += counts
        seen[call.layer] += real
    check_reached(named, {layer for layer, count in seen.items() if count})
    return ActiveExpertsReport(
        parameters=model.count_params(),
        layers=tuple(
            LayerActivity(
                name=name,
                num_experts=layer.num_experts,
                tokens=seen[layer],
                experts_per_token=met[layer] / seen[layer],
                expert_parameters=_kernels(layer) // layer.num_experts,
            )
            for name, layer in named.items()
        ),
    )


def _kernels(layer) -> int:
    """Parameters that a layer's experts share out among them."""
    if isinstance(layer, RoutedHeads):
        return math.prod(layer.projection.kernel.shape)
    if isinstance(layer, AttentionMixture):
        return layer.num_experts * layer.expert_params
    return layer.experts.count_params()


def _counts_of_heads(call) -> tuple[float, int]:
    factors = ops.convert_to_numpy(call.factors)
    real = np.ones(factors.shape[:2], bool)
    if call.mask is not None:
        real = ops.convert_to_numpy(call.mask).astype(bool)
    return float((factors[real] != 0).sum()), int(real.sum())


def _counts(call) -> tuple[float, int]:
    """Assignments of real tokens, and how many real tokens there are."""
    number = functional.experts_per_token(
        call.routing, call.length, call.layer.num_experts
    )
    real = call.num_tokens
    if call.mask is not None:
        real = int(ops.convert_to_numpy(call.mask).sum())
    # In double precision: float32 no longer counts beyond 2 ** 24.
    total = ops.convert_to_numpy(number).astype("float64").sum()
    return float(total), real

"""What a step of training keeps of a token, besides weights and gradients."""

import math

import keras

from keras_upcycle import keras_internals
from keras_upcycle.conversion.counts import width_of
from keras_upcycle.conversion.plan import Plan

# What is kept of a slot besides its hidden layer: the token on its way to the
# expert and back, each before and after the exchange.
ON_THE_WAY = 4
# A normalisation that trains: the sum that goes in, and what comes out before
# and after its scale; what comes out before it is for the scale's gradient.
OF_A_NORM, OF_A_FROZEN_NORM = 3, 2


def kept_bytes(
    decided: Plan, model: keras.Model, dense_trains: bool = True
) -> float:
    """Bytes that the forward pass keeps of a token, and one block's gradients.

    Where experts and routers alone train, no gradient goes below the first
    MoE layer, and nothing of what is there is kept.

    Args:
        decided: The conversion.
        model: The dense model.
        dense_trains: Whether what is not converted trains.
    """
    every = keras_internals.all_layers(model)
    order = {id(layer): place for place, layer in enumerate(every)}
    reached = [
        max(order.get(id(layer), 0) for layer in block.site.layers)
        for block in decided.blocks
    ]
    below = -1 if dense_trains else min(reached, default=-1)
    found = sum(
        _of_dense(layer, dense_trains)
        for layer in every
        if order[id(layer)] > below
    )
    most = 0.0
    for block, place in zip(decided.blocks, reached, strict=True):
        site = block.site
        width = width_of(site.layers[0].compute_dtype)
        slots = block.router.average_slots_per_token(block.num_experts)
        layers = 3 if site.gated else 2
        hidden = layers * block.intermediate_dim
        found += slots * (hidden + ON_THE_WAY * site.hidden_dim) * width
        if place > below:  # not counted above otherwise
            found -= (layers - 1) * site.intermediate_dim * width
        # The gradients of one block's, while it is passed backwards.
        passed = hidden + 2 * site.hidden_dim
        low_rank = block.counted.low_rank is not None
        if low_rank and keras.backend.backend() == "jax":
            # XLA holds what comes of the shared kernel beside their sum.
            passed += block.intermediate_dim
        most = max(most, slots * passed * width)
    return found + most


def _of_dense(layer, trains):
    """Bytes of a token of one layer of the dense model."""
    width = width_of(layer.compute_dtype)
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, outputs = layer.equation.replace(" ", "").split("->")
        kernel = inputs.split(",")[1]
        sizes = dict(zip(kernel, layer.kernel.shape, strict=True))
        return math.prod(sizes.get(a, 1) for a in outputs) * width
    if isinstance(layer, keras.layers.Dense):
        return layer.kernel.shape[-1] * width
    if layer.weights and all(len(v.shape) == 1 for v in layer.weights):
        often = OF_A_NORM if trains else OF_A_FROZEN_NORM
        return often * math.prod(layer.weights[0].shape) * width
    return 0

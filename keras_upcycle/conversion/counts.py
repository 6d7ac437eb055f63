"""Bytes, parameters and operations: of variables, of a layer's experts."""

import math
from collections.abc import Iterator

import keras
import numpy as np

from keras_upcycle import keras_internals
from keras_upcycle.layers.experts import Experts
from keras_upcycle.layers.low_rank import LowRankProjection
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.router import Router, clone


def width_of(dtype: str) -> int:
    """Bytes of a number."""
    # NumPy has no bfloat16; it is as wide as float16.
    return np.dtype("float16" if dtype == "bfloat16" else dtype).itemsize


def bytes_of(variable: keras.Variable) -> int:
    """Bytes of a variable, which need not have values."""
    return math.prod(variable.shape) * width_of(variable.dtype)


def expert_params(layer: MoEFeedForward) -> int:
    """Parameters of one expert, without what low-rank experts share."""
    shared = sum(
        projection.base.count_params()
        for projection in layer.experts.projections.values()
        if isinstance(projection, LowRankProjection)
    )
    return (layer.experts.count_params() - shared) // layer.num_experts


def router_params(router: Router, num_experts: int, hidden_dim: int) -> int:
    """Parameters of a router's clone for so many experts, not built."""
    made = clone(router)
    made.num_experts = num_experts
    with keras_internals.without_values():
        made.build((None, None, hidden_dim))
    return made.count_params()


def always_params(layer: MoEFeedForward) -> int:
    """Parameters of a layer that every token meets."""
    return layer.count_params() - layer.num_experts * expert_params(layer)


def flops(layer: MoEFeedForward, experts: float) -> float:
    """Forward operations of a layer's products for a token, router included.

    Args:
        layer: A MoE layer, which need not have values.
        experts: Rows of experts that a token costs: those it meets, or with
            them the empty slots of buffers.
    """
    each, beside = (
        0
        if networks is None
        else sum(2 * math.prod(shape) for shape in _products(networks))
        for networks in (layer.experts, layer.shared)
    )
    # A router of gated neurons has two kernels.
    second = getattr(layer.router, "up_kernel", None)
    router = math.prod(layer.router.kernel.shape)
    if second is not None:
        router += math.prod(second.shape)
    return 2 * router + beside + experts * each


def _products(networks: Experts) -> Iterator[tuple[int, int]]:
    """Shapes `(in, out)` of what a token of one network is multiplied with."""
    for projection in networks.projections.values():
        if isinstance(projection, LowRankProjection):
            yield projection.base.kernel.shape[-2:]
            yield projection.lora_a.shape[1:]
            yield projection.lora_b.shape[1:]
        else:
            yield projection.kernel.shape[1:]

"""torch: a top-k that breaks ties as JAX and TensorFlow do, and gradients.

Needs nothing beyond torch.
"""

import torch

from keras_upcycle.backend import portable


def top_k(x, k):
    """See `portable.top_k`; `torch.topk` breaks ties any way it likes."""
    values, index = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k].to(torch.int32)


def to_slots(tokens, source, place):
    """See `portable.to_slots`."""
    return _ToSlots.apply(tokens, source, place)


def from_slots(outputs, weights, source, place):
    """See `portable.from_slots`."""
    return _FromSlots.apply(outputs, weights, source, place)


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, source, place):
        ctx.save_for_backward(place)
        return portable.to_slots(tokens, source, place)

    @staticmethod
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        result = portable.to_slots_gradient(
            portable.gather_rows, gradient, place
        )
        return result, None, None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, weights, source, place):
        ctx.save_for_backward(outputs, weights, source, place)
        return portable.from_slots(outputs, weights, source, place)

    @staticmethod
    def backward(ctx, gradient):
        by_outputs, by_weights = portable.from_slots_gradient(
            portable.gather_rows,
            portable.scatter_add_rows,
            gradient,
            *ctx.saved_tensors,
        )
        return by_outputs, by_weights, None, None

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


def block_matmul(blocks, kernels, owners):
    """See `portable.block_matmul`.

    One product an expert, over all its blocks: torch runs eagerly and may
    look at how many there are. Spare blocks are left out.
    """
    counts = torch.bincount(owners, minlength=len(kernels) + 1).tolist()
    parts = []
    start = 0
    for expert, count in enumerate(counts[:-1]):
        if count:
            parts.append(blocks[start : start + count] @ kernels[expert])
        start += count
    spare = (counts[-1], blocks.shape[1], kernels.shape[-1])
    parts.append(blocks.new_zeros(spare))
    return torch.cat(parts)


def smallest_block(num_tokens):
    """See `portable.smallest_block`.

    `block_matmul` runs all of an expert's blocks as one product, so a block
    of one row costs nothing and none is padding.
    """
    del num_tokens
    return 1


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

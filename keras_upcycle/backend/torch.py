"""torch: a top-k that breaks ties as JAX and TensorFlow do, rows, gradients.

Needs nothing beyond torch.
"""

import torch
from keras import ops

from keras_upcycle.backend import portable


def top_k(x, k):
    """See `portable.top_k`; `torch.topk` breaks ties any way it likes.

    ONNX has it alone, and breaks ties lowest index first.
    """
    if is_recorded():
        values, index = torch.topk(x, int(k), dim=-1)
        return values, index.to(torch.int32)
    values, index = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k].to(torch.int32)


def gather_rows(rows, index):
    """See `portable.gather_rows`; its gradient adds rows, as below."""
    rows, index = map(ops.convert_to_tensor, (rows, index))
    flat = _flat(index, rows.shape[1])
    picked = torch.index_select(rows.flatten(0, 1), 0, flat)
    return picked.unflatten(0, index.shape)


def scatter_add_rows(rows, index, length):
    """See `portable.scatter_add_rows`.

    Row by row: `ops.segment_sum` names a place for each number, and took
    twenty times as long.
    """
    rows, index = map(ops.convert_to_tensor, (rows, index))
    groups, _, width = rows.shape
    zeros = rows.new_zeros(groups * length, width)
    sums = zeros.index_add(0, _flat(index, length), rows.flatten(0, 1))
    return sums.unflatten(0, (groups, length))


def _flat(index, length):
    """Of the rows of all groups, one after the other."""
    first = torch.arange(index.shape[0], device=index.device) * length
    return (index + first[:, None]).flatten()


def to_slots(tokens, source, place):
    """See `portable.to_slots`."""
    return _ToSlots.apply(tokens, source, place)


def from_slots(outputs, weights, source, place):
    """See `portable.from_slots`."""
    return _FromSlots.apply(outputs, weights, source, place)


def grouped_feed_forward(
    slots,
    tiles,
    tile_experts,
    used,
    weights,
    activation,
    keep=(None, None),
    training=False,
):
    """See `portable.grouped_feed_forward`.

    One product an expert, over all its rows: torch runs eagerly and may look
    at how many there are. On a GPU, where looking means waiting and each
    product is a launch, `grouped_mm` does it in one.
    """
    del training
    spare = 0
    if not tiles.is_cuda:
        spare = len(tiles) - int(used)
        tiles, tile_experts = tiles[: int(used)], tile_experts[: int(used)]
    # A product, not an index: the gradient of one adds row after row.
    experts = torch.arange(
        len(weights["up_kernel"]), device=tile_experts.device
    )
    owned = tile_experts[:, None] == experts
    own = {
        name: (owned.to(w.dtype) @ w[:, 0])[:, None]
        if name.endswith("bias")
        else w
        for name, w in weights.items()
    }

    # Not `bincount`, which waits for a GPU.
    counts = owned.sum(0, dtype=torch.int32) * tiles.shape[1]

    def multiply(tiles, kernels):
        rows = _GroupedRows.apply(tiles.flatten(0, 1), kernels, counts)
        return rows.unflatten(0, tiles.shape[:2])

    keep_tiles = None if keep[1] is None else keep[1][: len(tiles)]
    outputs = portable.feed_forward(
        tiles, own, activation, keep_tiles, multiply
    )
    outputs = torch.nn.functional.pad(outputs, (0, 0, 0, 0, 0, spare))
    if slots.shape[1] == 0:
        # Not products of nothing: their gradient is as large as all kernels.
        return torch.zeros_like(slots), outputs
    return (
        portable.feed_forward(slots, weights, activation, keep[0]),
        outputs,
    )


def is_recorded():
    """See `portable.is_recorded`: traced, as for ONNX, or exported."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def packing(num_tokens, top_k, num_experts, training):
    """See `portable.packing`.

    All of an expert's tiles run as one product, so a tile of one row costs
    nothing, none is padding, and slots spare no time.
    """
    del num_tokens, top_k, num_experts, training
    return 0, 1


class _GroupedRows(torch.autograd.Function):
    """`(R, D)` rows, sorted by expert, each times the kernel of its own.

    `counts` are int32 `(E,)`, rows of each expert. What is left are spare
    rows: 0.

    With a gradient of its own: what torch derives for a kernel picked by its
    expert is as large as all kernels, once for each expert.
    """

    @staticmethod
    def forward(ctx, rows, kernels, counts):
        ctx.save_for_backward(rows, kernels, counts)
        return _rows_times_kernels(rows, kernels, counts)

    @staticmethod
    def backward(ctx, gradient):
        rows, kernels, counts = ctx.saved_tensors
        gradient = gradient.contiguous()
        by_rows = by_kernels = None
        if ctx.needs_input_grad[0]:
            by_rows = _rows_times_kernels(
                gradient, kernels.transpose(1, 2), counts
            )
        if ctx.needs_input_grad[1]:
            by_kernels = _rows_times_rows(rows, gradient, kernels, counts)
        return by_rows, by_kernels, None


def _rows_times_kernels(rows, kernels, counts):
    if _grouped_mm_serves(rows, kernels):
        ends = _ends(counts)
        outputs = torch.nn.functional.grouped_mm(rows, kernels, offs=ends)
        # It leaves spare rows as it found the memory, and a bias' gradient is
        # a sum over all rows.
        filled = torch.arange(len(rows), device=rows.device) < ends[-1]
        return torch.where(filled[:, None], outputs, 0.0)
    outputs = rows.new_empty(len(rows), kernels.shape[2])
    end = 0
    for expert, part in _parts(counts):
        torch.mm(rows[part], kernels[expert], out=outputs[part])
        end = part.stop
    outputs[end:] = 0.0
    return outputs


def _rows_times_rows(rows, gradient, kernels, counts):
    if _grouped_mm_serves(rows, kernels):
        ends = _ends(counts)
        return torch.nn.functional.grouped_mm(rows.T, gradient, offs=ends)
    sums = torch.empty_like(kernels)
    idle = set(range(len(kernels)))
    for expert, part in _parts(counts):
        torch.mm(rows[part].T, gradient[part], out=sums[expert])
        idle.remove(expert)
    for expert in idle:
        sums[expert] = 0.0
    return sums


def _grouped_mm_serves(rows, kernels):
    """Whether torch's own grouped product runs these, and faster.

    On a CPU it is the loop below, in C++, and no faster (`benchmarks.layer`);
    on a GPU it wants bfloat16 and rows aligned to 16 bytes.
    """
    return (
        rows.is_cuda
        and rows.dtype == kernels.dtype == torch.bfloat16
        and rows.shape[1] % 8 == kernels.shape[1] % 8 == 0
        and kernels.shape[2] % 8 == 0
        and hasattr(torch.nn.functional, "grouped_mm")
    )


def _ends(counts):
    return torch.cumsum(counts, 0, dtype=torch.int32)


def _parts(counts):
    """Pairs of an expert and its slice of rows, where it has any."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, source, place):
        ctx.save_for_backward(place)
        return gather_rows(tokens, source)

    @staticmethod
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        result = portable.to_slots_gradient(gather_rows, gradient, place)
        return result, None, None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, weights, source, place):
        ctx.save_for_backward(outputs, weights, source, place)
        return portable.from_slots(outputs, weights, source, place, gather_rows)

    @staticmethod
    def backward(ctx, gradient):
        by_outputs, by_weights = portable.from_slots_gradient(
            gather_rows,
            scatter_add_rows,
            gradient,
            *ctx.saved_tensors,
        )
        return by_outputs, by_weights, None, None

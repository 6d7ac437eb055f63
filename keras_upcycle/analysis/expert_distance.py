"""How far a layer's experts have moved apart."""

from keras import ops

from keras_upcycle.layers.moe_feed_forward import MoEFeedForward


def expert_distance(layer: MoEFeedForward) -> float | None:
    """Mean distance of an expert from the average expert, relative to that.

    `mean_e ||W_e - W|| / ||W||`, with `W_e` all kernels of expert `e` and `W`
    their mean over experts. 0 right after copying; experts that stay near 0
    do not separate, and the mixture is the dense block at a higher price.

    Args:
        layer: Built.

    Returns:
        A float, or `None` for integer kernels, whose distance says little.

    Example:
        >>> layer = MoEFeedForward(4, 32)
        >>> layer.build((None, None, 16))
        >>> expert_distance(layer) > 0.5
        True
    """
    squares, norm = [0.0] * layer.num_experts, 0.0
    for projection in layer.experts.projections.values():
        if projection.quantization_mode is not None:
            return None
        kernel = ops.stop_gradient(
            ops.convert_to_tensor(projection.kernel, "float32")
        )
        mean = ops.mean(kernel, axis=0)
        norm += float(ops.sum(ops.square(mean)))
        # Expert by expert: all at once would take the kernel's size again.
        for e in range(layer.num_experts):
            squares[e] += float(ops.sum(ops.square(kernel[e] - mean)))
    if not norm:
        return 0.0
    return sum((s / norm) ** 0.5 for s in squares) / layer.num_experts

"""What is left of a dense block's neurons, and how alike its experts are."""

import numpy as np
from keras import ops

from keras_upcycle.families import FeedForwardSite
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward

# How exactly a neuron's weights must point where the dense neuron's do.
# Copies in the same dtype do to the last bit; scaled ones to its rounding.
_SAME = 1.0 - 1e-5
# Entries whose places identify a neuron, largest first.
_PLACES = 4


def intact_neurons(
    site: FeedForwardSite, layer: MoEFeedForward
) -> float | None:
    """Share of the experts' hidden neurons that are whole dense neurons.

    A neuron is whole if in every kernel of the block its weights are those of
    one and the same dense neuron, up to a positive factor, wherever it stands:
    methods permute, cut and scale. The shared expert counts as one more.

    Args:
        site: The dense block.
        layer: The MoE layer made from it, built.

    Returns:
        A share in `[0, 1]`: 1 after copying or cutting, `1 - ratio` after
        Drop-Upcycling with shared indices, `(1 - ratio) ** 3` for a gated
        block with independent ones, 0 after training. `None` for integer
        kernels.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> (site,) = keras_upcycle.find_feed_forwards(dense)
        >>> intact_neurons(site, moe.layers[0])
        1.0
    """
    if layer.experts.are_quantized:
        return None
    dense = {
        role: _neurons(role, _numpy(site.kernels[f"{role}_kernel"]))
        for role in layer.experts.projections
    }
    keys: dict[bytes, list[int]] = {}
    for number, key in enumerate(_keys(dense["up"])):
        keys.setdefault(key, []).append(number)
    whole = total = 0
    for networks in layer.networks:
        for expert in range(networks.num_experts):
            own = {
                role: _neurons(role, _numpy(projection.kernel[expert]))
                for role, projection in networks.projections.items()
            }
            whole += _whole(own, dense, keys)
            total += networks.intermediate_dim
    return whole / total


def expert_cosine(layer: MoEFeedForward) -> float | None:
    """Mean cosine between two experts, over all pairs, all kernels together.

    Args:
        layer: Built.

    Returns:
        A float: 1 after copying; 1.0 for a single expert too, which differs
        from none. `None` for integer kernels.

    Example:
        >>> layer = MoEFeedForward(4, 32)
        >>> layer.build((None, None, 16))
        >>> abs(expert_cosine(layer)) < 0.2
        True
    """
    if layer.experts.are_quantized:
        return None
    count = layer.num_experts
    if count == 1:
        return 1.0
    gram = np.zeros((count, count))
    for projection in layer.experts.projections.values():
        rows = ops.cast(
            ops.stop_gradient(ops.convert_to_tensor(projection.kernel)),
            "float32",
        )
        rows = ops.reshape(rows, (count, -1))
        gram += ops.convert_to_numpy(ops.matmul(rows, ops.transpose(rows)))
    norms = np.sqrt(np.diag(gram))
    norms = np.where(norms > 0, norms, 1.0)
    cosines = gram / np.outer(norms, norms)
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def expert_distance(layer: MoEFeedForward) -> float | None:
    """Mean distance of an expert from the average expert, relative to that.

    `mean_e ||W_e - W|| / ||W||`, with `W_e` all kernels of expert `e` and `W`
    their mean over experts. 0 right after copying; experts that stay near 0
    do not separate, and the MoE layer is the dense block at a higher price.

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
    if layer.experts.are_quantized:
        return None
    squares, norm = [0.0] * layer.num_experts, 0.0
    for projection in layer.experts.projections.values():
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


def _whole(own, dense, keys):
    """How many of one expert's neurons are dense ones."""
    found = 0
    for number, key in enumerate(_keys(own["up"])):
        found += any(
            all(_aligned(own[role][number], dense[role][n]) for role in own)
            for n in keys.get(key, ())
        )
    return found


def _keys(neurons):
    """Where each neuron's largest weights are, in order, and their signs.

    The same for a scaled copy, and hardly ever for another neuron.
    """
    order = np.argsort(-np.abs(neurons), axis=1, kind="stable")[:, :_PLACES]
    signs = np.take_along_axis(neurons, order, axis=1) > 0
    joined = np.concatenate([order, signs], axis=1).astype("int32")
    return [row.tobytes() for row in joined]


def _aligned(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    if not size:
        return not a.any() and not b.any()
    return a @ b >= _SAME * size


def _neurons(role, kernel):
    """`(F, D)`: a row for each hidden neuron."""
    return kernel if role == "down" else kernel.T


def _numpy(tensor):
    tensor = ops.convert_to_tensor(tensor)
    return ops.convert_to_numpy(ops.cast(ops.stop_gradient(tensor), "float32"))

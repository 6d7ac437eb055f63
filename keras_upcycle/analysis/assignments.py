"""Which experts process which class or token, counted on examples."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.layers.moe_layers import check_batch, named_mixtures
from keras_upcycle.routing import functional


def expert_assignments(
    model: keras.Model, inputs: Any, labels: Any
) -> dict[str, np.ndarray]:
    """How the tokens of each label are shared out among experts.

    Args:
        model: A Keras model, sparse.
        inputs: Array, tensor or structure of them: a batch as the model is
            called on, after preprocessing. It runs eagerly, in one piece, at
            inference.
        labels: Integer array, at least 0: `(batch,)`, a class for each example,
            all of whose tokens count for it; or `(batch, S)`, one for each
            token, such as the token ids themselves. A negative label leaves the
            example or token out.

    Returns:
        From each block's name to a float array `(num_labels, E)`: the share
        of a label's processed assignments that each expert had. Rows sum to
        1, or hold NaN for a label that does not occur. Blocks with another
        number of tokens than `labels` has, such as a decoder's for labels of
        source tokens, are left out.

    Raises:
        TypeError, ValueError: If the model holds no MoE layer; for inputs
            without an example; if the labels fit no block.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((6, 8)), MoEFeedForward(4, 16, name="moe"),
        ... ])
        >>> shares = expert_assignments(model, np.ones((2, 6, 8)), [0, 1])
        >>> [share.shape for share in shares.values()]
        [(2, 4)]
    """
    labels = checks.array_of(labels)
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2):
        raise ValueError(
            "`labels` must be integers of shape (batch,) or (batch, S). "
            f"Received: labels of dtype {labels.dtype} and shape "
            f"{labels.shape}. Pass class numbers or token ids."
        )
    checked = named_mixtures(model)
    check_batch("inputs", inputs, model)
    named = {id(layer): name for name, layer in checked.items()}
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    with record_calls() as calls:
        model(inputs, training=False)
    found: dict[str, np.ndarray] = {}
    shapes = []
    for call in calls:
        matrix = _matrix(call)  # (batch, S, E)
        shapes.append(matrix.shape[:2])
        own = labels if labels.ndim == 2 else labels[:, None]
        if own.shape[0] != matrix.shape[0] or own.shape[1] not in (
            1,
            matrix.shape[1],
        ):
            continue
        counts = _counts(matrix, np.broadcast_to(own, matrix.shape[:2]))
        name = named[id(call.layer)]
        found[name] = found.get(name, 0.0) + counts
    if not found:
        raise ValueError(
            "`labels` must have one entry for each example, or for each token "
            f"of some block. Received: labels of shape {labels.shape}; the "
            f"blocks had (batch, S) of {sorted(set(shapes))}. Pass labels of "
            "one of these shapes, or of their first axis alone."
        )
    with np.errstate(invalid="ignore"):
        return {n: c / c.sum(1, keepdims=True) for n, c in found.items()}


def mutual_information(share: np.ndarray) -> float:
    """How much a label says about which experts process it, in nats.

    `I(label; expert)` with all labels equally frequent: 0 where experts do not
    care for labels, at most the log of the number of labels or of experts.

    Args:
        share: One block of what `expert_assignments` gave, `(num_labels, E)`;
            labels that do not occur are left out.

    Example:
        >>> round(mutual_information(np.eye(2)), 4)
        0.6931
    """
    share = share[~np.isnan(share).any(1)]
    mean = share.mean(0)
    ratio = np.divide(share, mean, out=np.ones_like(share), where=share > 0)
    return float((share * np.log(ratio)).sum(1).mean())


def _matrix(call) -> np.ndarray:
    """Whether an expert processes a token, `(batch, S, E)`."""
    shape = tuple(call.inputs.shape)
    experts = call.layer.num_experts
    if isinstance(call.routing, functional.TokenChoice):
        kept = ops.convert_to_numpy(call.routing.experts)[..., None]
        matrix = (kept == np.arange(experts)).any(-2)
    else:
        tokens = ops.convert_to_numpy(call.routing.tokens)
        active = ops.convert_to_numpy(call.routing.active)
        groups, _, _ = tokens.shape
        matrix = np.zeros((groups, call.length, experts), bool)
        group, expert, _ = np.nonzero(active)
        matrix[group, tokens[active], expert] = True
    matrix = matrix.reshape(-1, experts)[: call.num_tokens]
    return matrix.reshape(shape[0], -1, experts)


def _counts(matrix, labels) -> np.ndarray:
    counts = np.zeros((max(int(labels.max()) + 1, 1), matrix.shape[-1]))
    kept = labels >= 0
    np.add.at(counts, labels[kept], matrix[kept])
    return counts


def most_distinct(shares: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """The labels whose experts differ most from the average label's.

    Args:
        shares: What `expert_assignments` gave.
        count: How many.

    Returns:
        int `(count,)`, or fewer where fewer labels occur, in rising order.
    """
    apart = np.zeros(())
    for share in shares.values():
        mean = np.nanmean(share, axis=0)
        apart = apart + np.nan_to_num(np.abs(share - mean).sum(1), nan=-1.0)
    order = np.argsort(-apart, kind="stable")[:count]
    return np.sort(order[apart[order] >= 0])

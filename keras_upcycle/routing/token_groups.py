"""A batch of tokens in groups that share expert slots, and back."""

import math
from typing import Any

from keras import ops

from keras_upcycle import checks
from keras_upcycle.types import Tensor

EXAMPLE, BATCH = "example", "batch"
GROUPS = (EXAMPLE, BATCH)


def grouped(
    inputs: Tensor, mask: Tensor | None, group: str | int, shards: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`(batch, ..., D)` to `(G, S, D)`, and the mask to `(G, S)`.

    A number of examples that does not divide the batch leaves a last group
    that is not full. What is missing counts as padding: it takes no slot, and
    as slots follow from real tokens, it brings none.

    Args:
        inputs: `(batch, ..., D)`.
        mask: `(batch, ...)`, nonzero at real tokens, or `None`.
        group: `"example"`, `"batch"` or a number of examples.
        shards: Over how many devices examples are spread, in their order. A
            `"batch"` is what one of them has, if all have as many.

    Returns:
        The tokens, 0 at padding, and a bool mask; `None` where all are real.

    Example:
        >>> tokens, mask = grouped(ops.ones((5, 3, 8)), None, group=2)
        >>> tuple(tokens.shape), int(ops.sum(ops.cast(mask, "int32")))
        ((3, 6, 8), 15)
    """
    shape = ops.shape(inputs)
    batch, width = shape[0], shape[-1]
    length = math.prod(shape[1:-1])
    if mask is not None:
        mask = ops.reshape(ops.cast(mask, "bool"), (batch, length))
    tokens = ops.reshape(inputs, (batch, length, width))
    if group == EXAMPLE:
        groups = (batch, length)
    elif group == BATCH:
        known = isinstance(batch, int) and batch % shards == 0
        count = shards if known else 1
        groups = (count, batch // count * length)
    else:
        tokens, mask, groups = _by_number(tokens, mask, group)
    tokens = ops.reshape(tokens, (*groups, width))
    if mask is None:
        return tokens, None
    mask = ops.reshape(mask, groups)
    # Padding may hold anything, and 0 times NaN is NaN.
    return ops.where(ops.expand_dims(mask, -1), tokens, 0.0), mask


def ungrouped(outputs: Tensor, shape: Any) -> Tensor:
    """`(G, S, D)` back to the inputs' shape.

    Args:
        outputs: `(G, S, D)`.
        shape: Of the inputs, `(batch, ..., D)`.
    """
    groups, length, width = ops.shape(outputs)
    real = math.prod(shape[:-1])
    known = isinstance(real, int) and isinstance(groups, int)
    if not known or real != groups * length:
        outputs = ops.reshape(outputs, (groups * length, width))[:real]
    return ops.reshape(outputs, shape)


def uneven(layer: Any, groups: int, batch: int, shards: int) -> ValueError:
    """The error for groups that devices cannot share alike.

    Args:
        layer: The MoE layer.
        groups: How many there are.
        batch: Of how many examples.
        shards: Over how many devices examples are spread.
    """
    return ValueError(
        "In training all devices must have as many groups of tokens. "
        f"Received: {groups} groups of {batch} examples for layer "
        f"{layer.path!r} with group={layer.router.group!r}, and a mesh that "
        f"splits a batch into {shards} parts. Use as `group` a number of "
        "examples of which each part has a multiple, or a larger batch."
    )


def check_group(group: Any) -> str | int:
    """Raises `ValueError` unless `group` is a word or a number of examples."""
    if isinstance(group, str):
        known = group in GROUPS
    else:
        known = checks.is_integer(group) and group >= 1
    if known:
        return str(group) if isinstance(group, str) else int(group)
    raise ValueError(
        f"`group` must be one of {list(GROUPS)} or a number of examples, "
        f"an integer of at least 1. Received: group={group!r}."
    )


def _by_number(tokens, mask, examples):
    """Tokens and mask filled up to whole groups, and the groups' shape."""
    batch, length, width = ops.shape(tokens)
    known = isinstance(batch, int)
    if known:
        examples = min(examples, batch)
        groups = -(-batch // examples)
        missing = groups * examples - batch
        shape = (groups, examples * length)
        if not missing:
            return tokens, mask, shape
    else:
        groups = (batch + examples - 1) // examples
        missing = groups * examples - batch
        shape = (groups, examples * length)
    if mask is None:
        mask = ops.ones((batch, length), "bool")
    more = ops.zeros((missing, length, width), tokens.dtype)
    tokens = ops.concatenate([tokens, more])
    mask = ops.concatenate([mask, ops.zeros((missing, length), "bool")])
    return tokens, mask, shape

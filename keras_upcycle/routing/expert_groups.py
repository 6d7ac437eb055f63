"""Groups of experts of which a token may meet one: a router on two levels.

Experts that were copied from one another are alternatives: who chooses two of
them computes the same twice. Their router chooses groups first and an expert in
each then, as hierarchical mixtures do (Shazeer et al., arXiv 1701.06538,
appendix B), here by one kernel: a group's logit is the mean of its experts',
and within a group the softmax of what they have themselves. However the copies
of an expert differ from one another, if their mean is the expert's the choice
of groups is what the choice of experts was.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.types import Tensor

# The logit of who does not exist. Not infinite: its gradient would be NaN.
NOWHERE = -1e30


class Table(NamedTuple):
    """Experts by group, the smaller groups filled up.

    Attributes:
        members: int32 `(F, M)`, an expert's number; a group's first again
            where it has fewer than `M`.
        exists: bool `(F, M)`.
        places: int32 `(E,)`, where each expert is in `F * M`.
    """

    members: np.ndarray
    exists: np.ndarray
    places: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Experts of each group, int64 `(F,)`."""
        return self.exists.sum(axis=1)


def check(name: str, value: Any) -> tuple[int, ...] | None:
    """`value` as a tuple, or `None`.

    Args:
        name: Of the argument, for the message.
        value: What was given.

    Raises:
        TypeError, ValueError: If it is no list of the experts' groups.
    """
    if value is None:
        return None
    said = (
        f"`{name}` must be a list with each expert's group, of numbers from 0 "
        f"without a gap, such as [0, 0, 1, 1]. Received: {name}={value!r}."
    )
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise TypeError(said)
    if not all(checks.is_integer(group) for group in value):
        raise TypeError(said)
    groups = tuple(int(group) for group in value)
    if not groups or set(groups) != set(range(max(groups) + 1)):
        raise ValueError(said)
    return groups


def choices(
    groups: tuple[int, ...] | None, num_experts: int
) -> tuple[str, int]:
    """What a token chooses `top_k` of, and how many there are.

    Raises:
        ValueError: If the groups are those of another number of experts.
    """
    if groups is None:
        return "num_experts", num_experts
    if len(groups) != num_experts:
        raise ValueError(
            "`expert_groups` must have one group for each expert. Received: "
            f"expert_groups of {len(groups)} experts, num_experts="
            f"{num_experts}."
        )
    return "groups", max(groups) + 1


def of_experts(
    groups: tuple[int, ...], index: Sequence[int]
) -> tuple[int, ...]:
    """Groups where expert `n` is what `index[n]` was, numbered anew.

    Args:
        groups: Each expert's group.
        index: Old numbers of the experts there are now.

    Example:
        >>> of_experts((0, 0, 1, 2), [0, 2, 2])
        (0, 1, 1)
    """
    left = [groups[number] for number in index]
    numbers = {group: n for n, group in enumerate(sorted(set(left)))}
    return tuple(numbers[group] for group in left)


@functools.lru_cache
def table(groups: tuple[int, ...]) -> Table:
    """The `Table` of each expert's group."""
    members = [
        [expert for expert, of in enumerate(groups) if of == group]
        for group in range(max(groups) + 1)
    ]
    most = max(map(len, members))
    places = np.zeros(len(groups), "int32")
    for group, experts in enumerate(members):
        places[experts] = group * most + np.arange(len(experts))
    return Table(
        np.array([(m + m[:1] * most)[:most] for m in members], "int32"),
        np.array([np.arange(most) < len(m) for m in members]),
        places,
    )


def logits(scores: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Logits of experts whose softmax is that of groups, and within them.

    Args:
        scores: float32 `(G, S, E)`, what the kernel gives.
        groups: Each expert's group.

    Returns:
        float32 `(G, S, E)`: an expert's is the mean of its group's scores plus
        the logarithm of its share within the group.
    """
    of = table(groups)
    mean = ops.sum(_by_group(scores, of, 0.0), axis=-1, keepdims=True)
    mean = ops.divide(mean, of.sizes[:, None].astype("float32"))
    shown = _by_group(scores, of, NOWHERE)
    within = shown - ops.logsumexp(shown, axis=-1, keepdims=True)
    flat = ops.reshape(
        mean + within, (*ops.shape(scores)[:-1], of.members.size)
    )
    return ops.take(flat, of.places, axis=-1)


def best_of_each(
    logits: Tensor, ranked: Tensor, groups: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Of each group the expert that a token would choose, and its logit.

    Args:
        logits: float32 `(G, S, E)`.
        ranked: float32 `(G, S, E)`: the highest of a group is chosen, of equal
            ones the one with the lowest number.
        groups: Each expert's group.

    Returns:
        `(experts, logits)`: int32 and float32 `(G, S, F)`. A logit is that of
        the whole group, `logsumexp` of its experts'; its gradient is that of
        the group's and of the chosen expert's share within it, so that the
        kernel learns which of a group to choose.
    """
    of = table(groups)
    best = ops.argmax(
        _by_group(ops.stop_gradient(ranked), of, NOWHERE), axis=-1
    )
    shown = _by_group(logits, of, NOWHERE)
    together = ops.logsumexp(shown, axis=-1)
    own = ops.take_along_axis(shown, ops.expand_dims(best, -1), axis=-1)
    share = own[..., 0] - together
    first = np.arange(len(of.members), dtype="int32") * of.members.shape[1]
    experts = ops.take(of.members.reshape(-1), ops.cast(best, "int32") + first)
    return (
        ops.cast(experts, "int32"),
        together + (share - ops.stop_gradient(share)),
    )


def mean(values: Tensor, groups: tuple[int, ...]) -> Tensor:
    """The mean of each group: `(..., E)` to `(..., F)`."""
    of = table(groups)
    total = ops.sum(_by_group(values, of, 0.0), axis=-1)
    return ops.divide(total, of.sizes.astype("float32"))


def with_means_kept(
    kernel: np.ndarray, groups: tuple[int, ...], index: Sequence[int]
) -> np.ndarray:
    """Columns of some experts, moved so that groups' means stay.

    What is left of a group is chosen as the group was, and among themselves
    its experts are told apart as before.

    Args:
        kernel: Float `(..., E)`.
        groups: Each expert's group.
        index: Numbers of the experts that are left.

    Returns:
        Float `(..., len(index))`.
    """
    of = np.array(groups)
    left = np.array(index)
    result = kernel[..., left].copy()
    for group in set(of[left].tolist()):
        here = of[left] == group
        before = kernel[..., of == group].mean(axis=-1, keepdims=True)
        after = result[..., here].mean(axis=-1, keepdims=True)
        result[..., here] += before - after
    return result


def _by_group(values, of, fill):
    """`(..., E)` as `(..., F, M)`, `fill` where nobody is."""
    taken = ops.take(values, of.members.reshape(-1), axis=-1)
    taken = ops.reshape(taken, (*ops.shape(values)[:-1], *of.members.shape))
    return ops.where(of.exists, taken, fill)

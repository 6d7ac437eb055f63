"""Step 2: where checkpoints are few, two that differ have a child."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_upcycle import checks
from keras_upcycle.layers import expert_init
from keras_upcycle.methods.expert_weights import (
    ExpertWeights,
    as_pool,
    dense_sites,
)

MOST_DISTANT, RANDOM = "most_distant", "random"
PARENTS = (MOST_DISTANT, RANDOM)
# Cosines that agree to so many places are a tie.
_PLACES = 9


def expand_experts(
    experts: Sequence[ExpertWeights],
    num_experts: int,
    base: keras.Model | ExpertWeights,
    *,
    drop_rate: float = 0.5,
    parents: str = MOST_DISTANT,
    seed: int | None = None,
) -> list[ExpertWeights]:
    """Adds children of two experts until there are `num_experts`.

    Each child is `base + a * DARE(j - base) + (1 - a) * DARE(k - base)`, with
    `a` uniform in `[0, 1)`. DARE (Yu et al., arXiv 2311.03099) drops each
    entry of a difference with probability `drop_rate` and divides the others
    by `1 - drop_rate`. A child may be a parent of the next.

    The paper takes as parents the two experts of the greatest difference and
    does not say how it is measured, nor the drop rate. Ours: the smallest
    cosine of the differences to the base, block by block, summed over blocks;
    an expert that equals the base has cosine 0 to all; of equal pairs the one
    of the lowest numbers. An expert is one model: parents and `a` are the same
    in all blocks. Biases are treated as kernels.

    References: UpIT (arXiv 2410.01610), expert expansion. Its ablation finds
    random parents no worse.

    Args:
        experts: List of `ExpertWeights`, such as `ExpertCheckpoints.experts`;
            at least two, if children are to be made.
        num_experts: Integer, how many there are to be, at least as many as
            there are (`E`).
        base: A Keras model, the dense one before it was tuned, or its
            `ExpertWeights`.
        drop_rate: Float in `[0, 1)`, the share of a difference that DARE drops.
            0 merges the parents and drops nothing. Defaults to 0.5.
        parents: String, `"most_distant"` (default) or `"random"`, any two.
        seed: Integer or `None`, the seed of all that is drawn, the same on
            every backend. `None` (default) draws one.

    Returns:
        The experts given, in their order, and their children, in the order of
        birth. A child's `description` names its parents.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If experts and base do not fit together.

    Example:
        >>> def model():
        ...     return keras.Sequential([
        ...         keras.Input((8,)),
        ...         keras.layers.Dense(16, activation="relu"),
        ...         keras.layers.Dense(8),
        ...     ])
        >>> base = model()
        >>> experts = [ExpertWeights.from_model(model()) for _ in range(2)]
        >>> more = expand_experts(experts, 4, base, seed=0)
        >>> len(more), more[0] is experts[0]
        (4, True)
    """
    num_experts = checks.check_count("num_experts", num_experts)
    drop_rate, seed = check_settings(drop_rate, parents, seed)
    pool = as_pool(experts)
    if len(pool) > num_experts:
        raise ValueError(
            "`num_experts` must be at least the number of `experts`. Received: "
            f"num_experts={num_experts} and {len(pool)} experts. Choose some "
            f"of them, such as the latest: `experts[-{num_experts}:]`."
        )
    if len(pool) < 2 and len(pool) < num_experts:
        raise ValueError(
            "`experts` must hold two parents for each new one. Received: "
            f"{len(pool)} experts. Collect more: lower `every` of "
            "`ExpertCheckpoints`."
        )
    base = _base(base, pool)
    if len(pool) == num_experts:
        return pool
    rng = expert_init.generator(seed)
    similar: dict[tuple[int, int], float] = {}
    while len(pool) < num_experts:
        if parents == RANDOM:
            first, second = sorted(rng.choice(len(pool), 2, replace=False))
        else:
            first, second = _most_distant(pool, base, similar)
        share = float(rng.random())
        blocks = [
            {
                name: _child(
                    base.blocks[index][name],
                    pool[first].blocks[index][name],
                    pool[second].blocks[index][name],
                    share,
                    drop_rate,
                    rng,
                )
                for name in base.blocks[index]
            }
            for index in range(len(base.blocks))
        ]
        made = ExpertWeights(
            blocks,
            description=(
                f"{share:.3f} of expert {first} and {1 - share:.3f} of expert "
                f"{second}, drop rate {drop_rate:g}"
            ),
        )
        pool.append(made)
    return pool


def check_settings(drop_rate, parents, seed) -> tuple:
    """The rate and the seed as Python's numbers; raises for bad settings."""
    drop_rate = checks.check_number("drop_rate", drop_rate, at_least=0.0)
    if drop_rate >= 1.0:
        raise ValueError(
            "`drop_rate` must be in [0, 1), or nothing of a parent is left. "
            f"Received: drop_rate={drop_rate}."
        )
    checks.check_choice("parents", parents, PARENTS)
    return drop_rate, checks.check_seed("seed", seed)


def _base(base: Any, pool) -> ExpertWeights:
    """The base's weights, once every expert is known to fit them."""
    if isinstance(base, keras.Model):
        sites = dense_sites(base)
        for number, expert in enumerate(pool):
            expert.check_fits(sites, f"Expert {number}")
        return ExpertWeights.from_model(base)
    if not isinstance(base, ExpertWeights):
        raise TypeError(
            "`base` must be the dense model before it was tuned, or its "
            f"`ExpertWeights`. Received: base={base!r} of type "
            f"{type(base).__name__}."
        )
    for number, expert in enumerate(pool):
        expert.check_like(base, f"Expert {number}")
    return base


def _most_distant(pool, base, similar):
    """The pair of the smallest cosine; `similar` keeps what is known."""
    for second in range(len(pool)):
        for first in range(second):
            if (first, second) not in similar:
                similar[first, second] = _cosine(
                    pool[first], pool[second], base
                )
    return min(sorted(similar), key=lambda pair: similar[pair])


def _cosine(one, other, base):
    total = 0.0
    for start, a, b in zip(base.blocks, one.blocks, other.blocks, strict=True):
        a, b = _flat(a, start), _flat(b, start)
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        total += float(a @ b / norm) if norm else 0.0
    return round(total, _PLACES)


def _flat(block, start):
    """One block's difference to the base, as a vector."""
    parts = [
        (np.asarray(block[name], "float64") - start[name]).ravel()
        for name in sorted(start)
    ]
    return np.concatenate(parts)


def _child(start, first, second, share, drop_rate, rng):
    change = share * _dare(first - start, drop_rate, rng)
    change += (1.0 - share) * _dare(second - start, drop_rate, rng)
    return (start + change).astype("float32")


def _dare(difference, drop_rate, rng):
    kept = rng.random(difference.shape) >= drop_rate
    return kept * difference / (1.0 - drop_rate)

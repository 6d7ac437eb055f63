"""Experts from random values, all or some of them: the paper's comparison.

What do experts owe to the dense block that they start from? Sparse Upcycling
asked by leaving it out: the rest of the model is kept, and the experts are
drawn. It found such experts behind copies for a long time.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers import expert_init
from keras_upcycle.layers.expert_init import ExpertInit
from keras_upcycle.methods import drop_upcycling
from keras_upcycle.state.first_values import ByExpert

GLOROT_UNIFORM, MATCHED = "glorot_uniform", "matched"
DISTRIBUTIONS = (GLOROT_UNIFORM, MATCHED)


@expert_init.named("random")
class RandomExperts(ExpertInit):
    """Experts drawn anew; those that are not are copies of the dense block.

    Every random expert is drawn by itself, kernel by kernel, as a `Dense`
    layer of its own shape would be. Nothing is shared between experts, blocks
    or kernels, and a seed gives the same values on every backend. The rest of
    the model stays what it was. It does not start as the dense model does, but
    where all experts of a token are copies.

    References: Sparse Upcycling (arXiv 2212.05055), appendix B.5: all experts
    random, or some of them. Both were behind copies of equal cost, at every
    number of experts tried.

    Args:
        count: Integer in `[1, num_experts]` or `None`: how many are random, the
            last ones; the first `num_experts - count` are copies. `None`
            (default) draws all.
        distribution: String. `"glorot_uniform"` (default): kernels `(D, F)` and
            `(F, D)` uniform within `sqrt(6 / (D + F))` of 0, biases 0, as Keras
            starts a `Dense` layer. `"matched"`: every kernel and bias normal,
            with the mean and standard deviation of the dense block's own; ours,
            so that an expert's output is of the dense block's size.

    Raises:
        TypeError, ValueError: For a setting outside its range; when used, for
            more random experts than experts.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, expert_init=RandomExperts(count=3), seed=0,
        ... )
        >>> kernel = moe.layers[0].experts.expert_down.kernel
        >>> same = [
        ...     bool(keras.ops.all(kernel[e] == dense.layers[1].kernel))
        ...     for e in range(4)
        ... ]
        >>> same
        [True, False, False, False]
    """

    def __init__(
        self, count: int | None = None, distribution: str = GLOROT_UNIFORM
    ):
        if count is not None:
            count = checks.check_count("count", count)
        checks.check_choice("distribution", distribution, DISTRIBUTIONS)
        self.count = count
        self.distribution = distribution

    def check(self, block, router, num_experts):
        if self.count is not None and self.count > num_experts:
            raise ValueError(
                "`count` must be between 1 and the number of experts. "
                f"Received: count={self.count} for num_experts={num_experts}. "
                "Lower it, or pass `count=None` for all of them."
            )

    def values(self, block, router, num_experts, seed):
        del router
        count = num_experts if self.count is None else self.count
        rng = expert_init.generator(seed)
        # A generator for each weight of each expert: weights are built one at
        # a time, and in whatever order.
        rngs = [
            dict(zip(block.kernels, own.spawn(len(block.kernels)), strict=True))
            for own in rng.spawn(count)
        ]
        return {
            name: self._first_value(
                variable, num_experts - count, [own[name] for own in rngs]
            )
            for name, variable in block.kernels.items()
        }

    def _first_value(self, variable: keras.Variable, copies: int, rngs: list):
        def make(experts):
            dense = ops.convert_to_numpy(ops.cast(variable.value, "float32"))
            return np.stack(
                [
                    dense
                    if e < copies
                    else self._drawn(dense, rngs[e - copies])
                    for e in experts
                ]
            )

        return ByExpert(make)

    def _drawn(self, dense: np.ndarray, rng: Any) -> np.ndarray:
        """One weight of one random expert."""
        # A generator of its own each time: building twice gives the same.
        rng = np.random.default_rng(rng.bit_generator.seed_seq)
        if self.distribution == MATCHED:
            return drop_upcycling.like(dense, rng)
        if dense.ndim == 1:
            return np.zeros_like(dense)
        limit = math.sqrt(6.0 / sum(dense.shape))
        return rng.uniform(-limit, limit, dense.shape).astype("float32")

"""Experts that fit one card: one frozen block, a low-rank difference each."""

from keras_upcycle import checks
from keras_upcycle.layers import expert_init


@expert_init.named("low_rank")
class LowRankExperts(expert_init.ExpertInit):
    """Experts that share the dense block and differ by a low rank each.

    The block itself is kept once, frozen, in floats or, after
    `quantize("int8")`, in integers. Each expert adds `alpha / rank * A_e B_e`
    to each of its kernels; `B_e` starts at 0, so that the sparse model starts
    as the dense one. Only the differences and the routers train in a converted
    block; `freeze(moe, "dense")` freezes the rest of the model. An expert costs
    `rank * (D + F)` parameters a kernel and not `D * F`. `merge_experts` makes
    whole experts of them, `save_adapters` writes what trained alone.

    References: MixLoRA (arXiv 2404.15159), section 3; PESC (arXiv 2401.02731),
    section 2, which adapts the output; LoRA (arXiv 2106.09685).

    Args:
        rank: Integer, at least 1. Defaults to 8.
        alpha: Float, above 0, or `None`: the differences are multiplied by
            `alpha / rank`. `None` (default) multiplies by 1.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, experts=LowRankExperts(rank=2)
        ... )
        >>> x = keras.ops.ones((1, 8))
        >>> bool(keras.ops.all(keras.ops.abs(moe(x) - dense(x)) < 1e-5))
        True
    """

    def __init__(self, rank: int = 8, alpha: float | None = None):
        self.rank = checks.check_count("rank", rank)
        if alpha is not None:
            alpha = checks.check_factor("alpha", alpha)
        self.alpha = alpha

    def values(self, block, router, num_experts, seed):
        del router, num_experts, seed
        return {
            name: expert_init.whole(variable)
            for name, variable in block.kernels.items()
        }

    def layer_settings(self, block):
        del block
        return {"low_rank": self.rank, "low_rank_alpha": self.alpha}

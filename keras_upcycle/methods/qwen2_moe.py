"""Qwen2's experts: copies of the dense block, shuffled and cut anew.

Fine-grained experts that share neurons but are no slices of one another: the
dense block is replicated, each copy's neurons are shuffled, the copies are
cut into narrow experts, and half of each is drawn anew.
"""

import numpy as np

from keras_upcycle import checks
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    SharedOut,
    add_recipe,
)
from keras_upcycle.layers import expert_init
from keras_upcycle.methods import drop_upcycling, hidden_slices
from keras_upcycle.routing.top_k_router import TopKRouter

# Qwen2-57B-A14B has experts of width 2560 where Qwen2-7B has 18944.
_PARTS = 8
# The share at which a study found that it collapses; it is Qwen's.
_COLLAPSED_AT = 0.5


@expert_init.named("replicate_shuffle_cut")
class ReplicateShuffleCut(drop_upcycling.PartlyNew):
    """Narrow experts cut from shuffled copies of the dense block.

    For `E` experts of width `H` from a block of width `F`, `ceil(E * H / F)`
    copies are made, the hidden neurons of each are shuffled, the copies are
    laid side by side and cut into experts, and what is left over is dropped.
    Of each expert `ratio * H` neurons are then drawn anew as in
    `DropUpcycling`; how Qwen draws them is not said, that is our choice. The
    output bias, which Qwen's models do not have, is added once and whole,
    outside the experts.

    It does not start as the dense model: experts whose weights sum to 1 and
    that hold `H` of `F` neurons put out about `H / F` of it.
    `verify_upcycle` measures how far off that is.

    A study of partial re-initialisation found this method to collapse at
    Qwen's share: 23.2 on average where 50.2 was reached otherwise. A `ratio`
    of 0.5 or more is warned of; a lower one keeps more of the dense model, and
    so does `DropUpcycling`, which cuts nothing, or `VirtualGroups`, which
    draws nothing anew.

    References: Qwen2 Technical Report (arXiv 2407.10671), section 2.2.2.

    Args:
        intermediate_dim: Integer, at least 1, or `None`: the width of an expert
            (`H`). `None` (default) takes an eighth of the block's.
        ratio: Float in `[0, 1]`, the share of an expert's neurons drawn anew.
            Defaults to 0.5, Qwen's.
        index_sharing: String, `"shared"` (default): an expert's kernels share
            one set of neurons that are drawn anew; or `"independent"`: each has
            a set of its own.
        rescale: Boolean, whether output kernels are multiplied by `F / H`, so
            that without new neurons the mean over experts is the dense block.
            Ours. Defaults to `False`.

    Raises:
        TypeError, ValueError: For a setting outside its range; when used, for
            a block narrower than an expert.
        UpcycleError: When used, for an activation of which a hidden unit
            depends on others, such as softmax.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 6, expert_init=ReplicateShuffleCut(4), seed=0,
        ... )
        >>> moe.layers[0].num_experts, moe.layers[0].intermediate_dim
        (6, 4)
    """

    def __init__(
        self,
        intermediate_dim: int | None = None,
        ratio: float = 0.5,
        index_sharing: str = drop_upcycling.SHARED,
        *,
        rescale: bool = False,
    ):
        super().__init__(ratio, index_sharing, permute=True)
        if intermediate_dim is not None:
            intermediate_dim = checks.check_count(
                "intermediate_dim", intermediate_dim
            )
        self.intermediate_dim = intermediate_dim
        self.rescale = checks.check_flag("rescale", rescale)

    def advice(self):
        if self.ratio < _COLLAPSED_AT:
            return None
        return (
            "A study of partial re-initialisation found replicated, shuffled "
            "and cut experts to collapse with half of each drawn anew (23.2 "
            f"on average against 50.2). Received: ratio={self.ratio}. Pass a "
            "lower share, such as expert_init=ReplicateShuffleCut(ratio=0.25), "
            'or another method: recipe="drop_upcycling", or "virtual_group" '
            "for small experts."
        )

    def layout(self, num_experts, intermediate_dim):
        return num_experts, self._width(intermediate_dim)

    def check(self, block, router, num_experts):
        super().check(block, router, num_experts)
        if self._width(block.intermediate_dim) != block.intermediate_dim:
            hidden_slices.check(block)

    def orders(self, width, num_experts, rng):
        own = self._width(width)
        copies = -(-num_experts * own // width)
        order = np.concatenate([rng.permutation(width) for _ in range(copies)])
        for expert in range(num_experts):
            yield order[expert * own : (expert + 1) * own]

    def draw(self, old, rng):
        return drop_upcycling.like(old, rng)

    def values(self, block, router, num_experts, seed):
        found = super().values(block, router, num_experts, seed)
        found = hidden_slices.once(found, block.kernels)
        if self.rescale:
            width = block.intermediate_dim
            scale = width / self._width(width)
            found["down_kernel"] = found["down_kernel"].times(scale)
        return found

    def layer_settings(self, block):
        return hidden_slices.layer_settings(block.kernels)

    def _width(self, dense_width: int) -> int:
        own = self.intermediate_dim
        if own is None:
            return max(1, dense_width // _PARTS)
        if own > dense_width:
            raise ValueError(
                "An expert must not be wider than the dense block it is cut "
                f"from. Received: intermediate_dim={own} for a width of "
                f"{dense_width}. Lower it, or leave it out."
            )
        return own


RECIPE = Recipe(
    name="qwen2_moe",
    paper="Qwen2 Technical Report, arXiv 2407.10671, section 2.2.2",
    changes=(
        "slices of shuffled copies, half of each drawn anew, and shared experts"
    ),
    costs="a start far from the dense model; smaller experts",
    fails=(
        "a study of partial re-initialisation found it to collapse at this "
        "share: 23.2 on average against 50.2"
    ),
    choices={
        ANY: (
            Choice(
                "expert_init",
                ReplicateShuffleCut(),
                "the report: copies, shuffled, cut, half drawn anew; width: "
                "2560 of 18944 in Qwen2-57B-A14B, here an eighth. A later "
                "study found this to collapse at that share (23.2 against "
                "50.2): pass expert_init=ReplicateShuffleCut(ratio=0.25), or "
                "less",
            ),
            Choice(
                "router",
                (
                    TopKRouter,
                    {
                        "top_k": 8,
                        "normalize": False,
                        "capacity_factor": None,
                        "load_balance_loss": SharedOut(0.001, times_top_k=True),
                    },
                ),
                "the report: 8 of 64 experts; weights as in the released "
                "model, not renormalised. The report gives the loss no "
                "weight; the released config has 0.001 of Hugging Face's loss: "
                "one over the logits of all L layers, not divided by K; of "
                "ours, added up over the layers, 0.001 K / L each",
            ),
            Note(
                "num_experts",
                64,
                "the report; you pass your own. With 8 all of them run, and "
                "nothing is sparse",
            ),
            Note(
                "shared experts",
                "8, of an expert's width each",
                "the report; pass expert_init=SharedExperts(8 * H, "
                "routed=ReplicateShuffleCut(H))",
            ),
            Choice(
                "layers",
                "all",
                "the released models: every block, the first too",
            ),
        ),
    },
)
add_recipe(RECIPE)

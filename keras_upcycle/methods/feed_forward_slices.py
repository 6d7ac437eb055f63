"""Experts that are slices of the dense block and together are the block.

Nothing is copied: the sparse model is as large as the dense one, and cheaper
where a token meets some of the slices only.
"""

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers import expert_init
from keras_upcycle.layers.expert_init import ExpertInit, generator
from keras_upcycle.methods import hidden_slices
from keras_upcycle.methods.clusters import balanced_clusters

CONTIGUOUS, RANDOM, CLUSTER = "contiguous", "random", "cluster"
ORDERS = (CONTIGUOUS, RANDOM, CLUSTER)


@expert_init.named("feed_forward_slices")
class FeedForwardSlices(ExpertInit):
    """Each expert is `1 / num_experts` of the dense block's hidden neurons.

    A block of hidden width `F` becomes `num_experts` experts of width `F /
    num_experts`. The router's kernel starts at zero, so that every expert has
    the weight `1 / num_experts`; output kernels are multiplied by
    `num_experts`. The output bias is added once and whole, outside the
    experts, whatever number of them runs. A token that meets all experts then
    meets the dense block, exactly, gated or not and with any activation.
    Slices differ, so the loss moves such a router away from zero, where copies
    would keep it there.

    For `DSMoERouter`, which trains with all experts. DS-MoE itself trains from
    scratch; starting from a dense block is ours. With `TopKRouter(K,
    normalize=True)` and `exact=False` the output is the mean of `K` slices
    times `num_experts`: LLaMA-MoE's form, which scales by `num_experts / K`,
    to be trained further since it does not start as the dense model.

    References: Pan et al., DS-MoE (arXiv 2404.05567), equations 1 and 3; for
    slices Zhang et al., MoEfication (2110.01786), section 3.2, and Zhu et al.,
    LLaMA-MoE (2406.16554).

    Args:
        order: String: which neurons stand together. `"contiguous"` (default):
            as they come. `"random"`: a permutation drawn from the block's seed,
            the same on every backend; LLaMA-MoE's choice. `"cluster"`: balanced
            k-means of their input weights, the columns of the gate kernel where
            the block is gated and of the up kernel where it is not;
            MoEfication's choice.
        exact: Boolean, whether to refuse routers with which the result could
            not start as the dense function, and to start routers at zero. With
            `False` a router starts as its own initializer says. Defaults to
            `True`.

    Raises:
        TypeError, ValueError: For a setting outside its range; when used, for
            a width that is no multiple of `num_experts`, or a router that does
            not suit.
        UpcycleError: When used, for an activation of which a hidden unit
            depends on others, such as softmax.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, router="ds_moe", expert_init=FeedForwardSlices(),
        ... )
        >>> moe.layers[0].num_experts, moe.layers[0].intermediate_dim
        (4, 4)
        >>> x = keras.ops.ones((2, 8))
        >>> report = keras_upcycle.verify_upcycle(dense, moe, x)
        >>> report.relative_difference < 1e-5
        True
    """

    def __init__(self, order: str = CONTIGUOUS, *, exact: bool = True):
        self.order = checks.check_choice("order", order, ORDERS)
        self.exact = checks.check_flag("exact", exact)

    def layout(self, num_experts, intermediate_dim):
        if intermediate_dim % num_experts:
            raise ValueError(
                "Slices share a block's hidden neurons out evenly, so "
                "`num_experts` must divide the hidden width of every block. "
                f"Received: num_experts={num_experts} for a width of "
                f"{intermediate_dim}. Pass a divisor of {intermediate_dim}."
            )
        return num_experts, intermediate_dim // num_experts

    def check(self, block, router, num_experts):
        hidden_slices.check(block)
        if not self.exact or router.meets_all_of_equals(num_experts):
            return
        raise ValueError(
            "A token must meet every slice with equal weight, or the sparse "
            "model does not start as the dense one. Received: "
            f"{_described(router)} with num_experts={num_experts} for block "
            f'{block.path!r}. Pass router="ds_moe" and choose fewer experts '
            "after training, with `set_active_experts`; or pass `exact=False` "
            "here."
        )

    def values(self, block, router, num_experts, seed):
        factors = dict.fromkeys(block.kernels, 1.0)
        factors["down_kernel"] = float(num_experts)
        return hidden_slices.first_values(
            block.kernels,
            num_experts,
            factors,
            order=self._neurons(block, num_experts, seed),
        )

    def layer_settings(self, block):
        return hidden_slices.layer_settings(block.kernels)

    def router_kernel(self, initializer, num_experts):
        return keras.initializers.Zeros() if self.exact else initializer

    def _neurons(self, block, num_experts, seed):
        """int32 `(F,)`, the order in which they are cut; `None` for as is."""
        if self.order == CONTIGUOUS:
            return None
        drawn = generator(seed)
        if self.order == RANDOM:
            return drawn.permutation(block.intermediate_dim).astype("int32")
        role = "gate" if block.gated else "up"  # what is activated
        kernel = ops.cast(block.kernels[f"{role}_kernel"].value, "float32")
        points = ops.convert_to_numpy(kernel).T
        labels = balanced_clusters(points, num_experts, drawn)
        return np.argsort(labels, kind="stable").astype("int32")


def _described(router):
    told = {
        name: getattr(router, name)
        for name in (
            "selection",
            "top_k",
            "threshold",
            "capacity_factor",
            "eval_capacity_factor",
        )
        if getattr(router, name, None) is not None
    }
    text = ", ".join(f"{name}={value!r}" for name, value in told.items())
    return f"a {type(router).__name__} with {text}"

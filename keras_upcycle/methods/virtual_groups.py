"""Fine-grained experts: the dense block cut into slices, in virtual groups.

Many small experts combine in more ways than few large ones. Cut the dense
block's hidden layer into `G` slices, make each an expert, and do that `E`
times: a token that meets all slices of one group meets the dense block.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    add_recipe,
)
from keras_upcycle.layers.expert_init import ExpertInit
from keras_upcycle.methods import hidden_slices
from keras_upcycle.routing.top_k_router import TopKRouter

OUTPUT, PUBLISHED = "output", "published"
SCALINGS = (OUTPUT, PUBLISHED)


class VirtualGroups(ExpertInit):
    """`num_experts` groups of slices of the dense block, one expert each slice.

    A block of hidden width `F` becomes `num_experts * granularity` experts of
    width `F / granularity`. Slices of a group start with the same router
    column, so a token's best experts are whole groups: ties go to the lowest
    index, and a group's experts stand side by side. With `top_k` a multiple of
    `granularity` the work a token does is that of `top_k / granularity` dense
    blocks, and the function is the dense one.

    What makes it exact is where the scale goes: a slice gets the weight
    `1 / granularity` of its group's, so its output kernel is multiplied by
    `granularity`. The output bias is added once and whole, outside the
    experts, whatever slices run. That holds for plain and gated blocks and any
    activation, with weights that are renormalised, which the authors measured
    to be the worse choice.

    Their best takes the softmax over all experts, then Top-K, and does not
    renormalise: `TopKRouter(K, normalize=False)`. The published scaling makes
    up for that: all kernels are multiplied by a root of one number. It goes
    through the activation, and where that is ReLU or ReLU squared the result
    is the dense function as long as all experts are equally likely. Other
    activations bend it. `recipe="virtual_group"` is this form.

    References: He et al., Upcycling Large Language Models into Mixture of
    Experts (arXiv 2410.07524), sections 3.2 and 3.3; the roots are those of
    `moe/upcycling_utils.py` in Megatron-LM, the authors' code.

    Args:
        granularity: Integer, at least 1, a divisor of the hidden width: slices
            of a block (`G`).
        scaling: String, `"output"` (default), ours, exact; or `"published"`:
            every kernel times `c ** (1/2)`, or `c ** (1/3)` where the block is
            gated or its activation is ReLU squared, with `c = E G^2 / K` where
            weights are a softmax over all experts, not renormalised, and
            `c = G` otherwise. The square is found by its values.
        exact: Boolean, whether to refuse routers with which the result could
            not be the dense function, under `scaling="output"`. Defaults to
            `True`.

    Raises:
        TypeError, ValueError: For a setting outside its range; when used, for
            a width that is no multiple of it, or a router that does not suit.
        UpcycleError: When used, for an activation of which a hidden unit
            depends on others, such as softmax.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, router=TopKRouter(top_k=4),
        ...     expert_init=VirtualGroups(granularity=2),
        ... )
        >>> moe.layers[0].num_experts, moe.layers[0].intermediate_dim
        (8, 8)
        >>> x = keras.ops.ones((2, 8))
        >>> report = keras_upcycle.verify_upcycle(dense, moe, x)
        >>> report.relative_difference < 1e-5
        True
    """

    def __init__(
        self,
        granularity: int,
        scaling: str = OUTPUT,
        *,
        exact: bool = True,
    ):
        self.granularity = checks.check_count("granularity", granularity)
        self.scaling = checks.check_choice("scaling", scaling, SCALINGS)
        self.exact = checks.check_flag("exact", exact)

    def layout(self, num_experts, intermediate_dim):
        if intermediate_dim % self.granularity:
            raise ValueError(
                "`granularity` must divide the hidden width of every block. "
                f"Received: granularity={self.granularity} for a width of "
                f"{intermediate_dim}. Pass a divisor of {intermediate_dim}."
            )
        return (
            num_experts * self.granularity,
            intermediate_dim // self.granularity,
        )

    def check(self, block, router, num_experts):
        if self.granularity > 1:
            hidden_slices.check(block)
        if not self.exact or self.scaling != OUTPUT:
            return
        # A router may have no fixed number.
        top_k = getattr(router, "top_k", None) or self.granularity
        if top_k % self.granularity:
            raise ValueError(
                "A token must meet whole groups of slices, or the sparse "
                "model does not start as the dense one. Received: "
                f"top_k={top_k} and granularity={self.granularity} for block "
                f"{block.path!r}. Make `top_k` a multiple of `granularity`, "
                "or pass `exact=False`."
            )
        if not router.sums_to_one:
            raise ValueError(
                "Combine weights must sum to 1, or no constant scale makes "
                "the slices the dense block again. Received: a "
                f"{type(router).__name__} with normalize=False for block "
                f"{block.path!r}. Pass `normalize=True`, or here "
                '`scaling="published"`, which is made for such weights, or '
                "`exact=False`."
            )

    def values(self, block, router, num_experts, seed):
        del seed
        return hidden_slices.first_values(
            block.kernels,
            self.granularity,
            self._scales(block, router, num_experts),
            groups=num_experts // self.granularity,
        )

    def layer_settings(self, block):
        return hidden_slices.layer_settings(block.kernels)

    def router_kernel(self, initializer, num_experts):
        return RepeatedColumns(initializer, self.granularity)

    def _scales(self, block, router, num_experts):
        """The factor on each of the block's weights."""
        factor = dict.fromkeys(block.kernels, 1.0)
        if self.scaling == OUTPUT:
            factor["down_kernel"] = float(self.granularity)
            return factor
        total = float(self.granularity)
        if not router.sums_to_one:
            groups = num_experts // self.granularity
            top_k = router.average_experts_per_token(num_experts)
            total = groups * self.granularity**2 / top_k
        kernels = [name for name in factor if name.endswith("kernel")]
        # Each counts once in the output, a squared hidden layer's twice.
        times = len(kernels)
        if times == 2 and _is_square(block.activation):
            times = 3
        for name in kernels:
            factor[name] = total ** (1 / times)
        for role in ("gate", "up"):  # a scaled layer, bias and all
            if f"{role}_bias" in factor:
                factor[f"{role}_bias"] = factor[f"{role}_kernel"]
        return factor


def _is_square(activation: Any) -> bool:
    """Whether twice the input is four times the output, as of ReLU squared.

    By its values, since Keras has no such activation and users' have any name.
    """
    points = np.linspace(-3.0, 3.0, 24).astype("float32")[None]
    function = keras.activations.get(activation)
    once, twice = (
        ops.convert_to_numpy(function(ops.convert_to_tensor(factor * points)))
        for factor in (1.0, 2.0)
    )
    return bool(np.any(once) and np.allclose(twice, 4.0 * once, rtol=1e-4))


@keras.saving.register_keras_serializable(package="keras_upcycle")
class RepeatedColumns(keras.initializers.Initializer):
    """Each column of another initializer's kernel several times in a row.

    Args:
        initializer: Of the kernel `(D, E)` whose columns are repeated.
        repeats: How often.

    Example:
        >>> kernel = RepeatedColumns("random_normal", repeats=2)((3, 4))
        >>> bool(keras.ops.all(kernel[:, 0] == kernel[:, 1]))
        True
    """

    def __init__(self, initializer: Any, repeats: int):
        self.initializer = keras.initializers.get(initializer)
        self.repeats = checks.check_count("repeats", repeats)

    def __call__(self, shape, dtype=None):
        columns = (shape[0], shape[1] // self.repeats)
        kernel = self.initializer(columns, dtype=dtype)
        return ops.repeat(kernel, self.repeats, axis=1)

    def get_config(self):
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "repeats": self.repeats,
        }


RECIPE = Recipe(
    name="virtual_group",
    paper="He et al., Upcycling LLMs into Mixture of Experts, arXiv 2410.07524",
    changes="experts are slices of the block, several to a token, scaled",
    costs="more, smaller experts to route to",
    fails=(
        "no gain from finer experts beyond 64; permuted or half drawn anew "
        "gained nothing over 0.1T tokens"
    ),
    choices={
        ANY: (
            Choice(
                "expert_init",
                VirtualGroups(granularity=8, scaling="published"),
                "the paper, section 4: G=8, of E8G8T8; kernels scaled as its "
                "code does, c^(1/3) each for ReLU squared and gated blocks, "
                "else c^(1/2), c = E G^2 / K. It starts close to the dense "
                "model; ours that starts exactly there is "
                "expert_init=VirtualGroups(8) with "
                "router=TopKRouter(8, capacity_factor=None)",
            ),
            Choice(
                "router",
                (
                    TopKRouter,
                    {
                        "top_k": 8,
                        "normalize": False,
                        "capacity_factor": None,
                        "load_balance_loss": 0.01,
                    },
                ),
                "the paper: T=8 slices; softmax over all experts before Top-K, "
                "not renormalised, which it measured better than the other "
                "order; loss 1e-2, in Megatron divided by K and added up over "
                "the layers, as ours; no z-loss",
            ),
            Choice("layers", "all", "the paper: every block, the first too"),
            Note(
                "learning rate",
                "near the peak of the dense training",
                "the paper: a low one does not leave the dense minimum",
            ),
        ),
    },
)
add_recipe(RECIPE)

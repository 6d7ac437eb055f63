"""Drop-Upcycling and its relatives: copies of which a part is drawn anew.

Copies have to drift apart before they can specialise. Drop-Upcycling
(Nakamura et al., arXiv 2502.19261) starts them apart: of every expert a share
of the hidden neurons is drawn anew, from the statistics of what stood there.
"""

from collections.abc import Iterator, Mapping
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
    SharedOut,
    add_recipe,
)
from keras_upcycle.layers import expert_init
from keras_upcycle.layers.expert_init import ExpertInit
from keras_upcycle.methods import hidden_slices
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.state.first_values import ByExpert

SHARED, INDEPENDENT = "shared", "independent"
SHARINGS = (SHARED, INDEPENDENT)
_ROLES = ("gate", "up", "down")


def like(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal draws with the mean and sample deviation of these entries."""
    spread = old.std(ddof=1) if old.size > 1 else 0.0
    new = rng.normal(old.mean(), spread, size=old.shape)
    return new.astype("float32")


class PartlyNew(ExpertInit):
    """Experts that differ from the dense block in a share of their neurons."""

    def __init__(self, ratio, index_sharing, permute):
        self.ratio = checks.check_share("ratio", ratio)
        self.index_sharing = checks.check_choice(
            "index_sharing", index_sharing, SHARINGS
        )
        self.permute = checks.check_flag("permute", permute)

    def draw(self, old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """New values for those entries of a weight that are replaced."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `draw(old, rng)`."
        )

    def orders(
        self, width: int, num_experts: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """For each expert the dense neurons that it holds, in its order."""
        for _ in range(num_experts):
            yield rng.permutation(width) if self.permute else np.arange(width)

    def draws(
        self, block: Any, num_experts: int, seed: int | None
    ) -> list[dict[str, Any]]:
        """What is random, expert by expert.

        Args:
            block: A `FeedForwardSite`, the dense block.
            num_experts: Integer, how many experts there are (`E`).
            seed: Integer or `None`, the seed of this block alone; `None` draws
                one.

        Returns:
            For each expert of width `F` `"order"`, int `(F,)`, the dense
            neuron at each place; `"chosen"`, from `"gate"`, `"up"` and
            `"down"` to the places drawn anew, int `(ratio * F,)`; and
            `"rng"`, from a weight's name to the generator of its new values.
        """
        rng = expert_init.generator(seed)
        roles = [role for role in _ROLES if f"{role}_kernel" in block.kernels]
        made = []
        for order in self.orders(block.intermediate_dim, num_experts, rng):
            width = len(order)
            count = int(width * self.ratio)
            chosen = rng.permutation(width)[:count]
            by_role = dict.fromkeys(roles, chosen)
            if self.index_sharing == INDEPENDENT:
                by_role = {r: rng.permutation(width)[:count] for r in roles}
            # A generator for each weight: they are built one at a time, and
            # in whatever order.
            rngs = dict(
                zip(block.kernels, rng.spawn(len(block.kernels)), strict=True)
            )
            made.append({"order": order, "chosen": by_role, "rng": rngs})
        return made

    def values(self, block, router, num_experts, seed) -> Mapping[str, Any]:
        del router
        draws = self.draws(block, num_experts, seed)
        return {
            name: self._first_value(name, variable, draws)
            for name, variable in block.kernels.items()
        }

    def _first_value(self, name, variable, draws):
        def make(experts):
            dense = ops.convert_to_numpy(ops.cast(variable.value, "float32"))
            return np.stack(
                [self.expert(name, dense, draws[e]) for e in experts]
            )

        return ByExpert(make)

    def expert(
        self, name: str, dense: np.ndarray, draw: Mapping[str, Any]
    ) -> np.ndarray:
        """One weight of one expert, given what is random.

        Args:
            name: String, the weight's name: `"up_kernel"`, `"down_bias"` and so
                on.
            dense: Array, float32, the dense block's weight of that name.
            draw: Mapping, an entry of `draws`.

        Returns:
            float32, of the shape of `dense`.
        """
        role, _ = name.split("_")
        axis = hidden_slices.neuron_axis(name)
        if axis is None:
            return dense.copy()
        made = np.take(dense, draw["order"], axis=axis)
        chosen = draw["chosen"][role]
        if len(chosen):
            place = [slice(None)] * made.ndim
            place[axis] = chosen
            # A generator of its own each time: making an expert twice gives
            # the same.
            rng = draw["rng"][name].bit_generator.seed_seq
            made[tuple(place)] = self.draw(
                made[tuple(place)], np.random.default_rng(rng)
            )
        return made


@expert_init.named("drop_upcycling")
class DropUpcycling(PartlyNew):
    """Copies of which a share of the hidden neurons is drawn anew.

    Of every expert `ratio * F` hidden neurons are chosen. Their entries in a
    kernel, columns of the gate and up kernels and rows of the down kernel, are
    replaced by draws from a normal distribution with the mean and the standard
    deviation (of a sample, `ddof=1`) of the entries replaced, kernel by
    kernel. Entries of gate and up biases are treated alike; the paper's models
    have none, so that is our choice, and the down bias is left alone.

    The paper says that an expert's kernels share one set of neurons; in its
    code, and so in its published results, each kernel has a set of its own.
    Both are here. With independent sets a share `(1 - ratio) ** 3` of a gated
    block's neurons is left whole, with a shared one `1 - ratio`.

    References: Nakamura et al. (arXiv 2502.19261), section 3; the authors on
    the two kinds of sets, github.com/Taishi-N324/Drop-Upcycling issue 1.

    Args:
        ratio: Float in `[0, 1]`, the share of the neurons. 0 is sparse
            upcycling, 1 keeps no neuron. Defaults to 0.5, the paper's best.
        index_sharing: String, `"shared"` (default, the paper's text) or
            `"independent"` (its code).
        permute: Boolean, whether an expert's neurons are also put in another
            order, as the code does, which changes no function. Defaults to
            `True`.
        router_initializer: String or `None`: `"uniform"` (default) draws the
            router as the released runs did, uniform with mean 0 and standard
            deviation 0.02; `None` leaves the router its own initializer.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, expert_init=DropUpcycling(ratio=0.25), seed=0,
        ... )
    """

    def __init__(
        self,
        ratio: float = 0.5,
        index_sharing: str = SHARED,
        permute: bool = True,
        *,
        router_initializer: str | None = "uniform",
    ):
        super().__init__(ratio, index_sharing, permute)
        self.router_initializer = checks.check_choice(
            "router_initializer", router_initializer, ("uniform", None)
        )

    def draw(self, old, rng):
        return like(old, rng)

    def router_kernel(self, initializer, num_experts):
        if self.router_initializer is None:
            return initializer
        seed = getattr(initializer, "seed", None)
        return CentredUniform(seed=seed if isinstance(seed, int) else None)


@expert_init.named("random_noise")
class RandomNoise(PartlyNew):
    """Copies to which noise is added, in a share of the hidden neurons.

    The paper's second baseline: entries chosen as for `DropUpcycling` keep
    their values and get normal noise on top.

    References: Drop-Upcycling (arXiv 2502.19261), its "random noise" baseline.

    Args:
        ratio: Float in `[0, 1]`, the share of the neurons. Defaults to 0.5.
        stddev: Float, at least 0: the standard deviation of the noise. Defaults
            to 0.02.
        index_sharing: String, `"shared"`: an expert's kernels share one set of
            neurons; or `"independent"` (default): each has a set of its own, as
            in the code, which alone defines this baseline.
        permute: Boolean, whether an expert's neurons are also put in another
            order, which changes no function. Defaults to `True`.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, expert_init=RandomNoise(stddev=1e-3), seed=0,
        ... )
    """

    def __init__(
        self,
        ratio: float = 0.5,
        stddev: float = 0.02,
        index_sharing: str = INDEPENDENT,
        permute: bool = True,
    ):
        super().__init__(ratio, index_sharing, permute)
        self.stddev = checks.check_number("stddev", stddev, at_least=0.0)

    def draw(self, old, rng):
        noise = rng.normal(0.0, self.stddev, size=old.shape)
        return old + noise.astype("float32")


@keras.saving.register_keras_serializable(package="keras_upcycle")
class CentredUniform(keras.initializers.Initializer):
    """Uniform, its sample mean taken off: the router of Drop-Upcycling.

    `(u - mean(u)) * stddev * sqrt(12)` with `u` uniform in `[0, 1)`.

    References: github.com/Taishi-N324/Drop-Upcycling, `torch_rand_002`.

    Args:
        stddev: Standard deviation. Defaults to 0.02.
        seed: Integer; `None` draws one, once.

    Example:
        >>> kernel = CentredUniform(seed=0)((16, 4))
        >>> abs(float(keras.ops.mean(kernel))) < 1e-8
        True
    """

    def __init__(self, stddev: float = 0.02, seed: int | None = None):
        self.stddev = checks.check_number("stddev", stddev, at_least=0.0)
        seed = checks.check_seed("seed", seed)
        if seed is None:
            seed = int(np.random.randint(2**31))
        self.seed = seed

    def __call__(self, shape, dtype=None):
        u = np.random.default_rng(self.seed).random(shape)
        values = (u - u.mean()) * self.stddev * 12**0.5
        return ops.convert_to_tensor(values.astype("float32"), dtype)

    def get_config(self):
        return {"stddev": self.stddev, "seed": self.seed}


RECIPE = Recipe(
    name="drop_upcycling",
    paper="Nakamura et al., Drop-Upcycling, arXiv 2502.19261",
    changes="a half of each expert's neurons is drawn anew",
    costs="a start far from the dense model",
    fails=(
        "its reviewers: ahead of Branch-Train-MiX only after 70B to 130B tokens"
    ),
    choices={
        ANY: (
            Choice(
                "expert_init",
                DropUpcycling(),
                "the paper: ratio 0.5, its best of 0, 0.5 and 1; one set of "
                "neurons for all kernels is the paper's text, while its code, "
                'and so its results, have index_sharing="independent"; router '
                "uniform with mean 0, std 0.02: its code",
            ),
            Choice(
                "router",
                (
                    TopKRouter,
                    {
                        "top_k": 2,
                        "capacity_factor": None,
                        "load_balance_loss": SharedOut(0.02, times_top_k=True),
                    },
                ),
                "the paper's models are Mixtral's kind: renormalised Top-2, "
                "dropless. Its training code has 0.02 of Hugging Face's loss: "
                "one over the logits of all L layers, not divided by K, so "
                "that its least value is K=2. Ours, of least value 1, is added "
                "up over the layers: 0.02 K / L each",
            ),
            Choice("layers", "all", "the paper: every block, the first too"),
            Note(
                "learning rate",
                "2e-4 to 2e-5, cosine, 2000 steps of warm-up",
                "the released training scripts; AdamW 0.9, 0.95, decay 0.1",
            ),
        ),
    },
)
add_recipe(RECIPE)

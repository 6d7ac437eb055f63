"""Step 3, second half: each expert's column of the router, trained alone."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_upcycle import checks
from keras_upcycle.conversion.arguments import LayersLike, RouterLike
from keras_upcycle.layers import expert_init
from keras_upcycle.methods.expert_weights import ExpertWeights, array, as_pool
from keras_upcycle.methods.upit.buckets import Buckets
from keras_upcycle.methods.upit.working_copy import WorkingCopy, samples_of
from keras_upcycle.training import progress

# Of the vectors before training: what routers start from here.
_STDDEV = 0.02
_ALPHA = 0.5


@dataclasses.dataclass
class VectorTraining:
    """How vectors are trained; the arguments of `routing_vectors`, checked.

    Raises:
        TypeError, ValueError: For a bad argument, or `alpha` where nothing is
            moved by the loss that it weighs.
    """

    alpha: Any = None
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-3
    equal_steps: bool = True
    train_experts: bool = False
    from_logits: bool = True
    seed: int | None = None
    verbose: int = 1

    def __post_init__(self):
        for name, check in (
            ("train_experts", checks.check_flag),
            ("epochs", checks.check_count),
            ("batch_size", checks.check_count),
            ("learning_rate", checks.check_factor),
            ("equal_steps", checks.check_flag),
            ("from_logits", checks.check_flag),
            ("seed", checks.check_seed),
            ("verbose", checks.check_verbose),
        ):
            setattr(self, name, check(name, getattr(self, name)))
        if self.alpha is None:
            self.alpha = _ALPHA
            return
        self.alpha = checks.check_share("alpha", self.alpha)
        if not self.train_experts:
            raise ValueError(
                "`alpha` weighs the model's loss, which moves no routing "
                "vector and no frozen expert, so that it would do nothing. "
                f"Received: alpha={self.alpha} with train_experts=False. Leave "
                "`alpha` out, or pass `train_experts=True`."
            )


class RoutingVectors(NamedTuple):
    """Trained columns of routers.

    Attributes:
        kernels: From a block's number, `FeedForwardSite.index`, to its
            router's kernel, float32 `(D, E)`; column `i` is expert `i`'s.
        experts: The experts; trained too where that was asked for.
    """

    kernels: Mapping[int, np.ndarray]
    experts: Sequence[ExpertWeights]


def routing_vectors(
    experts: Sequence[ExpertWeights],
    model: keras.Model,
    data: Any,
    buckets: Buckets | np.ndarray,
    *,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    alpha: float | None = None,
    epochs: int = 4,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    equal_steps: bool = True,
    train_experts: bool = False,
    from_logits: bool = True,
    seed: int | None = None,
    verbose: int = 1,
) -> RoutingVectors:
    """Trains each expert's routing vectors on its own bucket of samples.

    Expert `i` gets a vector `r` `(D,)` in every block that is to be converted.
    On its bucket `alpha * L_lm + (1 - alpha) * L_aux` is minimised, with the
    model's cross-entropy and `L_aux = -log sigmoid(h . r)`, the mean over real
    tokens, summed over blocks; `h` is what the block receives.

    Ours, where the paper is silent: the vector does not gate the expert, so
    `L_lm` does not move it; the expert is frozen unless `train_experts`; Adam,
    started anew for each expert; vectors start from N(0, 0.02^2); a batch that
    a bucket cannot fill is filled up with samples of the same bucket; and
    `equal_steps`. All that `L_aux` asks of a vector is to grow along its
    inputs, so one of more steps gets larger logits on any input, and with
    buckets of unequal size the router would start by sending everything to
    the experts of the largest.

    References: UpIT (arXiv 2410.01610), router initialisation.

    Args:
        experts: List of `ExpertWeights`, one for each bucket (`E`).
        model: A Keras model, the dense one whose other weights all experts get.
            It is not changed.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` as `fit` takes them,
            preprocessed: integer labels `(N,)` or token ids `(N, S)`.
        buckets: A `Buckets`, what `perplexity_buckets` or `random_buckets`
            gave, or an integer array `(N,)`, the number of each sample's
            bucket.
        router: String, `Router` or mapping: that of the later `upcycle_model`,
            of which it says which stacks stay dense. Defaults to `None`, the
            family's choice.
        layers: String, list, callable or mapping: that of the later
            `upcycle_model`; experts stand in these blocks alone. `"all"` where
            that gets `recipe="upit"`. Defaults to `None`, the family's choice.
        alpha: Float in `[0, 1]` or `None`, the weight of the model's loss; only
            with `train_experts`, since nothing else that trains is moved by
            that loss. Defaults to `None`: 0.5, the paper's.
        epochs: Integer, at least 1: epochs over each bucket. Defaults to 4, the
            paper's.
        batch_size: Integer, at least 1: samples of a step. Defaults to 32.
        learning_rate: Float above 0, the learning rate of Adam. Defaults to
            0.001.
        equal_steps: Boolean, whether every vector takes as many steps as the
            largest bucket's, a small bucket being gone through more often.
            `False` is the paper's letter: `epochs` over each bucket. Defaults
            to `True`.
        train_experts: Boolean, whether the experts train together with their
            vectors, another reading of the paper. Defaults to `False`.
        from_logits: Boolean, whether the model returns logits, not
            probabilities. Defaults to `True`.
        seed: Integer or `None`, the seed of the first vectors and of the order
            of samples. `None` (default) draws one.
        verbose: Integer, 0 or 1: 0 shows no progress. Defaults to 1.

    Returns:
        `RoutingVectors`. It warns of empty buckets, whose experts keep their
        random vectors.

    Raises:
        TypeError, ValueError, UpcycleError: As `perplexity_buckets`; also for
            buckets that do not fit samples and experts.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ...     keras.layers.Dense(3),
        ... ])
        >>> experts = [ExpertWeights.from_model(dense)] * 2
        >>> data = (np.ones((4, 8)), np.zeros(4, "int32"))
        >>> vectors = routing_vectors(
        ...     experts, dense, data, np.array([0, 1, 0, 1]), verbose=0,
        ... )
        >>> vectors.kernels[0].shape
        (8, 2)
    """
    how = VectorTraining(
        alpha=alpha,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        equal_steps=equal_steps,
        train_experts=train_experts,
        from_logits=from_logits,
        seed=seed,
        verbose=verbose,
    )
    experts = as_pool(experts)
    samples = samples_of(data)
    index = _index(buckets, len(samples), len(experts))
    copy = WorkingCopy(
        model,
        experts,
        router=router,
        layers=layers,
        weight=1.0 - how.alpha,
    )
    return train(copy, samples, index, how)


def train(
    copy: WorkingCopy, samples: Any, index: np.ndarray, how: VectorTraining
) -> RoutingVectors:
    """`routing_vectors`, with a working copy that is there already."""
    rng = expert_init.generator(how.seed)
    count = len(copy.experts)
    kernels = {
        site: rng.normal(0.0, _STDDEV, (layer.router.kernel.shape[0], count))
        for site, layer in copy.layers.items()
    }
    kernels = {site: k.astype("float32") for site, k in kernels.items()}
    own = [np.flatnonzero(index == number) for number in range(count)]
    empty = [number for number, rows in enumerate(own) if not len(rows)]
    if empty:
        warnings.warn(
            f"Experts {empty} are best at no sample, so their routing vectors "
            "stay random. Give more or more varied samples, or fewer experts.",
            stacklevel=3,
        )
    size = min(how.batch_size, max(map(len, own)))
    steps = [how.epochs * -(-len(rows) // size) for rows in own]
    if how.equal_steps:
        steps = [max(steps) if len(rows) else 0 for rows in own]
    copy.compile(
        how.alpha, how.learning_rate, how.from_logits, how.train_experts
    )
    trained = list(copy.experts)
    with progress.Reporter(silent=not how.verbose) as reporter:
        with reporter.steps("routing vectors", sum(steps)) as advance:
            for number, rows in enumerate(own):
                if not len(rows):
                    continue
                batches = _batches(rows, size, rng)
                copy.place(copy.experts[number])
                copy.restart_optimizer()
                for site, layer in copy.layers.items():
                    column = kernels[site][:, number : number + 1]
                    layer.router.kernel.assign(column)
                for _ in range(steps[number]):
                    copy.model.train_on_batch(*samples.rows(next(batches)))
                    advance()
                for site, layer in copy.layers.items():
                    kernels[site][:, number] = array(layer.router.kernel)[:, 0]
                if how.train_experts:
                    trained[number] = copy.placed(copy.experts[number])
    return RoutingVectors(kernels, trained)


def _batches(rows, size, rng):
    """Whole batches without end, each pass in an order of its own."""
    while True:
        order = rng.permutation(rows)
        total = -(-len(rows) // size) * size
        yield from np.resize(order, total).reshape(-1, size)


def _index(buckets, num_samples, num_experts):
    index = np.asarray(getattr(buckets, "index", buckets))
    fits = index.shape == (num_samples,) and index.dtype.kind in "iu"
    if not fits or not ((index >= 0) & (index < num_experts)).all():
        raise ValueError(
            "`buckets` must hold for each sample a number from 0 to "
            f"{num_experts - 1}. Received: shape {index.shape}, dtype "
            f"{index.dtype} for {num_samples} samples. Pass what "
            "`perplexity_buckets` gave for the same samples and experts."
        )
    return index

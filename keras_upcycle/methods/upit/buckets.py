"""Step 3, first half: which expert finds a sample likeliest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_upcycle import checks
from keras_upcycle.conversion.arguments import LayersLike, RouterLike
from keras_upcycle.layers import expert_init
from keras_upcycle.methods.expert_weights import ExpertWeights
from keras_upcycle.methods.upit.working_copy import WorkingCopy, samples_of
from keras_upcycle.training import progress


class Buckets(NamedTuple):
    """Samples sorted into one bucket for each expert.

    Attributes:
        index: int32 `(N,)`: the bucket of each sample.
        perplexity: float64 `(N, E)`: of each sample under each expert; `None`
            for buckets drawn at random.
    """

    index: np.ndarray  # type: ignore[assignment]  # tuples have an `index`
    perplexity: np.ndarray | None = None


def perplexity_buckets(
    experts: Sequence[ExpertWeights],
    model: keras.Model,
    data: Any,
    *,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    batch_size: int = 32,
    from_logits: bool = True,
    verbose: int = 1,
) -> Buckets:
    """Sorts samples by the expert under which their perplexity is lowest.

    A sample's perplexity is `exp` of the mean cross-entropy over its tokens,
    weighted by `sample_weight`, so that padding, and a prompt of weight 0, do
    not count. That mean is our reading: the paper says no more than
    perplexity. Ties go to the lowest number.

    References: UpIT (arXiv 2410.01610), router initialisation. The paper sorts
    a random 1 % of the training set.

    Args:
        experts: List of `ExpertWeights`, one for each bucket (`E`).
        model: A Keras model, the dense one whose other weights all experts get,
            such as the tuned one. It is not changed.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` as `fit` takes them,
            preprocessed: integer labels `(N,)` or token ids `(N, S)`.
        router: String, `Router` or mapping: that of the later `upcycle_model`,
            of which it says which stacks stay dense. Defaults to `None`, the
            family's choice.
        layers: String, list, callable or mapping: that of the later
            `upcycle_model`; experts stand in these blocks alone. `"all"` where
            that gets `recipe="upit"`. Defaults to `None`, the family's choice.
        batch_size: Integer, at least 1: samples at a time. Defaults to 32.
        from_logits: Boolean, whether the model returns logits, not
            probabilities. Defaults to `True`.
        verbose: Integer, 0 or 1: 0 shows no progress. Defaults to 1.

    Returns:
        `Buckets`.

    Raises:
        TypeError, ValueError: For a bad argument, or a sample without a token
            that counts.
        UpcycleError: As `upcycle_model`; if an expert does not fit the model,
            or the model predicts no labels.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ...     keras.layers.Dense(3),
        ... ])
        >>> expert = ExpertWeights.from_model(dense)
        >>> data = (np.ones((5, 8)), np.zeros(5, "int32"))
        >>> buckets = perplexity_buckets(
        ...     [expert, expert], dense, data, verbose=0,
        ... )
        >>> buckets.index.tolist()
        [0, 0, 0, 0, 0]
    """
    batch_size = checks.check_count("batch_size", batch_size)
    from_logits = checks.check_flag("from_logits", from_logits)
    verbose = checks.check_verbose("verbose", verbose)
    samples = samples_of(data)
    copy = WorkingCopy(model, experts, router=router, layers=layers)
    return sort(copy, samples, batch_size, from_logits, verbose)


def sort(copy, samples, batch_size, from_logits, verbose) -> Buckets:
    """`perplexity_buckets`, with a working copy that is there already."""
    count = len(samples)
    size = min(batch_size, count)
    starts = range(0, count, size)
    losses = np.zeros((count, len(copy.experts)))
    with progress.Reporter(silent=not verbose) as reporter:
        total = len(copy.experts) * len(starts)
        with reporter.steps("perplexity of the samples", total) as advance:
            for number, expert in enumerate(copy.experts):
                copy.place(expert)
                for start in starts:
                    # Filled up from the front: one shape for all batches.
                    rows = np.arange(start, start + size) % count
                    batch = copy.losses(samples.rows(rows), from_logits)
                    losses[rows, number] = batch
                    advance()
    return Buckets(
        losses.argmin(1).astype("int32"), np.exp(np.minimum(losses, 700.0))
    )


def random_buckets(
    num_samples: int, num_experts: int, seed: int | None = None
) -> Buckets:
    """Buckets that mean nothing, of equal size up to one: an ablation.

    References: UpIT (arXiv 2410.01610), router initialisation with random
    data.

    Args:
        num_samples: `N`.
        num_experts: `E`.
        seed: As for `expand_experts`.

    Example:
        >>> sorted(random_buckets(5, 2, seed=0).index.tolist())
        [0, 0, 0, 1, 1]
    """
    num_samples = checks.check_count("num_samples", num_samples)
    num_experts = checks.check_count("num_experts", num_experts)
    rng = expert_init.generator(checks.check_seed("seed", seed))
    index = np.arange(num_samples) % num_experts
    return Buckets(rng.permutation(index).astype("int32"))

"""Steps 2 to 4 of UpIT in one call."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.conversion import model_checks, plan, upcycle
from keras_upcycle.conversion.arguments import LayersLike, RouterLike
from keras_upcycle.methods.expert_weights import ExpertWeights
from keras_upcycle.methods.upit import buckets as sorting
from keras_upcycle.methods.upit import expansion
from keras_upcycle.methods.upit import routing_vectors as vectors
from keras_upcycle.methods.upit.assembly import MODEL, UpIT
from keras_upcycle.methods.upit.expansion import MOST_DISTANT, expand_experts
from keras_upcycle.methods.upit.working_copy import WorkingCopy, samples_of
from keras_upcycle.routing.top_k_router import TopKRouter

PERPLEXITY, RANDOM_DATA, RANDOM = "perplexity", "random_data", "random"
ROUTER_INITS = (PERPLEXITY, RANDOM_DATA, RANDOM)


def upit_upcycle(
    model: keras.Model,
    num_experts: int,
    experts: Sequence[ExpertWeights],
    data: Any = None,
    *,
    base: keras.Model | ExpertWeights | None = None,
    expand: bool = True,
    drop_rate: float = 0.5,
    parents: str = MOST_DISTANT,
    router_init: str = PERPLEXITY,
    alpha: float | None = None,
    epochs: int = 4,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    equal_steps: bool = True,
    train_experts: bool = False,
    from_logits: bool = True,
    other_weights: str = MODEL,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    dispatch: str = "auto",
    remat: bool = False,
    seed: int | None = None,
    verbose: int = 1,
) -> keras.Model:
    """A mixture from the checkpoints of an instruction tuning.

    Upcycling Instruction Tuning: experts are expanded, samples are sorted by
    perplexity, routing vectors trained, and all of it put together; see
    `expand_experts`, `perplexity_buckets`, `routing_vectors` and `UpIT`, which
    do a step each. Before it comes a `fit` of the dense model with
    `ExpertCheckpoints`, after it one of the result.

    References: Hui et al. (arXiv 2410.01610). Its ablations are `expand` with
    enough checkpoints, `parents="random"`, and `router_init`.

    Args:
        model: A Keras model, the dense one, tuned; the result gets what is in
            no expert from it. It is not changed.
        num_experts: Integer, at least 1: experts in each MoE layer (`E`).
        experts: List of `ExpertWeights`, `E` at most, such as
            `ExpertCheckpoints.experts`.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` as `fit` takes them,
            preprocessed: samples for the routers, a random 1 % of the training
            set in the paper; see `perplexity_buckets`. Defaults to `None`,
            which needs `router_init="random"`.
        base: A Keras model, the dense one before it was tuned, or its
            `ExpertWeights`. Defaults to `None`; needed for expansion.
        expand: Boolean, whether missing experts are made by `expand_experts`.
            If `False`, too few are an error. Defaults to `True`.
        drop_rate: Float in `[0, 1)`, the share of a parent's difference to
            `base` that a child drops. Defaults to 0.5; see `expand_experts`.
        parents: String, `"most_distant"` (default) or `"random"`: which two
            experts have a child; see `expand_experts`.
        router_init: String. `"perplexity"` (default, the method): buckets by
            perplexity; `"random_data"`: buckets at random; `"random"`: routers
            keep their own initializer.
        alpha: Float in `[0, 1]` or `None`, the weight of the model's loss where
            vectors are trained; only with `train_experts`. Defaults to `None`:
            0.5; see `routing_vectors`.
        epochs: Integer, at least 1: epochs over each bucket. Defaults to 4.
        batch_size: Integer, at least 1: samples at a time, of sorting and of
            training vectors. Defaults to 32.
        learning_rate: Float above 0, the learning rate of the vectors. Defaults
            to 0.001.
        equal_steps: Boolean, whether all vectors take equally many steps.
            Defaults to `True`; see `routing_vectors`.
        train_experts: Boolean, whether experts train with their vectors.
            Defaults to `False`.
        from_logits: Boolean, whether the model returns logits, not
            probabilities. Defaults to `True`.
        other_weights: String, whose weights stand outside the experts:
            `"model"` (default), those of `model`; `"last"`, of the last expert
            that holds them; or `"average"`, their mean over the experts that
            hold them. See `UpIT`.
        router: String, `Router` or mapping: how tokens meet experts, in all
            stacks or by stack. Defaults to `None`, the paper's in all stacks:
            Top-2 with a load-balancing loss. See `upcycle_model`.
        layers: String, list, callable or mapping: which blocks are converted.
            Defaults to `None`, the choice of the recipe `"upit"`: all blocks,
            the first of a stack too. See `upcycle_model`.
        dispatch: String, the engine of every new layer: `"auto"` (default),
            `"capacity"`, `"dropless"` or `"dense"`; see `MoEFeedForward`.
        remat: Boolean, whether the new layers recompute their hidden layers in
            the backward pass instead of keeping them. Defaults to `False`.
        seed: Integer or `None`, the seed of everything that is drawn. `None`
            (default) draws one.
        verbose: Integer, 0 or 1: 0 shows no progress. Defaults to 1.

    Returns:
        The sparse model, built.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: As `upcycle_model`; also if experts do not fit. Nothing
            was changed then.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ...     keras.layers.Dense(3),
        ... ])
        >>> dense.compile(
        ...     "adam", keras.losses.SparseCategoricalCrossentropy(True),
        ... )
        >>> base = ExpertWeights.from_model(dense)
        >>> x, y = np.random.normal(size=(8, 8)), np.arange(8) % 3
        >>> checkpoints = ExpertCheckpoints(every=0.5)
        >>> history = dense.fit(
        ...     x, y, batch_size=2, verbose=0, callbacks=[checkpoints],
        ... )
        >>> moe = upit_upcycle(
        ...     dense, 3, checkpoints.experts, (x, y), base=base, verbose=0,
        ...     router_init="random_data", seed=0,
        ... )
        >>> moe.layers[0].num_experts
        3
    """
    num_experts = checks.check_count("num_experts", num_experts)
    checks.check_choice("router_init", router_init, ROUTER_INITS)
    expand = checks.check_flag("expand", expand)
    drop_rate, seed = expansion.check_settings(drop_rate, parents, seed)
    if alpha is not None and router_init == RANDOM:
        raise ValueError(
            "`alpha` belongs to the training of routing vectors. Received: "
            f"alpha={alpha} with router_init={router_init!r}, which trains "
            "none. Leave `alpha` out, or choose another `router_init`."
        )
    how = vectors.VectorTraining(
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
    pool = UpIT(experts, other_weights=other_weights).donors
    if router is None:
        router = TopKRouter(top_k=min(2, num_experts))
    if expand and len(pool) < num_experts:
        if base is None:
            raise ValueError(
                "Expansion needs the dense model before it was tuned. "
                f"Received: base=None with {len(pool)} experts for "
                f"num_experts={num_experts}. Keep "
                "`base = ExpertWeights.from_model(model)` before tuning."
            )
        pool = expand_experts(
            pool,
            num_experts,
            base,
            drop_rate=drop_rate,
            parents=parents,
            seed=seed,
        )
    where: dict[str, Any] = {
        "router": router,
        "layers": layers,
        "recipe": "upit",
    }
    init = UpIT(pool, other_weights=other_weights)
    # All checks, before anything is trained.
    plan.make(
        model,
        num_experts,
        init=init,
        dispatch=dispatch,
        remat=remat,
        seed=seed,
        **where,
    )
    model_checks.check_donor(model)
    if router_init != RANDOM:
        if data is None:
            raise ValueError(
                "Routers are initialised from samples. Received: data=None "
                f"with router_init={router_init!r}. Pass some of the training "
                'data, or `router_init="random"`.'
            )
        samples = samples_of(data)
        copy = WorkingCopy(model, pool, weight=1.0 - how.alpha, **where)
        if router_init == PERPLEXITY:
            found = sorting.sort(
                copy,
                samples,
                how.batch_size,
                how.from_logits,
                how.verbose,
            )
        else:
            found = sorting.random_buckets(len(samples), num_experts, seed)
        trained = vectors.train(copy, samples, found.index, how)
        init = UpIT(trained.experts, trained, other_weights=other_weights)
    return upcycle.upcycle_model(
        model,
        num_experts,
        expert_init=init,
        dispatch=dispatch,
        remat=remat,
        seed=seed,
        **where,
    )

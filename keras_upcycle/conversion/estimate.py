"""`estimate_upcycle`: what a conversion will cost, before anything is built."""

from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_upcycle import checks, keras_internals
from keras_upcycle.conversion import (
    activations,
    heads,
    memory_plan,
    mesh_estimate,
    pairing,
    plan,
)
from keras_upcycle.conversion.arguments import (
    ExpertInitLike,
    LayersLike,
    MeshLike,
    RecipeLike,
    RouterLike,
)
from keras_upcycle.conversion.attention_experts import AttentionLike
from keras_upcycle.conversion.counts import bytes_of
from keras_upcycle.conversion.estimate_report import (
    LayerEstimate,
    UpcycleEstimate,
)
from keras_upcycle.conversion.mesh_estimate import MeshEstimate
from keras_upcycle.errors import UpcycleError


def estimate_upcycle(
    model: keras.Model | Callable[[], keras.Model],
    num_experts: int | None = None,
    *,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    expert_init: ExpertInitLike | None = None,
    experts: ExpertInitLike | None = None,
    recipe: RecipeLike | None = None,
    target: str | None = None,
    sequence_length: int | Mapping[str, int] | None = None,
    mesh: MeshLike | None = None,
    tokens_per_device: int | None = None,
    shard_dense: bool = False,
    budget: str | float | None = None,
    optimizer: Any = "adam",
    trainable: str = memory_plan.ALL,
    batch: int | None = None,
    attention: AttentionLike | None = None,
) -> Any:
    """The size and cost of `upcycle_model(...)`, without building anything.

    Args:
        model: A Keras model, dense and built, or a function of no arguments
            that makes it. The function's model gets shapes and no weights, so
            that a model too large for this machine can be asked about. It must
            not be compiled, as KerasHub's tasks are: return their backbone.
        num_experts: Integer, at least 1: experts in each MoE layer (`E`). May
            be left out with a `budget`, which then tries 2 to 128.
        router: String, `Router` or mapping: how tokens meet experts, for all
            converted blocks or by stack. Defaults to `None`, the recipe's or
            family's choice; see `upcycle_model`.
        layers: String, list, callable or mapping: which blocks would be
            converted, in all stacks or by stack. Defaults to `None`, the
            recipe's or family's choice; see `upcycle_model`.
        expert_init: String, `ExpertInit` or callable: what experts would start
            from, which may change how many there are and how wide. Defaults to
            `None`, the recipe's choice or `"copy"`; see `upcycle_model`.
        experts: An `ExpertInit` or `None`: what experts would be, such as
            `LowRankExperts(rank=8)`; see `upcycle_model`. Defaults to `None`.
        recipe: String or `Recipe`: what a paper chose, where you choose
            nothing. Defaults to `None`, this package's defaults; see
            `upcycle_model`.
        target: String or `None`: what the result is to be exported as, which
            chooses router and blocks where you do not; see `upcycle_model`.
            Defaults to `None`.
        sequence_length: Integer or mapping: tokens of an example, one number or
            one for each stack, such as `{"encoder": 512, "decoder": 114}`. With
            it the estimate also says what an example costs. Defaults to `None`.
        mesh: Mapping, `DeviceMesh`, `ExpertParallel` or integer: devices on
            which the model would train, as the sizes of their axes, such as
            `{"data": 2, "expert": 4}`, or a number, for all meshes of so many.
            The estimate then says what a device holds and sends. No device is
            needed. Defaults to `None`.
        tokens_per_device: Integer, at least 1: tokens of a device's share of a
            batch, for activations, exchange and operations. Defaults to
            `None`: weights, slots and gradients alone.
        shard_dense: Boolean, whether what is no expert is cut among all
            devices, as `ku.distribution.ExpertParallel(shard_dense=True)` does.
            Defaults to `False`.

        budget: String such as `"16GB"` or `"80GiB"`, or a number of bytes: the
            memory of one device, into which a step of training is to fit.
            Defaults to `None`: no plan is made.
        optimizer: String or optimizer, as `compile` takes it, whose slots count
            against the budget. Defaults to `"adam"`.
        trainable: String, `"all"` (default) or `"experts"`, for a model of
            which `freeze(moe, "dense")` freezes the rest.
        batch: Integer, at least 1: examples of a step, each of
            `sequence_length` tokens, whose activations count against the
            budget. Defaults to `None`: they are left out.
        attention: Boolean, `AttentionExperts`, `CopiedAttention` or `None`:
            whether attention would be experts too; see `upcycle_model`. All
            heads run, so operations are those of the routers; of copies, those
            of their projections too. Defaults to `None`, the recipe's choice.

    Returns:
        An `UpcycleEstimate`; `total_params` is exact. With a `budget` a
        `MemoryPlan`: whole and low-rank experts, in as many numbers, those that
        fit first and largest first, and why others do not.

    Raises:
        TypeError, ValueError, UpcycleError: As `upcycle_model` for the same
            arguments.
        TypeError, ValueError: For a mesh that is none, or that experts cannot
            be spread over; for the other two without one.
        TypeError, ValueError: For a budget, an optimizer or a batch that is
            none, and for the last three without a budget.
        UpcycleError: For a function whose model is compiled.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> estimate = estimate_upcycle(dense, num_experts=4)
        >>> estimate.dense_params, estimate.total_params
        (280, 1152)
        >>> def t5_base():
        ...     return keras_hub.models.T5Backbone(
        ...         vocabulary_size=32128, num_layers=12, num_heads=12,
        ...         hidden_dim=768, intermediate_dim=2048,
        ...         tie_embedding_weights=False,
        ...     )
        >>> print(f"{estimate_upcycle(t5_base, 32).total_params:,}")
        2,003,188,992
    """
    if callable(model) and not isinstance(model, keras.Layer):
        checks.check_takes("model", model, "")
        model = _shapes_of(model)
    if budget is None and (
        batch is not None or trainable != "all" or optimizer != "adam"
    ):
        raise ValueError(
            "`optimizer`, `trainable` and `batch` count against a `budget`. "
            f"Received: optimizer={optimizer!r}, trainable={trainable!r}, "
            f"batch={batch!r} and budget=None. Pass `budget`, such as '16GB'."
        )
    if budget is None and num_experts is None:
        raise TypeError(
            "`num_experts` must be an integer unless there is a `budget`. "
            "Received: num_experts=None and budget=None. Pass num_experts=8, "
            "say, or budget='16GB'."
        )
    if mesh is None and (tokens_per_device is not None or shard_dense):
        raise ValueError(
            "`tokens_per_device` and `shard_dense` are about devices. "
            f"Received: tokens_per_device={tokens_per_device!r}, "
            f"shard_dense={shard_dense!r} and mesh=None. Pass `mesh`, such as "
            "the number of devices."
        )
    chosen: dict[str, Any] = {
        "router": router,
        "layers": layers,
        "recipe": recipe,
        "target": target,
    }
    asked = (attention, recipe, target)
    init = plan.init_of(expert_init, experts)
    if budget is not None:
        return _plan_of(
            model,
            num_experts,
            init,
            chosen,
            asked,
            _tokens(batch, sequence_length),
            budget=budget,
            optimizer=optimizer,
            trainable=trainable,
        )
    decided = plan.make(model, num_experts, init=init, **chosen)
    routed = heads.asked(model, decided, *asked)
    flops = decided.family.matmul_flops(model)
    lengths = _lengths(sequence_length, flops)
    dense_bytes = sum(bytes_of(v) for v in model.weights)
    weight_bytes, trained, _ = _sizes(model, decided, routed)
    adam_bytes = 2 * trained
    parts = [_layer(block) for block in decided.blocks]
    parts += [_heads(made) for made in routed]
    dense_params = model.count_params()
    dense_flops = sum(flops.values())
    per_example = {}
    if lengths is not None:
        per_example = _per_example(decided, routed, flops, lengths)
    flops_per_token = dense_flops + sum(
        p.flops_per_token - p.dense_flops_per_token for p in parts
    )
    meshes: tuple[MeshEstimate, ...] = ()
    if mesh is not None:
        divided = mesh_estimate.parts_of(
            decided,
            model,
            weight_bytes,
            adam_bytes // 2,
            flops_per_token,
        )
        meshes = mesh_estimate.on_meshes(
            divided, mesh, tokens_per_device, shard_dense
        )
    return UpcycleEstimate(
        num_experts=decided.num_experts,
        dense_params=dense_params,
        total_params=dense_params
        + sum(p.total_params - p.dense_params for p in parts),
        active_params=dense_params
        + sum(p.active_params - p.dense_params for p in parts),
        dense_weight_bytes=dense_bytes,
        weight_bytes=weight_bytes,
        adam_bytes=adam_bytes,
        dense_flops_per_token=dense_flops,
        flops_per_token=flops_per_token,
        meshes=meshes,
        layers=tuple(parts),
        **per_example,
    )


def _shapes_of(make):
    """What a function makes, without values."""
    try:
        with keras_internals.without_values():
            return make()
    except ValueError as error:
        if "stateless scope" not in str(error):
            raise
        raise UpcycleError(
            "A function must make a model whose variables wait for values. "
            f"Received: {make!r}, which makes variables at once, as an "
            "optimizer does; KerasHub's tasks compile themselves. Return the "
            "task's backbone, or pass the model itself."
        ) from error


def _lengths(given, flops):
    """Tokens of an example in each stack; what is done once has one."""
    if given is None:
        return None
    stacks = [stack for stack in flops if stack is not None]
    if not isinstance(given, Mapping):
        given = dict.fromkeys(stacks, given)
    if set(given) != set(stacks):
        raise ValueError(
            "`sequence_length` must give a number for each of the stacks "
            f"{stacks}. Received: sequence_length={given!r}. Pass such a "
            "mapping, or one number for all."
        )
    lengths = {
        stack: checks.check_count("sequence_length", length)
        for stack, length in given.items()
    }
    return {**lengths, None: 1}


def _per_example(decided, routed, flops, lengths):
    dense = sum(lengths[stack] * size for stack, size in flops.items())
    sparse = dense
    for block in decided.blocks:
        length = lengths[block.site.stack]
        sparse += round(length * (block.flops(length) - block.dense_flops))
    sparse += sum(lengths[made.site.stack] * made.flops for made in routed)
    return {"dense_flops_per_example": dense, "flops_per_example": sparse}


def _layer(block):
    active = block.router.average_experts_per_token(block.num_experts)
    return LayerEstimate(
        path=block.site.path,
        dense_params=block.dense_params,
        total_params=block.total_params,
        active_params=round(active * block.expert_params) + block.always_params,
        dense_flops_per_token=block.dense_flops,
        flops_per_token=round(block.flops()),
    )


def _heads(made):
    return LayerEstimate(
        path=made.site.path,
        dense_params=made.dense_params,
        total_params=made.dense_params + made.added_params,
        active_params=made.active_params,
        dense_flops_per_token=made.dense_flops,
        flops_per_token=made.dense_flops + made.flops,
    )


def _sizes(model, decided, routed):
    """Bytes of all weights, of what trains, and of what does in MoE layers.

    Experts train where the dense weights that they stand for do, and a router
    where any expert does.
    """
    weights = sum(bytes_of(v) for v in model.weights)
    trained = sum(bytes_of(v) for v in model.trainable_weights)
    in_mixtures = 0
    for made in routed:
        added, replaced, trains = made.bytes
        weights += added
        trained -= replaced
        in_mixtures += trains
    for block in decided.blocks:
        kernels = block.site.kernels.values()
        router_trains = any(variable.trainable for variable in kernels)
        weights -= sum(map(bytes_of, kernels))
        trained -= sum(bytes_of(v) for v in kernels if v.trainable)
        for pair in pairing.of_block(block.site, block.counted):
            size = bytes_of(pair.sparse)
            weights += size
            trains = router_trains and pair.sparse.trainable
            if pair.dense is not None:
                # What low-rank experts share is frozen.
                trains = pair.dense.trainable and pair.sparse.trainable
            in_mixtures += size if trains else 0
    return weights, trained + in_mixtures, in_mixtures


def _plan_of(model, num_experts, init, chosen, asked, tokens, **limits):
    kinds: tuple[str, ...] = (memory_plan.WHOLE, memory_plan.LOW_RANK)
    if init is not None:
        kinds = (memory_plan.WHOLE,)  # as the caller says

    def sizes(count, kind):
        low_rank = kind == memory_plan.LOW_RANK
        decided = plan.make(
            model, count, init="low_rank" if low_rank else init, **chosen
        )
        routed = heads.asked(model, decided, *asked)
        weights, trained, in_mixtures = _sizes(model, decided, routed)
        params = model.count_params() + sum(
            block.total_params - block.dense_params for block in decided.blocks
        )
        params += sum(made.added_params for made in routed)
        trains = {
            memory_plan.ALL: trained,
            memory_plan.EXPERTS: in_mixtures,
        }
        kept = {
            part: tokens
            and tokens
            * activations.kept_bytes(
                decided, model, dense_trains=part == memory_plan.ALL
            )
            for part in trains
        }
        return len(decided.blocks), params, weights, trains, kept

    return memory_plan.make(sizes, num_experts, kinds=kinds, **limits)


def _tokens(batch, length):
    """Of a step, 0 where nobody says."""
    if batch is None:
        return 0
    batch = checks.check_count("batch", batch)
    if isinstance(length, Mapping):
        length = sum(length.values())
    if length is None:
        raise ValueError(
            "`batch` is examples of `sequence_length` tokens. Received: batch="
            f"{batch} and sequence_length=None. Pass both."
        )
    return batch * checks.check_count("sequence_length", length)

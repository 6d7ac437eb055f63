"""`upcycle_model`: find, plan, check everything, rewrite, verify."""

import warnings

import keras
from keras import ops

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import (
    compile_settings,
    heads,
    model_checks,
    pairing,
    plan,
)
from keras_upcycle.conversion.arguments import (
    ExpertInitLike,
    LayersLike,
    RecipeLike,
    RouterLike,
)
from keras_upcycle.conversion.attention_experts import AttentionLike
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import FeedForwardSite, copy_checks, surgery
from keras_upcycle.layers import first_expert_values
from keras_upcycle.routing.router import clone
from keras_upcycle.state import half_precision


def upcycle_model(
    model: keras.Model,
    num_experts: int,
    *,
    router: RouterLike | None = None,
    layers: LayersLike | None = None,
    expert_init: ExpertInitLike | None = None,
    experts: ExpertInitLike | None = None,
    dispatch: str = "auto",
    remat: bool = False,
    expert_dropout: float | None = None,
    seed: int | None = None,
    recipe: RecipeLike | None = None,
    target: str | None = None,
    attention: AttentionLike | None = None,
) -> keras.Model:
    """A sparse copy of a dense model: experts start as the dense blocks.

    Sparse Upcycling (Komatsuzaki et al., arXiv 2212.05055). The result is of
    the same kind (a backbone stays a backbone, a task a task with its
    preprocessor and head), and trains with plain `fit`. With the default
    renormalised weights it computes what the dense model computes on every
    token that some expert processes; `verify_upcycle` shows how many.

    What layers hold besides weights arrives as well: statistics, vocabularies,
    what `save_own_variables` and `save_assets` write, arrays and settings in
    attributes. A layer that cannot be carried over whole is refused by name.

    The input model is never changed and shares no weights with the result.
    Frozen layers stay frozen; an expert is frozen where its dense kernel was,
    a router where all of its block was.

    If the model is compiled, the result is compiled with the same loss,
    metrics and run settings and a new optimizer of the same class and
    settings, without its slots, its step count and the state of a loss scale:
    `upcycle_optimizer` carries these. What the optimizer was told of single
    variables (`exclude_from_weight_decay`, `scale_learning_rate`) holds for
    what came of them; routers are new, and go by names and paths. Metrics are
    made anew; plain functions are carried as they are, and so are losses whose
    config does not tell all of them. What cannot be carried is left out, with
    a warning, and the rest is carried.

    A model whose weights themselves are bfloat16 or float16 trains badly or
    not at all, dense or sparse; a warning says with which optimizers.

    Args:
        model: A Keras model, dense and built: a Transformer of KerasHub, its
            backbone or a task (`guides/models.md` lists them), a functional
            model that holds one as a layer, one with KerasHub's Transformer
            layers or blocks that `register_block` taught, a functional or
            `Sequential` model with `Dense -> Dense` pairs, in plain models
            inside it too, or what `register_family` taught.
        num_experts: Integer, at least 1: experts in each MoE layer (`E`).
        router: String, `Router` or mapping: one of `"top_k"`,
            `"expert_choice"`, `"default_moe"` and `"ds_moe"`, a `Router` whose
            settings every converted block gets, or a mapping of these by stack,
            such as `{"encoder": "expert_choice", "decoder": "top_k"}`. In a
            mapping `None` leaves a stack dense. Defaults to `None`, the
            recipe's or else the family's: Expert Choice with
            `capacity_factor=2` for stacks that look both ways, Top-2 for causal
            ones and Dense pairs.
        layers: String, integer, slice, list, callable or mapping:
            `"last_half"` (default for vision and Dense pairs), `"every_other"`
            (from the second; default for language), `"all"` (the first too),
            `"all_but_first"`, the number of a block (negative ones count from
            the end), its name or a pattern of names, such as
            `"*encoder*"` (`find_feed_forwards` lists them), a list of these, a
            slice of a stack's blocks, a function from a `FeedForwardSite` to a
            bool, or a mapping of these by stack, where `None` leaves a stack
            dense. In a model with several stacks numbers and slices stand in a
            mapping. No default converts the first block of a Transformer's
            stack; a choice of yours that does is followed, with a warning. A
            recipe converts what its paper converts. Defaults to `None`, the
            recipe's or family's choice.
        expert_init: String, `ExpertInit` or callable: what experts start from.
            `"copy"` (default), `"drop_upcycling"`, `"random_noise"`,
            `"feed_forward_slices"`, `"shared_experts"`,
            `"replicate_shuffle_cut"`, `"random"` (drawn anew, to compare with),
            an `ExpertInit` such as `VirtualGroups(4)` or
            `BranchTrainMix(models)`, or a function `(value, num_experts, name)`
            to expert values. Some change how many experts there are, and how
            wide.
        experts: An `ExpertInit` or `None`: what experts are, such as
            `LowRankExperts(rank=8)`, which fits one card: the dense block once,
            frozen, and a low-rank difference for each expert. The same as
            `expert_init`, of which one alone may be given. Defaults to `None`:
            whole networks.
        dispatch: String, the engine of every new layer: `"auto"` (default),
            `"capacity"`, `"dropless"` or `"dense"`; see `MoEFeedForward`.
        remat: Boolean, whether the new layers recompute their hidden layers in
            the backward pass instead of keeping them; see `MoEFeedForward`.
            Defaults to `False`.
        expert_dropout: Float in `[0, 1)` or `None`, the dropout rate on the
            experts' hidden layers, apart from the model's. Sparse Upcycling
            fine-tuned its Large model with 0.3 where the rest had 0.1 (arXiv
            2212.05055, appendix A). `None` (default) takes the dense block's;
            `set_dropout` sets rates later.
        seed: Integer or `None`, the seed of the routers' kernels and of what an
            `expert_init` draws. `None` (default) draws one.
        recipe: String or `Recipe`: what a paper chose, where you choose
            nothing. `"sparse_upcycling"`, `"drop_upcycling"`, `"default_moe"`,
            `"ds_moe"`, `"virtual_group"`, `"qwen2_moe"`, `"shared_experts"`,
            `"skywork"`, and with an `expert_init` of yours
            `"branch_train_mix"`, `"upit"` and `"carving"`.
            `print(keras_upcycle.get_recipe(...))` shows the choices with their
            sources. Not all start as the dense model does. Defaults to `None`:
            this package's defaults.
        target: String, `"mixtral"` (of a Llama or Mistral) or `"qwen3_moe"` (of
            a Qwen3), or `None`: what the result is to be exported as. Where you
            choose nothing, router and blocks are those of such a mixture; what
            it could not say is refused now, and not when training is done. See
            `export_model`. Defaults to `None`.
        attention: Boolean, `AttentionExperts`, `CopiedAttention` or `None`:
            whether attention becomes experts too, its heads or copies of it,
            and how, as by `upcycle_attention`. `True` takes the defaults of
            `AttentionExperts`, `False` leaves attention dense. Defaults to
            `None`: the recipe's choice (`"ds_moe"` routes heads), or else
            dense.

    Returns:
        The sparse model, built.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: A `ValueError`: no block found, the model is not built,
            sparse already, of an unknown class, or holds weights that must
            not be copied. Nothing was changed or built then.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = upcycle_model(dense, num_experts=4)
        >>> type(moe.layers[0]).__name__
        'MoEFeedForward'
    """
    expert_init = plan.init_of(expert_init, experts)
    decided = plan.make(
        model,
        num_experts,
        router=router,
        layers=layers,
        init=expert_init,
        dispatch=dispatch,
        remat=remat,
        expert_dropout=expert_dropout,
        seed=seed,
        recipe=recipe,
        target=target,
    )
    heads_planned = heads.asked(model, decided, attention, recipe, target)
    model_checks.check_donor(model)
    if decided.first_blocks:
        warnings.warn(
            f"The first block, {', '.join(decided.first_blocks)}, will be "
            "converted, as asked. Sparse Upcycling (arXiv 2212.05055, "
            "appendix B.4) found that sparsifying the very first block tends "
            "to be problematic.",
            stacklevel=2,
        )
    advice = decided.init.advice()
    if advice is not None:
        warnings.warn(advice, stacklevel=2)
    new_layers = {
        block.site.index: _layer(decided, order, block)
        for order, block in enumerate(decided.blocks)
    }
    result = decided.family.rebuild(model, decided.findings.sites, new_layers)
    _check_complete(model, result, decided, new_layers)
    copy_checks.check_methods(model, result)
    surgery.copy_added(model, result)
    for site in decided.chosen:
        _copy_trainable(site, new_layers[site.index])
        _copy_seed(site, new_layers[site.index])
    decided.init.finish(model, result)
    if heads_planned:
        heads.install(decided.family, result, heads_planned, seed)
    places = [(site, new_layers[site.index]) for site in decided.chosen]
    compile_settings.carry(
        decided.family,
        model,
        result,
        lambda: [
            (pair.sparse, pair.dense)
            for pair in pairing.pairs(model, result, places)
        ],
    )
    half_precision.warn_of_training(model)
    return result


def find_feed_forwards(
    model: keras.Model, explain: bool = False
) -> list[FeedForwardSite]:
    """The feed-forward blocks that `upcycle_model` could convert.

    Args:
        model: A Keras model, built, of a kind that `upcycle_model` takes.
        explain: Boolean, whether to print every candidate too, and why it was
            taken or turned down. Defaults to `False`.

    Returns:
        The sites, inputs first.

    Raises:
        TypeError, UpcycleError: As `upcycle_model`, except that finding no
            block is no error.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(3),
        ... ])
        >>> find_feed_forwards(dense, explain=True)
        DensePair in 'sequential...': 0 blocks found, 1 turned down.
          no   dense...: its output is an output of the model
        []
    """
    explain = checks.check_flag("explain", explain)
    family = families.family_of(model)
    findings = family.find(model)
    if explain:
        print(
            f"{family.name} in {model.name!r}: {len(findings.sites)} blocks "
            f"found, {len(findings.rejected)} turned down."
        )
        for site in findings.sites:
            print(
                f"  {site.index:<4} {site.path} ({site.stack}): "
                f"{site.hidden_dim} -> {site.intermediate_dim} -> "
                f"{site.hidden_dim}"
                f"{', gated' if site.gated else ''}"
            )
        for path, reason in findings.rejected:
            print(f"  no   {path}: {reason}")
    return findings.sites


def _layer(decided, order, block):
    """The unbuilt layer for a block, told what its experts start from."""
    site, num_experts = block.site, block.num_experts
    seed = decided.seed
    if seed is not None:  # of every block its own, and still a seed
        seed = (seed + order) % (checks.LARGEST_SEED + 1)
    router = clone(block.router, seed)
    initializer = decided.init.router_kernel(
        router.kernel_initializer, num_experts
    )
    first_expert_values.check_router_kernel(
        initializer, (site.hidden_dim, num_experts), site
    )
    router.kernel_initializer = initializer
    layer = block.layer(router)
    values = first_expert_values.first_values(
        decided.init, site, router, num_experts, seed
    )
    decided.init.start_router(site, router, num_experts, seed)
    layer.start_from(values)
    return layer


def _copy_trainable(site, layer):
    """An expert is frozen where its dense kernel was, and so is its bias."""
    owners = {
        id(variable): owner
        for whole in site.layers
        for owner in keras_internals.all_layers(whole)
        for variable in keras_internals.own_variables(owner)
    }

    def trains(variable):
        owner = owners.get(id(keras_internals.shown(variable)))
        return variable.trainable and (owner is None or owner.trainable)

    flags = {name: trains(variable) for name, variable in site.kernels.items()}
    layer.trainable = any(flags.values())
    for networks in layer.networks:
        for role, projection in networks.projections.items():
            if networks is layer.experts and layer.low_rank is not None:
                # What all share is frozen anyhow.
                projection.trainable = flags[f"{role}_kernel"]
                continue
            bias = projection.bias is not None and flags[f"{role}_bias"]
            projection.trainable = flags[f"{role}_kernel"] or bias
            for part, variable in (
                ("kernel", projection.kernel),
                ("bias", projection.bias),
            ):
                if variable is not None:
                    variable.trainable = flags[f"{role}_{part}"]
    if layer.output_bias is not None:
        layer.output_bias.trainable = flags["down_bias"]


def _copy_seed(site, layer):
    """The experts' dropout goes on with the random numbers of the block's."""
    for own in site.layers:
        if type(own) is not keras.layers.Dropout:
            continue
        old = keras_internals.seed_of(own)
        dropout = layer.experts.hidden_dropout
        if old is not None and dropout is not None:
            keras_internals.seed_of(dropout).assign(ops.copy(old.value))


def _check_complete(model, result, decided, new_layers):
    """That the surgery did what was asked; a failure is a bug, not a use."""
    inside = {id(layer) for layer in keras_internals.all_layers(result)}
    placed = [
        layer
        for layer in new_layers.values()
        if id(layer) in inside and layer.built
    ]
    if len(placed) != len(new_layers):
        raise UpcycleError(
            f"The family {decided.family.name!r} did not rebuild the model as "
            f"planned: `rebuild` must put every layer of `replacements` into "
            f"its result, built. Received: {len(placed)} of "
            f"{len(new_layers)}. This is a bug of the family; please report "
            "it."
        )
    grown = sum(
        block.total_params - block.dense_params for block in decided.blocks
    )
    expected = model.count_params() + grown
    if result.count_params() != expected:
        raise UpcycleError(
            f"The family {decided.family.name!r} did not rebuild the model as "
            f"planned: expected {expected:,} parameters. Received: "
            f"{result.count_params():,}. This is a bug of the family; please "
            "report it."
        )

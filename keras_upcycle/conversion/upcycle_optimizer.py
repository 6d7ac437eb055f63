"""`upcycle_optimizer`: the dense optimizer's memory, for the sparse model."""

import warnings

import keras
from keras import ops

from keras_upcycle import checks, keras_internals
from keras_upcycle.conversion import pairing
from keras_upcycle.errors import UpcycleError
from keras_upcycle.optimizers import per_expert, scaled_optimizer

# Slots of Keras's optimizers by what they hold; they scale as the gradient,
# as its square, as its size, or as the weights themselves.
_FIRST = {"_momentums", "momentums", "_m", "_average_gradients"}
_SECOND = {
    "_velocities",
    "_velocity_hats",
    "adam_velocities",
    "_r",
    "_c",
    "_v",
    "_accumulators",
    "_accumulated_grads",
    "_accumulated_delta_vars",
}
SIZES = {"_u"}
_SUMS = {"_accumulated_gradients"}
_WEIGHTS = {"_model_variables_moving_average"}
# What adds up over tokens.
ADDED_UP = _FIRST | _SECOND | _SUMS

CARRY, NEW = "carry", "new"
SLOTS = (CARRY, NEW)


def upcycle_optimizer(
    optimizer: keras.optimizers.Optimizer,
    dense: keras.Model,
    moe: keras.Model,
    *,
    slots: str = CARRY,
    rescale_moments: bool | None = None,
) -> keras.optimizers.Optimizer:
    """An optimizer for the sparse model that goes on where the dense one was.

    Every expert gets the slots (momentum, second moment, ...) of the dense
    block that it is a copy of; what was copied keeps its own; `iterations`,
    the learning rate and a loss scale go on, and so does a schedule; what was
    excluded from weight decay stays excluded. Routers are new: their slots
    start as a new optimizer's do, and bias correction and decay count their
    own steps, without which Adam's first update of a router would be 3.2
    times too large. With one expert a block, training goes on as if the model
    had never been upcycled.

    With `slots="new"` that is so for all variables: the first update is that
    of a new optimizer at the rate that the schedule has come to.

    Sparse Upcycling (arXiv 2212.05055, appendix B.6) carried the slots in
    vision, where it helped at every number of experts, and made them new in
    language, where it gained nothing; the step, and with it the learning
    rate, went on in both. The default here is `"carry"` for every family,
    T5 included, with `rescale_moments`: it was as good as `"new"` or better
    wherever it was tried (`guides/study.md`). Pass `"new"` for the paper's
    language recipe.

    Keras's Adafactor, Lamb and Muon look at a whole variable, here the stack
    of all experts. The result looks at every expert (see `per_expert`).

    Args:
        optimizer: A Keras optimizer, the dense model's after training: any of
            Keras's but `MultiOptimizer`, or one of your own whose slots are
            lists in the order of the variables; without the factors of
            `scale_learning_rate`, which can be given to the result. Not
            changed.
        dense: A Keras model, the dense one, as given to `upcycle_model`.
        moe: A Keras model, what `upcycle_model` made of it; not yet trained.
        slots: String, `"carry"` (default) or `"new"`. Gradients that were
            accumulated and not yet applied are carried in both; a moving
            average of the weights starts at the weights where it is new.
        rescale_moments: Boolean or `None`, whether experts' moments are also
            scaled to what their gradients will be. An expert sees a share of
            the tokens, so with `E` experts and `C` experts a token first
            moments get `1 / E` and second ones `1 / (C * E)`; one expert keeps
            what it has. Sparse Upcycling (arXiv 2212.05055, appendix B.6)
            copies them as they are (`False`), and experts' first steps are
            smaller for it, which cost a third of the gain in `guides/study.md`.
            Only with `slots="carry"`, where `None`, the default, means `True`.

    Returns:
        A new optimizer of the same settings, built for
        `moe.trainable_variables`. Pass it to `moe.compile`.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer, or `rescale_moments`
            no boolean.
        ValueError: If it was not built, or for other variables; for an
            unknown `slots`, and `rescale_moments` with `slots="new"`.
        UpcycleError: If the models do not belong together, or the optimizer
            has variables that cannot be placed; the message names them.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> dense.compile("adam", "mse")
        >>> x = keras.ops.ones((4, 8))
        >>> _ = dense.fit(x, x, epochs=2, verbose=0)
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> adam = upcycle_optimizer(dense.optimizer, dense, moe)
        >>> int(adam.iterations)
        2
        >>> moe.compile(adam, "mse")
    """
    rescale_moments = _check_arguments(optimizer, slots, rescale_moments)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = upcycle_optimizer(
            optimizer.inner_optimizer,
            dense,
            moe,
            slots=slots,
            rescale_moments=rescale_moments,
        )
        result = keras.optimizers.LossScaleOptimizer(
            inner,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
        result.build(moe.trainable_variables)
        copy_scalars(optimizer, result)
        return result
    check_placed(optimizer)
    numbers = {
        id(v): n
        for n, v in enumerate(keras_internals.optimizer_targets(optimizer))
    }
    pairs = pairing.of_whole_experts(dense, moe)
    _check_whose(optimizer, dense, numbers, pairs)
    by_variable = {id(pair.sparse): pair for pair in pairs}
    targets = [by_variable[id(v)] for v in moe.trainable_variables]
    fresh = [
        n
        for n, pair in enumerate(targets)
        if slots == NEW or id(pair.dense) not in numbers
    ]
    result = _same_settings(optimizer, fresh, slots)
    spared = [
        pair.sparse
        for pair in targets
        if not keras_internals.decays(
            optimizer,
            pair.dense if id(pair.dense) in numbers else pair.sparse,
        )
    ]
    if spared:
        result.exclude_from_weight_decay(var_list=spared)
    result.build(moe.trainable_variables)
    copy_scalars(optimizer, result)
    old = keras_internals.optimizer_slots(optimizer)
    new = keras_internals.optimizer_slots(result)
    for name, of_name in new.items():
        for slot, pair in zip(of_name, targets, strict=True):
            number = numbers.get(id(pair.dense))
            if slots == NEW and name not in _SUMS:
                number = None
            if slot is not None:
                _fill(slot, name, pair, old, number, rescale_moments)
    return result


def _check_arguments(optimizer, slots, rescale_moments):
    """Whether moments are rescaled; raises for what cannot be carried."""
    if rescale_moments is not None:
        rescale_moments = checks.check_flag("rescale_moments", rescale_moments)
    checks.check_instance(
        "optimizer",
        optimizer,
        keras.optimizers.Optimizer,
        "a Keras optimizer, such as `dense.optimizer` after training",
    )
    checks.check_choice("slots", slots, SLOTS)
    if slots == NEW and rescale_moments:
        raise ValueError(
            "`rescale_moments` scales the slots that are carried. Received: "
            f"slots={slots!r} and rescale_moments=True. Leave one of them out."
        )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise UpcycleError(
            "A `MultiOptimizer` chooses by paths, which the sparse model does "
            f"not share. Received: optimizer={optimizer.name!r}. Upcycle with "
            "one optimizer for all, and give it several learning rates after."
        )
    if isinstance(optimizer, scaled_optimizer.ScaledOptimizer):
        raise UpcycleError(
            "Factors on rates or gradients are given by paths, which the "
            "sparse model does not share. Received: optimizer="
            f"{optimizer.name!r} with factors. Take them off, by "
            "`scale_learning_rate` and `scale_gradients` with `{}`, and scale "
            "the result of `upcycle_optimizer`."
        )
    if not optimizer.built:
        raise ValueError(
            "`optimizer` must have been built by training, or loaded with a "
            f"trained model. Received: {type(optimizer).__name__} without "
            "slots. An optimizer without memory needs no upcycling: pass a "
            "new one to `moe.compile`."
        )
    return slots == CARRY if rescale_moments is None else rescale_moments


def _check_whose(optimizer, dense, numbers, pairs):
    """Raises for an optimizer of another model's variables."""
    known = {id(pair.dense) for pair in pairs if pair.dense is not None}
    strangers = numbers.keys() - known
    if strangers:
        raise ValueError(
            "`optimizer` must be that of the dense model. Received: "
            f"{type(optimizer).__name__} built for {len(numbers)} variables, "
            f"of which {len(strangers)} are not in {dense.name!r}. Pass "
            "`dense.optimizer`."
        )


def _fill(slot, name, pair, old, number, rescale_moments):
    """One slot of the sparse model's optimizer.

    Args:
        slot: The variable.
        name: Which slot, such as `"_momentums"`.
        pair: Of the weight that it belongs to.
        old: The dense optimizer's slots, by name.
        number: Of the dense weight among its slots; `None` for a new start.
        rescale_moments: Whether moments of experts are scaled.
    """
    if number is None:
        if name in _WEIGHTS:
            slot.assign(ops.copy(pair.sparse.value))
        return
    source = old[name][number].value
    if pair.relation == pairing.COPIED:
        slot.assign(ops.copy(source))
        return
    if name in ("_r", "_c") and len(pair.dense.shape) < 2:
        # A bias `(F,)` has no factors in Adafactor, its stack `(E, 1, F)` has:
        # the mean over the last axis, and over the one before, of length 1.
        source = old["_v"][number].value
        source = ops.mean(source) if name == "_r" else source
    scale = _scale(name, pair.layer, rescale_moments)
    slot.assign(_for_each_expert(scale * source, slot))


def check_placed(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises for a variable that is neither a known slot nor a scalar."""
    slots = keras_internals.optimizer_slots(optimizer)
    scalars = keras_internals.optimizer_scalars(optimizer).values()
    placed = {id(v) for vs in slots.values() for v in vs}
    placed |= {id(v) for v in scalars if not len(v.shape)}
    lost = [v.path for v in optimizer.variables if id(v) not in placed]
    if lost:
        raise UpcycleError(
            f"{type(optimizer).__name__} has variables of which it is not "
            "known whose slots they are. Expected lists in the order of the "
            f"model's variables, as Keras's own have. Received: {lost}. "
            "Compile the sparse model with a new optimizer instead."
        )


def _same_settings(optimizer, fresh, slots):
    config = optimizer.get_config()
    kind = type(optimizer).__name__
    if isinstance(optimizer, keras_internals.FreshSlots):
        raise UpcycleError(
            "`optimizer` must be that of the dense model. Received: "
            f"optimizer={optimizer.name!r}, a {kind} that was made for a "
            "sparse model already. Pass `dense.optimizer`."
        )
    for base, continued in per_expert.CONTINUED.items():
        if per_expert.is_kerass(optimizer, base):
            since = keras_internals.whole(optimizer.iterations)
            if base is keras.optimizers.Muon:
                warnings.warn(
                    "Keras's Muon hands kernels of three axes, as experts "
                    "have, to its AdamW. The sparse model's Muon "
                    "orthogonalises them expert by expert instead.",
                    stacklevel=3,
                )
            return continued.from_config(
                {**config, "fresh": fresh, "fresh_since": since}
            )
    if not type(optimizer).__module__.startswith("keras."):
        _say_what_counts(optimizer, fresh, slots)
    return type(optimizer).from_config(config)


def _say_what_counts(optimizer, fresh, slots):
    """Of a class of the user's own, whose new slots may not start at a step."""
    kind = type(optimizer).__name__
    counts = isinstance(optimizer, tuple(per_expert.CONTINUED))
    if slots == NEW and counts:
        raise UpcycleError(
            "New slots need an update that counts its own steps, which is "
            "known of Keras's classes alone: with the dense model's count, "
            "Adam's first update would be 3.2 times too large. Received: "
            f"{kind}, a class of your own. Pass slots='carry', or train on "
            f"with a new {kind} and a schedule that begins where the dense "
            "model's was."
        )
    if slots == NEW or (counts and fresh):
        whose = "All slots are" if slots == NEW else "Routers' slots are"
        warnings.warn(
            f"{whose} new and {kind}, a class of your own, goes on at step "
            f"{keras_internals.whole(optimizer.iterations)}: if its update "
            "corrects for the number of steps, as Adam's does, the first "
            "updates come out too large.",
            stacklevel=4,
        )


def copy_scalars(
    old: keras.optimizers.Optimizer, new: keras.optimizers.Optimizer
) -> None:
    """What belongs to no variable, such as the number of steps, goes over."""
    of_old = keras_internals.optimizer_scalars(old)
    of_new = keras_internals.optimizer_scalars(new)
    for name, variable in of_old.items():
        if name in of_new:
            of_new[name].assign(ops.copy(variable.value))


def _for_each_expert(value, slot):
    """A dense block's value, stacked into the shape of a slot `(E, ...)`."""
    flat = ops.reshape(ops.cast(value, slot.dtype), (1, -1))
    return ops.reshape(ops.tile(flat, (slot.shape[0], 1)), tuple(slot.shape))


def _scale(name, layer, rescale_moments):
    """The factor on an expert's slot."""
    num_experts = layer.num_experts
    if name in _SUMS:
        # Of gradients that were to be an update: the experts' add up to it.
        return 1.0 / num_experts
    if not rescale_moments:
        return 1.0
    per_token = layer.router.average_experts_per_token(num_experts)
    if name in _FIRST:
        return 1.0 / num_experts
    if name in _SECOND:
        return 1.0 / (per_token * num_experts)
    if name in SIZES:
        return (per_token * num_experts) ** -0.5
    return 1.0

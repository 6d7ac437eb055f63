"""A mixture that has learned nothing: the baseline of training it whole."""

from typing import Any

import keras

from keras_upcycle import families, keras_internals
from keras_upcycle.conversion.upcycle import upcycle_model
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import surgery


def mixture_from_scratch(
    model: keras.Model, num_experts: int, **kwargs: Any
) -> keras.Model:
    """The mixture that `upcycle_model` would make, with every weight drawn new.

    The baseline "MoE from scratch" of Sparse Upcycling (arXiv 2212.05055,
    figure 4 and table 2): the same shape, cost and routers, and nothing of
    what the dense model learned. Each weight is drawn by its own layer's
    initializer, from Keras's global seed: call
    `keras.utils.set_random_seed(seed)` before for the same draws again.

    What was adapted to the data and not trained stays: statistics of a
    `Normalization`, vocabularies, and whatever else a layer holds that is no
    variable.

    Args:
        model: A Keras model, built, of a kind that `upcycle_model` takes. Its
            weights may be anything; it is not changed.
        num_experts: Integer, at least 1: experts in each MoE layer (`E`).
        **kwargs: Keyword arguments of `upcycle_model`, such as `router`,
            `layers` and `dispatch`. Of `expert_init` and `recipe` the shape
            alone is used, such as the slices of `VirtualGroups`; all experts
            are drawn apart.

    Returns:
        The sparse model, built, compiled as `upcycle_model` compiles its.

    Raises:
        TypeError, ValueError, UpcycleError: As `upcycle_model`; also if the
            model has frozen weights, which would stay at what was drawn.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = mixture_from_scratch(dense, num_experts=4)
        >>> type(moe.layers[0]).__name__
        'MoEFeedForward'
    """
    families.family_of(model)
    frozen = [
        layer.name
        for layer in keras_internals.all_layers(model)
        if not _adapts(layer)
        and any(not v.trainable for v in keras_internals.made_to_train(layer))
    ]
    if frozen:
        raise UpcycleError(
            "A mixture from scratch must be able to train. Received: "
            f"{model.name!r}, in which {len(frozen)} layers hold frozen "
            f"weights, such as {frozen[0]!r}; they would stay at random "
            "values. Set `model.trainable = True` first."
        )
    moe = upcycle_model(model, num_experts, **kwargs)
    new = _drawn(moe)
    kept = [
        [layer for layer in keras_internals.all_layers(m) if _adapts(layer)]
        for m in (new, moe)
    ]
    surgery.copy_state(new, moe, *kept, variables_only=True)
    return moe


def _drawn(moe):
    """Another model of the same structure, as its initializers make it."""
    if surgery.is_plain_model(moe):
        new, _ = surgery.rebuild(moe, lambda layer: None)
    else:
        new = type(moe).from_config(moe.get_config())
    keras_internals.draw_first_values(new)
    return new


def _adapts(layer):
    """Whether the layer's state comes from the data and not from training."""
    return callable(getattr(layer, "adapt", None))

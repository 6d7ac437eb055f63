"""`expert_usefulness`: which experts' gradients are large."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import model_checks
from keras_upcycle.conversion.remade_layers import with_experts
from keras_upcycle.layers.moe_layers import named_mixtures

GRADIENT, SALIENCY = "gradient", "saliency"
# Of each weight, from its gradient and itself.
SIZES = {
    GRADIENT: lambda gradient, weight: ops.square(gradient),
    SALIENCY: lambda gradient, weight: ops.abs(gradient * weight),
}


def expert_usefulness(
    moe: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    measure: str = GRADIENT,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> dict[str, np.ndarray]:
    """How much the loss asks of each expert, by its gradients on some data.

    A copy of the model goes once over the data in `fit` without changing a
    weight. Expert upcycling (Dwivedi et al., arXiv 2604.19835) copies those
    experts more often whose gradients are large; see `grow_experts`.

    Args:
        moe: A Keras model with MoE layers, what `upcycle_model` made, trained
            since. It is not changed.
        x: Array, a structure of them, or a dataset of batches, what `fit`
            takes.
        y: Array or structure of them, targets where `x` does not hold them.
            Defaults to `None`.
        loss: String, Keras loss or function, as `compile` takes it. Defaults
            to `None`: what `moe` is compiled with, its weights of several
            losses included.
        measure: String: `"gradient"` (default), the squares of the gradients
            of an expert's weights added up, or `"saliency"`, the sizes of
            gradient times weight; each of every batch, added up.
        batch_size: Integer, at least 1, or `None`: examples in a batch, as
            `fit` has it. Defaults to `None`.
        verbose: Integer or string, what `fit` shows of its progress. Defaults
            to `"auto"`, a bar.

    Returns:
        From each block's name, as in a `RouterReading`, to float64 `(E,)`.

    Raises:
        TypeError: If `moe` is no Keras model.
        ValueError: For an unknown `measure`, or without a loss.
        UpcycleError: As `prune_experts`.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> x = keras.random.normal((32, 8), seed=0)
        >>> found = expert_usefulness(moe, x, x, loss="mse", verbose=0)
        >>> larger, _ = keras_upcycle.grow_experts(moe, 6, usefulness=found)
        >>> larger.layers[0].num_experts
        6
    """
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    checks.check_choice("measure", measure, SIZES)
    if batch_size is not None:
        checks.check_count("batch_size", batch_size)
    mixtures = named_mixtures(moe)
    model_checks.check_floats(moe, "`moe`", "Measure")
    compiled = keras_internals.compiled_with(moe) if moe.compiled else {}
    loss = compiled.get("loss") if loss is None else loss
    if loss is None:
        raise ValueError(
            "Gradients are those of a loss. Received: loss=None, and "
            f"{moe.name!r} is not compiled with one. Pass `loss`."
        )
    family = families.family_of(moe)
    index = {name: range(layer.num_experts) for name, layer in mixtures.items()}
    copy, _ = with_experts(family, moe, mixtures, index)
    copy.trainable = True
    watched = {
        name: [
            projection.kernel
            for projection in layer.experts.projections.values()
        ]
        for name, layer in named_mixtures(copy).items()
    }
    meter = keras_internals.GradientMeter(
        SIZES[measure], [v for vs in watched.values() for v in vs]
    )
    copy.compile(
        optimizer=meter,
        loss=loss,
        loss_weights=compiled.get("loss_weights"),
        metrics=[],
        weighted_metrics=[],
        auto_scale_loss=False,
        **family.compile_arguments(moe),
    )
    copy.fit(x, y, batch_size=batch_size, epochs=1, verbose=verbose)
    return {
        name: np.sum([meter.found(each) for each in variables], axis=0)
        for name, variables in watched.items()
    }

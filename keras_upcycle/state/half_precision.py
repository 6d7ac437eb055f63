"""Weights of half precision: what trains in them, and a warning."""

import warnings

import keras

HALF = ("bfloat16", "float16")
# Measured with Keras 3.15 at their default decays on JAX, TensorFlow and
# torch, 80 steps of regression: in bfloat16 not one weight of Adam, AdamW and
# Lamb moves, nor of what Muon leaves to its AdamW; Nadam gives NaN (an error on
# torch). SGD, RMSprop, Adamax, Adafactor, Lion, Adagrad, Adadelta and Ftrl
# train, without the steps that are too small for the weight's 8 bits.
_WHY = {
    "bfloat16": (
        "in bfloat16 Keras's Adam, AdamW and Lamb move no weight (their beta_2 "
        "of 0.999 rounds to 1) and Nadam gives NaN; other optimizers lose "
        "every step that is below 1/256 of its weight"
    ),
    "float16": (
        "in float16 Keras's Adam, AdamW, Lamb and Nadam may diverge or give "
        "NaN (their second moments are too small for it)"
    ),
}


def warn_of_training(model: keras.Model, stacklevel: int = 3) -> None:
    """Warns if a model is about to train whose weights have half precision.

    A policy of `mixed_bfloat16` computes in bfloat16 with float32 weights, and
    is right. Frozen weights need no precision to train in.

    Args:
        model: Built.
        stacklevel: By default the line that called whoever called this.
    """
    trained = model.trainable_variables
    for dtype in HALF:
        count = sum(str(variable.dtype) == dtype for variable in trained)
        if count:
            warnings.warn(
                f"{count} of {len(trained)} trainable weights of "
                f"{model.name!r} are {dtype}, in which it cannot be trained "
                f"well: {_WHY[dtype]}. To train, make or load it with "
                'dtype="mixed_bfloat16" (`--dtype mixed_bfloat16`): float32 '
                "weights, computed with in bfloat16. For inference alone all "
                "is well.",
                stacklevel=stacklevel,
            )


def warn_of_more_training(model: keras.Model, stacklevel: int = 3) -> None:
    """As `warn_of_training`, if the model has been trained where it is.

    For what is also done to serve a model: an optimizer with slots tells the
    two apart, since KerasHub's tasks are compiled whatever they are for.
    """
    optimizer = getattr(model, "optimizer", None)
    if model.compiled and optimizer is not None and optimizer.built:
        warn_of_training(model, stacklevel + 1)

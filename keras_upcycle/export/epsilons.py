"""A number that two formats disagree about, said aloud.

KerasHub's Qwen3 normalises queries and keys with an epsilon of 1e-5 whatever
its config says; Hugging Face takes the one of all other norms.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from keras_upcycle import keras_internals


def of_heads(backbone: Any) -> set[float]:
    """The epsilons by which queries and keys are normalised; none without."""
    return {
        float(layer.epsilon)
        for layer in keras_internals.all_layers(backbone)
        if layer.name == "query_dense_layernorm"
    }


def say(old: Iterable[float], new: Iterable[float]) -> None:
    """Warns where queries and keys will be normalised with another epsilon."""
    here, there = set(old), set(new)
    if here and here != there:
        warnings.warn(
            "Queries and keys are normalised with an epsilon of "
            f"{_shown(here)} here and of {_shown(there)} in what was written, "
            "which its format does not say apart: outputs differ by about "
            f"{max(here | there):.0e} of their size.",
            stacklevel=4,
        )


def _shown(values):
    return " and ".join(f"{value:.0e}" for value in sorted(values))

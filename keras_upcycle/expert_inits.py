"""The table of expert initialisations: a new one is a file and a row here."""

from collections.abc import Callable
from typing import Any

from keras_upcycle import checks
from keras_upcycle.layers.expert_init import ExpertInit, FromFunction, copy
from keras_upcycle.methods.drop_upcycling import DropUpcycling, RandomNoise
from keras_upcycle.methods.feed_forward_slices import FeedForwardSlices
from keras_upcycle.methods.qwen2_moe import ReplicateShuffleCut
from keras_upcycle.methods.random_experts import RandomExperts
from keras_upcycle.methods.shared_experts import SharedExperts

INITS: dict[str, Callable[[], ExpertInit]] = {
    "copy": lambda: FromFunction(copy),
    "drop_upcycling": DropUpcycling,
    "feed_forward_slices": FeedForwardSlices,
    "random": RandomExperts,
    "random_noise": RandomNoise,
    "replicate_shuffle_cut": ReplicateShuffleCut,
    "shared_experts": SharedExperts,
}


def get(identifier: Any) -> ExpertInit:
    """An expert initialisation from its name, a function, or itself.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither.
    """
    if isinstance(identifier, ExpertInit):
        return identifier
    if isinstance(identifier, str):
        if identifier not in INITS:
            raise ValueError(
                f"`expert_init` must be one of {sorted(INITS)}, an "
                "`ExpertInit`, or a function. Received: "
                f"expert_init={identifier!r}."
            )
        return INITS[identifier]()
    checks.check_no_class("expert_init", identifier, "`ExpertInit`")
    if callable(identifier):
        return FromFunction(identifier)
    raise TypeError(
        "`expert_init` must be a name, an `ExpertInit`, or a function (value, "
        "num_experts, name) -> expert values. Received: "
        f"expert_init={identifier!r} of type {type(identifier).__name__}."
    )

"""The table of expert initialisations: a new one is a file and a row here."""

from collections.abc import Callable
from typing import Any

from keras_upcycle import settings
from keras_upcycle.drop_upcycling import DropUpcycling, RandomNoise
from keras_upcycle.expert_init import ExpertInit, FromFunction, copy
from keras_upcycle.feed_forward_slices import FeedForwardSlices
from keras_upcycle.random_experts import RandomExperts
from keras_upcycle.replicate_shuffle_cut import ReplicateShuffleCut
from keras_upcycle.shared_experts import SharedExperts

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
    settings.check_no_class("expert_init", identifier, "`ExpertInit`")
    if callable(identifier):
        return FromFunction(identifier)
    raise TypeError(
        "`expert_init` must be a name, an `ExpertInit`, or a function (value, "
        "num_experts, name) -> expert values. Received: "
        f"expert_init={identifier!r} of type {type(identifier).__name__}."
    )

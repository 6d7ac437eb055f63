"""What the arguments of `upcycle_model` and its relatives may be, as types."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import keras

from keras_upcycle.conversion.recipe import Recipe
from keras_upcycle.families import FeedForwardSite
from keras_upcycle.layers.expert_init import ExpertInit, InitFunction
from keras_upcycle.routing.router import Router

# One for all stacks: by name, the router itself, or its serialized config.
OneRouter: TypeAlias = Router | str | Mapping[str, Any]
# Or one for each stack; `None` leaves a stack dense.
RouterLike: TypeAlias = OneRouter | Mapping[str, OneRouter | None]
# A rule or a block by name, its number, several of these, a slice of the
# stack's blocks, or a function that says yes or no.
OneLayers: TypeAlias = (
    str | int | slice | Iterable[int | str] | Callable[[FeedForwardSite], Any]
)
LayersLike: TypeAlias = OneLayers | Mapping[str, OneLayers | None]
ExpertInitLike: TypeAlias = ExpertInit | InitFunction | str
RecipeLike: TypeAlias = Recipe | str
# A number of devices, the sizes of a mesh's axes, or what has a mesh.
MeshLike: TypeAlias = (
    int
    | Mapping[str, int]
    | keras.distribution.DeviceMesh
    | keras.distribution.ModelParallel
)

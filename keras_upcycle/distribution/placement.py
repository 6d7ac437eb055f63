"""Where a layer's tokens and experts are: what a mesh means for one call."""

import math
from typing import Any, NamedTuple

import keras

from keras_upcycle import keras_internals


class Placement(NamedTuple):
    """How a mesh holds tokens and the experts of one layer.

    Attributes:
        device_mesh: A `keras.distribution.DeviceMesh`.
        batch_axes: Axes of the mesh over which examples are split.
        expert_axis: The axis over which experts are.
    """

    device_mesh: Any
    batch_axes: tuple[str, ...]
    expert_axis: str

    @property
    def sizes(self) -> dict[str, int]:
        """From an axis of the mesh to how many devices it has."""
        mesh = self.device_mesh
        return dict(zip(mesh.axis_names, mesh.shape, strict=True))

    @property
    def shards(self) -> int:
        """How many parts a batch has."""
        return math.prod(self.sizes[axis] for axis in self.batch_axes)

    @property
    def other_axes(self) -> tuple[str, ...]:
        """Axes of the batch over which there are no experts."""
        return tuple(a for a in self.batch_axes if a != self.expert_axis)


def check_experts(num_experts: int, where: str) -> None:
    """Raises where the distribution that is set cannot spread experts.

    Args:
        num_experts: `E`.
        where: The block, for the message.

    Raises:
        UpcycleError: If the expert axis does not divide them.
    """
    distribution = keras.distribution.distribution()
    check = getattr(distribution, "check_experts", None)
    if check is not None:
        check(num_experts, where)


def batch_axes_of(distribution: Any) -> tuple[str, ...]:
    """Axes of the mesh over which a distribution splits a batch."""
    own = getattr(distribution, "batch_axes", None)
    return (distribution.batch_dim_name,) if own is None else own


def placement_of(layer: keras.Layer, kernel: keras.Variable) -> Any:
    """The `Placement` of a layer whose experts are spread; else `None`.

    Args:
        layer: For messages.
        kernel: `(E, ...)`, one of its experts' weights.

    Raises:
        ValueError: If a distribution that spreads experts came after the
            layer.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    axes = keras_internals.axes_of(kernel)
    if axes is None:
        if getattr(distribution, "expert_axis", None) is None:
            return None
        raise ValueError(
            "A distribution must be set before a model's variables exist: "
            "they lie where it says when they are made. Received: "
            f"{type(distribution).__name__}, set after the layer "
            f"{layer.path!r} was built. Call "
            "`keras.distribution.set_distribution` first, then make or load "
            "the model and its optimizer."
        )
    if not axes or axes[0] is None:
        return None
    return Placement(
        distribution.device_mesh, batch_axes_of(distribution), axes[0]
    )

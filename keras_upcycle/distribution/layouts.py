"""Which variables lie where: experts by expert, others whole or cut."""

import math
import re
from typing import Any

import keras

from keras_upcycle import checks, keras_internals

# All weights of all experts, an adapter's first factor among them, and nothing
# else; an `Experts` is so named.
EXPERTS = (
    r"(?:.*/)?experts/expert_(?:up|gate|down)/(?:kernel|bias|lora_kernel_a)"
)
RANK = 3  # of each of these


def expert_layout_map(
    device_mesh: keras.distribution.DeviceMesh, expert_axis: str = "expert"
) -> keras.distribution.LayoutMap:
    """Where experts lie, as `keras.distribution.ModelParallel` takes it.

    For a distribution of your own; `ExpertParallel` needs none. More entries
    can be added to the result.

    Args:
        device_mesh: A `keras.distribution.DeviceMesh`.
        expert_axis: String, the axis of the mesh over which experts are
            spread. Defaults to `"expert"`.

    Returns:
        A `LayoutMap` with one entry, for the kernels and biases of all
        `MoEFeedForward`; their routers are not in it, and so are whole on
        every device.

    Raises:
        TypeError: If `device_mesh` is no mesh.
        ValueError: For an axis that it does not have.

    Example:
        ```python
        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
        layout_map = ku.distribution.expert_layout_map(mesh, "model")
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(
                layout_map=layout_map, batch_dim_name="batch"
            )
        )
        ```
    """
    check_mesh(device_mesh)
    check_axis("expert_axis", expert_axis, device_mesh)
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map[EXPERTS] = (expert_axis,) + (None,) * (RANK - 1)
    return layout_map


def is_of_experts(path: str) -> bool:
    """Whether a variable is a weight of experts."""
    return re.fullmatch(EXPERTS, path) is not None


def is_of_router(path: str) -> bool:
    """Whether a variable is a router's."""
    return re.fullmatch(r"(?:.*/)?router/[^/]+", path) is not None


def check_mesh(device_mesh: Any) -> None:
    """Raises `TypeError` unless it is a mesh of Keras."""
    checks.check_instance(
        "device_mesh",
        device_mesh,
        keras.distribution.DeviceMesh,
        "a `keras.distribution.DeviceMesh`",
    )


def check_axis(name: str, axis: Any, device_mesh: Any) -> None:
    """Raises unless a mesh has an axis.

    Args:
        name: Of the argument.
        axis: What was given.
        device_mesh: A `DeviceMesh`.
    """
    if axis not in list(device_mesh.axis_names):
        raise ValueError(
            f"`{name}` must name axes of the mesh, "
            f"{list(device_mesh.axis_names)}. Received: {name}={axis!r}. Name "
            "one of these, or make the mesh with that axis."
        )


def check_divides(
    what: str, shape: tuple, layout: Any, device_mesh: Any
) -> None:
    """Raises `ValueError` where a layout cuts a dimension unevenly.

    Args:
        what: The variable, in words.
        shape: Its shape.
        layout: A `TensorLayout`.
        device_mesh: A `DeviceMesh`.
    """
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    if len(layout.axes) != len(shape):
        raise ValueError(
            f"A layout must have an entry for each dimension. Received: "
            f"{tuple(layout.axes)} for {what} of shape {shape}. Change that "
            "entry of `layout_map`."
        )
    for dimension, (size, axes) in enumerate(
        zip(shape, layout.axes, strict=True)
    ):
        names = axes if isinstance(axes, tuple) else (axes,)
        parts = math.prod(sizes[a] for a in names if a is not None)
        if size % parts:
            raise ValueError(
                f"An axis of the mesh must divide what is spread over it. "
                f"Received: {what} of shape {shape}, whose dimension "
                f"{dimension} of {size} goes over {axes!r} with {parts} "
                "devices. Use a mesh with another size of that axis, or "
                "another entry of `layout_map`."
            )


class SplitLayout(keras_internals.LayoutOfTuples):
    """A `TensorLayout` in which one dimension may go over several axes.

    Args:
        axes: As of a `TensorLayout`; an entry may be a tuple of names.
        device_mesh: A `DeviceMesh`.
    """


def spread_evenly(
    shape: tuple, axes: tuple[str, ...], device_mesh: Any
) -> SplitLayout:
    """The largest dimension that divides goes over all of some axes.

    Args:
        shape: Of a variable.
        axes: Of the mesh.
        device_mesh: A `DeviceMesh`.

    Returns:
        Its layout; whole where no dimension divides.
    """
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    parts = math.prod(sizes[axis] for axis in axes)
    entries: list[Any] = [None] * len(shape)
    fitting = [n for n, size in enumerate(shape) if size and not size % parts]
    if fitting and parts > 1:
        largest = max(fitting, key=lambda n: shape[n])
        entries[largest] = axes if len(axes) > 1 else axes[0]
    return SplitLayout(entries, device_mesh)

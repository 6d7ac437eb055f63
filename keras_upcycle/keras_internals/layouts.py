"""Layouts of variables over devices, beyond what Keras lets one say."""

from typing import Any

import keras


class LayoutOfTuples(keras.distribution.TensorLayout):
    """A `TensorLayout` in which one dimension may go over several axes.

    Keras's own takes one name a dimension; what it is turned into, a
    `PartitionSpec`, takes tuples. `TensorLayout._validate_axes`, Keras 3.15.
    """

    def _validate_axes(self):
        if self.device_mesh is None:
            return
        known = set(self.device_mesh.axis_names)
        for entry in self.axes:
            named = entry if isinstance(entry, tuple) else (entry,)
            unknown = set(named) - known - {None}
            if unknown:
                raise ValueError(
                    "A layout must name axes of its mesh, "
                    f"{sorted(known)}. Received: {sorted(unknown)}."
                )


def kernel_variable(layer: keras.layers.EinsumDense) -> keras.Variable:
    """The layer's kernel itself, whatever adapters add to it. Keras 3.15."""
    return layer._kernel


def axes_of(variable: keras.Variable) -> tuple | None:
    """The mesh axes of each dimension of a variable.

    `Variable._layout`, which JAX's variables have from when they are made.
    Keras 3.15.

    Returns:
        Names, tuples of names and `None`; `None` for a variable that was made
        without a distribution.
    """
    layout: Any = getattr(variable, "_layout", None)
    if layout is None:
        return None
    if isinstance(layout, keras.distribution.TensorLayout):
        return tuple(layout.axes)
    spec = tuple(getattr(layout, "spec", ()))
    return spec + (None,) * (len(variable.shape) - len(spec))

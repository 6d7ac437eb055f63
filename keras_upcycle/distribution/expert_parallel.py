"""`ExpertParallel`: a `keras.distribution` whose experts are spread."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.distribution import layouts
from keras_upcycle.errors import UpcycleError

DATA_AXIS = "data"


class ExpertParallel(keras.distribution.ModelParallel):
    """Spreads experts, and a batch, over the devices of a mesh.

    Each device holds `E / n` experts of every MoE layer, for an axis of `n`
    devices, and a share of the batch. Tokens go to their experts and come back
    by two exchanges a layer (all-to-all), kernels stay where they are. What a
    model computes is what one device computes. To be set, by
    `keras.distribution.set_distribution`, before a model *and* its optimizer
    are made, loaded or converted; `upcycle_model` makes each expert on the
    devices that will hold it.

    A `TopKRouter(group="batch")`, the default of causal models, takes the
    tokens of one data shard for a group, so that nobody waits for all tokens:
    which tokens are *dropped* in training then depends on the mesh, and so do
    losses that are means over groups. An integer fixes the groups, on any mesh
    and on one device.

    References: GShard (Lepikhin et al., arXiv 2006.16668), section 3; ZeRO
    (Rajbhandari et al., arXiv 1910.02054) for `shard_dense`.

    Args:
        device_mesh: A `keras.distribution.DeviceMesh`. Defaults to `None`: all
            devices, on the expert axis.
        expert_axis: String, the axis of the mesh over which experts are
            spread; their number must be a multiple of its size. Defaults to
            `"expert"`.
        batch_axes: List or tuple of strings, the axes over which the examples
            of a batch are split; batches must be multiples of their product.
            Defaults to `None`: all axes.
        shard_dense: Boolean, whether all other weights, and their optimizer's
            slots, are cut as well, along the largest dimension that the batch
            axes divide, and put together where they are used. Saves memory for
            more exchange. Defaults to `False`: they are whole on each device.
        layout_map: A `keras.distribution.LayoutMap` for weights outside the
            experts, such as that of a KerasHub backbone's `get_layout_map`,
            for tensor parallelism; of the same mesh. Experts go first.
            Defaults to `None`.
        auto_shard_dataset: Boolean, whether Keras splits a `tf.data.Dataset`
            among processes. `False` for data of which each process makes its
            own part. Defaults to `True`.

    Raises:
        TypeError: For a setting of another type.
        ValueError: For axes that the mesh does not have; if the backend is not
            JAX; when a variable is made, if an axis does not divide it.

    Example:
        ```python
        mesh = keras.distribution.DeviceMesh((2, 4), ["data", "expert"])
        keras.distribution.set_distribution(
            ku.distribution.ExpertParallel(mesh)
        )
        moe = ku.upcycle_model(dense, num_experts=8)
        ```
    """

    def __init__(
        self,
        device_mesh: keras.distribution.DeviceMesh | None = None,
        *,
        expert_axis: str = "expert",
        batch_axes: Sequence[str] | None = None,
        shard_dense: bool = False,
        layout_map: keras.distribution.LayoutMap | None = None,
        auto_shard_dataset: bool = True,
    ):
        _check_backend()
        checks.check_instance("expert_axis", expert_axis, str, "a string")
        shard_dense = checks.check_flag("shard_dense", shard_dense)
        auto_shard_dataset = checks.check_flag(
            "auto_shard_dataset", auto_shard_dataset
        )
        if device_mesh is None:
            device_mesh = _mesh_of_all(expert_axis)
        own = layouts.expert_layout_map(device_mesh, expert_axis)
        self.expert_axis = expert_axis
        self.batch_axes = _batch_axes(batch_axes, device_mesh)
        self.shard_dense = shard_dense
        self.layout_map = _checked_map(layout_map, device_mesh)
        super().__init__(
            layout_map=own,
            batch_dim_name=self.batch_axes[0],
            auto_shard_dataset=auto_shard_dataset,
        )

    @property
    def num_model_replicas(self) -> int:
        """How many parts a batch has, as Keras calls them."""
        mesh = self.device_mesh
        sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        return math.prod(sizes[axis] for axis in self.batch_axes)

    def get_data_layout(self, data_shape: Sequence[int]) -> Any:
        """Examples are split, whatever else they have is not.

        A batch that is no multiple of its parts, such as one prompt, is whole
        on each device.
        """
        entries: list[Any] = [None] * len(data_shape)
        # Of several processes each has a part that it does not say the size of.
        several = self.num_processes > 1
        if entries and (several or not data_shape[0] % self.num_model_replicas):
            entries[0] = self.batch_axes
        return layouts.SplitLayout(entries, self.device_mesh)

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        """Where a variable lies; raises if that cannot be.

        Raises:
            ValueError: If an axis of the mesh does not divide a dimension that
                goes over it.
        """
        known = getattr(variable, "_layout", None)
        if known is not None:
            return known
        shape, mesh = tuple(variable.shape), self.device_mesh
        if layouts.is_of_experts(variable.path):
            self.check_experts(shape[0], variable.path)
            entries = [self.expert_axis, *[None] * (len(shape) - 1)]
            return layouts.SplitLayout(entries, mesh)
        if self.layout_map is not None:
            layout = self.layout_map[variable.path]
            if layout is not None:
                what = f"the variable {variable.path!r}"
                layouts.check_divides(what, shape, layout, mesh)
                return layout
        # Whole numbers are counts and the states of random generators; a
        # router is small, and every token meets it.
        is_cut = "float" in str(variable.dtype)
        is_cut = is_cut and not layouts.is_of_router(variable.path)
        if self.shard_dense and is_cut:
            return layouts.spread_evenly(shape, self.batch_axes, mesh)
        return layouts.SplitLayout([None] * len(shape), mesh)

    def get_tensor_layout(self, path: str) -> Any:
        """Of what is between layers: what `layout_map` says."""
        return None if self.layout_map is None else self.layout_map[path]

    def check_experts(self, num_experts: int, where: str) -> None:
        """Raises unless experts can be spread.

        Args:
            num_experts: Integer, `E`.
            where: String, the layer or block, for the message.

        Raises:
            UpcycleError: A `ValueError`, if the axis does not divide them.
        """
        mesh = self.device_mesh
        size = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        size = size[self.expert_axis]
        if num_experts % size:
            raise UpcycleError(
                "`num_experts` must be a multiple of the devices on the "
                f"mesh's expert axis. Received: num_experts={num_experts} and "
                f"the axis {self.expert_axis!r} of {size} devices, for "
                f"{where!r}. Use {-(-num_experts // size) * size} experts, or "
                "a mesh with fewer devices on that axis and more on another."
            )


def _check_backend():
    backend = keras.backend.backend()
    if backend != "jax":
        raise ValueError(
            "Experts can be spread over devices on the JAX backend, whose "
            f"variables Keras lays out. Received: backend {backend!r}. Set "
            "KERAS_BACKEND=jax before Keras is imported."
        )


def _mesh_of_all(expert_axis):
    devices = keras.distribution.list_devices()
    if expert_axis == DATA_AXIS:
        return keras.distribution.DeviceMesh(
            (len(devices),), [expert_axis], devices
        )
    return keras.distribution.DeviceMesh(
        (1, len(devices)), [DATA_AXIS, expert_axis], devices
    )


def _batch_axes(batch_axes, device_mesh):
    if batch_axes is None:
        return tuple(device_mesh.axis_names)
    checks.check_instance(
        "batch_axes", batch_axes, list | tuple, "a list of names of axes"
    )
    if not batch_axes or len(set(batch_axes)) != len(batch_axes):
        raise ValueError(
            "`batch_axes` must name one axis or more, each once. Received: "
            f"batch_axes={batch_axes!r}. Leave it out for all axes."
        )
    for axis in batch_axes:
        layouts.check_axis("batch_axes", axis, device_mesh)
    # In the order of the mesh, which is that of its devices.
    return tuple(a for a in device_mesh.axis_names if a in batch_axes)


def _checked_map(layout_map, device_mesh):
    if layout_map is None:
        return None
    checks.check_instance(
        "layout_map",
        layout_map,
        keras.distribution.LayoutMap,
        "a `keras.distribution.LayoutMap`",
    )
    if layout_map.device_mesh is not device_mesh:
        raise ValueError(
            "`layout_map` must be of the same mesh as `device_mesh`. "
            f"Received: {layout_map.device_mesh} and {device_mesh}. Make both "
            "from one `DeviceMesh`."
        )
    return layout_map

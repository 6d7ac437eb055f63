"""JAX: one program on several devices, told where tokens and experts lie.

Without a word XLA gathers what is smaller at each layer: all experts' kernels,
or all tokens.
"""

import functools

import jax
import keras
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def top_k(x, k):
    """`lax.top_k` of `(G, ..., N)`, group by group where groups are spread.

    XLA's partitioner would gather all scores.
    """
    mesh, axes, shards = _batch()
    if mesh is None or x.ndim < 3 or x.shape[0] % shards:
        return lax.top_k(x, k)
    spread = jax.shard_map(
        functools.partial(lax.top_k, k=k),
        mesh=mesh,
        in_specs=P(axes),
        out_specs=P(axes),
    )
    return spread(x)


def to_experts(split, placement):
    """See `portable.to_experts`: one all-to-all."""
    if not _fits(split.shape[0], placement):
        return split.transpose(1, 0, 2, 3)
    batch, others, expert = _axes(placement)
    # First as tokens lie, then as experts do: an exchange, and no gather.
    split = _laid(split, placement, P(batch))
    split = _laid(split, placement, P(others, expert))
    return _laid(split.transpose(1, 0, 2, 3), placement, P(expert, others))


def to_groups(split, placement):
    """See `portable.to_groups`: one all-to-all."""
    if not _fits(split.shape[1], placement):
        return split.transpose(1, 0, 2, 3)
    batch, others, expert = _axes(placement)
    split = _laid(split, placement, P(expert, others))
    split = _laid(split.transpose(1, 0, 2, 3), placement, P(others, expert))
    return _laid(split, placement, P(batch))


def is_at_hand(value):
    """See `portable.is_at_hand`; other processes may hold a part."""
    if getattr(value, "is_fully_addressable", True):
        return True
    here = value.sharding.addressable_devices_indices_map(value.shape)
    everywhere = value.sharding.devices_indices_map(value.shape)
    return set(map(str, here.values())) == set(map(str, everywhere.values()))


def on_each_device(function, placement, rows, kernels):
    """See `portable.on_each_device`."""
    batch, _, expert = _axes(placement)
    device = _Device(placement)
    spread = jax.shard_map(
        functools.partial(function, device),
        mesh=placement.device_mesh.backend_mesh,
        in_specs=(P(batch), P(expert)),
        out_specs=(P(batch), P(expert)),
        check_vma=False,
    )
    return spread(rows, kernels)


class _Device:
    """What one device of a mesh knows of the others."""

    def __init__(self, placement):
        self._expert = placement.expert_axis
        self._others = placement.other_axes
        self._splits_tokens = placement.expert_axis in placement.batch_axes

    @property
    def number(self):
        """Of the device on the expert axis."""
        return lax.axis_index(self._expert)

    def gather(self, rows):
        """The rows of all devices that hold the other experts."""
        if not self._splits_tokens:
            return rows
        return lax.all_gather(rows, self._expert, axis=0, tiled=True)

    def add_up(self, rows):
        """Rows added up over these devices; each gets its own back."""
        if not self._splits_tokens:
            return lax.psum(rows, self._expert)
        return lax.psum_scatter(
            rows, self._expert, scatter_dimension=0, tiled=True
        )

    def add_over_others(self, x):
        """The sum over devices that hold the same experts."""
        return lax.psum(x, self._others) if self._others else x


def _laid(x, placement, spec):
    mesh = placement.device_mesh.backend_mesh
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _axes(placement):
    return (
        placement.batch_axes,
        placement.other_axes or None,
        placement.expert_axis,
    )


def _fits(groups, placement):
    """Whether groups are spread evenly; they are not where one is decoded."""
    return placement is not None and groups % placement.shards == 0


def _batch():
    """The mesh of the distribution, the batch's axes and their size."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None, None, 1
    mesh = distribution.device_mesh.backend_mesh
    axes = getattr(distribution, "batch_axes", None)
    axes = (distribution.batch_dim_name,) if axes is None else axes
    shards = 1
    for axis in axes:
        shards *= mesh.shape[axis]
    return (mesh if shards > 1 else None), axes, shards

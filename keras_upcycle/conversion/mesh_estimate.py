"""What a sparse model costs on several devices: memory, exchange, time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks, tables
from keras_upcycle.conversion import activations, counts
from keras_upcycle.conversion.plan import Plan
from keras_upcycle.distribution.layouts import check_axis

EXPERT_AXIS = "expert"
PASSES = 3  # a step's operations as a multiple of the forward pass's
# A layer's tokens go to their experts and back, forward and backward.
EXCHANGES = 4


@dataclass(frozen=True)
class MeshEstimate:
    """A step of Adam on one device of a mesh, others doing as much.

    Attributes:
        expert_devices: Devices on the expert axis: each holds that share of
            the experts.
        data_devices: All others; how often each expert is held.
        shard_dense: Whether what is no expert is cut among all devices.
        weight_bytes: Bytes of a device's weights.
        optimizer_bytes: Of Adam's two slots for them.
        gradient_bytes: Of gradients, all at once.
        activation_bytes: Of what the forward pass keeps for the backward pass;
            and of one block's gradients; without attention's scores, and
            within a tenth or so. 0 without `tokens_per_device`.
        exchange_bytes: Of tokens that a device hands to the experts and back in
            all MoE layers, what it keeps included, forward and backward.
        reduce_bytes: Of gradients that are added up over devices.
        gather_bytes: Of weights that `shard_dense` puts together, forward and
            backward.
        sent_bytes: Of all that, what goes over a device's link, by rings.
        flops: Floating-point operations of a device's step, backward pass
            included. 0 without `tokens_per_device`.
    """

    expert_devices: int
    data_devices: int
    shard_dense: bool
    weight_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    exchange_bytes: int
    reduce_bytes: int
    gather_bytes: int
    sent_bytes: int
    flops: int

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return self.expert_devices * self.data_devices

    @property
    def bytes_per_device(self) -> int:
        """All that a device holds in a step."""
        return (
            self.weight_bytes
            + self.optimizer_bytes
            + self.gradient_bytes
            + self.activation_bytes
        )

    def step_seconds(
        self, flops_per_second: float, link_bytes_per_second: float
    ) -> float:
        """Time of a step, exchange and arithmetic one after the other.

        Args:
            flops_per_second: Float, operations that a device does in a second;
                a half of what its maker says is usual.
            link_bytes_per_second: Float, bytes that it sends in a second.

        Raises:
            TypeError, ValueError: Unless both are numbers above 0.
        """
        given = {
            "flops_per_second": flops_per_second,
            "link_bytes_per_second": link_bytes_per_second,
        }
        rates = [checks.check_factor(name, n) for name, n in given.items()]
        return self.flops / rates[0] + self.sent_bytes / rates[1]


@dataclass(frozen=True)
class Parts:
    """Bytes and counts that any mesh divides.

    Attributes:
        always_bytes: Of weights that every token uses.
        always_trained: Bytes of these that train.
        expert_bytes: Of all experts' weights.
        expert_trained: Bytes of these that train.
        slot_bytes: Of what a token's slots hold of all MoE layers: a token's
            width as often as it has slots.
        kept_bytes: Of activations, for a token.
        flops: Forward operations of a token.
        num_experts: Of each converted block.
    """

    always_bytes: int
    always_trained: int
    expert_bytes: int
    expert_trained: int
    slot_bytes: float
    kept_bytes: float
    flops: float
    num_experts: tuple[int, ...]


def parts_of(
    decided: Plan,
    model: keras.Model,
    weight_bytes: int,
    trained: int,
    flops: float,
) -> Parts:
    """What `on_meshes` divides.

    Args:
        decided: The conversion.
        model: The dense model.
        weight_bytes: Of the sparse model.
        trained: Bytes of these that train.
        flops: Forward operations of the sparse model, for a token.
    """
    expert_bytes = expert_trained = 0
    slot_bytes = 0.0
    for block in decided.blocks:
        site, experts = block.site, block.counted.experts
        width = counts.width_of(site.layers[0].compute_dtype)
        slots = block.router.average_slots_per_token(block.num_experts)
        slot_bytes += slots * site.hidden_dim * width
        own = sum(map(counts.bytes_of, experts.weights))
        expert_bytes += own
        if any(variable.trainable for variable in site.kernels.values()):
            expert_trained += own
    return Parts(
        always_bytes=weight_bytes - expert_bytes,
        always_trained=max(trained - expert_trained, 0),
        expert_bytes=expert_bytes,
        expert_trained=min(expert_trained, trained),
        slot_bytes=slot_bytes,
        kept_bytes=activations.kept_bytes(decided, model),
        flops=flops,
        num_experts=tuple(block.num_experts for block in decided.blocks),
    )


def on_meshes(
    parts: Parts, mesh: Any, tokens: int | None, shard_dense: Any
) -> tuple[MeshEstimate, ...]:
    """A `MeshEstimate` for a mesh, or for each that a number of devices makes.

    Args:
        parts: What is divided.
        mesh: As of `estimate_upcycle`.
        tokens: Of a device's share of a batch.
        shard_dense: As of `ExpertParallel`.

    Raises:
        TypeError, ValueError: For what is no mesh, or none for these experts.
    """
    shard_dense = checks.check_flag("shard_dense", shard_dense)
    if tokens is not None:
        tokens = checks.check_count("tokens_per_device", tokens)
    shapes = _shapes(mesh, parts.num_experts)
    return tuple(
        _on_mesh(parts, experts, data, tokens or 0, shard_dense)
        for experts, data in shapes
    )


def _shapes(mesh, num_experts):
    """`(expert devices, others)` of each mesh."""
    if checks.is_integer(mesh):
        devices = checks.check_count("mesh", mesh)
        return [
            (size, devices // size)
            for size in range(1, devices + 1)
            if devices % size == 0 and not any(n % size for n in num_experts)
        ]
    axis = EXPERT_AXIS
    if isinstance(mesh, keras.distribution.ModelParallel):
        axis = getattr(mesh, "expert_axis", axis)
        mesh = mesh.device_mesh
    if isinstance(mesh, keras.distribution.DeviceMesh):
        check_axis("mesh", axis, mesh)
        mesh = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    if not isinstance(mesh, Mapping):
        raise TypeError(
            "`mesh` must be a number of devices, a mapping from axes to their "
            f'sizes, such as {{"data": 2, "{EXPERT_AXIS}": 4}}, or a '
            f"`DeviceMesh`. Received: mesh={mesh!r} of type "
            f"{type(mesh).__name__}."
        )
    if axis not in mesh:
        raise ValueError(
            f"`mesh` must have an axis {axis!r}, on which experts are spread. "
            f"Received: mesh={dict(mesh)!r}. Add it, of size 1 for experts "
            "that are whole on each device."
        )
    sizes = [checks.check_count("mesh", size) for size in mesh.values()]
    experts = int(mesh[axis])
    for count in num_experts:
        if count % experts:
            raise ValueError(
                "`num_experts` must be a multiple of the devices on the "
                f"mesh's expert axis. Received: {count} experts and "
                f"mesh={dict(mesh)!r}. Use more experts, or fewer devices on "
                "that axis."
            )
    return [(experts, math.prod(sizes) // experts)]


def _on_mesh(parts, experts, data, tokens, shard_dense):
    devices = experts * data
    cut = devices if shard_dense else 1
    always, trained = parts.always_bytes, parts.always_trained
    own, own_trained = parts.expert_bytes, parts.expert_trained
    exchange = EXCHANGES * tokens * parts.slot_bytes if experts > 1 else 0
    # Gradients of experts are added up over those that hold the same ones.
    reduced_experts = own_trained / experts if data > 1 else 0
    reduced_always = trained if devices > 1 else 0
    gathered = 2 * always if shard_dense and devices > 1 else 0
    sent = (
        exchange * (experts - 1) / experts
        + 2 * (devices - 1) / devices * reduced_always
        + 2 * (data - 1) / data * reduced_experts
        + (devices - 1) / devices * gathered
    )
    numbers = {
        "weight_bytes": always / cut + own / experts,
        "optimizer_bytes": 2 * (trained / cut + own_trained / experts),
        "gradient_bytes": trained + own_trained / experts,
        "activation_bytes": tokens * parts.kept_bytes,
        "exchange_bytes": exchange,
        "reduce_bytes": reduced_always + reduced_experts,
        "gather_bytes": gathered,
        "sent_bytes": sent,
        "flops": PASSES * tokens * parts.flops,
    }
    return MeshEstimate(
        expert_devices=experts,
        data_devices=data,
        shard_dense=shard_dense,
        **{name: round(number) for name, number in numbers.items()},
    )


def table(estimates: Sequence[MeshEstimate]) -> str:
    """Meshes of one model side by side, for people."""
    size, count = tables.size, tables.count
    header = ["data x expert", "weights", "Adam", "gradients", "activations"]
    header += ["a device", "sent a step", "FLOPs a step"]
    rows = [
        (
            f"{each.data_devices} x {each.expert_devices}",
            size(each.weight_bytes),
            size(each.optimizer_bytes),
            size(each.gradient_bytes),
            size(each.activation_bytes),
            size(each.bytes_per_device),
            size(each.sent_bytes),
            count(each.flops),
        )
        for each in estimates
    ]
    return tables.text(header, rows)

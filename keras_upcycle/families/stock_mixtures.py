"""KerasHub's own mixtures: what they hold, as settings and values of ours.

KerasHub runs all experts on every token and weighs what they put out. What its
layers hold is what a `MoEFeedForward` holds; only the arithmetic differs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_upcycle.families.rows import Block, Mixture, part
from keras_upcycle.keras_internals.keras_hub import inner_class
from keras_upcycle.layers.expert_init import SHARED
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing.rescaled_top_k_router import RescaledTopKRouter
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.state import layer_state
from keras_upcycle.types import Tensor

_ROLES = ("gate", "up", "down")


@keras.saving.register_keras_serializable(package="keras_upcycle")
class MixtureInBlock(MoEFeedForward):
    """A `MoEFeedForward` where a stock block expects its own mixture.

    Stock mixtures take a mask for attention, which says nothing of padding,
    and return their logits beside their outputs.
    """

    def call(self, inputs, attention_mask=None, mask=None, training=None):
        del attention_mask
        return super().call(inputs, mask=mask, training=training), None

    def compute_output_spec(
        self, inputs, attention_mask=None, mask=None, training=None
    ):
        return super().compute_output_spec(inputs), None


@keras.saving.register_keras_serializable(package="keras_upcycle")
class MixtureBesideRouter(MoEFeedForward):
    """A `MoEFeedForward` where a stock block hands on what its router saw."""

    def call(self, inputs, router_inputs, mask=None, training=None):
        return super().call(
            inputs, mask=mask, training=training, router_inputs=router_inputs
        )

    def compute_output_spec(
        self, inputs, router_inputs, mask=None, training=None
    ):
        del router_inputs
        return super().compute_output_spec(inputs)


class FoundMixture(NamedTuple):
    """The mixture of a stock block.

    `holder` is the layer that is the mixture, `routed` the one that has its
    router: the same, or one beside it.
    """

    network: Mixture
    holder: Any
    routed: Any

    @property
    def kind(self) -> type[MoEFeedForward]:
        """The class of what stands in its place."""
        if self.network.beside is None:
            return MixtureInBlock
        return MixtureBesideRouter

    @property
    def first(self) -> Any:
        """A projection of the tokens."""
        return part(self.routed, self.network.router)

    @property
    def experts(self) -> Any:
        """The layer that has the stacked variables."""
        if not self.network.experts:
            return self.holder
        return part(self.holder, self.network.experts)

    @property
    def num_experts(self) -> int:
        return int(self.first.kernel.shape[1])

    def variable(self, name: str) -> keras.Variable:
        """One of the experts' stacked variables."""
        return getattr(self.experts, name)

    @property
    def shared_roles(self) -> dict[str, Any]:
        """The layers of the network that every token meets, by role."""
        row = self.network
        if row.shared is None or row.shared_network is None:
            return {}
        shared = part(self.holder, row.shared)
        return {
            role: part(shared, getattr(row.shared_network, role))
            for role in _ROLES
        }


class Counterpart(NamedTuple):
    """A weight of ours, the stock one, and the way between.

    Attributes:
        ours: The weight's variable in a `MoEFeedForward`.
        stock: The variable of the stock mixture that holds it.
        name: As `MoEFeedForward.start_from` calls it; `None` of what it does
            not set.
        read: From the stock variable's value to ours.
        write: From the stock value and ours to the stock value with ours.
        owner: The stock layer whose flag freezes it.
    """

    ours: keras.Variable | None
    stock: keras.Variable
    name: str | None
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]
    owner: keras.Layer


def mixture_in(block: keras.Layer, row: Block) -> FoundMixture | None:
    """The mixture of a stock block; `None` where it has another network."""
    if row.whole is None:
        return None
    holder = part(block, row.whole)
    for network in row.networks:
        if isinstance(network, Mixture) and type(holder) is inner_class(
            network.layer
        ):
            beside = network.beside
            routed = holder if beside is None else part(block, beside)
            return FoundMixture(network, holder, routed)
    return None


def layer_of(found: FoundMixture) -> MoEFeedForward:
    """An unbuilt `MoEFeedForward` that is told to hold what a mixture holds.

    Its router's values come with `finish`, once it is built.
    """
    row, holder = found.network, found.holder
    shared = found.shared_roles
    normalize = row.normalize
    if isinstance(normalize, str):
        normalize = bool(getattr(holder, normalize))
    loss = 0.0 if row.loss is None else float(getattr(holder, row.loss))
    make: Any = TopKRouter
    if row.beside is not None:
        make = functools.partial(
            RescaledTopKRouter, epsilon=found.routed.layer_norm_epsilon
        )
    router = make(
        int(getattr(found.routed, row.top_k)),
        normalize=normalize,
        softmax=row.softmax,
        use_bias=found.first.bias is not None,
        # As the stock mixture, which leaves no token out.
        capacity_factor=None,
        load_balance_loss=loss,
    )
    layer = found.kind(
        found.num_experts,
        int(found.variable(row.down).shape[1]),
        router,
        activation=row.activation(found.experts),
        gated=True,
        use_bias=row.bias is not None,
        shared_intermediate_dim=shared["up"].units if shared else None,
        shared_gate=row.shared_gate is not None,
        kernel_initializer=found.first.kernel_initializer,
        dtype=found.first.dtype_policy,
        name="moe",
    )
    layer.start_from(
        {
            each.name: _first_value(each)
            for each in counterparts(found)
            if each.name is not None
        }
    )
    return layer


def finish(found: FoundMixture, layer: MoEFeedForward) -> None:
    """What `start_from` does not set: the router, gates, flags."""
    for each in counterparts(found, layer):
        if each.name is None and each.ours is not None:
            value = each.read(ops.copy(each.stock.value))
            each.ours.assign(ops.cast(value, each.ours.dtype))
    layer.trainable = found.holder.trainable
    layer.router.trainable = found.first.trainable
    for each in counterparts(found, layer):
        if each.ours is not None:
            layer_state.copy_flag(each.stock, each.ours)
            if not each.owner.trainable:
                each.ours.trainable = False


def write_back(found: FoundMixture, layer: MoEFeedForward) -> None:
    """What a `MoEFeedForward` holds, into a stock mixture of its structure."""
    for each in counterparts(found, layer):
        if each.ours is None:
            continue
        value = ops.cast(each.ours.value, each.stock.dtype)
        each.stock.assign(each.write(each.stock.value, value))
        layer_state.copy_flag(each.ours, each.stock)


def counterparts(
    found: FoundMixture, layer: MoEFeedForward | None = None
) -> list[Counterpart]:
    """All weights of a mixture, each beside what it is in a layer of ours.

    Args:
        found: The stock mixture.
        layer: Ours, built; `None` to have names alone.
    """
    made = list(_of_experts(found, layer))
    router = None if layer is None else layer.router
    first = found.first
    kernel = None if router is None else router.kernel
    made.append(_of_logits(first.kernel, first, kernel, router))
    if first.bias is not None:
        ours = None if router is None else router.logits_bias
        made.append(_of_logits(first.bias, first, ours, router))
    row = found.network
    for name, holder in (
        ("token_scale", found.routed),
        ("expert_scale", found.holder),
    ):
        there = getattr(row, name)
        if there is not None:
            ours = None if router is None else getattr(router, name)
            made.append(_whole(getattr(holder, there), holder, ours))
    for role, dense in found.shared_roles.items():
        ours = None
        if layer is not None and layer.shared is not None:
            ours = layer.shared.projections[role].kernel
        made.append(
            Counterpart(
                ours,
                dense.kernel,
                f"{SHARED}{role}_kernel",
                lambda value: value[None],
                lambda whole, own: own[0],
                dense,
            )
        )
    gate = part(found.holder, row.shared_gate)
    if gate is not None:
        ours = None if layer is None else layer.shared_gate.kernel
        made.append(_whole(gate.kernel, gate, ours))
    return made


def _of_experts(found, layer) -> Iterator[Counterpart]:
    row = found.network
    owner = found.experts
    for role in _ROLES:
        name = getattr(row, role)
        half = None
        if row.gate == row.up and role != "down":
            half = _Half(0 if role == "gate" else 1, row.interleaved)
        for which, suffix in (("kernel", ""), ("bias", row.bias)):
            if suffix is None:
                continue
            ours = None
            if layer is not None:
                ours = getattr(layer.experts.projections[role], which)
            yield Counterpart(
                ours,
                found.variable(name + suffix),
                f"{role}_{which}",
                functools.partial(_read, half, which == "bias"),
                functools.partial(_write, half, which == "bias"),
                owner,
            )


class _Half(NamedTuple):
    """Which half of the last axis of what holds gate and up."""

    number: int
    interleaved: bool

    def both(self, whole):
        if self.interleaved:
            return [whole[..., ::2], whole[..., 1::2]]
        return ops.split(whole, 2, axis=-1)

    def joined(self, halves):
        if self.interleaved:
            return ops.reshape(
                ops.stack(halves, axis=-1), (*halves[0].shape[:-1], -1)
            )
        return ops.concatenate(halves, axis=-1)


def _read(half, bias, value):
    if half is not None:
        value = half.both(value)[half.number]
    return value[:, None] if bias else value


def _write(half, bias, whole, own):
    if bias:
        own = own[:, 0]
    if half is None:
        return own
    halves = half.both(whole)
    halves[half.number] = own
    return half.joined(halves)


def _whole(stock, owner, ours):
    return Counterpart(
        ours,
        stock,
        None,
        lambda value: value,
        lambda whole, own: own,
        owner,
    )


def _of_logits(stock, owner, ours, router):
    """What makes logits, which in a stock mixture have no temperature."""
    return _whole(stock, owner, ours)._replace(
        write=lambda whole, own: own / router.setting_now("temperature")
    )


def _first_value(each):
    def value(shape, dtype=None):
        del shape
        return ops.cast(each.read(ops.copy(each.stock.value)), dtype)

    return value

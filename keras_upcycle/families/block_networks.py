"""Finds the feed-forward network in a block, by the block's row."""

import dataclasses
import re
from typing import Any, NamedTuple

import keras

from keras_upcycle.families.rows import (
    SEQUENTIAL,
    Block,
    Mixture,
    Network,
    part,
)
from keras_upcycle.keras_internals.keras_hub import inner_class
from keras_upcycle.layers.activations import Float32Activation
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward


class Found(NamedTuple):
    """The network of a block, its layers by their roles.

    `holder` has the layers as attributes; `names` are theirs. `roles` has
    `"up"`, `"down"` and where gated `"gate"`.
    """

    network: Network
    holder: Any
    names: dict[str, str]

    @property
    def kind(self) -> type[MoEFeedForward]:
        """The class of what stands in its place."""
        return MoEFeedForward

    @property
    def roles(self) -> dict[str, keras.Layer]:
        return {
            role: part(self.holder, name) for role, name in self.names.items()
        }

    @property
    def first(self) -> keras.Layer:
        """The layer that carries the activation, where one does."""
        return self.roles.get("gate", self.roles["up"])

    @property
    def activation(self) -> Any:
        """What experts apply to the hidden layer."""
        said = self.network.activation
        if self.network.activation_from is not None:
            found = self.network.activation_from(self.holder)
        elif said is None:
            found = self.first.activation
        elif callable(said):
            found = said
        else:
            found = part(self.holder, said)
        if isinstance(found, keras.layers.Activation):
            found = found.activation
        found = keras.activations.get(found)
        return Float32Activation(found) if self.network.float32 else found

    @property
    def first_name(self) -> str:
        """The name of `first`, where a MoE layer is put."""
        return self.names.get("gate", self.names["up"])

    def dropout(self, name: str | None) -> keras.Layer | None:
        return part(self.holder, name)


def found_in(block: keras.Layer, row: Block) -> Found | str:
    """The network of a stock block, or why it has none that is known."""
    holder = block
    network: Any = row.networks[0]
    if row.whole is not None:
        holder = part(block, row.whole)
        if holder is None:
            return f"it has no layer {row.whole!r}"
        kinds = {_class(network): network for network in row.networks}
        if type(holder) not in kinds:
            return f"its {row.whole!r} is a {type(holder).__name__}"
        network = kinds[type(holder)]
    if isinstance(network, Mixture):
        return f"its {row.whole!r} is a mixture of experts already"
    if network is SEQUENTIAL:
        return _in_sequential(holder)
    if network.why_not is not None:
        reason = network.why_not(holder)
        if reason is not None:
            return reason
    names = {"up": network.up, "down": network.down}
    if network.gate is not None:
        plain = network.gated_if and not part(holder, network.gated_if)
        if plain:
            names["up"] = network.gate
        else:
            names["gate"] = network.gate
    found = Found(network, holder, names)
    for role, layer in found.roles.items():
        if layer is None:
            return f"it has no layer {names[role]!r}"
    return found


def dropouts_of(found: Found) -> list[keras.Layer]:
    """The dropout layers that serve the network alone, each once."""
    layers = [
        found.dropout(found.network.dropout),
        found.dropout(found.network.output_dropout),
    ]
    return list({id(one): one for one in layers if one is not None}.values())


def old_layers(block: keras.Layer, row: Block, found: Found) -> list:
    """What a MoE layer takes the place of, its own place first."""
    if row.whole is not None:
        return [found.holder]
    roles = found.roles
    ordered = [roles[r] for r in ("gate", "up", "down") if r in roles]
    return ordered + dropouts_of(found)


def _in_sequential(holder):
    """Of `Dense`, perhaps an activation, `Dense`, and dropouts behind each."""
    kinds = {
        keras.layers.Dense: "D",
        keras.layers.EinsumDense: "D",
        keras.layers.Dropout: "r",
        keras.layers.Activation: "a",
    }
    layers = holder.layers
    order = "".join(kinds.get(type(layer), "?") for layer in layers)
    if not re.fullmatch("Da?r?Dr?", order):
        names = ", ".join(type(layer).__name__ for layer in layers)
        return (
            "its network must be Dense, perhaps an Activation and a Dropout, "
            f"Dense, and perhaps a Dropout; it is {names}"
        )
    activation, last = order.find("a"), order.rfind("D")
    drops = [n for n, kind in enumerate(order) if kind == "r"]
    between = next((n for n in drops if n < last), None)
    behind = next((n for n in drops if n > last), None)
    named = [None if n is None else f"layers.{n}" for n in (between, behind)]
    network = dataclasses.replace(
        SEQUENTIAL,
        up="layers.0",
        down=f"layers.{last}",
        activation=f"layers.{activation}" if activation > 0 else None,
        dropout=named[0],
        output_dropout=named[1],
    )
    names = {"up": network.up, "down": network.down}
    return Found(network, holder, names)


def _class(network):
    if isinstance(network.layer, str):
        return inner_class(network.layer)
    return network.layer

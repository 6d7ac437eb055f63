"""What a row of the table says: of a network, a block, a stack, a model.

A row holds names of attributes and no code of its own, but for what a name
cannot say. `sparse_blocks` and `keras_hub_family` read it.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

GATED_PROJ: dict[str, Any] = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
ONE_KERNEL = (
    "one kernel holds its gate and its up projection, which experts keep apart"
)


@dataclass(frozen=True)
class Network:
    """Where the parts of a feed-forward network are.

    All names are of attributes of the layer that holds the network, dotted
    where the part is deeper.

    Attributes:
        up: The projection to the hidden layer; of a gated network the one
            that is not activated.
        down: The projection back.
        gate: Of a gated network the projection that is activated, whatever
            KerasHub calls it.
        activation: `None` where the projection carries it itself; the name of
            an attribute, a function or a layer; or the function.
        activation_from: From the layer that holds the network to what experts
            apply, where neither says it.
        float32: Whether what is activated is cast to float32.
        dropout: The dropout on the hidden layer.
        output_dropout: The dropout on the output. The same name where one
            layer serves both. One that attention uses as well is not named:
            it stays where it is.
        gated_if: A flag of the layer that holds the network; where it is
            false, the network has the projection called `gate` and no other.
        why_not: From the layer that holds the network to the reason why it
            cannot be converted, or `None`.
        layer: Class of the layer that holds the network, where that layer is
            the network and nothing else.
        follows_global_dtype: Whether its layers are made without the block's
            dtype policy, so that Keras's global one decides.
    """

    up: str
    down: str
    gate: str | None = None
    activation: str | Callable[[Any], Any] | None = None
    activation_from: Callable[[Any], Any] | None = None
    float32: bool = False
    dropout: str | None = None
    output_dropout: str | None = None
    gated_if: str | None = None
    why_not: Callable[[Any], str | None] | None = None
    layer: type | str | None = None
    follows_global_dtype: bool = False


@dataclass(frozen=True)
class Mixture:
    """Where the parts of a mixture of KerasHub's own are.

    Names are of attributes of the layer that is the mixture, or of the layer
    in it that holds the experts.

    Attributes:
        layer: The mixture's class, or where KerasHub keeps it.
        router: The `Dense` that gives the logits.
        experts: The layer whose variables are stacked, `(E, D, F)` and
            `(E, F, D)`.
        gate, up, down: Its kernels. One name for `gate` and `up` is one kernel
            `(E, D, 2F)` of both.
        interleaved: Whether such a kernel has them neuron by neuron, the gate
            first, and not one half behind the other.
        bias: What the name of a kernel's bias `(E, F)` has at its end; `None`
            where there are none.
        activation: From the layer that holds the experts to what they apply.
        top_k: How many experts a token meets.
        normalize: Whether their weights sum to 1, or the name of the flag.
        softmax: As `TopKRouter` takes it.
        loss: The weight of the load-balancing loss; `None` where there is none.
        noise: The rate of noise on the tokens in training, which is not
            carried over; `None` where there is none.
        beside: Of a router that stands beside the experts and looks at other
            tokens than they do: its name in the block. `router` and `top_k`
            are of it then; it normalises with its `layer_norm_epsilon`.
        token_scale: Its scale of each dimension.
        expert_scale: The experts' scale of what each of them puts out.
        shared: The layer that every token meets.
        shared_network: Where its parts are.
        shared_gate: The `Dense` whose sigmoid multiplies what it gives.
    """

    layer: str
    router: str
    experts: str
    gate: str
    up: str
    down: str
    activation: Callable[[Any], Any]
    interleaved: bool = False
    bias: str | None = None
    top_k: str = "top_k"
    normalize: str | bool = True
    softmax: str = "before_top_k"
    loss: str | None = None
    noise: str | None = None
    beside: str | None = None
    token_scale: str | None = None
    expert_scale: str | None = None
    shared: str | None = None
    shared_network: Network | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class Block:
    """A Transformer block with one feed-forward network.

    Attributes:
        layer: The block's class, or where KerasHub keeps it.
        networks: What its network may be. One network, whose names are the
            block's own; or, with `whole`, one, or a mixture, for each class of
            layer that may stand there.
        whole: Name of the sub-layer that is the network.
        mask: Name of the argument of `call` that marks real tokens, `(B, S)`
            or `(B, 1, S)`; `None` where the block is told of none.
        calls: Methods through which tokens enter.
        inside: Class of the layer, or where KerasHub keeps it, that holds
            such blocks where a model's graph does not.
        alone: Whether people put it into models of their own.
        causal: Of one that stands alone, whether a token must not see later
            ones.
    """

    layer: type | str
    networks: tuple[Network | Mixture, ...]
    whole: str | None = None
    mask: str | None = None
    calls: tuple[str, ...] = ("call",)
    inside: tuple[type | str, ...] = ()
    alone: bool = False
    causal: bool = False


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another.

    Attributes:
        name: Such as `"encoder"`, `"decoder"`, `"vision"`, `"text"`.
        path: Where its blocks are, from the backbone: names of attributes or
            of layers in its graph, `*` for each of a list.
        causal: Whether a token must not see others of its stack: later ones,
            or those of other examples that stand beside it.
        modality: `"language"` or `"vision"`, as recipes ask; `None` for audio.
        mask: Which of the model's inputs marks the real positions of what the
            stack puts out, or a function from the backbone and the inputs to
            it; `None` where all are real.
    """

    name: str
    path: str
    causal: bool = False
    modality: str | None = "language"
    mask: str | Callable[[Any, Any], Any] | None = "padding_mask"


@dataclass(frozen=True)
class Model:
    """A backbone of KerasHub.

    Attributes:
        backbone: Name of its class in `keras_hub.models`, or where KerasHub
            keeps it.
        stacks: Its stacks, inputs first. One that a model lacks is passed by.
        forgets: Arguments of the constructor that `get_config` leaves out,
            and that the backbone has as attributes.
    """

    backbone: str
    stacks: tuple[Stack, ...]
    forgets: tuple[str, ...] = ()


# A `keras.Sequential` of `Dense`, `Dense` and dropouts: its layers are found by
# what they are.
SEQUENTIAL = Network(up="", down="", layer=keras.Sequential)


def inner(layer, mask=None, calls=("call",), inside=(), **network) -> Block:
    """A row of a block whose own layers are its network."""
    return Block(
        layer, (Network(**network),), mask=mask, calls=calls, inside=inside
    )


def whole(layer, name, *networks, mask=None, inside=()) -> Block:
    """A row of a block with a sub-layer that is its network."""
    return Block(layer, networks, whole=name, mask=mask, inside=inside)


def part(holder: Any, name: str | None) -> keras.Layer | None:
    """What a dotted name of a row leads to, `None` where there is none."""
    if name is None:
        return None
    for each in name.split("."):
        holder = holder[int(each)] if each.isdigit() else _of(holder, each)
        if holder is None:
            return None
    return holder


def parts(holder: Any, path: str) -> list[Any]:
    """All that a path of a row leads to, in order.

    `*` is each of a list, and in a name any characters, of layers in a graph.
    """
    found = [holder]
    for each in path.split("."):
        if each == "*":
            found = [below for one in found for below in one]
        elif "*" in each:
            found = [
                layer
                for one in found
                for layer in one.layers
                if fnmatch.fnmatch(layer.name, each)
            ]
        else:
            found = [part(one, each) for one in found]
            found = [one for one in found if one is not None]
    return [
        block
        for one in found
        for block in (one if isinstance(one, (list, tuple)) else [one])
    ]


def _of(holder, name):
    found = getattr(holder, name, None)
    if found is None and isinstance(holder, keras.Model):
        by_name = {layer.name: layer for layer in holder.layers}
        return by_name.get(name)
    return found

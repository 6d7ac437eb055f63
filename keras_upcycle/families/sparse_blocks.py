"""Transformer blocks with experts: what a row says, done to a block.

Knows rows and no family. A block is converted by putting a MoE layer where
its network's first projection stands, or its whole network, and by making the
block one of a subclass that says so in its config.
"""

import functools
import inspect
from typing import Any

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.families.block_networks import found_in, old_layers
from keras_upcycle.families.placeholders import (
    Flattened,
    HeldOutput,
    PassOn,
)
from keras_upcycle.families.routed_attention import route, settings_in
from keras_upcycle.families.rows import Block, part
from keras_upcycle.families.stock_mixtures import mixture_in
from keras_upcycle.keras_internals.keras_hub import config_of, inner_class
from keras_upcycle.layers.call_context import (
    held_outputs,
    padding_mask,
)
from keras_upcycle.layers.expert_files import read_settings
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward

_PACKAGE = "keras_upcycle"
# From a block's class to its row, and to the subclass with experts.
_ROWS: dict[type, Block] = {}
_SPARSE: dict[type, type] = {}


def add_block(row: Block) -> None:
    """Makes a kind of block known, and the class of those with experts.

    A class that the installed KerasHub has not is passed by.
    """
    stock = inner_class(row.layer) if isinstance(row.layer, str) else row.layer
    if stock is None:
        return
    _ROWS[stock] = row
    _SPARSE[stock] = _sparse_class(stock, row)


def known_blocks() -> tuple[type, ...]:
    """Stock classes of blocks that a row describes."""
    return tuple(_ROWS)


def row_of(block: keras.Layer) -> Block | None:
    """The row of a stock block: of exactly its class, which alone is known."""
    return None if is_sparse(block) else _ROWS.get(stock_of(block))


def is_sparse(block: keras.Layer) -> bool:
    """Whether a block has experts in the place of its network."""
    return isinstance(block, SparseBlock) and bool(
        block.replaced or (block.given is not None and block.given.experts)
    )


def is_changed(block: keras.Layer) -> bool:
    """Whether a block has experts or routed heads."""
    return isinstance(block, SparseBlock)


def is_known(block: keras.Layer) -> bool:
    """Whether a block is of a class that a row describes, changed or not."""
    return stock_of(block) in _ROWS


def stock_of(block: keras.Layer) -> Any:
    """The stock class of a block, changed or not."""
    return block.stock if isinstance(block, SparseBlock) else type(block)


def new_layers(block: keras.Layer) -> list[keras.Layer]:
    """What a sparse block has in their place, in the same order."""
    return [part(block, name) for name in block.replaced]


def replaceable(block: keras.Layer) -> list[keras.Layer]:
    """What a MoE layer takes the place of in a stock block, its own first."""
    row = _ROWS[stock_of(block)]
    found = _network_of(block, row)
    if row.whole is not None:
        beside = getattr(found, "routed", found.holder)
        return list({id(one): one for one in (found.holder, beside)}.values())
    return old_layers(block, row, found)


def current_layer(block: keras.Layer) -> keras.Layer:
    """What stands at a block's network: its MoE layer, or where one would."""
    return block.moe_layer if is_sparse(block) else replaceable(block)[0]


def experts_of(blocks: list) -> dict[str, Any]:
    """From the numbers of those with experts, as strings, to the arguments."""
    return {
        str(number): block.experts
        for number, block in enumerate(blocks)
        if is_sparse(block)
    }


def install_all(blocks: list, experts: dict[str, Any]) -> None:
    """What `experts_of` says, or MoE layers, into blocks that are dense."""
    for number, layer in experts.items():
        if not is_sparse(blocks[int(number)]):
            install(blocks[int(number)], layer)


def install(block: keras.Layer, layer: Any) -> None:
    """Puts a MoE layer, or one made from its settings, into a stock block.

    The block becomes one of the sparse class. What the stock `__init__` of a
    model made stands in a graph already, so it is this object that changes.
    """
    row = _ROWS[stock_of(block)]
    found = _network_of(block, row)
    first = found.first
    if not isinstance(layer, MoEFeedForward):
        layer = found.kind(
            **read_settings(layer), dtype=first.dtype_policy, name="moe"
        )
    owner, _ = _owner(block, row.whole or found.first_name)
    if first.built and owner.path:
        # In a block of a built backbone; else it is built when called.
        shape = (None, None, first.kernel.shape[0])
        keras_internals.build_inside(owner.path, layer, shape)
    if row.whole is not None:
        places = {row.whole: layer}
        beside = getattr(found.network, "beside", None)
        if beside is not None:
            # It hands on what the router of the MoE layer is to look at.
            places[beside] = Flattened(name="router_inputs")
    else:
        places = {
            name: PassOn(name="no_projection", dtype=first.dtype_policy)
            for name in found.names.values()
        }
        places[found.names["down"]] = HeldOutput(
            name="held_output", dtype=first.dtype_policy
        )
        places[found.first_name] = layer
        for name in (found.network.dropout, found.network.output_dropout):
            if name is not None and found.dropout(name) is not None:
                places[name] = PassOn(
                    name="no_dropout", dtype=first.dtype_policy
                )
    for name, new in places.items():
        owner, attribute = _owner(block, name)
        keras_internals.replace_sublayer(owner, attribute, new)
    block.__class__ = _SPARSE[stock_of(block)]
    keras_internals.set_attribute(block, "replaced", tuple(places))


def route_heads(block: keras.Layer, heads: dict[str, Any]) -> None:
    """Routes heads of a block's attention; see `routed_attention.route`."""
    if heads:
        route(block, heads)
        block.__class__ = _SPARSE[stock_of(block)]


def heads_of_blocks(blocks: list) -> dict[str, Any]:
    """From the numbers of those with routed heads to what `route` takes."""
    return {
        str(number): block.attention_experts
        for number, block in enumerate(blocks)
        if is_changed(block) and block.attention_experts
    }


def route_all(blocks: list, heads: dict[str, Any]) -> None:
    """What `heads_of_blocks` says, of blocks whose heads are not routed."""
    for number, settings in heads.items():
        block = blocks[int(number)]
        if not (is_changed(block) and block.attention_experts):
            route_heads(block, settings)


def _network_of(block, row):
    """The network, or mixture, that a family has found fit."""
    found = mixture_in(block, row) or found_in(block, row)
    if isinstance(found, str):
        raise ValueError(
            f"Block {block.name!r} ({type(block).__name__}) cannot hold "
            f"experts: {found}."
        )
    return found


def sparse_copy(block: keras.Layer, layer: Any) -> keras.Layer:
    """A new block like a built one, with a MoE layer once it is built.

    Args:
        block: A stock block, or one of the sparse class.
        layer: An unbuilt MoE layer.
    """
    stock = stock_of(block)
    config = {**config_of(block, stock), "experts": layer}
    kind: Any = _SPARSE[stock]
    return kind.from_config(config)


def dense_copy(block: "SparseBlock") -> keras.Layer:
    """A new stock block of the structure that a sparse one came from."""
    stock: Any = block.stock
    return stock.from_config(config_of(block, stock))


def real_positions(mask: Any, tokens: Any) -> Any:
    """`(B, S)` from a mask that a block gets, `None` where it has none.

    `(B, 1, S)`, as T5 hands its blocks, says the same; one row for each query
    says who may attend to whom, and nothing of padding. In cached decoding
    there is none, or one of the whole cache: every token is real.
    """
    if mask is None:
        return None
    while len(mask.shape) > 2 and mask.shape[1] == 1:
        mask = ops.squeeze(mask, axis=1)
    if isinstance(tokens, (list, tuple)):
        tokens = tokens[0]
    length = tokens.shape[1] if len(tokens.shape) == 3 else None
    if len(mask.shape) != 2 or mask.shape[1] != length:
        return None
    return ops.cast(mask, "bool")


class Given:
    """Experts that wait for a block to be built: no sub-layer of it yet."""

    def __init__(self, experts, attention_experts=None):
        self.experts = experts
        self.attention_experts = attention_experts or {}


def _settings(experts):
    if isinstance(experts, MoEFeedForward):
        return experts.saved_settings()
    return experts


class SparseBlock:
    """Mixed into a stock block: its feed-forward network is a MoE layer.

    Args:
        experts: The arguments of the block's `MoEFeedForward`, or the layer.
        attention_experts: From where an attention layer is to the arguments
            of its experts.
        **kwargs: Of the stock block.
    """

    stock: type
    row: Block
    # Names of what was replaced, of the block or of what holds its network.
    replaced: tuple[str, ...] = ()
    given: Given | None = None
    built: bool

    def __init__(self, *args, experts=None, attention_experts=None, **kwargs):
        super().__init__(*args, **kwargs)
        if experts is None and not attention_experts:
            return
        keras_internals.set_attribute(
            self, "given", Given(experts, attention_experts)
        )
        # Some are built when they are made, and others never by `build`.
        if self.built or not _builds_itself(self.stock):
            self._become_sparse()

    def _become_sparse(self):
        given = self.given
        keras_internals.set_attribute(self, "given", None)
        self.__class__ = self.stock
        if given.experts is not None:
            install(self, given.experts)
        route_heads(self, given.attention_experts)

    @property
    def moe_layer(self) -> MoEFeedForward | None:
        """The layer, `None` in a block that is not built yet."""
        for name in self.replaced:
            layer = part(self, name)
            if isinstance(layer, MoEFeedForward):
                return layer
        return None

    @property
    def experts(self) -> dict[str, Any] | None:
        """The arguments of the block's `MoEFeedForward`."""
        layer = self.moe_layer
        if layer is not None:
            return layer.saved_settings()
        return None if self.given is None else _settings(self.given.experts)

    @property
    def attention_experts(self) -> dict[str, Any]:
        """What `routed_attention.route` takes for the same heads."""
        return (
            settings_in(self)
            if self.given is None
            else self.given.attention_experts
        )

    def get_config(self):
        config = {**config_of(self, self.stock), "experts": self.experts}
        if found := self.attention_experts:
            config["attention_experts"] = found
        return config


def _sparse_class(stock, row):
    name = f"Upcycled{stock.__name__}"
    if name in globals():
        # KerasHub has several `CLIPEncoderLayer`s.
        package = stock.__module__.rpartition(".")[2]
        name += "_" + package
    methods = {
        each: _with_context(getattr(stock, each), row) for each in row.calls
    }
    if _builds_itself(stock):
        methods["build"] = _with_experts_in_it(stock.build)
    # Files name layers of a list by their class: inside a holder, whose own
    # class tells, blocks are called as in the dense model.
    made = type(
        stock.__name__ if row.inside else name,
        (SparseBlock, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` with experts.",
            "stock": stock,
            "row": row,
            **methods,
        },
    )
    globals()[name] = made
    return keras.saving.register_keras_serializable(_PACKAGE, name)(made)


def _with_context(method, row):
    """A stock method of a block, its mask handed down to the MoE layer."""
    signature = inspect.signature(method)
    tokens = list(signature.parameters)[1]
    held = row.whole is None

    # `Layer.__init__` reads the call's signature, to know its arguments.
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        mask = real_positions(given.get(row.mask), given.get(tokens))
        with padding_mask(mask), held_outputs(held and bool(self.replaced)):
            return method(self, *args, **kwargs)

    return call


def _with_experts_in_it(build):
    """A stock `build`, after which the block that was built becomes sparse."""

    @functools.wraps(build)
    def built(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if self.given is not None:
            self._become_sparse()

    return built


def _builds_itself(stock):
    return stock.build is not keras.Layer.build


def _owner(holder, name):
    """The layer that has the last name of a dotted one, and that name."""
    above, _, last = name.rpartition(".")
    return (part(holder, above) if above else holder), last

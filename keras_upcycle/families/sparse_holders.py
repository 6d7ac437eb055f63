"""Layers that hold Transformer blocks with experts where no graph does.

Of such a layer's config a copy is made: it must say which blocks are sparse.
"""

import functools
from typing import Any

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families.rows import Block
from keras_upcycle.families.sparse_blocks import (
    Given,
    experts_of,
    heads_of_blocks,
    install_all,
    is_changed,
    route_all,
    row_of,
)
from keras_upcycle.keras_internals.keras_hub import config_of, inner_class

_PACKAGE = "keras_upcycle"
# From a stock class to the one of those that hold sparse blocks.
_HOLDERS: dict[type, type] = {}


def add_holders(row: Block) -> None:
    """Makes known what holds blocks of a kind, where it is no graph.

    A class that the installed KerasHub has not is passed by.
    """
    for path in row.inside:
        holder = inner_class(path) if isinstance(path, str) else path
        if holder is not None and holder not in _HOLDERS:
            _HOLDERS[holder] = _holder_class(holder)


def known_holders() -> tuple[type, ...]:
    """Stock classes of layers that hold such blocks."""
    return tuple(_HOLDERS)


def mark_holders(model: keras.Layer) -> None:
    """Layers that hold sparse blocks become of a class that says so.

    Else a copy that is made of such a layer's config would be dense.
    """
    for layer in keras_internals.all_layers(model):
        if type(layer) in _HOLDERS and any(map(is_changed, _blocks_in(layer))):
            layer.__class__ = _HOLDERS[type(layer)]


class SparseHolder:
    """Mixed into a stock layer that holds blocks: some have experts.

    Args:
        experts: From a block's number in it, as a string, to the arguments
            of the block's `MoEFeedForward`, or the layer.
        attention_experts: From a block's number to what its own
            `attention_experts` says.
        **kwargs: Of the stock layer.
    """

    stock: type
    built: bool

    def __init__(self, *args, experts=None, attention_experts=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.given = Given(experts or {}, attention_experts)

    @property
    def experts(self) -> dict[str, Any]:
        """From block number to the arguments of its `MoEFeedForward`."""
        if not self.built:
            return self.given.experts
        return experts_of(_blocks_in(self))

    @property
    def attention_experts(self) -> dict[str, Any]:
        """From block number to what its `attention_experts` says."""
        return (
            heads_of_blocks(_blocks_in(self))
            if self.built
            else (self.given.attention_experts)
        )

    def get_config(self):
        config = {**config_of(self, self.stock), "experts": self.experts}
        if found := self.attention_experts:
            config["attention_experts"] = found
        return config


def _blocks_in(holder):
    return [
        layer
        for layer in keras_internals.all_layers(holder)
        if is_changed(layer) or row_of(layer) is not None
    ]


def _holder_class(stock):
    @functools.wraps(stock.build)
    def build(self, *args, **kwargs):
        stock.build(self, *args, **kwargs)
        install_all(_blocks_in(self), self.given.experts)
        route_all(_blocks_in(self), self.given.attention_experts)

    made = type(
        f"Upcycled{stock.__name__}",
        (SparseHolder, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` with experts.",
            "stock": stock,
            "build": build,
        },
    )
    globals()[made.__name__] = made
    return keras.saving.register_keras_serializable(_PACKAGE)(made)

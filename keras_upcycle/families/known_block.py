"""A block of a known class by itself, as a layer of somebody's model."""

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import sparse_blocks, surgery
from keras_upcycle.families.base import Family, Findings, layers_flops
from keras_upcycle.families.block_sites import (
    last_name,
    looked_at,
    site_of,
    stack_of,
)


class BlockFamily(Family):
    """Knows one block, as others know a backbone.

    `keras_hub.layers.TransformerEncoder` and `TransformerDecoder` in a model
    of one's own, and what `register_block` taught.
    """

    name = "Transformer blocks"

    def find(self, block):
        row = sparse_blocks.row_of(block)
        path = last_name(row)
        found, reason = looked_at(block, row)
        if reason is not None:
            return Findings(rejected=[(path, reason)])
        site = site_of(0, path, stack_of(row), 0, block, row, found)
        return Findings([site])

    def rebuild(self, block, sites, replacements):
        """A block that is built when it is called, see `finish`."""
        if not replacements:
            return None
        (layer,) = replacements.values()
        return sparse_blocks.sparse_copy(block, layer)

    def finish(self, old, new):
        """Copies what a block holds beside its network, once it is built."""
        if new is None:
            return
        if sparse_blocks.is_sparse(old):
            replaced = sparse_blocks.new_layers(old)
        else:
            replaced = sparse_blocks.replaceable(old)
        surgery.copy_state(
            old, new, replaced, sparse_blocks.new_layers(new), from_config=True
        )

    def current_layers(self, block, sites):
        return [sparse_blocks.current_layer(block) for _ in sites]

    def matmul_flops(self, block):
        row = sparse_blocks.row_of(block) or block.row
        flops = layers_flops(keras_internals.all_layers(block))
        return {stack_of(row).name: flops}

    def build_dense(self, block):
        """A dense block of the same structure, or `None` for one as it is."""
        if not sparse_blocks.is_sparse(block):
            return None
        return sparse_blocks.dense_copy(block)

    def replace_moe_layers(self, block, replacements):
        if not sparse_blocks.is_sparse(block):
            return None
        return sparse_blocks.sparse_copy(block, replacements[block.moe_layer])


def is_known_block(layer: keras.Layer) -> bool:
    """Whether a layer is a block that may stand in anybody's model."""
    row = sparse_blocks.row_of(layer)
    if row is None and sparse_blocks.is_sparse(layer):
        row = layer.row
    return row is not None and row.alone

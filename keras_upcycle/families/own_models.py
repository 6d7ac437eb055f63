"""Subclassed models of somebody's own that hold blocks of a known class.

Such a model is made anew from its `get_config()`, and the blocks in it change
their class where they stand: its own `call`, `train_step` and the like stay.
"""

from typing import Any

import keras
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import block_networks, sparse_blocks, surgery
from keras_upcycle.families.base import Family, Findings, layers_flops
from keras_upcycle.families.block_sites import (
    last_name,
    looked_at,
    site_of,
    stack_of,
)
from keras_upcycle.families.known_block import is_known_block
from keras_upcycle.keras_internals.keras_hub import config_of

_PACKAGE = "keras_upcycle"
_SPARSE: dict[type, type] = {}


class SparseModel:
    """Mixed into a subclassed model: some of its blocks hold experts.

    Args:
        experts: From a block's number in the model, as a string, to the
            arguments of its `MoEFeedForward`.
        **kwargs: Of the model.
    """

    stock: type
    given: Any = None

    def __init__(self, *args, experts=None, **kwargs):
        super().__init__(*args, **kwargs)
        if experts:
            self.given = experts

    def build_from_config(self, config):
        _build(self, config)
        if self.given is not None:
            sparse_blocks.install_all(blocks_in(self), self.given)
            self.given = None

    @property
    def experts(self) -> dict[str, Any]:
        """From a block's number to the arguments of its `MoEFeedForward`."""
        return sparse_blocks.experts_of(blocks_in(self))

    def get_config(self):
        return {**config_of(self, self.stock), "experts": self.experts}


class OwnModelFamily(Family):
    """See the module's docstring."""

    name = "models with a registered block"

    def find(self, model):
        findings = Findings()
        numbers: dict[str, int] = {}
        for block in blocks_in(model):
            row = sparse_blocks.row_of(block)
            path = f"{block.path or block.name}/{last_name(row)}"
            found, reason = looked_at(block, row)
            if reason is not None:
                findings.rejected.append((path, reason))
                continue
            stack = stack_of(row)
            number = numbers.get(stack.name, 0)
            numbers[stack.name] = number + 1
            index = len(findings.sites)
            findings.sites.append(
                site_of(index, path, stack, number, block, row, found)
            )
        return findings

    def rebuild(self, model, sites, replacements):
        new = _made_anew(model, type(model))
        old_blocks, new_blocks = blocks_in(model), blocks_in(new)
        replaced, given = [], []
        by_block = {
            id(self._block(old_blocks, site)): replacements[site.index]
            for site in sites
            if site.index in replacements
        }
        for old, block in zip(old_blocks, new_blocks, strict=True):
            if id(old) not in by_block:
                continue
            replaced += sparse_blocks.replaceable(old)
            sparse_blocks.install(block, by_block[id(old)])
            given += sparse_blocks.new_layers(block)
        if replacements:
            new.__class__ = sparse_model_class(type(model))
        surgery.copy_state(model, new, replaced, given, from_config=True)
        keras_internals.draw_first_values(new)
        return new

    def current_layers(self, model, sites):
        stacks: dict[str, list] = {}
        for block in blocks_in(model):
            row = sparse_blocks.row_of(block) or block.row
            stacks.setdefault(stack_of(row).name, []).append(block)
        return [
            sparse_blocks.current_layer(stacks[site.stack][site.number])
            for site in sites
        ]

    def matmul_flops(self, model):
        flops: dict[Any, int] = {}
        for block in blocks_in(model):
            row = sparse_blocks.row_of(block) or block.row
            name = stack_of(row).name
            own = layers_flops(keras_internals.all_layers(block))
            flops[name] = flops.get(name, 0) + own
        # What stands beside the blocks is taken to meet each token, too.
        everything = layers_flops(keras_internals.all_layers(model))
        first = next(iter(flops))
        flops[first] += everything - sum(flops.values())
        return flops

    def build_dense(self, model):
        return _made_anew(model, getattr(model, "stock", type(model)))

    def _block(self, blocks, site):
        for block in blocks:
            row = sparse_blocks.row_of(block)
            if row is None:
                continue
            found = block_networks.found_in(block, row)
            if isinstance(found, str):
                continue
            first = block_networks.old_layers(block, row, found)[0]
            if first is site.layers[0]:
                return block
        raise ValueError(
            f"Site {site.path!r} is no block of this model. Pass the sites "
            "that `find` gave for this very model."
        )


def blocks_in(model: keras.Layer) -> list[Any]:
    """The known blocks of a model, in the order in which it made them."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if is_known_block(layer)
    ]


def sparse_model_class(stock: type) -> type:
    """The class of a subclassed model's sparse copies; made once."""
    if stock not in _SPARSE:
        name = f"Upcycled{stock.__name__}"
        made = type(
            name,
            (SparseModel, stock),
            {
                "__module__": __name__,
                "__doc__": f"A `{stock.__name__}` with experts.",
                "stock": stock,
            },
        )
        globals()[name] = made
        _SPARSE[stock] = made
        keras.saving.register_keras_serializable(_PACKAGE)(made)
    return _SPARSE[stock]


def _made_anew(model, kind: Any):
    """A built model of the same config."""
    stock = getattr(model, "stock", type(model))
    how = (
        "Complete its `get_config()`, from which `from_config` must make an "
        "equal model, or teach the class with `keras_upcycle.register_family`."
    )
    try:
        new = kind.from_config(config_of(model, stock))
    except Exception as error:
        raise UpcycleError(
            f"Model {model.name!r} ({stock.__name__}) cannot be made anew "
            "from its own `get_config()`, so that Keras can neither clone nor "
            f"reload it. Received the error: {type(error).__name__}: {error}. "
            f"{how}"
        ) from error
    if not new.built:
        _build(new, model.get_build_config())
    if not new.built or len(blocks_in(new)) != len(blocks_in(model)):
        raise UpcycleError(
            f"Model {model.name!r} ({stock.__name__}) cannot be built anew: "
            f"its copy has {len(blocks_in(new))} of {len(blocks_in(model))} "
            "known blocks, and is built from the shapes that the model was "
            f"first called on. {how}"
        )
    return new


def _build(model, config):
    """Builds a model by a call on zeros of the shapes that it was built with.

    Keras's own `build_from_config` hands a model symbolic numbers, which an
    embedding may not take for ids.
    """
    shapes = (config or {}).get("shapes_dict") or config or {}
    if list(shapes) == ["input_shape"]:
        arguments, keywords = [shapes["input_shape"]], {}
    else:
        arguments = []
        keywords = {k.removesuffix("_shape"): v for k, v in shapes.items()}
    for dtype in ("int32", "float32"):

        def zeros(shape, dtype=dtype):
            if isinstance(shape, dict):
                return {name: zeros(each) for name, each in shape.items()}
            return ops.zeros([size or 1 for size in shape], dtype)

        try:
            model(
                *map(zeros, arguments),
                **{name: zeros(shape) for name, shape in keywords.items()},
            )
        except Exception:  # anybody's code; the other may do
            continue
        if model.built:
            return

"""Sparse backbones of KerasHub, and all that KerasHub looks for beside them.

KerasHub pairs tasks, preprocessors, tokenizers and converters with backbones
through `backbone_cls`, so a sparse backbone comes with one registered subclass
of each: then every stock `from_preset` finds them. They are made from the
stock ones when this package is imported, for that is when a file may ask.
"""

import inspect
import tempfile
from typing import Any

import keras
import keras_hub

from keras_upcycle import keras_internals
from keras_upcycle.families import sparse_blocks, sparse_holders
from keras_upcycle.families.adapter_biases import KeepsBiasesOfAdapters
from keras_upcycle.families.adapters import ChecksAdapters
from keras_upcycle.families.keras_hub_fixes import (
    ClearsGradients,
    TakesPyDataset,
)
from keras_upcycle.families.rows import Model, Stack, parts
from keras_upcycle.keras_internals.keras_hub import inner_class, subclasses_for
from keras_upcycle.state.random_state import KeepsRandomState

_PACKAGE = "keras_upcycle"
_PREPROCESSOR = keras_hub.models.Preprocessor
# In the order in which one needs the others.
_BESIDE = (
    ("tokenizer_cls", keras_hub.tokenizers.Tokenizer),
    ("image_converter_cls", keras_hub.layers.ImageConverter),
    ("audio_converter_cls", keras_hub.layers.AudioConverter),
    ("preprocessor_cls", _PREPROCESSOR),
)
# From a stock class to the one for sparse backbones, and back.
_SPARSE: dict[type, type] = {}
_STOCK: dict[type, type] = {}


class SparseBackbone(
    ChecksAdapters, KeepsBiasesOfAdapters, ClearsGradients, KeepsRandomState
):
    """Mixed into a KerasHub backbone: some of its blocks hold experts.

    Made by `upcycle_model`; loads and saves as any backbone does.

    Args:
        experts: From a stack's name to a mapping from a block's number in it,
            as a string, to the arguments of its `MoEFeedForward`. Of a model
            with one stack the inner mapping alone will do.
        attention_experts: From a stack's name to a mapping from a block's
            number to what its attention's experts are made with. Defaults to
            `None`.
        **kwargs: Of the stock backbone.
    """

    row: Model

    def __init__(
        self, *, experts, attention_experts=None, dtype=None, **kwargs
    ):
        if type(dtype) is keras.dtype_policies.DTypePolicy:
            # Some stock blocks leave their config to Keras, which records
            # names and not policies: such a model could not be cloned.
            dtype = dtype.name
        super().__init__(dtype=dtype, **kwargs)
        if any(key.isdigit() for key in experts):
            experts = {self.row.stacks[0].name: experts}
        for stack in self.row.stacks:
            sparse_blocks.install_all(
                blocks_of(self, stack), experts.get(stack.name, {})
            )
        self.route_heads(attention_experts or {})
        if not self.trainable:
            keras_internals.freeze_tree(self)  # what came after, too

    def route_heads(self, heads: dict[str, dict[str, Any]]) -> None:
        """Routes heads, of stacks and blocks, that are not routed yet."""
        for stack in self.row.stacks:
            sparse_blocks.route_all(
                blocks_of(self, stack), heads.get(stack.name, {})
            )
        sparse_holders.mark_holders(self)

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """From stack and block number to the `MoEFeedForward`'s arguments."""
        return {
            stack.name: sparse_blocks.experts_of(blocks_of(self, stack))
            for stack in self.row.stacks
        }

    @property
    def attention_experts(self) -> dict[str, dict[str, Any]]:
        """From stack and block number to what `route_heads` takes."""
        found = {
            stack.name: sparse_blocks.heads_of_blocks(blocks_of(self, stack))
            for stack in self.row.stacks
        }
        return {name: blocks for name, blocks in found.items() if blocks}

    def get_config(self):
        config = {**complete_config(self), "experts": self.experts}
        if found := self.attention_experts:
            config["attention_experts"] = found
        return config


class SavesAllSettings:
    """Mixed into a preprocessor: settings that the stock config forgets.

    A loaded `T5Seq2SeqLMPreprocessor` pads and truncates to 1024, whatever it
    was made with.
    """

    def get_config(self):
        config = super().get_config()
        return {**_forgotten(self, config), **config}


class KeepsHeadDtype:
    """Mixed into a task whose config leaves `head_dtype` out."""

    def __init__(self, backbone, num_classes, head_dtype=None, **kwargs):
        super().__init__(backbone, num_classes, head_dtype=head_dtype, **kwargs)
        self.head_dtype = head_dtype

    def get_config(self):
        config = super().get_config()
        if self.head_dtype is not None:
            config["head_dtype"] = keras.dtype_policies.serialize(
                keras.dtype_policies.get(self.head_dtype)
            )
        return config


def add_model(row: Model) -> list[type]:
    """Makes the classes of a row.

    Returns:
        Stock and sparse classes of its backbone and tasks; none where the
        installed KerasHub has no such backbone.
    """
    stock = inner_class(row.backbone)
    if stock is None:
        return []
    backbone = _made(stock, (SparseBackbone,), {"row": row})
    for _, base in _BESIDE:
        for kind in subclasses_for(base, stock):
            mixins = (SavesAllSettings,) if base is _PREPROCESSOR else ()
            _made(kind, mixins, {"backbone_cls": backbone, **_named(kind)})
    known = [stock, backbone]
    for kind in subclasses_for(keras_hub.models.Task, stock):
        of_task: tuple[type, ...] = (TakesPyDataset, KeepsRandomState)
        arguments = arguments_of(kind)
        if "head_dtype" in arguments and "num_classes" in arguments:
            of_task = (KeepsHeadDtype, *of_task)
        made = _made(kind, of_task, {"backbone_cls": backbone, **_named(kind)})
        known += [kind, made]
    return known


def stock_classes(backbone: str) -> list[type]:
    """A backbone's class by its name, and its tasks'; none if unknown."""
    stock = inner_class(backbone)
    if stock is None:
        return []
    return [stock, *subclasses_for(keras_hub.models.Task, stock)]


def sparse_class(stock: type) -> type:
    """The class for sparse backbones of a stock class, or it itself."""
    return _SPARSE.get(stock, stock)


def stock_to_sparse() -> dict[type, type]:
    """All stock classes that have one for sparse models, and these."""
    return dict(_SPARSE)


def stock_class(sparse: type) -> type:
    """The stock class of which one for sparse backbones is, or it itself."""
    return _STOCK.get(sparse, sparse)


def blocks_of(backbone: keras.Model, stack: Stack) -> list[keras.Layer]:
    """The blocks of a stack, inputs first; none where it has no such stack."""
    return [
        block
        for block in parts(backbone, stack.path)
        if isinstance(block, keras.Layer)
    ]


def arguments_of(kind: Any) -> list[str]:
    """The names of what a class is made with."""
    return list(inspect.signature(kind.__init__).parameters)


def complete_config(backbone: keras.Model) -> dict[str, Any]:
    """What makes an equal backbone, with what the stock config forgets.

    A sparse backbone's own `get_config` adds its experts.
    """
    kind: Any = stock_class(type(backbone))
    config = kind.get_config(backbone)
    row = getattr(backbone, "row", None) or _ROW_OF[kind]
    return {**config, **{n: _setting(backbone, n) for n in row.forgets}}


def _setting(backbone, name):
    """A setting by name, of a backbone or of the first layer that has it."""
    for layer in keras_internals.all_layers(backbone):
        found = getattr(layer, name, None)
        if found is not None:
            return found
    return None


def converted(old: Any, change) -> Any:
    """A preprocessor whose parts are of other classes; anything else as it is.

    Sharing is safe: a preprocessor holds settings and is never trained.

    Args:
        old: A preprocessor, or what stands in its place.
        change: `sparse_class` or `stock_class`.
    """
    if old is None or change(type(old)) is type(old):
        return old
    config = old.get_config()
    config = {**_forgotten(old, config), **config}
    for name in ("tokenizer", "image_converter", "audio_converter"):
        part = getattr(old, name, None)
        if part is not None:
            config[name] = _part(part, change)
    new = change(type(old)).from_config(config)
    if len(keras_internals.sublayers(new)) < len(
        keras_internals.sublayers(old)
    ):
        new.build(None)  # as the old one was when it was first called
    return new


def _part(old, change):
    kind = change(type(old))
    if kind is type(old):
        return old
    new = kind.from_config(old.get_config())
    if isinstance(old, keras_hub.tokenizers.Tokenizer) and _has_words(old):
        # No config holds a vocabulary.
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    return new


def _has_words(tokenizer):
    if hasattr(tokenizer, "proto"):
        return tokenizer.proto is not None
    return getattr(tokenizer, "vocabulary", None) is not None


def _forgotten(made, config):
    """Arguments that an object was made with and its config has not."""
    return {
        name: getattr(made, name)
        for name in arguments_of(stock_class(type(made)))
        if name not in config
        and isinstance(getattr(made, name, None), (bool, int, float, str))
    }


def _named(kind):
    """What a class names as its own, in their sparse forms."""
    return {
        name: _SPARSE[getattr(kind, name)]
        for name, _ in _BESIDE
        if getattr(kind, name, None) in _SPARSE
    }


_ROW_OF: dict[type, Model] = {}


def _made(stock, mixins, attributes):
    made = type(
        f"Upcycled{stock.__name__}",
        (*mixins, stock),
        {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` for models with experts.\n\n"
            "Every stock entry point finds it.",
            **attributes,
        },
    )
    keras.saving.register_keras_serializable(_PACKAGE)(made)
    _SPARSE[stock], _STOCK[made] = made, stock
    if "row" in attributes:
        _ROW_OF[stock] = attributes["row"]
    globals()[made.__name__] = made
    return made

"""Sparse models as KerasHub's own mixtures."""

import re
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_upcycle import families
from keras_upcycle.conversion import targets
from keras_upcycle.conversion.targets import Target
from keras_upcycle.errors import UpcycleError
from keras_upcycle.export import epsilons
from keras_upcycle.families import sparse_blocks, stock_mixtures
from keras_upcycle.families.keras_hub_classes import (
    complete_config,
    converted,
    stock_class,
)
from keras_upcycle.families.keras_hub_family import backbone_of
from keras_upcycle.keras_internals.keras_hub import subclasses_for
from keras_upcycle.layers import moe_layers
from keras_upcycle.state import layer_state


def to_keras_hub(model: keras.Model, target: Target) -> keras.Model:
    """The stock model; `reasons` has found that there is one."""
    old = backbone_of(model)
    new = _structure(old, target)
    _fill(old, new)
    epsilons.say(epsilons.of_heads(old), epsilons.of_heads(new))
    if model is old:
        return new
    kind = _task_class(model, type(new))
    preprocessor = _preprocessor(model, kind)
    return kind(backbone=new, preprocessor=preprocessor)


def _structure(old, target):
    kind = getattr(keras_hub.models, target.backbone)
    source = stock_class(type(old))
    layers = moe_layers.moe_layers_in(old)
    alike = targets.settings_of(layers[0])
    counts = {there: alike[here] for here, there in target.counts.items()}
    if source is kind:
        config = complete_config(old)
        return kind.from_config({**config, **counts})
    config = target.sources[source.__name__](old)
    if not target.every_block:
        config["mlp_only_layers"] = [
            number
            for number, block in enumerate(old.transformer_layers)
            if not sparse_blocks.is_sparse(block)
        ]
        config["decoder_sparse_step"] = 1
    return kind(**{**config, **counts}, dtype=old.dtype_policy)


def _fill(old: Any, new: Any) -> None:
    """All that the target holds, each from its counterpart, none left over."""
    left = {id(v): v for v in old.weights}
    sites = families.family_of(new).mixtures(new)
    inside = set()
    for site in sites:
        layer = sparse_blocks.current_layer(old.transformer_layers[site.number])
        stock_mixtures.write_back(site.found, layer)
        for part in (site.found.holder, site.found.routed):
            inside |= {id(v) for v in part.weights}
        for variable in layer.weights:
            left.pop(id(variable), None)
    by_path = {_path(variable): variable for variable in left.values()}
    for variable in new.weights:
        if id(variable) in inside:
            continue
        path = _path(variable)
        source = by_path.pop(path, None)
        if source is None and path.endswith("reverse_embeddings"):
            # Untied: written twice.
            source = old.token_embedding.embeddings
            variable.assign(ops.transpose(source.value))
            continue
        if source is None or tuple(source.shape) != tuple(variable.shape):
            raise _no_counterpart(new, variable.path)
        variable.assign(ops.copy(source.value))
        layer_state.copy_flag(source, variable)
    # The state of random generators is nobody's weight.
    rest = [
        v.path
        for v in by_path.values()
        if keras.backend.is_float_dtype(v.dtype)
    ]
    if rest:
        raise _no_counterpart(old, ", ".join(rest))


def _path(variable):
    """Where a variable is, without the layer that is the whole network.

    Keras numbers that layer as it pleases: `qwen3_moe_mlp_2`.
    """
    parts = variable.path.split("/")
    return "/".join(p for p in parts if not re.fullmatch(r"\w+_mlp(_\d+)?", p))


def _no_counterpart(model, paths):
    return UpcycleError(
        "Every weight must have its place in both models. Received: "
        f"{paths} of {model.name!r}, which the other has not. This is a bug "
        "of the target; please report it."
    )


def _task_class(model, backbone_class):
    bases = [
        base
        for base in type(model).__mro__
        if base in (keras_hub.models.CausalLM, keras_hub.models.TextClassifier)
    ]
    for kind in subclasses_for(keras_hub.models.Task, backbone_class):
        if bases and issubclass(kind, bases[0]):
            return kind
    raise UpcycleError(
        "A task must have one of its kind for the target. Received: "
        f"{type(model).__name__} for {backbone_class.__name__}. Export its "
        "`backbone`."
    )


def _preprocessor(model, kind):
    """The target's preprocessor, with the same settings and vocabulary."""
    old = model.preprocessor
    if old is None:
        return None
    change = {}
    tokenizer = getattr(old, "tokenizer", None)
    new = kind.preprocessor_cls
    if tokenizer is not None:
        there = new.tokenizer_cls
        if not _alike(type(tokenizer), there):
            raise UpcycleError(
                "A tokenizer must be of the kind that the target has. "
                f"Received: {type(tokenizer).__name__} for "
                f"{there.__name__}, which reads other files. Set "
                "`model.preprocessor = None` to export without it."
            )
        change[type(tokenizer)] = there
    change[type(old)] = new
    return converted(old, lambda each: change.get(each, each))


def _alike(own, there):
    bases = (
        keras_hub.tokenizers.SentencePieceTokenizer,
        keras_hub.tokenizers.BytePairTokenizer,
    )
    return any(issubclass(own, b) and issubclass(there, b) for b in bases)

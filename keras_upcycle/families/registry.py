"""Which family knows a model: the table, and how to add to it."""

from typing import Any

import keras

from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import (
    keras_hub_classes,
    keras_hub_image_blocks,
    keras_hub_mixtures,
    keras_hub_refused,
    keras_hub_table,
    keras_hub_text_blocks,
    sparse_blocks,
    sparse_holders,
    surgery,
)
from keras_upcycle.families.base import Family
from keras_upcycle.families.dense_pair import DensePairFamily
from keras_upcycle.families.keras_hub_family import KerasHubFamily
from keras_upcycle.families.known_block import BlockFamily, is_known_block
from keras_upcycle.families.mixture_family import MixtureFamily
from keras_upcycle.families.nested import NestedFamily
from keras_upcycle.families.own_models import OwnModelFamily, blocks_in
from keras_upcycle.families.refused import RefusedFamily
from keras_upcycle.state import layer_state

# From a model class, or the dotted path of one, to the family that knows it.
# Exact classes: a subclass may add what a rebuilt model would lose.
# `register_family` alone adds to it.
_FAMILIES: dict[Any, Family] = {}
_BLOCK = BlockFamily()
_OWN = OwnModelFamily()
for _block in (
    *keras_hub_text_blocks.BLOCKS,
    *keras_hub_image_blocks.BLOCKS,
    *keras_hub_mixtures.BLOCKS,
):
    sparse_blocks.add_block(_block)
    sparse_holders.add_holders(_block)
for _kind, _rows in (
    (KerasHubFamily, keras_hub_table.MODELS),
    (MixtureFamily, keras_hub_mixtures.MODELS),
):
    for _row in _rows:
        _family = _kind(_row)
        _FAMILIES |= dict.fromkeys(keras_hub_classes.add_model(_row), _family)
for _name, _reason in keras_hub_refused.REFUSED.items():
    _refused = keras_hub_classes.stock_classes(_name)
    _FAMILIES |= dict.fromkeys(_refused, RefusedFamily(_name, _reason))


def register_family(model_class: type | str, family: Family) -> None:
    """Teaches `upcycle_model` a new kind of model.

    Args:
        model_class: Class of the model, or its dotted path as a string, such as
            `"my_package.models.MyBackbone"`, which is not imported. Exactly
            this class is meant, not its subclasses.
        family: A `Family`, an instance and no class.

    Raises:
        TypeError: If either is of another type.
        ValueError: If the class has a family already.

    Example:
        ```python
        class MyFamily(keras_upcycle.Family):
            def find(self, model): ...
            def rebuild(self, model, sites, replacements): ...
            def current_layers(self, model, sites): ...

        keras_upcycle.register_family(MyBackbone, MyFamily())
        ```
    """
    if not isinstance(model_class, (type, str)):
        raise TypeError(
            "`model_class` must be a class or its dotted path. Received: "
            f"model_class={model_class!r} of type "
            f"{type(model_class).__name__}."
        )
    if not isinstance(family, Family):
        raise TypeError(
            "`family` must be an instance of `keras_upcycle.Family`. "
            f"Received: family={family!r} of type {type(family).__name__}. "
            "Pass an object, not a class."
        )
    path = model_class if isinstance(model_class, str) else _path(model_class)
    if path in {_path(known) for known in _FAMILIES}:
        raise ValueError(
            f"{path!r} has a family already. Received: family={family!r}. "
            "Register another class, or derive one of your own."
        )
    _FAMILIES[model_class] = family


def known_families() -> list[str]:
    """What can be upcycled, for messages."""
    of_keras_hub = {
        family.name
        for family in _FAMILIES.values()
        if isinstance(family, KerasHubFamily)
    }
    others = {
        family.name
        for family in _FAMILIES.values()
        if not isinstance(family, KerasHubFamily | RefusedFamily)
    }
    return [
        f"{len(of_keras_hub)} backbones of KerasHub and their tasks",
        *sorted(others),
        NestedFamily.name,
        "models with blocks that `register_block` taught",
        "Dense -> Dense pairs",
    ]


def taken_apart(model: keras.Model) -> list[keras.Layer]:
    """Layers of known families that stand in a model of no family."""
    inner = {
        kind for family in _FAMILIES.values() for kind in family.inner_classes
    }
    return [
        layer
        for layer in model.layers
        if isinstance(layer, (*inner,)) and not is_known_block(layer)
    ]


def family_of(model: Any) -> Family:
    """The family that knows the model.

    Raises:
        TypeError: If it is no Keras model.
        UpcycleError: If it is not built, of a class that no family knows, or
            without its values, which a failed `predict` takes on JAX.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    if not model.built:
        raise UpcycleError(
            f"`model` must be built, or there is nothing to copy. Received: "
            f"{model.name!r} ({type(model).__name__}), not built. Call it on "
            "a batch, or `model.build(input_shape)`, first."
        )
    layer_state.check_values(model)
    family = _registered(model)
    if family is not None:
        return family
    if surgery.is_plain_model(model):
        nested = NestedFamily(_known)
        return nested if nested.backbones(model) else DensePairFamily()
    if blocks_in(model):
        return _OWN
    raise UpcycleError(
        f"{model.name!r} is a {type(model).__name__}, and no family knows "
        f"this class (known: {', '.join(known_families())}). A subclassed "
        "model may hide its layers or override `train_step`, and a rebuilt "
        "one would lose that. Name the class of its Transformer block with "
        "`keras_upcycle.register_block`; or upcycle the functional model or "
        "KerasHub backbone inside it and wrap the result again; or teach this "
        "class with `keras_upcycle.register_family`."
    )


def _registered(model):
    by_path = {_path(known): family for known, family in _FAMILIES.items()}
    return by_path.get(_path(type(model)))


def _known(layer):
    """The family of a backbone or of a block that stands in any model."""
    return _registered(layer) or (_BLOCK if is_known_block(layer) else None)


def _path(known):
    if isinstance(known, str):
        return known
    return f"{known.__module__}.{known.__qualname__}"


def mixtures_known() -> list[str]:
    """Names of KerasHub's backbones that `adopt_model` takes."""
    return sorted(row.backbone for row in keras_hub_mixtures.MODELS)

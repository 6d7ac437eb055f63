"""Which part of a sparse model trains: routers, experts, or the rest."""

import math
from collections.abc import Sequence

import keras

from keras_upcycle import checks, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.moe_layers import (
    attention_routing_in,
    moe_layers_in,
)
from keras_upcycle.layers.routed_heads import RoutedHeads

ROUTER, EXPERTS, DENSE = "router", "experts", "dense"
PARTS = (ROUTER, EXPERTS, DENSE)


def freeze(model: keras.Model, part: str | Sequence[str]) -> int:
    """Keeps a part of a sparse model from training.

    As `layer.trainable = False` for the part's layers, wherever they are in
    the model. The others' gradients stay what they are; only a
    `global_clipnorm`, which is over all that trains, may come out otherwise.

    Keras builds the optimizer and the training step for the variables that
    train at the time. So if the model was trained since `compile`, or loaded
    with its optimizer, compile it again, with a new optimizer: `fit` and
    `evaluate` refuse to run before. Give the very model that is compiled, not
    a backbone inside it. To stop a part for a while without losing the
    optimizer's memory, leave it trainable and give it the factor 0 with
    `scale_learning_rate`.

    Files keep what Keras keeps. A `.keras` file or preset of this package's
    models remembers frozen routers and experts, each as a whole; KerasHub's
    own layers forget theirs, so freeze `"dense"` again after loading one.

    Args:
        model: A Keras model or layer that holds at least one `MoEFeedForward`.
        part: String or list of strings: `"router"`, `"experts"`, `"dense"` (all
            that is in no MoE layer), or several of them.

    Returns:
        How many parameters no longer train that did before.

    Raises:
        TypeError: If `model` is no Keras layer.
        ValueError: If `part` is none of these.
        UpcycleError: If `model` holds no MoE layer.

    Example:
        >>> moe = keras.Sequential([
        ...     keras.Input((8,)), MoEFeedForward(4, 32, name="moe"),
        ... ])
        >>> freeze(moe, "router")
        32
        >>> len(moe.trainable_variables)
        4
        >>> moe.compile("adam", "mse")
    """
    return _set(model, part, trainable=False)


def unfreeze(model: keras.Model, part: str | Sequence[str]) -> int:
    """Lets a part of a sparse model train, and nothing else that was frozen.

    Also where the model or a layer around the part is frozen as a whole, in
    which Keras would train nothing: what is around the part is then no longer
    marked as frozen, and all else in it stays so. Base kernels under LoRA stay
    frozen.

    Args:
        model: A Keras model or layer that holds at least one `MoEFeedForward`.
            What `freeze` says of compiling again holds here too.
        part: String or list of strings: `"router"`, `"experts"`, `"dense"` (all
            that is in no MoE layer), or several of them.

    Returns:
        How many parameters train that did not before.

    Raises:
        TypeError, ValueError, UpcycleError: As `freeze`.

    Example:
        >>> moe = keras.Sequential([
        ...     keras.Input((8,)), MoEFeedForward(4, 32, name="moe"),
        ... ])
        >>> moe.trainable = False
        >>> unfreeze(moe, "router")
        32
        >>> [variable.path for variable in moe.trainable_variables]
        ['sequential.../moe/router/kernel']
    """
    return _set(model, part, trainable=True)


def _set(model, part, trainable):
    mixtures = _mixtures(model)
    layers = _layers_of(model, mixtures, part)
    before = _parameters(model)
    if trainable:
        if not model.trainable:
            keras_internals.freeze_tree(model)
        inside = {id(layer) for layer in layers}
        for layer in keras_internals.all_layers(model):
            below = keras_internals.all_layers(layer)
            if any(id(each) in inside for each in below):
                keras_internals.set_trainable_alone(layer, True)
    for layer in layers:
        for variable in keras_internals.made_to_train(layer):
            variable.trainable = trainable
        # What holds an MoE layer is not frozen as a whole.
        if not any(m in keras_internals.all_layers(layer) for m in mixtures):
            keras_internals.set_trainable_alone(layer, trainable)
    after = _parameters(model)
    changed = before.items() ^ after.items()
    if changed:
        _ask_for_compile(model)
    return sum(size for _, size in changed)


def _mixtures(model):
    checks.check_instance("model", model, keras.Layer, "a Keras model or layer")
    mixtures = [*moe_layers_in(model), *attention_routing_in(model)]
    if not mixtures:
        raise UpcycleError(
            "`model` must hold an MoE layer. Received: "
            f"{model.name!r} with none. Pass what `upcycle_model` returned; "
            "in a dense model set `layer.trainable`."
        )
    return mixtures


def _layers_of(model, mixtures, part):
    """The layers of the parts, with everything that is in them."""
    parts = [part]
    if isinstance(part, list | tuple | set | frozenset):
        parts = list(part)
    if not parts:
        raise ValueError(
            f"`part` must name at least one of {list(PARTS)}. Received: "
            f"part={part!r}."
        )
    for each in parts:
        checks.check_choice("part", each, PARTS)
    found = {}
    for each in parts:
        if each == DENSE:
            sparse = {
                id(layer)
                for mixture in mixtures
                for layer in _sparse_part(mixture)
            }
            layers = [
                layer
                for layer in keras_internals.all_layers(model)
                if id(layer) not in sparse
            ]
        else:
            layers = [
                layer
                for mixture in mixtures
                for layer in _own_part(mixture, each)
            ]
        found |= {id(layer): layer for layer in layers}
    return list(found.values())


def _sparse_part(mixture):
    """What of a layer is in no dense model."""
    if isinstance(mixture, RoutedHeads):
        return _own_part(mixture, ROUTER)
    if isinstance(mixture, AttentionMixture):
        return [*_own_part(mixture, ROUTER), *mixture.projections.values()]
    return keras_internals.all_layers(mixture)


def _own_part(mixture, part):
    """Routers or experts. Heads are the dense model's; scores of shared ones
    are variables of the layer itself."""
    if part == ROUTER:
        of_attention = isinstance(mixture, RoutedHeads | AttentionMixture)
        above = [mixture] if of_attention else []
        return [*above, *keras_internals.all_layers(mixture.router)]
    if isinstance(mixture, RoutedHeads):
        return []
    if isinstance(mixture, AttentionMixture):
        return list(mixture.projections.values())
    return [
        layer
        for network in mixture.with_experts
        for layer in keras_internals.all_layers(network)
    ]


def _parameters(model):
    """Sizes of what trains, by variable."""
    return {id(v): math.prod(v.shape) for v in model.trainable_variables}


def _ask_for_compile(model):
    """Lets `fit` ask for `compile` where what was compiled is out of date."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        model.compiled = False

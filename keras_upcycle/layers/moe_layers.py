"""The MoE layers inside a model, by name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from keras_upcycle import checks, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.call_context import LayerCall, record_calls
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.routed_heads import RoutedHeads
from keras_upcycle.state import layer_state


def moe_layers_in(model: keras.Layer) -> list[MoEFeedForward]:
    """Every `MoEFeedForward` of a model or layer, each once, inputs first."""
    return _of_kind(model, MoEFeedForward)


def routed_heads_in(model: keras.Layer) -> list[RoutedHeads]:
    """Every `RoutedHeads` of a model or layer, each once, inputs first."""
    return _of_kind(model, RoutedHeads)


def attention_mixtures_in(model: keras.Layer) -> list[AttentionMixture]:
    """Every `AttentionMixture` of a model or layer, each once."""
    return _of_kind(model, AttentionMixture)


def attention_routing_in(
    model: keras.Layer,
) -> list[RoutedHeads | AttentionMixture]:
    """What routes attention, by heads or by copies, inputs first."""
    return _of_kind(model, RoutedHeads | AttentionMixture)


def named_mixtures(model: keras.Layer) -> dict[str, MoEFeedForward]:
    """Every `MoEFeedForward` of a model, inputs first.

    Args:
        model: A built model, or a layer.

    Returns:
        From the shortest paths that still tell the blocks apart, such as
        `"transformer_block_3"`, to the layers.

    Raises:
        TypeError: If `model` is no Keras layer.
        UpcycleError: If there is none, or if Keras left them without values.
    """
    checks.check_instance("model", model, keras.Layer, "a Keras model or layer")
    layer_state.check_values(model)
    layers = moe_layers_in(model)
    if not layers:
        raise UpcycleError(
            "`model` must hold an MoE layer. Received: "
            f"{model.name!r}, which holds none. Pass what `upcycle_model` "
            "made, or a model with a `MoEFeedForward`."
        )
    return _named(layers, "moe")


def named_routing_layers(
    model: keras.Layer,
) -> dict[str, MoEFeedForward | RoutedHeads | AttentionMixture]:
    """Every layer that holds a router: `named_mixtures`, then attention's.

    Raises:
        TypeError, UpcycleError: As `named_mixtures`, if there is neither.
    """
    checks.check_instance("model", model, keras.Layer, "a Keras model or layer")
    heads = _named(routed_heads_in(model), "routed_heads")
    heads |= _named(attention_mixtures_in(model), "attention_mixture")
    if heads and not moe_layers_in(model):
        layer_state.check_values(model)
        return dict(heads)
    return {**named_mixtures(model), **heads}


def _of_kind(model, kinds):
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if isinstance(layer, kinds)
    ]


def _named(layers, last):
    if not layers:
        return {}
    paths = [(layer.path or layer.name).split("/") for layer in layers]
    if all(len(path) > 1 and path[-1] == last for path in paths):
        paths = [path[:-1] for path in paths]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    named: dict[str, Any] = {}
    for path, layer in zip(paths, layers, strict=True):
        name = base = "/".join(path)
        number = 2
        while name in named:  # KerasHub has paths that collide
            name, number = f"{base}#{number}", number + 1
        named[name] = layer
    return named


def calls_of(
    model: keras.Model,
    inputs: Any,
    prepare: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[LayerCall]:
    """What every MoE layer sees and decides on some batches, at inference.

    Args:
        model: A sparse model.
        inputs: A batch as the model is called on, or a list or iterator of
            batches. They run eagerly.
        prepare: Called with each batch, gives what the model is called on.

    Yields:
        A `LayerCall` for each call of an MoE layer.
    """
    several = isinstance(inputs, (list, Iterator))
    for batch in inputs if several else [inputs]:
        check_batch("inputs", batch, model)
        with record_calls() as calls:
            model(prepare(batch), training=False)
        yield from calls


def check_batch(
    name: str, inputs: Any, model: keras.Layer | None = None
) -> None:
    """Raises unless inputs hold at least one example that a model can take.

    Nothing differs on nothing, and nothing is measured. What does not fit
    would be refused deep in the model, in words of a layer that nobody named.

    Args:
        name: Of the argument.
        inputs: A batch as a model is called on: an array or a structure.
        model: Where it is known: `inputs` are to be of its ranks and widths.
    """
    if inputs is None:
        raise TypeError(
            f"`{name}` must be a batch as the model is called on. Received: "
            f"{name}=None. Pass an array, or what the model takes."
        )
    parts = keras.tree.flatten(inputs)
    for part in parts:
        _check_array(name, part)
    shapes = [tuple(part.shape) for part in parts]
    if not parts or any(0 in shape for shape in shapes):
        raise ValueError(
            f"`{name}` must hold at least one example. Received: "
            f"{len(parts)} arrays of the shapes {shapes}. Pass a batch as the "
            "model is called on."
        )
    expected = [tuple(x.shape) for x in getattr(model, "inputs", None) or ()]
    if model is None or len(shapes) != len(expected):
        return  # Keras tells apart what is left out, and by which name
    if not all(map(_fits, shapes, expected)):
        raise ValueError(
            f"`{name}` must be a batch as {model.name!r} is called on, of the "
            f"shapes {expected}. Received: {name} of the shapes {shapes}. Pass "
            "them after preprocessing."
        )


def _fits(own, known):
    """Rank and width; Keras adds a last axis of 1 and takes one away."""
    if len(own) == len(known):
        return known[-1:] == own[-1:] or known[-1] is None
    longer = max(own, known, key=len)
    return abs(len(own) - len(known)) == 1 and longer[-1] == 1


def _check_array(name, part):
    dtype = checks.dtype_name(part)
    arrays = hasattr(part, "shape") and not isinstance(part, type | keras.Layer)
    if not arrays or "complex" in dtype or dtype == "object":
        received = f"an array of dtype {dtype}"
        if not arrays:
            received = f"{repr(part)[:80]} of type {type(part).__name__}"
        raise TypeError(
            f"`{name}` must hold arrays or tensors of numbers. Received: "
            f"{received}. Pass a batch as the model is called on, such "
            "as `np.asarray(examples)`."
        )
    if not len(part.shape):
        raise ValueError(
            f"`{name}` must have an axis of examples in front. Received: an "
            "array without axes. Pass a batch as the model is called on."
        )


def check_reached(named: Mapping[str, MoEFeedForward], reached: Any) -> None:
    """Raises `ValueError` unless tokens reached every MoE layer.

    Args:
        named: What `named_mixtures` gave.
        reached: The MoE layers that some token reached.
    """
    unused = [name for name, layer in named.items() if layer not in reached]
    if unused:
        raise ValueError(
            "`inputs` must send tokens to every MoE layer. Received: no batch, "
            f"or none that sends any to {unused}. Pass a batch as the model "
            "is called on, or a list of batches."
        )

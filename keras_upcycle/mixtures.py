"""The mixtures inside a model, by name."""

import keras

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.moe_feed_forward import MoEFeedForward


def mixtures_in(model: keras.Layer) -> list[MoEFeedForward]:
    """Every `MoEFeedForward` of a model or layer, each once, inputs first."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if isinstance(layer, MoEFeedForward)
    ]


def named_mixtures(model: keras.Layer) -> dict[str, MoEFeedForward]:
    """Every `MoEFeedForward` of a model, inputs first.

    Args:
        model: A built model, or a layer.

    Returns:
        From the shortest paths that still tell the blocks apart, such as
        `"transformer_block_3"`, to the layers.

    Raises:
        UpcycleError: If there is none.
    """
    layers = mixtures_in(model)
    if not layers:
        raise UpcycleError(
            "`model` must hold a mixture of experts. Received: "
            f"{model.name!r}, which holds none. Pass what `upcycle_model` "
            "made, or a model with a `MoEFeedForward`."
        )
    paths = [(layer.path or layer.name).split("/") for layer in layers]
    if all(len(path) > 1 and path[-1] == "moe" for path in paths):
        paths = [path[:-1] for path in paths]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    named = {}
    for path, layer in zip(paths, layers, strict=True):
        name = base = "/".join(path)
        number = 2
        while name in named:  # KerasHub has paths that collide
            name, number = f"{base}#{number}", number + 1
        named[name] = layer
    return named

"""Rates of dropout, also where a layer drops without a `Dropout`."""

import keras

from keras_upcycle.keras_internals.layers import unlocked


def set_rate(dropout: keras.layers.Dropout, rate: float) -> None:
    """Another rate for a built `Dropout`, from 0 too.

    A `Dropout` that was made with the rate 0 has no seed to draw from
    (`Dropout.__init__`), and a built layer takes none. Keras 3.15.
    """
    dropout.rate = rate
    if rate and getattr(dropout, "seed_generator", None) is None:
        with unlocked(dropout):
            dropout.seed_generator = keras.random.SeedGenerator(dropout.seed)


def add_dropout(
    layer: keras.Layer, attribute: str, dropout: keras.layers.Dropout
) -> None:
    """Gives a built layer a `Dropout` that it was made without."""
    with unlocked(layer):
        setattr(layer, attribute, dropout)


def attention_rate(layer: keras.Layer) -> float | None:
    """The rate of dropout on a Keras attention layer's weights.

    `None` for any other layer. Keras 3.15: `MultiHeadAttention._dropout`,
    `GroupedQueryAttention.dropout`, beside a `Dropout` layer of the same rate,
    and `Attention.dropout`, which draws by a seed of its own.
    """
    if type(layer) is keras.layers.MultiHeadAttention:
        return layer._dropout
    if type(layer) in (
        keras.layers.GroupQueryAttention,
        keras.layers.Attention,
        keras.layers.AdditiveAttention,
    ):
        return layer.dropout
    return None


def set_attention_rate(layer: keras.Layer, rate: float) -> None:
    """Sets what `attention_rate` reads.

    Where a `Dropout` layer draws, it is one in the attention layer, with a
    rate of its own to set.
    """
    if type(layer) is keras.layers.MultiHeadAttention:
        layer._dropout = rate
        return
    layer.dropout = rate
    simple = isinstance(layer, keras.layers.Attention)
    if simple and rate and getattr(layer, "seed_generator", None) is None:
        with unlocked(layer):
            layer.seed_generator = keras.random.SeedGenerator(layer.seed)


def uses_flash_attention(layer: keras.Layer) -> bool:
    """Whether a Keras attention layer was asked for what has no dropout."""
    return bool(getattr(layer, "_flash_attention", None))

"""The small causal language model of demo and study, and its optimizer."""

import dataclasses

import keras
import keras_hub
from keras import layers

from keras_upcycle.conversion.estimate_report import UpcycleEstimate
from keras_upcycle.demo import sources


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model.

    Attributes:
        num_layers: Blocks.
        hidden_dim: Width of a token.
        intermediate_dim: Hidden width of a feed-forward.
        num_heads: Of the attention.
        length: Tokens of an example.
        vocabulary_size: Distinct tokens.
    """

    num_layers: int = 2
    hidden_dim: int = 32
    intermediate_dim: int = 128
    num_heads: int = 1
    length: int = 32
    vocabulary_size: int = sources.VOCABULARY

    def attention_flops(self) -> int:
        """Forward operations of scores and their sums, for one example."""
        return 4 * self.num_layers * self.length**2 * self.hidden_dim


def operations_ratio(estimate: UpcycleEstimate, attention: int) -> float:
    """Operations of a sparse step as a multiple of a dense one's.

    Args:
        estimate: What `estimate_upcycle` counts, with its `sequence_length`.
        attention: Forward operations of attention's scores for one example,
            which it leaves out.
    """
    sparse = estimate.flops_per_example or 0
    dense = estimate.dense_flops_per_example or 0
    return (sparse + attention) / (dense + attention)


def build(shape: Shape) -> keras.Model:
    """A causal Transformer of Keras's and KerasHub's layers; gives logits.

    Args:
        shape: A `Shape`.

    Returns:
        A functional model, int32 `(batch, length)` to float32 `(batch,
        length, vocabulary_size)`, with random weights.
    """
    tokens = keras.Input((shape.length,), dtype="int32", name="tokens")
    x = layers.Embedding(
        shape.vocabulary_size, shape.hidden_dim, name="embedding"
    )(tokens)
    x = layers.Add(name="embedded")(
        [x, keras_hub.layers.PositionEmbedding(shape.length, name="places")(x)]
    )
    for index in range(shape.num_layers):
        y = layers.LayerNormalization(name=f"attention_norm_{index}")(x)
        y = layers.MultiHeadAttention(
            shape.num_heads,
            shape.hidden_dim // shape.num_heads,
            name=f"attention_{index}",
        )(y, y, use_causal_mask=True)
        x = layers.Add(name=f"after_attention_{index}")([x, y])
        y = layers.LayerNormalization(name=f"feed_forward_norm_{index}")(x)
        y = layers.Dense(
            shape.intermediate_dim, activation="relu", name=f"up_{index}"
        )(y)
        y = layers.Dense(shape.hidden_dim, name=f"down_{index}")(y)
        x = layers.Add(name=f"after_feed_forward_{index}")([x, y])
    x = layers.LayerNormalization(name="norm")(x)
    logits = layers.Dense(shape.vocabulary_size, name="logits")(x)
    return keras.Model(tokens, logits, name="language_model")


def adam(learning_rate: float) -> keras.optimizers.Optimizer:
    """The optimizer of every arm. Its rate is a variable, set as it trains."""
    return keras.optimizers.Adam(
        learning_rate, beta_2=0.99, global_clipnorm=1.0
    )

"""`register_block`: a block that somebody wrote, named once."""

import inspect
from collections.abc import Iterable
from typing import Any

import keras

from keras_upcycle import checks
from keras_upcycle.families import own_models, sparse_blocks
from keras_upcycle.families.rows import SEQUENTIAL, Block, Network
from keras_upcycle.layers.moe_settings import activation_of


def register_block(
    block_class: type[keras.Layer],
    *,
    up: str | None = None,
    down: str | None = None,
    gate: str | None = None,
    network: str | None = None,
    activation: Any = None,
    dropout: str | None = None,
    output_dropout: str | None = None,
    causal: bool = False,
    mask: str | None = None,
    models: Iterable[type[keras.Model]] = (),
) -> None:
    """Teaches `upcycle_model` a Transformer block of your own.

    Afterwards models that hold such blocks are converted: functional ones,
    and subclassed ones, which are made anew from their `get_config()`. In a
    block with experts your own `call` runs as it is; where it calls the
    projections, a `MoEFeedForward` does their work.

    Args:
        block_class: Class of the block, a `keras.Layer`. Exactly this class is
            meant, not its subclasses.
        up: String or `None`, the attribute that holds the projection to the
            hidden layer, a `Dense` or an `EinsumDense` on the last axis;
            dotted where it is deeper, such as `"mlp.fc1"`. Of a gated network
            the projection that is not activated. Defaults to `None`; needed
            with `down`, and not with `network`.
        down: String or `None`, the attribute of the projection back. Defaults
            to `None`.
        gate: String or `None`, of a gated network the attribute of the
            projection that is activated. Defaults to `None`: it has none.
        network: String or `None`, the attribute of a `keras.Sequential` that
            is the whole network: two `Dense`, and perhaps a `Dropout` between
            and behind. Defaults to `None`.
        activation: String, callable or `None`, what the block's `call` applies
            to the hidden layer. Defaults to `None`: the projection carries its
            activation itself.
        dropout: String or `None`, the attribute of a `Dropout` on the hidden
            layer that nothing else uses. Defaults to `None`.
        output_dropout: String or `None`, the attribute of a `Dropout` on the
            network's output that nothing else uses; it may be the same.
            Defaults to `None`.
        causal: Boolean, whether a token must not see later ones. Defaults to
            `False`.
        mask: String or `None`, the argument of the block's `call` that is true
            at real tokens, `(batch, length)`. Defaults to `None`.
        models: List or tuple of classes, of the subclassed models that hold
            such blocks, so that their sparse `.keras` files load in a process
            that has converted nothing. Defaults to `()`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the block is registered already, or neither `up` and
            `down` nor `network` say where its network is.

    Example:
        ```python
        @keras.saving.register_keras_serializable()
        class TransformerBlock(keras.layers.Layer):
            def __init__(self, dim, heads, hidden, **kwargs):
                super().__init__(**kwargs)
                self.attention = keras.layers.MultiHeadAttention(heads, dim)
                self.ffn1 = keras.layers.Dense(hidden, activation="relu")
                self.ffn2 = keras.layers.Dense(dim)

            def call(self, x):
                x = x + self.attention(x, x)
                return x + self.ffn2(self.ffn1(x))

        keras_upcycle.register_block(TransformerBlock, up="ffn1", down="ffn2")
        ```
    """
    if not (
        inspect.isclass(block_class) and issubclass(block_class, keras.Layer)
    ):
        raise TypeError(
            "`block_class` must be a class of `keras.Layer`. Received: "
            f"block_class={block_class!r} of type "
            f"{type(block_class).__name__}. Pass the class, not a block."
        )
    names = {
        "up": up,
        "down": down,
        "gate": gate,
        "network": network,
        "dropout": dropout,
        "output_dropout": output_dropout,
        "mask": mask,
    }
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"`{name}` must be the name of an attribute, a string. "
                f"Received: {name}={value!r} of type {type(value).__name__}."
            )
    if network is not None:
        rest = [n for n in names if names[n] and n not in ("network", "mask")]
        if rest or activation is not None:
            raise ValueError(
                "`network` says where the whole network is, and nothing else "
                f"of it need be named. Received: network={network!r} with "
                f"{rest or ['activation']}. Leave these out, or name "
                "`up` and `down` instead."
            )
    elif up is None or down is None:
        raise ValueError(
            "`up` and `down` must name the block's projections, or `network` "
            f"a `keras.Sequential` of them. Received: up={up!r}, "
            f"down={down!r}, network=None."
        )
    causal = checks.check_flag("causal", causal)
    kind: Any = block_class
    parameters = inspect.signature(kind.call).parameters
    if mask is not None and mask not in parameters:
        raise ValueError(
            f"`mask` must be an argument of `{block_class.__name__}.call`, "
            f"one of {list(parameters)[1:]}. Received: mask={mask!r}."
        )
    models = list(models)
    for kind in models:
        if not (inspect.isclass(kind) and issubclass(kind, keras.Model)):
            raise TypeError(
                "`models` must list classes of `keras.Model`. Received: "
                f"{kind!r} of type {type(kind).__name__}."
            )
    if block_class in sparse_blocks.known_blocks():
        raise ValueError(
            f"{block_class.__name__!r} is registered already. Received: "
            f"block_class={block_class!r}. Register a subclass to say "
            "something else."
        )
    found = SEQUENTIAL
    if up is not None and down is not None:
        if activation is not None:
            activation = activation_of(activation)
        found = Network(
            up=up,
            down=down,
            gate=gate,
            activation=activation,
            dropout=dropout,
            output_dropout=output_dropout,
        )
    sparse_blocks.add_block(
        Block(
            block_class,
            (found,),
            whole=network,
            mask=mask,
            alone=True,
            causal=causal,
        )
    )
    for kind in models:
        own_models.sparse_model_class(kind)

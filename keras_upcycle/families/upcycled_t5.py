"""T5's classes with experts in some of their blocks."""

import functools

import keras
import keras_hub
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.families.adapter_biases import KeepsBiasesOfAdapters
from keras_upcycle.families.adapters import ChecksAdapters
from keras_upcycle.families.base import (
    DECODER,
    ENCODER,
)
from keras_upcycle.families.keras_hub_fixes import (
    ClearsGradients,
    TakesPyDataset,
)
from keras_upcycle.keras_internals.keras_hub import T5TransformerLayer
from keras_upcycle.layers.call_context import padding_mask
from keras_upcycle.layers.expert_files import read_settings
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.state.random_state import KeepsRandomState

_PACKAGE = "keras_upcycle"
# What the mixture takes the place of, in the order of the block's `call`.
FEED_FORWARD = ("input_projector", "gate_projector", "output_projector")
DROPOUT = "dropout_layer"


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledT5TransformerLayer(T5TransformerLayer):
    """A `T5TransformerLayer` whose feed-forward network is a mixture.

    The mixture stands where the stock `call` applies the first projection, and
    nothing is left of the rest of the feed-forward network, so the attention
    and its caches are KerasHub's own code.

    Args:
        experts: The arguments of the block's `MoEFeedForward`, or `None`.
        **kwargs: Of `T5TransformerLayer`.
    """

    def __init__(self, *args, experts=None, **kwargs):
        super().__init__(*args, **kwargs)
        if experts is not None:
            self.install(experts)

    # `Layer.__init__` reads the call's signature, to know its arguments.
    @functools.wraps(T5TransformerLayer.call)
    def call(self, hidden_states, attention_mask=None, *args, **kwargs):
        with padding_mask(_real_positions(attention_mask)):
            return super().call(hidden_states, attention_mask, *args, **kwargs)

    def install(self, layer):
        """Puts a mixture, or one made from its arguments, into the block."""
        if not isinstance(layer, MoEFeedForward):
            layer = MoEFeedForward(
                **read_settings(layer), dtype=self.dtype_policy, name="moe"
            )
        if self.path:
            # In a block of a built backbone; else it is built when called.
            keras_internals.build_inside(
                self.path, layer, (None, None, self.self_attention.hidden_dim)
            )
        replace = functools.partial(keras_internals.replace_sublayer, self)
        replace("input_projector", layer)
        if self.use_gated_activation:
            # The mixture gates; the stock `call` must not once more.
            self.use_gated_activation = False
            replace("gate_projector", None)
        own = {"dtype": self.dtype_policy}
        nothing = keras.layers.Identity(name="no_projection", **own)
        replace("output_projector", nothing)
        # The mixture drops out inside itself, where the dense block does.
        replace(DROPOUT, keras.layers.Identity(name="no_dropout", **own))

    @property
    def experts(self):
        """The arguments of the block's `MoEFeedForward`."""
        return self.input_projector.saved_settings()

    def get_config(self):
        mixture, attention = self.input_projector, self.self_attention
        return {
            **super().get_config(),
            "is_decoder": self.is_decoder,
            "hidden_dim": attention.hidden_dim,
            "intermediate_dim": mixture.intermediate_dim,
            "key_value_dim": attention.key_value_dim,
            "dropout": self.self_attention_dropout.rate,
            "activation": keras.activations.serialize(mixture.activation),
            "layer_norm_epsilon": self.layer_norm.epsilon,
            "num_heads": attention.num_heads,
            "use_gated_activation": mixture.gated,
            "use_relative_attention_bias": (
                attention.use_relative_attention_bias
            ),
            "experts": self.experts,
        }


def _real_positions(attention_mask):
    """`(B, S)` from the `(B, 1, S)` that T5 hands its blocks.

    A mask with one row for each query says who may attend to whom, and
    nothing of padding. In cached decoding there is none: every token is real.
    """
    if attention_mask is None or attention_mask.shape[1] != 1:
        return None
    return ops.cast(attention_mask[:, 0, :], "bool")


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledT5Backbone(
    ChecksAdapters,
    KeepsBiasesOfAdapters,
    ClearsGradients,
    KeepsRandomState,
    keras_hub.models.T5Backbone,
):
    """A `keras_hub.models.T5Backbone` some of whose blocks hold experts.

    Made by `upcycle_model`; loads and saves as any backbone does.

    Args:
        experts: From `"encoder"` and `"decoder"` to a mapping from a block's
            number, as a string, to the arguments of its `MoEFeedForward`.
        **kwargs: Of `keras_hub.models.T5Backbone`.

    Example:
        >>> settings = {"num_experts": 4, "intermediate_dim": 16,
        ...             "use_bias": False, "gated": True, "format": 2}
        >>> backbone = UpcycledT5Backbone(
        ...     experts={"encoder": {}, "decoder": {"1": settings}},
        ...     vocabulary_size=20, num_layers=2, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16,
        ... )
        >>> list(backbone.experts["decoder"])
        ['1']
    """

    def __init__(self, *, experts, dtype=None, **kwargs):
        if type(dtype) is keras.dtype_policies.DTypePolicy:
            # Stock blocks leave their config to Keras, which records names
            # and not policies: without it the model could not be cloned.
            dtype = dtype.name
        super().__init__(dtype=dtype, **kwargs)
        for stack, of_stack in experts.items():
            blocks = blocks_of(self, stack)
            for number, layer in of_stack.items():
                block = blocks[int(number)]
                # `T5Backbone.__init__` names the stock class; the graph holds
                # this very object, so it is the object that becomes ours.
                block.__class__ = UpcycledT5TransformerLayer
                block.install(layer)
        if not self.trainable:
            keras_internals.freeze_tree(self)  # what came after, too

    @property
    def experts(self):
        """From stack and block number to the `MoEFeedForward`'s arguments."""
        return {
            stack: {
                str(number): block.experts
                for number, block in enumerate(blocks_of(self, stack))
                if isinstance(block, UpcycledT5TransformerLayer)
            }
            for stack in (ENCODER, DECODER)
        }

    def get_config(self):
        return {**super().get_config(), "experts": self.experts}


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledT5Tokenizer(keras_hub.tokenizers.T5Tokenizer):
    """The stock tokenizer, found for presets of `UpcycledT5Backbone`."""

    backbone_cls = UpcycledT5Backbone


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledT5Seq2SeqLMPreprocessor(keras_hub.models.T5Seq2SeqLMPreprocessor):
    """The stock preprocessor, found for presets of `UpcycledT5Backbone`.

    Saves its sequence lengths, which the stock one forgets: a loaded dense
    model pads and truncates to 1024 whatever it was made with.
    """

    backbone_cls = UpcycledT5Backbone
    tokenizer_cls = UpcycledT5Tokenizer

    def get_config(self):
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
        }


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledT5Seq2SeqLM(
    TakesPyDataset, KeepsRandomState, keras_hub.models.T5Seq2SeqLM
):
    """A `keras_hub.models.T5Seq2SeqLM` on a sparse backbone.

    Made by `upcycle_model`; every stock entry point, such as
    `keras_hub.models.Seq2SeqLM.from_preset`, finds it. `fit`, `evaluate` and
    `predict` also take a `keras.utils.PyDataset`.
    """

    backbone_cls = UpcycledT5Backbone
    preprocessor_cls = UpcycledT5Seq2SeqLMPreprocessor

    # Named, not `*args`: `clone_model` takes a class of bare `*args` for a
    # plain functional model and calls it as one.
    def __init__(self, backbone, preprocessor=None, **kwargs):
        super().__init__(backbone, preprocessor=preprocessor, **kwargs)


def blocks_of(backbone, stack):
    """The Transformer layers of a stack, inputs first."""
    if stack == ENCODER:
        return backbone.encoder_transformer_layers
    return backbone.decoder_transformer_layers

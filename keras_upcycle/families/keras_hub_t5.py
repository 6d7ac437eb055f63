"""KerasHub's T5: `T5Backbone` and `T5Seq2SeqLM`.

As in `keras_hub_vit`, a sparse backbone comes with one registered subclass of
the task, the preprocessor and the tokenizer, so that every stock `from_preset`
finds them. T5 computes its feed-forward network inside the block's own `call`;
a block that holds experts is therefore a subclass too, which hands the padding
mask down to them.
"""

import functools

import keras
import keras_hub
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import plain_layers, surgery
from keras_upcycle.families.adapter_biases import KeepsBiasesOfAdapters
from keras_upcycle.families.adapters import ChecksAdapters
from keras_upcycle.families.base import (
    DECODER,
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
    layers_flops,
)
from keras_upcycle.families.keras_hub_fixes import (
    ClearsGradients,
    TakesPyDataset,
)
from keras_upcycle.keras_internals.keras_hub import T5TransformerLayer
from keras_upcycle.layers.experts import read_settings
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward, padding_mask
from keras_upcycle.state.random_state import KeepsRandomState

_PACKAGE = "keras_upcycle"
# What the mixture takes the place of, in the order of the block's `call`.
_FEED_FORWARD = ("input_projector", "gate_projector", "output_projector")
_DROPOUT = "dropout_layer"


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
        replace(_DROPOUT, keras.layers.Identity(name="no_dropout", **own))

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
            blocks = _blocks(self, stack)
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
                for number, block in enumerate(_blocks(self, stack))
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


class T5Family(Family):
    """See the module's docstring.

    Every other block of both stacks, from the second, as Sparse Upcycling did
    for language (arXiv 2212.05055, section 3.1). Experts choose in the
    encoder, tokens in the decoder, which must not look ahead.
    """

    name = "T5Backbone"

    def find(self, model):
        backbone = _backbone(model)
        _check_tokenizer(model)
        findings = Findings()
        for stack in (ENCODER, DECODER):
            for block in _blocks(backbone, stack):
                path = f"{block.name}/feed_forward"
                reason = _why_not_stock(block)
                if reason is not None:
                    findings.rejected.append((path, reason))
                    continue
                index = len(findings.sites)
                findings.sites.append(_site(index, path, stack, block))
        return findings

    def rebuild(self, model, sites, replacements):
        old = _backbone(model)
        experts = {ENCODER: {}, DECODER: {}}
        replaced, given = [], []
        for site in sites:
            if site.index not in replacements:
                continue
            number = _number(old, site)
            layer = replacements[site.index]
            experts[site.stack][str(number)] = layer
            replaced += _feed_forward(_blocks(old, site.stack)[number])
        config = _config(old)
        with keras_internals.without_values():
            if replacements:
                new = UpcycledT5Backbone(experts=experts, **config)
            else:
                new = type(old)(**config)
        for stack, of_stack in experts.items():
            for number in of_stack:
                given += _feed_forward(_blocks(new, stack)[int(number)])
        surgery.copy_state(old, new, replaced, given, from_config=True)
        keras_internals.draw_first_values(new)
        return new if model is old else _language_model(model, new)

    def places(self, model, sites):
        backbone = _backbone(model)
        blocks = {
            block.name: block
            for stack in (ENCODER, DECODER)
            for block in _blocks(backbone, stack)
        }
        return [
            blocks[site.path.split("/")[-2]].input_projector for site in sites
        ]

    def blocks(self, model):
        backbone = _backbone(model)
        return {stack: _blocks(backbone, stack) for stack in (ENCODER, DECODER)}

    def skeleton(self, model, **changes):
        old = _backbone(model)
        config = {**_config(old), **changes}
        config.pop("experts", None)
        with keras_internals.without_values():
            new = keras_hub.models.T5Backbone(**config)
        if model is old:
            return new
        # A task on torch reads the values of what it is made of.
        keras_internals.draw_first_values(new)
        return keras_hub.models.T5Seq2SeqLM(
            backbone=new,
            preprocessor=_preprocessor(model.preprocessor, dense=True),
            name=model.name,
        )

    def compile_arguments(self, model):
        sampler = getattr(model, "sampler", None)
        if sampler is None:
            return {}
        # Of its own: a sampler holds the state of its random generator.
        return {"sampler": type(sampler).from_config(sampler.get_config())}

    def matmul_flops(self, model):
        backbone = _backbone(model)
        encoder = _flops(_blocks(backbone, ENCODER))
        decoder = _flops(_blocks(backbone, DECODER))
        # Cross-attention projects the encoder's tokens to keys and values.
        crossing = layers_flops(
            layer
            for block in _blocks(backbone, DECODER)
            for layer in (
                block.cross_attention.key_projector,
                block.cross_attention.value_projector,
            )
        )
        if backbone is not model:
            # Logits: a product with the embedding, which no `Dense` shows.
            decoder += 2 * backbone.hidden_dim * backbone.vocabulary_size
        return {ENCODER: encoder + crossing, DECODER: decoder - crossing}

    def check_inputs(self, model, inputs):
        size = _backbone(model).vocabulary_size
        for name in ("encoder_token_ids", "decoder_token_ids"):
            ids = ops.convert_to_numpy(inputs[name])
            wrong = ids[(ids < 0) | (ids >= size)]
            if wrong.size:
                raise ValueError(
                    f"`inputs[{name!r}]` must hold ids from 0 to {size - 1}, "
                    f"the model's vocabulary. Received: {wrong.size} others, "
                    f"such as {int(wrong[0])}. The tokenizer that made them "
                    "is not the model's."
                )

    def real_positions(self, model, inputs):
        decoder = inputs["decoder_padding_mask"]
        if _backbone(model) is not model:
            return decoder
        return {
            "encoder_sequence_output": inputs["encoder_padding_mask"],
            "decoder_sequence_output": decoder,
        }


def _config(backbone):
    """What makes an equal backbone."""
    config = backbone.get_config()
    config["dtype"] = keras.dtype_policies.get(config["dtype"])
    return config


def _language_model(old, backbone):
    """The task around a new backbone, its preprocessor kept."""
    return UpcycledT5Seq2SeqLM(
        backbone=backbone,
        preprocessor=_preprocessor(old.preprocessor, dense=False),
        name=old.name,
    )


def _preprocessor(old, dense):
    """The stock preprocessor as our class or back, anything else as it is.

    Sharing is safe: a preprocessor holds settings and is never trained.
    """
    preprocessors = [
        keras_hub.models.T5Seq2SeqLMPreprocessor,
        UpcycledT5Seq2SeqLMPreprocessor,
    ]
    tokenizers = [keras_hub.tokenizers.T5Tokenizer, UpcycledT5Tokenizer]
    if dense:
        preprocessors.reverse()
        tokenizers.reverse()
    if type(old) is not preprocessors[0]:
        return old
    config = old.get_config()
    tokenizer = old.tokenizer
    if type(tokenizer) is tokenizers[0]:
        vocabulary = tokenizer.proto
        tokenizer = tokenizers[1].from_config(tokenizer.get_config())
        tokenizer.set_proto(vocabulary)  # no config holds it
    config["tokenizer"] = tokenizer
    config["encoder_sequence_length"] = old.encoder_sequence_length
    config["decoder_sequence_length"] = old.decoder_sequence_length
    return preprocessors[1].from_config(config)


def _check_tokenizer(model):
    """Ids past the embedding's end: JAX would give NaN and say nothing."""
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is None or getattr(tokenizer, "proto", None) is None:
        return
    known, size = tokenizer.vocabulary_size(), model.backbone.vocabulary_size
    if known > size:
        raise UpcycleError(
            "The tokenizer of a model must not know more tokens than the "
            f"model. Received: {model.name!r} with a tokenizer of {known} "
            f"tokens and vocabulary_size={size}. Use the tokenizer that the "
            "model was trained with."
        )


def _why_not_stock(block):
    """What a block's network does that its class does not say, or `None`."""
    if type(block) is not T5TransformerLayer:
        return f"it is in a {type(block).__name__}, not the stock block"
    gated = block.use_gated_activation
    return plain_layers.why_not_network(
        block.input_projector,
        block.output_projector,
        gate=block.gate_projector if gated else None,
        dropout=block.dropout_layer,
    ) or plain_layers.why_not_policy(block.input_projector, block.dtype_policy)


def _site(index, path, stack, block):
    # KerasHub activates `input_projector`, gated or not, and multiplies it by
    # `gate_projector`: what is called the gate everywhere else is the former.
    if block.use_gated_activation:
        kernels = {
            "gate_kernel": block.input_projector.kernel,
            "up_kernel": block.gate_projector.kernel,
        }
    else:
        kernels = {"up_kernel": block.input_projector.kernel}
    kernels["down_kernel"] = block.output_projector.kernel
    decoder = stack == DECODER
    return FeedForwardSite(
        index=index,
        path=path,
        stack=stack,
        layers=tuple(_feed_forward(block)[:-1]),
        kernels=kernels,
        activation=block.input_projector.activation,
        # One dropout layer serves the hidden layer and the output.
        dropout=block.dropout_layer.rate,
        output_dropout=block.dropout_layer.rate,
        causal=decoder,
        default_router="top_k" if decoder else "expert_choice",
        default_layers="every_other",
        modality="language",
    )


def _feed_forward(block):
    """The feed-forward network's layers in a block, its dropout last."""
    layers = [getattr(block, name, None) for name in (*_FEED_FORWARD, _DROPOUT)]
    return [layer for layer in layers if layer is not None]


def _flops(blocks):
    return sum(layers_flops(keras_internals.all_layers(b)) for b in blocks)


def _backbone(model):
    return getattr(model, "backbone", model)


def _blocks(backbone, stack):
    if stack == ENCODER:
        return backbone.encoder_transformer_layers
    return backbone.decoder_transformer_layers


def _number(backbone, site):
    """The number, in its stack, of the block that holds the site."""
    for number, block in enumerate(_blocks(backbone, site.stack)):
        if block.input_projector is site.layers[0]:
            return number
    raise ValueError(
        f"Site {site.path!r} is not a block of {backbone.name!r}. Pass the "
        "sites that `find` gave for this very model."
    )

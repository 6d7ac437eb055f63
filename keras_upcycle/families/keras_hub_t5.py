"""KerasHub's T5: `T5Backbone` and `T5Seq2SeqLM`."""

import keras
import keras_hub
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import plain_layers, surgery
from keras_upcycle.families.base import (
    DECODER,
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
    layers_flops,
)
from keras_upcycle.families.upcycled_t5 import (
    DROPOUT,
    FEED_FORWARD,
    UpcycledT5Backbone,
    UpcycledT5Seq2SeqLM,
    UpcycledT5Seq2SeqLMPreprocessor,
    UpcycledT5Tokenizer,
    blocks_of,
)
from keras_upcycle.keras_internals.keras_hub import T5TransformerLayer


class T5Family(Family):
    """See the module's docstring.

    Every other block of both stacks, from the second, as Sparse Upcycling did
    for language (arXiv 2212.05055, section 3.1). Experts choose in the
    encoder, tokens in the decoder, which must not look ahead.
    """

    name = "T5Backbone"
    inner_classes = (T5TransformerLayer,)

    def find(self, model):
        backbone = _backbone(model)
        _check_tokenizer(model)
        findings = Findings()
        for stack in (ENCODER, DECODER):
            for block in blocks_of(backbone, stack):
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
            replaced += _feed_forward(blocks_of(old, site.stack)[number])
        config = _config(old)
        with keras_internals.without_values():
            if replacements:
                new = UpcycledT5Backbone(experts=experts, **config)
            else:
                new = type(old)(**config)
        for stack, of_stack in experts.items():
            for number in of_stack:
                given += _feed_forward(blocks_of(new, stack)[int(number)])
        surgery.copy_state(old, new, replaced, given, from_config=True)
        keras_internals.draw_first_values(new)
        return new if model is old else _language_model(model, new)

    def current_layers(self, model, sites):
        backbone = _backbone(model)
        blocks = {
            block.name: block
            for stack in (ENCODER, DECODER)
            for block in blocks_of(backbone, stack)
        }
        return [
            blocks[site.path.split("/")[-2]].input_projector for site in sites
        ]

    def blocks(self, model):
        backbone = _backbone(model)
        return {
            stack: blocks_of(backbone, stack) for stack in (ENCODER, DECODER)
        }

    def build_dense(self, model, **changes):
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
        encoder = _flops(blocks_of(backbone, ENCODER))
        decoder = _flops(blocks_of(backbone, DECODER))
        # Cross-attention projects the encoder's tokens to keys and values.
        crossing = layers_flops(
            layer
            for block in blocks_of(backbone, DECODER)
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
    layers = [getattr(block, name, None) for name in (*FEED_FORWARD, DROPOUT)]
    return [layer for layer in layers if layer is not None]


def _flops(blocks):
    return sum(layers_flops(keras_internals.all_layers(b)) for b in blocks)


def _backbone(model):
    return getattr(model, "backbone", model)


def _number(backbone, site):
    """The number, in its stack, of the block that holds the site."""
    for number, block in enumerate(blocks_of(backbone, site.stack)):
        if block.input_projector is site.layers[0]:
            return number
    raise ValueError(
        f"Site {site.path!r} is not a block of {backbone.name!r}. Pass the "
        "sites that `find` gave for this very model."
    )

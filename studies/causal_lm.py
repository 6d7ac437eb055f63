"""A causal language model of KerasHub that learns the same text."""

import functools

import keras_hub
import numpy as np

import keras_upcycle as ku
from keras_upcycle.demo import language_model, sources, training
from studies.language import Language
from studies.plans import Plan

HEADS = 2
# Of a block with a gate: three kernels hold what two of `4 * width` hold.
GATED = 8 / 3


class CausalLM(Language):
    """Windows of a text, and a task of KerasHub as its users have it.

    Args:
        text: What is learned.
        plan: What is compared; its `study` is a key of `BACKBONES`.
        batch_size: Windows of a step.
        length: Bytes of a window.
    """

    def __init__(
        self,
        text: sources.Text,
        plan: Plan,
        batch_size: int = 64,
        length: int = 32,
    ):
        shape = language_model.Shape(
            num_layers=plan.blocks, hidden_dim=plan.width, length=length
        )
        super().__init__(text, shape, plan, batch_size)

    def build(self):
        return BACKBONES[self.plan.study](self.shape)

    def batches_of(self, tokens, seed, start):
        stream = super().batches_of(tokens, seed, start)
        return ((_inputs(x), y) for x, y in stream)

    def held_out(self, model, part):
        tokens = getattr(self.text, part)
        at = training.places(tokens, self.shape.length)
        inputs, targets = training.windows(tokens, at, self.shape.length)
        return training.evaluate(model, _inputs(inputs), targets)

    @functools.cached_property
    def _reference(self):
        return self.build()

    def estimate(self, **options):
        return ku.estimate_upcycle(
            self._reference, sequence_length=self.shape.length, **options
        )

    def fingerprint(self):
        return f"{self.plan.study}-{super().fingerprint()}"


def _inputs(tokens):
    tokens = tokens.astype("int32")
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def _llama(shape):
    return keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(
            vocabulary_size=shape.vocabulary_size,
            num_layers=shape.num_layers,
            num_query_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            hidden_dim=shape.hidden_dim,
            intermediate_dim=round(GATED * shape.hidden_dim / 8) * 8,
        )
    )


def _gpt2(shape):
    return keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=shape.vocabulary_size,
            num_layers=shape.num_layers,
            num_heads=HEADS,
            hidden_dim=shape.hidden_dim,
            intermediate_dim=4 * shape.hidden_dim,
            dropout=0.0,
            max_sequence_length=shape.length,
        )
    )


BACKBONES = {"llama": _llama, "heads": _llama, "gpt2": _gpt2}

"""A causal language model that learns a text byte by byte."""

import zlib

import keras_upcycle as ku
from keras_upcycle.demo import language_model, sources, training
from studies.plans import Plan
from studies.setting import Setting


class Language(Setting):
    """Windows of a text, and the model of `keras_upcycle.demo`.

    Args:
        text: What is learned.
        shape: Sizes of the dense model.
        plan: What is compared.
        batch_size: Windows of a step.
    """

    def __init__(
        self,
        text: sources.Text,
        shape: language_model.Shape,
        plan: Plan,
        batch_size: int = 64,
    ):
        self.text = text
        self.shape = shape
        self.plan = plan
        self.batch_size = batch_size
        self.name = text.name

    def build(self):
        return language_model.build(self.shape)

    def batches(self, seed, start):
        return self.batches_of(self.text.train, seed, start)

    def batches_of(self, tokens, seed, start):
        """`batches` of a part of the text."""
        return training.batches(
            tokens, self.shape.length, self.batch_size, seed, start
        )

    def held_out(self, model, part):
        return training.held_out(model, getattr(self.text, part))

    def estimate(self, **options):
        return ku.estimate_upcycle(
            self.build, sequence_length=self.shape.length, **options
        )

    def uncounted_flops(self):
        return self.shape.attention_flops()

    def fingerprint(self):
        return (
            f"{zlib.crc32(self.text.train.tobytes()):x}-"
            f"{self.shape.hidden_dim}x{self.shape.num_layers}"
        )

    def measured(self, model, arm, seed):
        """Of DS-MoE, the held-out loss by how many experts run."""
        if arm.router != "ds_moe":
            return {}
        found = {}
        for count in (arm.experts // 4, arm.experts // 2):
            ku.set_active_experts(model, top_k=count)
            tested = training.held_out(model, self.text.test)
            found[count] = tested["cross_entropy"]
        ku.set_active_experts(model)
        return {"active": found}

"""Skywork-MoE: logits of one size, a balance loss no stronger than needed.

Wei et al., Skywork-MoE (arXiv 2406.06563), section 4: a token's logits are
normalised before the softmax, so that routers stay sure of what they choose,
and each layer's load-balancing loss gets a weight that follows how many tokens
the layer drops.
"""

from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, checks
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    add_recipe,
)
from keras_upcycle.routing import training_steps
from keras_upcycle.routing.registry import named
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import Tensor, TokenChoice

# Of a variance: what a router of zeros is divided by.
_EPSILON = 1e-6


@named("skywork")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class SkyworkRouter(TopKRouter):
    """Top-K of normalised logits, its balance loss weighted by what it drops.

    A token's logits become `lambda * (z - mean(z)) / std(z)` over the experts
    (section 4.1): however small or large the kernel is, its probabilities are
    as sharp as `logits_stddev` says. Inference does so too. A `temperature`
    divides what was normalised: `lambda / T` by a schedule, where `T` follows
    one.

    After a training step in which the share `d` of the assignments found no
    slot, the weight of the load-balancing loss becomes (section 4.2)
    `smoothing * weight + (1 - smoothing) * min(drop_scale * d,
    load_balance_loss)`: `load_balance_loss` is the most it can be, and what it
    starts with. The weight is a variable that files keep; `RouterMonitor`
    reads the loss multiplied by what share of the most the weight is.

    References: Wei et al., Skywork-MoE (arXiv 2406.06563), sections 4.1 and
    4.2.

    Args:
        top_k: Integer in `[1, num_experts]`: experts that a token chooses.
            Defaults to 2.
        normalize: Boolean, whether weights are rescaled to sum to 1. Defaults
            to `True`.
        logits_stddev: Float above 0, `lambda`: the standard deviation of a
            token's logits. Defaults to 1.0.
        drop_scale: Float, at least 0, `xi`: the weight for each share of
            assignments that is dropped. Defaults to 0.2.
        smoothing: Float in `[0, 1)`, `beta`: how much of the weight a step
            keeps. Defaults to 0.99.
        **kwargs: Keyword arguments of `TopKRouter`; `capacity_factor`, 1.25 by
            default, must not be `None`, where nothing is dropped, and
            `expert_groups` must be.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> layer = MoEFeedForward(8, 32, router=SkyworkRouter())
        >>> y = layer(keras.random.normal((2, 5, 16), seed=0), training=True)
        >>> 0.9 < float(layer.router.balance_share) <= 1.0
        True
    """

    def __init__(
        self,
        top_k=2,
        normalize=True,
        *,
        logits_stddev=1.0,
        drop_scale=0.2,
        smoothing=0.99,
        **kwargs,
    ):
        super().__init__(top_k, normalize, **kwargs)
        self.logits_stddev = checks.check_factor("logits_stddev", logits_stddev)
        self.drop_scale = checks.check_number(
            "drop_scale", drop_scale, at_least=0.0
        )
        self.smoothing = checks.check_rate("smoothing", smoothing)
        if self.capacity_factor is None:
            raise ValueError(
                "The weight of the balance loss follows what is dropped. "
                "Received: capacity_factor=None, which drops nothing. Pass a "
                "`capacity_factor`, or use a `TopKRouter`."
            )
        if self.expert_groups is not None:
            raise ValueError(
                "Logits are normalised over all experts, of which groups are "
                "chosen by their mean. Received: expert_groups="
                f"{self.expert_groups}. Leave it out."
            )

    def build(self, input_shape):
        super().build(input_shape)
        self.balance_share = self.add_weight(
            name="balance_share",
            shape=(),
            initializer="ones",
            dtype="float32",
            trainable=False,
            # The replicas of `tf.distribute` assign the same.
            aggregation="only_first_replica",
        )
        self.gathered_drops = training_steps.GatheredOverStep(
            ((), ()), "gathered_drops"
        )

    def logits_of(self, scores):
        scores = scores - ops.mean(scores, axis=-1, keepdims=True)
        square = ops.mean(ops.square(scores), axis=-1, keepdims=True)
        return self.logits_stddev * scores * ops.rsqrt(square + _EPSILON)

    def choose_by(self, noisy, logits, mask, training) -> TokenChoice:
        chosen = super().choose_by(noisy, logits, mask, training)
        if training and self.trainable and self.load_balance_loss:
            self._move(chosen)
        return chosen

    def penalize(self, name: str, loss: Tensor) -> None:
        if name == "load_balance":
            # A copy: the variable moves before torch's backward pass.
            share = ops.copy(ops.convert_to_tensor(self.balance_share))
            loss = loss * ops.stop_gradient(share)
        super().penalize(name, loss)

    def _move(self, chosen: TokenChoice) -> None:
        """The weight of the next step, as a share of the most it can be."""
        counts = tuple(
            backend.sum_over_replicas(
                ops.sum(ops.cast(experts < self.num_experts, "float32"))
            )
            for experts in (chosen.requested, chosen.experts)
        )
        (asked, kept), last = self.gathered_drops.add(
            counts, training_steps.batches_per_step(self.batches_per_step)
        )
        dropped = (asked - kept) / ops.maximum(asked, 1.0)
        wanted = ops.minimum(
            self.drop_scale * dropped / self.load_balance_loss, 1.0
        )
        old = ops.convert_to_tensor(self.balance_share)
        new = self.smoothing * old + (1.0 - self.smoothing) * wanted
        self.balance_share.assign(ops.stop_gradient(ops.where(last, new, old)))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "logits_stddev": self.logits_stddev,
            "drop_scale": self.drop_scale,
            "smoothing": self.smoothing,
        }


RECIPE = Recipe(
    name="skywork",
    paper="Wei et al., Skywork-MoE, arXiv 2406.06563",
    changes=(
        "a token's logits are normalised, and balance weighs by what is dropped"
    ),
    costs="nothing",
    fails=(
        "its report: with twice the dense model's budget or more left, a "
        "mixture from scratch ends lower"
    ),
    choices={
        ANY: (
            Choice(
                "router",
                (
                    SkyworkRouter,
                    {
                        "top_k": 2,
                        "logits_stddev": 1.0,
                        "load_balance_loss": 0.01,
                        "drop_scale": 0.2,
                        "smoothing": 0.99,
                    },
                ),
                "the report: 2 of 16 experts, logits of standard deviation 1, "
                "the loss's weight at most 0.01, a fifth of the drop rate, "
                "smoothed by 0.99. How many slots an expert has is not told; "
                "1.25 times its share here",
            ),
            Note("num_experts", 16, "the report; you pass your own"),
            Choice("expert_init", "copy", "the report: copies of the dense"),
            Choice("layers", "all", "the report: every layer of Skywork-13B"),
            Note(
                "when",
                "less than twice the dense model's cost is left to spend",
                "the report: with more, a mixture from scratch ends better",
            ),
        ),
    },
)
add_recipe(RECIPE)

"""`ExpertChoiceRouter`: every expert chooses its likeliest tokens."""

import keras

from keras_upcycle import checks
from keras_upcycle.routing import functional
from keras_upcycle.routing.noisy_router import NoisyRouter
from keras_upcycle.routing.registry import named
from keras_upcycle.types import ExpertChoice


@named("expert_choice")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class ExpertChoiceRouter(NoisyRouter):
    """Every expert chooses its likeliest tokens: balanced by design.

    The router of Sparse Upcycling for vision and for encoders. Not for causal
    decoders, where an expert's choice would look at later tokens: with every
    `group` a token's experts depend on the other tokens of its group, and with
    any but `"example"` a prediction depends on the examples beside it.

    References: Zhou et al. (arXiv 2202.09368); Sparse Upcycling (2212.05055),
    section 2.1 and appendix B.7 for `normalize`; for noise, capacity at
    evaluation and groups of several images V-MoE (2106.05974) and its code,
    `NoisyTopItemsPerExpertRouter`.

    Args:
        capacity_factor: Float above 0: each expert takes
            `ceil(capacity_factor * S / E)` of a group's `S` real tokens, so
            that many experts process a token on average. Defaults to 2.
        group: String or integer. `"example"` (default): a prediction does not
            depend on the other examples of its batch. `"batch"`: all tokens
            compete. An integer: those of so many examples, one after another in
            the batch; V-MoE's configurations had 8 images. See `Router` for a
            batch that it does not divide.
        normalize: Boolean, whether a processed token's weights are rescaled to
            sum to 1; tokens that no expert chose keep 0, and only the residual
            branch carries them. A token that one expert chose alone has a
            weight of 1 then and teaches the router nothing. Defaults to `True`.
        eval_capacity_factor: Float above 0 or `None`, the capacity factor at
            inference. Defaults to `None`: that of training.
        noise_stddev: Float, at least 0: the standard deviation of Gaussian
            noise added to the logits in training, before the softmax, for the
            choice and the weights; V-MoE used `1 / num_experts`. Or a schedule
            of it, see `temperature`. Defaults to 0.
        temperature: Float above 0, or a schedule of Keras's: what logits are
            divided by, noise included, before the softmax, in training and at
            inference; see `Router`. Experts rank tokens by probabilities, so
            here it changes the choice too. Defaults to 1.0.
        z_loss: Float, at least 0: the weight of the router z-loss, of the
            logits without noise. Defaults to 0.
        seed: Integer or `None`, the seed of the noise. Files keep where the
            noise stands. `None` (default) draws one.
        **kwargs: Keyword arguments of `Router`: `kernel_initializer`, the
            initializer of its kernel, `name`, a string, and `trainable`, a
            boolean; see `Router`.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> router = ExpertChoiceRouter(capacity_factor=1.0)
        >>> layer = MoEFeedForward(4, 32, router=router)
        >>> tuple(layer(keras.ops.ones((2, 8, 16))).shape)
        (2, 8, 16)
    """

    def __init__(
        self,
        capacity_factor=2.0,
        group="example",
        normalize=True,
        *,
        eval_capacity_factor=None,
        noise_stddev=0.0,
        temperature=1.0,
        z_loss=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            group=group,
            z_loss=z_loss,
            noise_stddev=noise_stddev,
            temperature=temperature,
            seed=seed,
            **kwargs,
        )
        self.capacity_factor = checks.check_factor(
            "capacity_factor", capacity_factor
        )
        if eval_capacity_factor is not None:
            eval_capacity_factor = checks.check_factor(
                "eval_capacity_factor", eval_capacity_factor
            )
        self.eval_capacity_factor = eval_capacity_factor
        self.normalize = checks.check_flag("normalize", normalize)

    @property
    def mixes_tokens(self):
        return True

    @property
    def sums_to_one(self):
        return self.normalize

    def meets_all_of_equals(self, num_experts):
        factor = self.eval_capacity_factor
        if factor is None:
            factor = self.capacity_factor
        return min(factor, self.capacity_factor) >= num_experts

    def choose(self, logits, mask, training) -> ExpertChoice:
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return functional.expert_choice(
            self.noisy(logits, training),
            factor,
            normalize=self.normalize,
            mask=mask,
        )

    def average_experts_per_token(self, num_experts, length=None):
        return self._slots(self.capacity_factor, num_experts, length)

    def get_config(self):
        return {
            **super().get_config(),
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "normalize": self.normalize,
        }

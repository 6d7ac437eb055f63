"""`TopKRouter`: every token chooses its likeliest experts."""

from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, checks
from keras_upcycle.routing import (
    drop_policies,
    functional,
    router_gradients,
    top_k_settings,
    training_steps,
)
from keras_upcycle.routing import expert_groups as groups_of_experts
from keras_upcycle.routing.auxiliary_losses import AUXILIARY_LOSSES
from keras_upcycle.routing.noisy_router import NoisyRouter
from keras_upcycle.routing.registry import named
from keras_upcycle.types import Tensor, TokenChoice


@named("top_k")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class TopKRouter(NoisyRouter):
    """Every token chooses its `top_k` likeliest experts.

    The router for causal decoders and for anything whose prediction must not
    depend on its neighbours: at inference it is dropless by default.

    References: Shazeer et al. (arXiv 1701.06538), GShard (2006.16668), Switch
    Transformers (2101.03961), Sparse Upcycling (2212.05055, appendix B.7 for
    `normalize`); `routing.losses` gives each loss's own.

    Args:
        top_k: Integer in `[1, num_experts]`: experts that a token chooses
            (`K`). Defaults to 2.
        normalize: Boolean, whether the weights of the experts that process a
            token are rescaled to sum to 1, after drops. With identical experts
            the layer then equals the dense block. With `top_k=1` every weight
            is 1 then, the router gets no gradient from the task (Sparse
            Upcycling, appendix B.7), and a warning says so. Defaults to `True`.
        capacity_factor: Float above 0 or `None`: in training each expert takes
            `ceil(capacity_factor * S * K / E)` of a group's `S` real tokens and
            drops the others. `None` is dropless. Defaults to 1.25.
        eval_capacity_factor: Float above 0 or `None`, the capacity factor at
            inference. Defaults to `None`, dropless: a prediction then does not
            depend on its batch.
        load_balance_loss: Float, at least 0: the weight of the load-balancing
            loss, added in training by each layer, whose least value is 1.
            Defaults to 0.01, the number of most papers; some mean a loss `K`
            times as large, or the mean of all layers' (`print(get_recipe(...))`
            translates).
        balance_over: String: of which tokens the load-balancing loss counts the
            choices: `"batch"` (default), or `"step"`, of all batches of an
            optimizer step so far (`batches_per_step`) and all replicas of
            `tf.distribute` (Qiu et al., arXiv 2501.11873): experts may then
            specialise within a small batch. On JAX a batch is the whole one,
            over however many devices.
        z_loss: Float, at least 0: the weight of the router z-loss; ST-MoE used
            0.001. Defaults to 0.
        importance_loss: Float, at least 0: the weight of the importance loss,
            of the probabilities before noise; V-MoE's released code used 0.005.
            Defaults to 0.
        load_loss: Float, at least 0: the weight of the load loss, which needs
            `noise_stddev`; V-MoE's released code used 0.005. It takes choices
            as made by logits, a `bias` aside. Defaults to 0.
        mutual_information_loss: Float, at least 0: the weight of the
            mutual-information loss, of the probabilities before noise; DS-MoE
            used 0.0002 to 0.0006. The loss is negative. Defaults to 0.
        bias_update_rate: Float, at least 0: balances without a loss (Wang et
            al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, 2412.19437, section
            2.1.2). The router owns a saved weight `bias` `(E,)`, float32, 0 at
            first, that is added to the scores for the choice alone. Once an
            optimizer step it moves by
            `bias_update_rate * sign(mean(load) - load)`, where an expert's load
            is how many real tokens requested it, in all batches of the step
            (`batches_per_step`) and in all replicas of `tf.distribute`. Both
            papers used 0.001, with a sigmoid for scores and no loss that
            balances batches (here `load_balance_loss=0`). Here scores are
            probabilities, near `1 / E` each, or logits with
            `softmax="after_top_k"`: a rate that is large beside their
            differences overshoots. No gradient reaches the bias, inference
            leaves it, and so does a router with `trainable=False`. Defaults to
            0: no such weight.
        batches_per_step: Integer, at least 1, or `None`: how many training
            calls make one step of the optimizer, for what the router itself
            moves. `None` (default) is the `gradient_accumulation_steps` of the
            optimizer that the model's `fit` or `train_on_batch` uses, and 1 in
            a loop of your own: pass the number if yours accumulates gradients.
            Calls are counted, twice where a model calls the layer twice, and
            files keep where the count stands.
        softmax: String, `"before_top_k"` (default, over all experts, as Switch
            and Mixtral) or `"after_top_k"` (over the chosen, as gpt-oss). Equal
            where `normalize` is `True`.
        noise_stddev: Float, at least 0: the standard deviation of Gaussian
            noise added to the logits in training; V-MoE used `1 / num_experts`.
            Or a schedule of it, see `temperature`; not with `load_loss`.
            Defaults to 0.
        temperature: Float above 0, or a schedule of Keras's: what logits are
            divided by, noise included, before the softmax, in training and at
            inference; see `Router`. With `expert_groups` both the choice of
            groups and the softmax within them. Defaults to 1.0.
        drop_policy: String, `"position"` (default), `"batch_priority"` (V-MoE)
            or `"probability"`: which tokens an expert without room drops; see
            `functional.top_k`. In a causal model only dropless training is
            causal: under every policy a later token's first choice may take an
            earlier token's slot.
        expert_groups: List of integers or `None`: each expert's group, from
            0 without a gap, such as `[0, 0, 1, 1]`. A token then chooses
            `top_k` groups and one expert in each: experts of a group are
            alternatives, as copies of one expert are (`grow_experts`). A
            group's logit is the mean of its experts', its weight theirs
            together, and within a group they share by a softmax (Shazeer et
            al., appendix B, hierarchical mixtures). Defaults to `None`: any
            `top_k` experts.
        router_gradient: String: `"top_k"` (default), of the experts that a
            token meets, or `"dense_mixer"` (Yao et al., DenseMixer,
            openreview 4HGIIekCx3): straight through Top-K, of what every
            expert would put out. In training each expert then runs forward on
            every token besides, so that a layer's step takes about `1 + E /
            (3 K)` times as long; outputs, other gradients and inference stay.
            `DefaultMoERouter` guesses what the others put out instead.
        group: String, `"batch"` (default) or `"example"`, or an integer, a
            number of examples: tokens that share buffers; see `Router`.
        seed: Integer or `None`, the seed of the noise. Files keep where the
            noise stands, so that training resumed from one goes on with new
            noise. `None` (default) draws one.
        **kwargs: Keyword arguments of `Router`: `kernel_initializer`, the
            initializer of its kernel, `name`, a string, and `trainable`, a
            boolean; see `Router`.

    Raises:
        TypeError, ValueError: For a setting outside its range, or `load_loss`
            without noise; `top_k > num_experts` is found when the router meets
            its experts.

    Example:
        >>> layer = MoEFeedForward(8, 32, router=TopKRouter(top_k=2))
        >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
        (2, 5, 16)
    """

    def __init__(
        self,
        top_k=2,
        normalize=True,
        *,
        capacity_factor=1.25,
        eval_capacity_factor=None,
        load_balance_loss=0.01,
        z_loss=0.0,
        importance_loss=0.0,
        load_loss=0.0,
        mutual_information_loss=0.0,
        bias_update_rate=0.0,
        batches_per_step=None,
        softmax="before_top_k",
        noise_stddev=0.0,
        temperature=1.0,
        drop_policy="position",
        expert_groups=None,
        router_gradient="top_k",
        balance_over="batch",
        group="batch",
        seed=None,
        **kwargs,
    ):
        super().__init__(
            group=group,
            z_loss=z_loss,
            noise_stddev=noise_stddev,
            temperature=temperature,
            batches_per_step=batches_per_step,
            seed=seed,
            **kwargs,
        )
        self.top_k = checks.check_count("top_k", top_k)
        self.normalize = checks.check_flag("normalize", normalize)
        self.capacity_factor = checks.check_factor(
            "capacity_factor", capacity_factor, optional=True
        )
        self.eval_capacity_factor = checks.check_factor(
            "eval_capacity_factor", eval_capacity_factor, optional=True
        )
        for name, number in (
            ("load_balance_loss", load_balance_loss),
            ("importance_loss", importance_loss),
            ("load_loss", load_loss),
            ("mutual_information_loss", mutual_information_loss),
            ("bias_update_rate", bias_update_rate),
        ):
            number = checks.check_number(name, number, at_least=0.0)
            setattr(self, name, number)
        self.softmax = checks.check_choice(
            "softmax", softmax, functional.SOFTMAX_ORDERS
        )
        self.drop_policy = checks.check_choice(
            "drop_policy", drop_policy, drop_policies.DROP_POLICIES
        )
        self.expert_groups = groups_of_experts.check(
            "expert_groups", expert_groups
        )
        self.router_gradient = checks.check_choice(
            "router_gradient",
            router_gradient,
            router_gradients.ROUTER_GRADIENTS,
        )
        self.balance_over = checks.check_choice(
            "balance_over", balance_over, top_k_settings.BALANCED_OVER
        )
        top_k_settings.check_together(self)
        self.bias = None
        if not self.learns_from_task and self.trainable:
            top_k_settings.warn_of_no_gradient(self)

    @property
    def _asks_all(self):
        return self.router_gradient == router_gradients.DENSE_MIXER

    @property
    def learns_from_task(self) -> bool:
        """Whether combine weights, and so the task, depend on the logits."""
        if self.top_k > 1 or self._asks_all:
            return True
        return not self.normalize and self.softmax == "before_top_k"

    def limit(self, num_experts):
        _, count = groups_of_experts.choices(self.expert_groups, num_experts)
        self.top_k = min(self.top_k, count)

    @property
    def sums_to_one(self):
        return self.normalize or self.softmax == "after_top_k"

    @property
    def is_plain_top_k(self):
        # A kind of its own says for itself.
        return type(self) is TopKRouter and self.expert_groups is None

    def meets_all_of_equals(self, num_experts):
        factor = self.eval_capacity_factor
        return self.top_k == num_experts and (factor is None or factor >= 1)

    def check(self, num_experts):
        what, count = groups_of_experts.choices(self.expert_groups, num_experts)
        if self.top_k > count:
            raise ValueError(
                f"`top_k` must be between 1 and `{what}`. Received: "
                f"top_k={self.top_k}, {what}={count}. Lower "
                "`top_k` or add experts."
            )

    def logits_of(self, scores):
        if self.expert_groups is None:
            return scores
        return groups_of_experts.logits(scores, self.expert_groups)

    def logits_at(self, scores, temperature):
        if self.expert_groups is None:
            return super().logits_at(scores, temperature)
        # What a group has together is not to hang on its size.
        return self.logits_of(scores / temperature)

    def settings_of(self, index):
        if self.expert_groups is None:
            return super().settings_of(index)
        return {
            "expert_groups": groups_of_experts.of_experts(
                self.expert_groups, index
            )
        }

    def value_of(self, variable, shape, index):
        # What a group is chosen by is the mean of its experts'.
        if self.expert_groups is None or not any(
            variable is each for each in (self.kernel, self.logits_bias)
        ):
            return super().value_of(variable, shape, index)
        return groups_of_experts.with_means_kept(
            ops.convert_to_numpy(variable.value), self.expert_groups, index
        )

    def build(self, input_shape):
        super().build(input_shape)
        if self.balance_over == top_k_settings.STEP:
            self.gathered_choices = training_steps.GatheredOverStep(
                ((self.num_experts,),), "gathered_choices"
            )
        if self.bias_update_rate:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                # The replicas of `tf.distribute` assign the same.
                aggregation="only_first_replica",
            )
            self.gathered_load = training_steps.GatheredOverStep(
                ((self.num_experts,),), "gathered_load"
            )

    def choose(self, logits, mask, training) -> TokenChoice:
        noisy = self.noisy(logits, training)
        return self.choose_by(noisy, logits, mask, training)

    def choose_by(
        self, noisy: Tensor, logits: Tensor, mask: Tensor | None, training: Any
    ) -> TokenChoice:
        """As `choose`, by logits to which noise has been added."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        chosen = functional.top_k(
            noisy,
            self.top_k,
            normalize=self.normalize,
            softmax=self.softmax,
            capacity_factor=factor,
            drop_policy=self.drop_policy,
            mask=mask,
            bias=self.bias,
            expert_groups=self.expert_groups,
        )
        if training and self._asks_all:
            chosen = router_gradients.with_probabilities(chosen, noisy, mask)
        if training:
            self._add_losses(logits, noisy, chosen.requested, mask)
            if self.bias_update_rate and self.trainable:
                self._move_bias(chosen.requested)
        return chosen

    def run(self, tokens, chosen, engine, experts, training):
        outputs = engine(tokens, chosen, experts, training)
        if not (training and self._asks_all and self.trainable):
            return outputs
        met = functional.membership(chosen.experts, experts.num_experts)
        added = router_gradients.of_unmet(
            chosen.probabilities,
            ops.max(met, axis=2),
            outputs,
            router_gradients.of_all_experts(tokens, experts, training),
            normalized=self.sums_to_one,
        )
        return outputs + ops.cast(added, outputs.dtype)

    def _add_losses(self, *seen):
        for name, loss in AUXILIARY_LOSSES.items():
            if getattr(self, f"{name}_loss"):
                self.penalize(name, loss(self, *seen))

    def share_of_step(self, requested: Tensor) -> Tensor | None:
        """Each expert's share of the choices so far, `(E,)`; `None` for those
        of the batch alone.
        """
        if self.balance_over == top_k_settings.BATCH:
            return None
        count, _ = self._counted(requested, self.gathered_choices, "float32")
        return count / ops.maximum(ops.sum(count), 1.0)

    def _counted(self, requested, gathered, dtype):
        """Choices of each expert in the step so far, and whether it is over."""
        one_hot = functional.membership(requested, self.num_experts, dtype)
        count = backend.sum_over_replicas(ops.sum(one_hot, axis=(0, 1, 2)))
        (count,), last = gathered.add(
            (count,), training_steps.batches_per_step(self.batches_per_step)
        )
        return count, last

    def _move_bias(self, requested):
        # In integers: a rounded mean would differ from loads that equal it.
        load, last = self._counted(requested, self.gathered_load, "int32")
        below = ops.sign(ops.sum(load) - self.num_experts * load)
        move = self.bias_update_rate * ops.cast(below, "float32")
        self.bias.assign_add(ops.where(last, move, ops.zeros_like(move)))

    def losses_by_name(self):
        weights = {
            name: getattr(self, f"{name}_loss") for name in AUXILIARY_LOSSES
        }
        return {
            **super().losses_by_name(),
            **{name: weight for name, weight in weights.items() if weight},
        }

    def average_experts_per_token(self, num_experts, length=None):
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        return min(self.top_k * min(factor, 1.0), num_experts)

    def average_slots_per_token(self, num_experts, length=None):
        # Forward alone, one of a step's three passes.
        beside = num_experts / 3 if self._asks_all else 0
        if self.capacity_factor is None:
            return min(self.top_k, num_experts) + beside
        factor = self.top_k * self.capacity_factor
        return self._slots(factor, num_experts, length) + beside

    def get_config(self):
        own = {name: getattr(self, name) for name in top_k_settings.SETTINGS}
        return {**super().get_config(), **own}

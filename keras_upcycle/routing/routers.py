"""Keras layers that own a router's weights and settings."""

import contextlib
import contextvars
import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, checks, keras_internals
from keras_upcycle.routing import functional, losses, statistics, training_steps
from keras_upcycle.routing.token_groups import BATCH, EXAMPLE
from keras_upcycle.types import ExpertChoice, Routing, Tensor, TokenChoice

GROUPS = (EXAMPLE, BATCH)

# Whether a router is made from settings that someone has met before.
_REMADE: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_upcycle_remade", default=False
)


class Router(keras.layers.Layer):
    """Base of all routers: the projection to logits, always in float32.

    A router of your own derives from it and writes `choose`.

    Args:
        group: `"example"`, `"batch"` or an integer, a number of examples: the
            tokens that compete for one set of expert slots. Where the number
            does not divide the batch, the last group has the examples that
            are left, and slots for its own tokens; a batch of fewer examples
            is one group. What counts is the batch that the layer is called
            on: under `tf.distribute` or gradient accumulation a replica's, or
            the micro-batch.
        kernel_initializer: Initializer of the router kernel; N(0, 0.02^2)
            unless given. Zeros would make every expert see the same tokens
            and never differ.
        z_loss: Weight of the router z-loss; 0 leaves it out.
        **kwargs: Of `keras.layers.Layer`. `dtype` is ignored: a router is
            float32 under every policy, since one flipped choice costs more
            than the small matmul saves.

    Input shape:
        `(G, S, D)`, groups of tokens; optionally a mask `(G, S)`.

    Output:
        A `TokenChoice` or an `ExpertChoice`.
    """

    def __init__(self, *, group, kernel_initializer=None, z_loss=0.0, **kwargs):
        kwargs.pop("dtype", None)
        kwargs.setdefault("name", "router")
        if "trainable" in kwargs:
            flag = checks.check_flag("trainable", kwargs["trainable"])
            kwargs["trainable"] = flag
        super().__init__(dtype="float32", **kwargs)
        group = _check_group(group)
        z_loss = checks.check_number("z_loss", z_loss, at_least=0.0)
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.group = group
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.z_loss = z_loss
        self.num_experts = None
        self.statistics = None
        # Without it Keras warns that a masked input's mask gets lost here.
        self.supports_masking = True

    def build(self, input_shape):
        if self.num_experts is None:
            raise ValueError(
                "A router must know how many experts it chooses from before "
                f"it is built. Received: router {self.name!r} with "
                "num_experts=None. Put it into a `MoEFeedForward`, or set "
                "`router.num_experts` first."
            )
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=self.kernel_initializer,
            dtype="float32",
        )

    def load_own_variables(self, store):
        saved = len(store.keys())
        own = [(v.name, tuple(v.shape)) for v in self.weights]
        if self.built and saved != len(own):
            raise ValueError(
                "A router's weights must come from a router of the same kind "
                f"and settings. Received: {saved} weights for {self.path!r}, a "
                f"{type(self).__name__} that has {own}. Only a router with "
                "`bias_update_rate` has a `bias`, and only a "
                "`DefaultMoERouter` has `default_vectors`. Make the model as "
                "the saved one was made."
            )
        super().load_own_variables(store)

    def check(self, num_experts: int) -> None:
        """Raises `ValueError` if the settings do not suit `num_experts`."""

    def call(self, inputs, mask=None, training=None):
        logits = ops.matmul(inputs, self.kernel)  # (G, S, E)
        if training and self.z_loss:
            self.penalize("z_loss", losses.z_loss(logits, mask))
        chosen = self.choose(logits, mask, training)
        if training and self.statistics is not None:
            self.statistics.add(chosen, logits, mask)
        return chosen

    def watch(self) -> bool:
        """Counts loads, drops and losses in training from now on.

        In `statistics`, which is saved in no file. A step compiled before does
        not count: see `RouterMonitor`, which does all of this.

        Returns:
            Whether it did not count before.
        """
        if self.statistics is not None:
            return False
        made = statistics.RouterStatistics(
            self.num_experts, self.losses_by_name()
        )
        keras_internals.attach_state(self, "statistics", made)
        return True

    def losses_by_name(self) -> dict[str, float]:
        """The auxiliary losses that training adds, each with its weight."""
        return {"z_loss": self.z_loss} if self.z_loss else {}

    def penalize(self, name: str, loss: Tensor) -> None:
        """Adds an auxiliary loss to what `fit` minimises.

        Args:
            name: A key of `losses_by_name`, which has the weight.
            loss: Scalar float32, not weighted yet.
        """
        self.add_loss(self.losses_by_name()[name] * loss)
        if self.statistics is not None:
            self.statistics.note_loss(name, loss)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # A second run would draw other noise and add its losses twice.
        return layer_call

    def compute_mask(self, inputs, previous_mask):
        # A routing is no sequence; the mask is in it already.
        return None

    def choose(
        self, logits: Tensor, mask: Tensor | None, training: Any
    ) -> Routing:
        """Turns logits into a routing.

        Args:
            logits: float32 `(G, S, E)`.
            mask: bool `(G, S)`, `True` at real tokens, or `None`.
            training: Whether the model trains.

        Returns:
            A `TokenChoice` or an `ExpertChoice`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `choose(logits, mask, "
            "training)` and return a TokenChoice or an ExpertChoice."
        )

    def run(
        self,
        tokens: Tensor,
        chosen: Routing,
        engine: Callable[..., Any],
        experts: Any,
        training: Any,
    ) -> Tensor:
        """What a mixture puts out: the engine's result, unless overridden.

        For methods that add to it, or learn from what experts put out.

        Args:
            tokens: `(G, S, D)`.
            chosen: What `choose` returned.
            engine: Of `dispatch`.
            experts: What the engine runs.
            training: Whether the model trains.

        Returns:
            `(G, S, D)`.
        """
        return engine(tokens, chosen, experts, training)

    @property
    def mixes_tokens(self) -> bool:
        """Whether at inference a token's experts depend on other tokens.

        `upcycle_model` keeps such a router out of causal stacks.
        """
        return False

    def average_experts_per_token(
        self, num_experts: int, length: int | None = None
    ) -> float:
        """Experts that process a token on average: the weights it meets.

        Args:
            num_experts: Integer, `E`.
            length: Tokens of an example, where known: slots are whole, so a
                short example may cost more than the factor says.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define "
            "`average_experts_per_token(num_experts, length=None)`, which "
            "estimates use."
        )

    def average_slots_per_token(
        self, num_experts: int, length: int | None = None
    ) -> float:
        """Rows that experts compute in training for a token: what it costs.

        At least `average_experts_per_token`, its default: where experts have
        buffers, an empty slot takes as long as a full one.

        Args:
            num_experts: As for `average_experts_per_token`.
            length: As for `average_experts_per_token`.
        """
        return self.average_experts_per_token(num_experts, length=length)

    def _slots(self, factor, num_experts, length):
        """Slots of all experts for a token of a group, whole where known."""
        if length is None or self.group == BATCH:
            return min(factor, num_experts)
        if self.group != EXAMPLE:
            length = length * self.group
        slots = functional.capacity(length, num_experts, factor)
        return slots * num_experts / length

    @classmethod
    def from_config(cls, config):
        with _remade():
            return super().from_config(config)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return {
            **config,
            "group": self.group,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "z_loss": self.z_loss,
        }


class NoisyRouter(Router):
    """A router that adds noise to its logits in training.

    Args:
        noise_stddev: Standard deviation of the Gaussian noise; 0 for none.
        seed: Seed of the noise; `None` draws one.
        **kwargs: As for `Router`.
    """

    def __init__(self, *, noise_stddev=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.noise_stddev = checks.check_number(
            "noise_stddev", noise_stddev, at_least=0.0
        )
        self.seed = checks.check_seed("seed", seed)
        if self.noise_stddev:
            self.noise_seed = keras.random.SeedGenerator(self.seed)

    def noisy(self, logits: Tensor, training: Any) -> Tensor:
        """The logits with this call's noise; themselves at inference."""
        if not training or not self.noise_stddev:
            return logits
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.noise_seed
        )
        return logits + self.noise_stddev * noise

    def get_config(self):
        return {
            **super().get_config(),
            "noise_stddev": self.noise_stddev,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="keras_upcycle")
class TopKRouter(NoisyRouter):
    """Every token chooses its `top_k` likeliest experts.

    The router for causal decoders and for anything whose prediction must not
    depend on its neighbours: at inference it is dropless by default.

    References: Shazeer et al. (arXiv 1701.06538), GShard (2006.16668), Switch
    Transformers (2101.03961), Sparse Upcycling (2212.05055, appendix B.7 for
    `normalize`); `router_losses` gives each loss's own.

    Args:
        top_k: Integer in `[1, num_experts]`. Defaults to 2.
        normalize: Whether the weights of the experts that process a token are
            rescaled to sum to 1, after drops. With identical experts the
            layer then equals the dense block. With `top_k=1` every weight is
            1 then, the router gets no gradient from the task (Sparse
            Upcycling, appendix B.7), and a warning says so. Defaults to
            `True`.
        capacity_factor: In training each expert takes `ceil(capacity_factor *
            S * K / E)` of a group's `S` real tokens and drops the others.
            `None` is dropless. Defaults to 1.25.
        eval_capacity_factor: The same at inference. Defaults to `None`,
            dropless: a prediction then does not depend on its batch.
        load_balance_loss: Weight of the load-balancing loss, added in
            training by each layer, whose least value is 1. Defaults to 0.01,
            the number of most papers; some mean a loss `K` times as large, or
            the mean of all layers' (`print(get_recipe(...))` translates).
        z_loss: Weight of the router z-loss; ST-MoE used 0.001. Defaults to 0.
        importance_loss: Weight of the importance loss, of the probabilities
            before noise; V-MoE's released code used 0.005. Defaults to 0.
        load_loss: Weight of the load loss, which needs `noise_stddev`; V-MoE's
            released code used 0.005. It takes choices as made by logits, a
            `bias` aside. Defaults to 0.
        mutual_information_loss: Weight of the mutual-information loss, of the
            probabilities before noise; DS-MoE used 0.0002 to 0.0006. The loss
            is negative. Defaults to 0.
        bias_update_rate: Balances without a loss (Wang et al., arXiv
            2408.15664, algorithm 1; DeepSeek-V3, 2412.19437, section 2.1.2).
            The router owns a saved weight `bias` `(E,)`, float32, 0 at first,
            that is added to the scores for the choice alone. Once an
            optimizer step it moves by `bias_update_rate * sign(mean(load) -
            load)`, where an expert's load is how many real tokens wanted it,
            in all batches of the step (`batches_per_step`) and in all
            replicas of `tf.distribute`.
            Both papers used 0.001, with a sigmoid for scores and no loss that
            balances batches (here `load_balance_loss=0`). Here scores are
            probabilities, near `1 / E` each, or logits with
            `softmax="after_top_k"`: a rate that is large beside their
            differences overshoots. No gradient reaches the bias, inference
            leaves it, and so does a router with `trainable=False`. Defaults
            to 0: no such weight.
        batches_per_step: How many training calls make one step of the
            optimizer, for what the router itself moves. `None` (default) is
            the `gradient_accumulation_steps` of the optimizer that the
            model's `fit` or `train_on_batch` uses, and 1 in a loop of your
            own: pass the number if yours accumulates gradients. Calls are
            counted, twice where a model calls the layer twice, and files
            keep where the count stands.
        softmax: `"before_top_k"` (over all experts, as Switch and Mixtral) or
            `"after_top_k"` (over the chosen, as gpt-oss). Equal where
            `normalize` is `True`.
        noise_stddev: Standard deviation of Gaussian noise added to the logits
            in training; V-MoE used `1 / num_experts`. Defaults to 0.
        drop_policy: `"position"`, `"batch_priority"` (V-MoE) or
            `"probability"`; see `routing.top_k`. In a causal model only
            dropless training is causal: under every policy a later token's
            first choice may take an earlier token's slot.
        group: `"batch"` (default), `"example"` or a number of examples:
            tokens that share buffers; see `Router`.
        seed: Seed of the noise. Files keep where the noise stands, so that
            training resumed from one goes on with new noise.
        **kwargs: `kernel_initializer`, `name`, `trainable`; see `Router`.

    Raises:
        ValueError: For a setting outside its range, or `load_loss` without
            noise; `top_k > num_experts` is found when the router meets its
            experts.

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
        drop_policy="position",
        group="batch",
        seed=None,
        **kwargs,
    ):
        super().__init__(
            group=group,
            z_loss=z_loss,
            noise_stddev=noise_stddev,
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
        if load_loss and not noise_stddev:
            raise ValueError(
                "`load_loss` is about how often noise changes a choice, so it "
                f"needs `noise_stddev > 0`. Received: load_loss={load_loss}, "
                f"noise_stddev={noise_stddev}. Set `noise_stddev`, such as "
                "1 / num_experts, or `load_loss=0`."
            )
        if batches_per_step is not None:
            batches_per_step = checks.check_count(
                "batches_per_step", batches_per_step
            )
        self.batches_per_step = batches_per_step
        self.softmax = checks.check_choice(
            "softmax", softmax, functional.SOFTMAX_ORDERS
        )
        self.drop_policy = checks.check_choice(
            "drop_policy", drop_policy, functional.DROP_POLICIES
        )
        self.bias = None
        if not self.learns_from_task and self.trainable:
            self._warn_of_no_gradient()

    @property
    def learns_from_task(self) -> bool:
        """Whether combine weights, and so the task, depend on the logits."""
        if self.top_k > 1:
            return True
        return not self.normalize and self.softmax == "before_top_k"

    def _warn_of_no_gradient(self):
        # It would be said again for every block that gets a router like it.
        # A loss that makes tokens sure of an expert teaches the router.
        if _REMADE.get() or self.mutual_information_loss:
            return
        cause = (
            "normalize=True" if self.normalize else f"softmax={self.softmax!r}"
        )
        warnings.warn(
            f"top_k=1 with {cause} gives the router no gradient from the task: "
            "its one combine weight is always 1. Pass `normalize=False` with "
            "`softmax='before_top_k'`, where the weight is the probability; "
            "`DefaultMoERouter(1)`, whose gradient is of all experts; a loss "
            "that teaches it, `mutual_information_loss`; or `top_k=2`.",
            stacklevel=3,
        )

    def check(self, num_experts):
        if self.top_k > num_experts:
            raise ValueError(
                "`top_k` must be between 1 and `num_experts`. Received: "
                f"top_k={self.top_k}, num_experts={num_experts}. Lower "
                "`top_k` or add experts."
            )

    def build(self, input_shape):
        super().build(input_shape)
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
        )
        if training:
            self._add_losses(logits, noisy, chosen.wanted, mask)
            if self.bias_update_rate and self.trainable:
                self._move_bias(chosen.wanted)
        return chosen

    def _add_losses(self, logits, noisy, wanted, mask):
        if self.load_balance_loss:
            loss = losses.load_balance(
                functional.probabilities(noisy), wanted, mask
            )
            self.penalize("load_balance", loss)
        if self.importance_loss:
            loss = losses.importance(functional.probabilities(logits), mask)
            self.penalize("importance", loss)
        if self.load_loss:
            loss = losses.load(
                logits, noisy, self.noise_stddev, self.top_k, mask
            )
            self.penalize("load", loss)
        if self.mutual_information_loss:
            loss = losses.mutual_information(
                functional.probabilities(logits), mask
            )
            self.penalize("mutual_information", loss)

    def _move_bias(self, wanted):
        # In integers: a rounded mean would differ from loads that equal it.
        one_hot = functional.membership(wanted, self.num_experts, "int32")
        load = backend.sum_over_replicas(ops.sum(one_hot, axis=(0, 1, 2)))
        (load,), last = self.gathered_load.add(
            (load,), training_steps.batches_per_step(self.batches_per_step)
        )
        below = ops.sign(ops.sum(load) - self.num_experts * load)
        move = self.bias_update_rate * ops.cast(below, "float32")
        self.bias.assign_add(ops.where(last, move, ops.zeros_like(move)))

    def losses_by_name(self):
        known = super().losses_by_name()
        for name, weight in (
            ("load_balance", self.load_balance_loss),
            ("importance", self.importance_loss),
            ("load", self.load_loss),
            ("mutual_information", self.mutual_information_loss),
        ):
            if weight:
                known[name] = weight
        return known

    def average_experts_per_token(self, num_experts, length=None):
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        return min(self.top_k * min(factor, 1.0), num_experts)

    def average_slots_per_token(self, num_experts, length=None):
        if self.capacity_factor is None:
            return min(self.top_k, num_experts)
        return self._slots(
            self.top_k * self.capacity_factor, num_experts, length
        )

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "normalize": self.normalize,
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "load_balance_loss": self.load_balance_loss,
            "importance_loss": self.importance_loss,
            "load_loss": self.load_loss,
            "mutual_information_loss": self.mutual_information_loss,
            "bias_update_rate": self.bias_update_rate,
            "batches_per_step": self.batches_per_step,
            "softmax": self.softmax,
            "drop_policy": self.drop_policy,
        }


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
        capacity_factor: Each expert takes `ceil(capacity_factor * S / E)` of
            a group's `S` real tokens, so that many experts process a token on
            average. Defaults to 2.
        group: `"example"` (default): a prediction does not depend on the
            other examples of its batch. `"batch"`: all tokens compete. An
            integer: those of so many examples, one after another in the
            batch; V-MoE's configurations had 8 images. See `Router` for a
            batch that it does not divide.
        normalize: Whether a processed token's weights are rescaled to sum to
            1; tokens that no expert chose keep 0, and only the residual
            branch carries them. A token that one expert chose alone has a
            weight of 1 then and teaches the router nothing. Defaults to
            `True`.
        eval_capacity_factor: As `capacity_factor`, at inference. Defaults to
            `None`: the same.
        noise_stddev: Standard deviation of Gaussian noise added to the logits
            in training, before the softmax, for the choice and the weights;
            V-MoE used `1 / num_experts`. Defaults to 0.
        z_loss: Weight of the router z-loss, of the logits without noise.
            Defaults to 0.
        seed: Seed of the noise. Files keep where the noise stands.
        **kwargs: `kernel_initializer`, `name`, `trainable`; see `Router`.

    Raises:
        ValueError: For a setting outside its range.

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
        z_loss=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            group=group,
            z_loss=z_loss,
            noise_stddev=noise_stddev,
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


def clone(router: Router, seed: int | None = None) -> Router:
    """A router with the same settings and weights of its own.

    Args:
        router: Any router.
        seed: Seed for the clone's kernel, where its initializer takes one.
            `None` keeps the initializer's own, which draws one if it has none.
    """
    initializer = router.kernel_initializer
    if isinstance(initializer, keras.initializers.Initializer):
        fresh = initializer.get_config()
        if seed is not None and "seed" in fresh:
            fresh["seed"] = seed
        initializer = type(initializer).from_config(fresh)
    # The object and not its config: a function of the user's own has none.
    config = {**router.get_config(), "kernel_initializer": initializer}
    with _remade():
        return type(router).from_config(config)


@contextlib.contextmanager
def _remade():
    """Routers made inside are made again: what was to be said was said."""
    token = _REMADE.set(True)
    try:
        yield
    finally:
        _REMADE.reset(token)


def _check_group(group: Any) -> str | int:
    if isinstance(group, str):
        known = group in GROUPS
    else:
        known = checks.is_integer(group) and group >= 1
    if known:
        return str(group) if isinstance(group, str) else int(group)
    raise ValueError(
        f"`group` must be one of {list(GROUPS)} or a number of examples, "
        f"an integer of at least 1. Received: group={group!r}."
    )

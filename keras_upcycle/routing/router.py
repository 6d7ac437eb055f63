"""The base of all routers: a Keras layer that owns weights and settings."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, checks, keras_internals
from keras_upcycle.routing import functional, losses, schedules, statistics
from keras_upcycle.routing.remade import clone as clone
from keras_upcycle.routing.remade import remade, value_of
from keras_upcycle.routing.token_groups import BATCH, EXAMPLE, check_group
from keras_upcycle.state import first_values
from keras_upcycle.types import ExpertChoice, Routing, Tensor, TokenChoice


class Router(keras_internals.LossesByReplica, schedules.FollowsSchedules):
    """Base of all routers: the projection to logits, always in float32.

    A router of your own derives from it and writes `choose`.

    References: for a temperature that falls, noise divided by it as well, Nie
    et al., EvoMoE (arXiv 2112.14397), and its code.

    Args:
        group: String, `"example"` or `"batch"`, or an integer, a number of
            examples: the tokens that compete for one set of expert slots. Where
            the number does not divide the batch, the last group has the
            examples that are left, and slots for its own tokens; a batch of
            fewer examples is one group. What counts is the batch that the layer
            is called on: under `tf.distribute` or gradient accumulation a
            replica's, or the micro-batch. Where experts are spread over devices
            (`ku.distribution.ExpertParallel`), `"batch"` is the part of it that
            one device has.
        kernel_initializer: String or initializer, that of the router kernel
            `(D, E)`. Defaults to `None`: N(0, 0.02^2). Zeros would make every
            expert see the same tokens and never differ.
        use_bias: Boolean, whether logits have a bias `(E,)` that trains, as in
            gpt-oss; it starts at 0. Defaults to `False`.
        z_loss: Float, at least 0: the weight of the router z-loss; 0 (default)
            leaves it out.
        temperature: Float above 0, or a
            `keras.optimizers.schedules.LearningRateSchedule`: what logits are
            divided by, noise included, before the softmax and all losses: as
            if the kernel were smaller by it, but that noise is not larger
            beside the logits. A schedule, Keras's own, `InverseSquareRoot` or
            one of yours with a `get_config`, is asked for the router's own
            count of training steps, a weight `training_step` that it has only
            then, that starts at 0 and that files keep. Calls are what it can
            count: a model that calls the layer twice in a step, as ALBERT does,
            needs `batches_per_step=2`. Inference divides too, by what the
            schedule gives for the count: a model annealed to `T` predicts at
            `T`. A frozen router does not count. A schedule is checked at step 0
            alone, and must be above 0 at every step; write its values as
            floats. Defaults to 1.0: nothing is divided.
        batches_per_step: Integer, at least 1, or `None`: how many training
            calls make one step of the optimizer; see `TopKRouter`.
        **kwargs: Keyword arguments of `keras.layers.Layer`. `dtype` is ignored:
            a router is float32 under every policy, since one flipped choice
            costs more than the small matmul saves.

    Input shape:
        `(G, S, D)`, groups of tokens; optionally a mask `(G, S)`.

    Output:
        A `TokenChoice` or an `ExpertChoice`.

    Raises:
        TypeError, ValueError: For a setting outside its range; when built, if
            it was not told `num_experts`, which a `MoEFeedForward` does.

    Example:
        >>> class Top1Router(Router):
        ...     def choose(self, logits, mask, training):
        ...         return functional.top_k(
        ...             logits, 1, normalize=False, mask=mask
        ...         )
        >>> layer = MoEFeedForward(4, 8, router=Top1Router(group="batch"))
        >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
        (2, 5, 16)
    """

    replica = staticmethod(backend.replica_number)

    def __init__(
        self,
        *,
        group,
        kernel_initializer=None,
        use_bias=False,
        z_loss=0.0,
        temperature=1.0,
        batches_per_step=None,
        **kwargs,
    ):
        kwargs.pop("dtype", None)
        kwargs.setdefault("name", "router")
        if "trainable" in kwargs:
            flag = checks.check_flag("trainable", kwargs["trainable"])
            kwargs["trainable"] = flag
        super().__init__(
            dtype="float32",
            temperature=temperature,
            batches_per_step=batches_per_step,
            **kwargs,
        )
        self.group = check_group(group)
        self.z_loss = checks.check_number("z_loss", z_loss, at_least=0.0)
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.kernel_initializer = first_values.initializer_of(
            "kernel_initializer", kernel_initializer
        )
        self.use_bias = checks.check_flag("use_bias", use_bias)
        self.num_experts = None
        self.logits_bias = None
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
        if self.use_bias:
            self.logits_bias = self.add_weight(
                name="logits_bias",
                shape=(self.num_experts,),
                initializer="zeros",
                dtype="float32",
            )
        self.build_count()

    def load_own_variables(self, store):
        saved = len(store.keys())
        own = [(v.name, tuple(v.shape)) for v in self.weights]
        if self.built and saved != len(own):
            raise ValueError(
                "A router's weights must come from a router of the same kind "
                f"and settings. Received: {saved} weights for {self.path!r}, a "
                f"{type(self).__name__} that has {own}. Only a router with "
                "`use_bias` has a `logits_bias`, one with `bias_update_rate` a "
                "`bias`, one with a schedule a `training_step`, and a "
                "`DefaultMoERouter` `default_vectors`. Make the model as the "
                "saved one was made."
            )
        super().load_own_variables(store)

    def check(self, num_experts: int) -> None:
        """Raises `ValueError` if the settings do not suit `num_experts`."""

    def limit(self, num_experts: int) -> None:
        """Lowers what was not asked for, such as `top_k`, to `num_experts`.

        Called where the router itself was chosen by a name, so that its
        defaults are nobody's wish.
        """

    def call(self, inputs, mask=None, training=None):
        logits = self.scores_of(inputs)  # (G, S, E)
        if schedules.is_one(self.temperature):
            logits = self.logits_of(logits)
        else:
            logits = self.logits_at(logits, self.setting("temperature"))
        if training and self.z_loss:
            self.penalize("z_loss", losses.z_loss(logits, mask))
        chosen = self.choose(logits, mask, training)
        if not isinstance(chosen, TokenChoice | ExpertChoice):
            raise TypeError(
                f"`{type(self).__name__}.choose` must return a `TokenChoice` "
                f"or an `ExpertChoice`. Received: {type(chosen).__name__}. "
                "`keras_upcycle.routing.functional` makes both."
            )
        if training:
            self.count_step()
            if self.statistics is not None:
                self.statistics.add(chosen, logits, mask)
        return chosen

    def scores_of(self, inputs: Tensor) -> Tensor:
        """What the kernel gives of tokens: float32 `(G, S, E)`."""
        scores = ops.matmul(inputs, self.kernel)
        return scores if self.logits_bias is None else scores + self.logits_bias

    def logits_of(self, scores: Tensor) -> Tensor:
        """Logits from what the kernel gives: the same, unless overridden."""
        return scores

    def logits_at(self, scores: Tensor, temperature: Any) -> Tensor:
        """The same divided by a temperature, a number or a scalar tensor."""
        return self.logits_of(scores) / temperature

    def settings_of(self, index: Sequence[int]) -> dict[str, Any]:
        """Settings that are others where expert `n` is what `index[n]` was.

        None, unless overridden.
        """
        del index
        return {}

    def value_of(
        self, variable: keras.Variable, shape: tuple, index: Sequence[int]
    ) -> Tensor:
        """A weight of a router whose expert `n` is what `index[n]` was.

        Args:
            variable: Tensor, as a `keras.Variable`, a weight of this router.
            shape: Tuple of integers, of the other router's weight.
            index: List of integers, the old numbers of the experts there are.
        """
        return value_of(variable, shape, index)

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
            name: String, a key of `losses_by_name`, which has the weight.
            loss: Scalar float32 tensor, not weighted yet.
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
            logits: Tensor, float32 `(G, S, E)`.
            mask: Tensor, bool `(G, S)`, `True` at real tokens, or `None`.
            training: Boolean, whether the model trains.

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
        """What an MoE layer puts out: the engine's result, unless overridden.

        For methods that add to it, or learn from what experts put out.

        Args:
            tokens: Tensor, float `(G, S, D)`.
            chosen: A `TokenChoice` or `ExpertChoice`, what `choose` returned.
            engine: Callable, one of the engines of `dispatch`.
            experts: A Keras layer, the experts that the engine runs.
            training: Boolean, whether the model trains.

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

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token that experts process sum to 1.

        `True` unless overridden; `VirtualGroups` scales experts by it.
        """
        return True

    @property
    def is_plain_top_k(self) -> bool:
        """Whether at inference it is Top-K and nothing more, as others have."""
        return False

    @property
    def adds_slices(self) -> bool:
        """Whether experts are parts of a block, each to be added with 1."""
        return False

    def meets_all_of_equals(self, num_experts: int) -> bool:
        """Whether equal logits give every expert every token, `1 / E` each.

        At inference, and in training where tokens are not dropped. `True`
        unless overridden; `FeedForwardSlices` starts as the dense block if so.
        """
        del num_experts
        return True

    def average_experts_per_token(
        self, num_experts: int, length: int | None = None
    ) -> float:
        """Experts that process a token on average: the weights it meets.

        Args:
            num_experts: Integer, how many experts there are (`E`).
            length: Integer, the tokens of an example, where known: slots are
                whole, so a short example may cost more than the factor says.
                Defaults to `None`.
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
            num_experts: Integer, how many experts there are (`E`).
            length: Integer, the tokens of an example, where known: slots are
                whole, so a short example may cost more than the factor says.
                Defaults to `None`.
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
        with remade():
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
            "use_bias": self.use_bias,
            "z_loss": self.z_loss,
        }

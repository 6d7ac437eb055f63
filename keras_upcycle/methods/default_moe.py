"""Default MoE: a default vector stands in for every expert that does not run.

With Top-K a router learns from the experts that ran alone. Default MoE (Panda
et al., arXiv 2504.12463) lets it learn from all: each expert has a default
vector, the running mean of what it put out, which takes the expert's place
where a token does not meet it.
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
    SharedOut,
    add_recipe,
)
from keras_upcycle.routing import (
    functional,
    router_gradients,
    training_steps,
)
from keras_upcycle.routing.registry import named
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import Tensor, TokenChoice

PAPER, BACKWARD_ONLY = "paper", "backward_only"
FORWARDS = (PAPER, BACKWARD_ONLY)
NONE, NORMALIZED, RAW = "none", "normalized", "raw"
SCORE_WEIGHTINGS = (NONE, NORMALIZED, RAW)


@named("default_moe")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class DefaultMoERouter(TopKRouter):
    """Top-K with default vectors: the router learns from every expert.

    In training each expert's default vector moves towards the mean of what
    the expert put out in this batch, and the moved vectors `d_i` take the
    places of the experts that a token does not meet, `A` being those that
    process it and `p` the softmax over all experts:

    * `default_forward="paper"`: `y = sum_{i in A} p_i E_i(x) + sum_{i not in
      A} p_i d_i`, at inference too unless `use_default_at_inference=False`.
      Weights are not renormalised, so a model upcycled with it does not start
      as the dense one: at first its output is about `K / E` of the dense
      block's plus a constant. `verify_upcycle` measures how far off that is.
    * `default_forward="backward_only"`: `y = sum_{i in A} w_i E_i(x)`, with
      `w_i = p_i / P` and `P = sum_A p`, and only the router's gradient sees
      the vectors: that of `p_i` is `<dL/dy, f_i - y> / P` for every expert,
      `f_i` being what it put out or, outside `A`, its vector. Through the
      softmax this is equation 8's gradient over `P`. It starts as the dense
      model does, and at inference it is plain Top-K. The paper found passing
      the vectors forward to be the better of the two, when training from
      scratch (figure 10).

    A batch is what one optimizer step sees, as in the paper: where gradients
    are accumulated (`batches_per_step`) a vector moves once for all batches
    of the step, and in each of them the mean is over the batches so far; under
    `tf.distribute` it is over all replicas.

    No gradient flows through the vectors. A token's dropped expert counts as
    one that it does not meet; where none is left, `P` counts as 1 and `y` as
    0 in the gradient. With `noise_stddev`, `p` is that of the noisy logits,
    and with `temperature` that of logits divided by it.

    References: Panda et al., Dense Backpropagation Improves Training for
    Sparse Mixture-of-Experts (arXiv 2504.12463), equations 8 to 11. Upcycling
    is future work there; the renormalised form is ours.

    Args:
        top_k: Integer in `[1, num_experts]`: experts that a token chooses
            (`K`). Defaults to 2.
        default_forward: String, `"backward_only"` (default) or `"paper"`, see
            above.
        decay: Float in `[0, 1)`: how much of a default vector a training step
            keeps. The paper's with `score_weighting="none"`: 0.9 with 8
            experts, 0.65 to 0.999 with 32. Defaults to 0.9.
        score_weighting: String: how an expert's outputs are averaged over its
            tokens: `"none"`, the plain mean (equation 10); `"normalized"`
            (default) with the scores `p_i` as weights, divided by their sum;
            `"raw"`, divided by the number of tokens. The paper's final method
            weights by score and prints no formula.
        use_default_at_inference: Boolean, whether `"paper"` adds the vectors at
            inference as well. Defaults to `True`.
        **kwargs: Keyword arguments of `TopKRouter`, such as `capacity_factor`
            and `load_balance_loss`. `normalize` follows from `default_forward`.
            `softmax` must be `"before_top_k"`.

    Raises:
        TypeError, ValueError: For a setting outside its range.

    Example:
        >>> router = DefaultMoERouter(top_k=2, default_forward="paper")
        >>> layer = MoEFeedForward(8, 32, router=router)
        >>> y = layer(keras.random.normal((2, 5, 16), seed=0), training=True)
        >>> tuple(router.default_vectors.shape)
        (8, 16)
    """

    def __init__(
        self,
        top_k=2,
        *,
        default_forward=BACKWARD_ONLY,
        decay=0.9,
        score_weighting=NORMALIZED,
        use_default_at_inference=True,
        **kwargs,
    ):
        default_forward = checks.check_choice(
            "default_forward", default_forward, FORWARDS
        )
        score_weighting = checks.check_choice(
            "score_weighting", score_weighting, SCORE_WEIGHTINGS
        )
        decay = checks.check_number("decay", decay, at_least=0.0)
        if decay >= 1.0:
            raise ValueError(
                "`decay` must be below 1, or the default vectors never move. "
                f"Received: decay={decay}."
            )
        normalize = default_forward == BACKWARD_ONLY
        given = kwargs.pop("normalize", normalize)
        if checks.check_flag("normalize", given) != normalize:
            raise ValueError(
                f"default_forward={default_forward!r} needs "
                f"`normalize={normalize}`. Received: normalize="
                f"{not normalize}. Leave `normalize` out."
            )
        if kwargs.pop("router_gradient", "top_k") != "top_k":
            raise ValueError(
                "Default MoE has a gradient of its own for experts that a "
                "token does not meet. Received: router_gradient other than "
                "'top_k'. Leave it out, or use a `TopKRouter`."
            )
        if kwargs.get("softmax", "before_top_k") != "before_top_k":
            raise ValueError(
                "Default MoE weights all experts, so `softmax` must be "
                f"'before_top_k'. Received: softmax={kwargs['softmax']!r}. "
                "Leave it out."
            )
        if kwargs.get("expert_groups") is not None:
            raise ValueError(
                "Default MoE adds what experts that a token does not meet put "
                "out, each with its own probability, so `expert_groups` must "
                f"be None. Received: expert_groups={kwargs['expert_groups']!r}."
                " Leave it out, or use a `TopKRouter`."
            )
        super().__init__(top_k, normalize, **kwargs)
        self.default_forward = default_forward
        self.decay = decay
        self.score_weighting = score_weighting
        self.use_default_at_inference = checks.check_flag(
            "use_default_at_inference", use_default_at_inference
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.default_vectors = self.add_weight(
            name="default_vectors",
            shape=(self.num_experts, input_shape[-1]),
            initializer="zeros",
            dtype="float32",
            autocast=False,
            trainable=False,
            # The replicas of `tf.distribute` assign the same.
            aggregation="only_first_replica",
        )
        self.gathered_outputs = training_steps.GatheredOverStep(
            (tuple(self.default_vectors.shape), (self.num_experts,)),
            "gathered_outputs",
        )

    @property
    def learns_from_task(self):
        # From every expert but the one of weight 1.
        return True

    @property
    def is_plain_top_k(self):
        return not self._uses_vectors(training=False)

    def choose(self, logits, mask, training) -> TokenChoice:
        noisy = self.noisy(logits, training)
        chosen = self.choose_by(noisy, logits, mask, training)
        if not self._uses_vectors(training):
            return chosen
        return router_gradients.with_probabilities(chosen, noisy, mask)

    def run(self, tokens, chosen, engine, experts, training):
        if not self._uses_vectors(training):
            return engine(tokens, chosen, experts, training)
        scores = chosen.probabilities  # (G, S, E)
        # (G, S, K, E)
        one_hot = functional.membership(chosen.experts, experts.num_experts)
        met = ops.max(one_hot, axis=2)
        if training and self.trainable:
            sum_weights = self._sum_weights(one_hot, scores)
            outputs, sums = engine(
                tokens, chosen, experts, training, sum_weights
            )
            vectors = self._moved(sums, sum_weights, one_hot)
        else:
            outputs = engine(tokens, chosen, experts, training)
            vectors = ops.convert_to_tensor(self.default_vectors)
        if self.default_forward == PAPER:
            added = ops.matmul(scores * (1.0 - met), vectors)
        else:
            added = router_gradients.of_unmet(
                scores,
                met,
                outputs,
                lambda weights: ops.matmul(weights, vectors),
                normalized=True,
            )
        return outputs + ops.cast(added, outputs.dtype)

    def get_config(self):
        config = super().get_config()
        del config["normalize"], config["router_gradient"]
        return {
            **config,
            "default_forward": self.default_forward,
            "decay": self.decay,
            "score_weighting": self.score_weighting,
            "use_default_at_inference": self.use_default_at_inference,
        }

    def _uses_vectors(self, training: Any) -> bool:
        if self.default_forward == BACKWARD_ONLY:
            return bool(training)
        return bool(training) or self.use_default_at_inference

    def _sum_weights(self, one_hot: Tensor, scores: Tensor) -> Tensor:
        """What an expert's outputs are weighted with, `(G, S, K)`."""
        if self.score_weighting == NONE:
            return ops.max(one_hot, axis=-1)
        return ops.einsum("gske,gse->gsk", one_hot, scores)

    def _moved(
        self, sums: Tensor, sum_weights: Tensor, one_hot: Tensor
    ) -> Tensor:
        """The vectors after this batch, stored where it ends a step."""
        if self.score_weighting == NORMALIZED:
            total = ops.einsum("gske,gsk->e", one_hot, sum_weights)
        else:
            total = ops.sum(one_hot, axis=(0, 1, 2))
        (sums, total), last = self.gathered_outputs.add(
            tuple(map(backend.sum_over_replicas, (sums, total))),
            training_steps.batches_per_step(self.batches_per_step),
        )
        used = total > 0.0
        mean = sums / ops.expand_dims(ops.where(used, total, 1.0), -1)
        old = ops.convert_to_tensor(self.default_vectors)
        new = self.decay * old + (1.0 - self.decay) * mean
        # Of an expert without a token nothing is known, and nothing changes.
        new = ops.where(ops.expand_dims(used, -1), new, old)
        new = ops.stop_gradient(new)
        self.default_vectors.assign(ops.where(last, new, old))
        return new


RECIPE = Recipe(
    name="default_moe",
    paper="Panda et al., Dense Backpropagation, arXiv 2504.12463",
    changes=(
        "the router also learns from the mean outputs of experts that did "
        "not run"
    ),
    costs="a vector for each expert",
    fails=(
        "its gain shrinks with more experts a token; the paper trains from "
        "scratch and leaves upcycling to others"
    ),
    choices={
        ANY: (
            Choice(
                "router",
                (
                    DefaultMoERouter,
                    {
                        "top_k": 2,
                        "capacity_factor": None,
                        "load_balance_loss": SharedOut(0.01),
                    },
                ),
                "the paper: dropless, load-balancing loss 0.01, K of 1 to 4. "
                "It trains with MegaBlocks, whose loss is the mean of the "
                "layers' and divided by K: 0.01 / L of ours for each of L. Its "
                "form for renormalised weights is ours, since the paper does "
                "not upcycle: it starts as the dense model",
            ),
            Choice(
                "layers",
                "all_but_first",
                "the paper: every block but the first, which stays dense",
            ),
            Note(
                "decay",
                0.9,
                "the paper's for 8 experts; with outputs weighted by score, "
                "its final method, it hardly matters (figure 8)",
            ),
            Choice("expert_init", "copy", "ours: the paper does not upcycle"),
            Note(
                "learning rate",
                "9e-4 where plain Top-K had 7e-4",
                "the paper, best of its sweep at 1.96B, from scratch",
            ),
        ),
    },
)
add_recipe(RECIPE)

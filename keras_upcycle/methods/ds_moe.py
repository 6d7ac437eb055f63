"""DS-MoE: trained with all experts, run with few.

Training a mixture sparsely spares time and costs quality for each parameter.
DS-MoE (Pan et al., arXiv 2404.05567) trains densely, with a loss that makes
tokens sure of few experts, and leaves the others out at inference alone. How
many are left is chosen after training.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.conversion.attention_experts import AttentionExperts
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    add_recipe,
)
from keras_upcycle.routing import functional, losses
from keras_upcycle.routing.registry import named
from keras_upcycle.routing.router import Router
from keras_upcycle.types import Tensor, TokenChoice

ALL, TOP_K = "all", "top_k"
THRESHOLD, BATCH_THRESHOLD = "threshold", "batch_threshold"
SELECTIONS = (ALL, TOP_K, THRESHOLD, BATCH_THRESHOLD)


@named("ds_moe")
@keras.saving.register_keras_serializable(package="keras_upcycle")
class DSMoERouter(Router):
    """Every expert in training, few at inference.

    With `S` the softmax over all `N` experts:

    * In training `y = sum_i S_i E_i(x)` over all experts, with full gradients:
      each expert's is `S_i` times that of the output, and the router learns
      from what every expert put out. Nothing is dropped.
    * At inference the sum is over the experts that `selection` keeps, with the
      same weights: what is left out is missing from their sum. The
      mutual-information loss makes it little.

    A training step therefore costs what all experts cost, and so does what
    `estimate_upcycle` says. Experts that are slices of a dense block
    (`FeedForwardSlices`) cost what the block costs. `set_active_experts`
    changes the selection of a trained model; `measure_active_experts` counts
    what is left. Of selections that leave as much, `"top_k"` is the quickest:
    thresholds must have room for all that a token might meet.

    A token meets one expert at least, its likeliest. The paper does not say;
    with its threshold of 0.48 it follows, since the likeliest has a
    probability of `1 / N` or more, and so it does below 1.

    It chooses attention heads too (the paper's MoA, `RoutedHeads`), which the
    recipe does; in the paper too attention runs densely, being slower sparse.

    References: Pan et al., Dense Training, Sparse Inference (arXiv
    2404.05567), equations 1, 3, 4 and 5. The paper trains from scratch.

    Args:
        selection: String: which experts a token meets at inference. `"all"`
            (default): every expert. `"top_k"`: the `top_k` likeliest.
            `"threshold"`: those with `N * S_i > threshold`, how many they may
            be. `"batch_threshold"`: as many for each token as the threshold
            keeps on average in the batch, rounded (halves up), at least one:
            the paper's Threshold-TopK. A prediction then depends on its batch,
            so causal stacks refuse it.
        top_k: Integer in `[1, num_experts]`, for `"top_k"` alone. The paper: 4
            to 6 of 32. Defaults to `None`.
        threshold: Float, at least 0, for the two thresholds alone; 1 is the
            uniform probability. The paper: 0.48 with 3B parameters. Defaults to
            `None`.
        normalize: Boolean, whether at inference a token's weights are rescaled
            to sum to 1. Defaults to `False`, the paper's equation 1.
        mutual_information_loss: Float, at least 0: the weight of the
            mutual-information loss, which is negative. Larger leaves more
            quality at fewer experts. Defaults to 6.3e-4, the paper's for its
            smallest model, of 1B parameters; 4e-4 with 3B, 2e-4 with 6B.
        z_loss: Float, at least 0: the weight of the router z-loss. Defaults to
            0.
        group: String, `"batch"` (default) or `"example"`, or an integer, a
            number of examples. No token competes, so all give the same.
        **kwargs: Keyword arguments of `Router`: `temperature`, by which the
            thresholds' probabilities are sharper or flatter too,
            `kernel_initializer`, the initializer of its kernel, `name`, a
            string, and `trainable`, a boolean; see `Router`.

    Raises:
        TypeError, ValueError: For a setting outside its range, missing for
            the selection, or of another one.

    Example:
        >>> router = DSMoERouter("top_k", top_k=1)
        >>> layer = MoEFeedForward(4, 8, router=router)
        >>> x = keras.ops.ones((2, 5, 16))
        >>> tuple(layer(x, training=True).shape)
        (2, 5, 16)
        >>> tuple(router(x, training=True).experts.shape)
        (2, 5, 4)
        >>> tuple(router(x).experts.shape)
        (2, 5, 1)
    """

    def __init__(
        self,
        selection=ALL,
        *,
        top_k=None,
        threshold=None,
        normalize=False,
        mutual_information_loss=6.3e-4,
        z_loss=0.0,
        group="batch",
        **kwargs,
    ):
        super().__init__(group=group, z_loss=z_loss, **kwargs)
        self.mutual_information_loss = checks.check_number(
            "mutual_information_loss", mutual_information_loss, at_least=0.0
        )
        self.normalize = checks.check_flag("normalize", normalize)
        self.select(selection, top_k=top_k, threshold=threshold)

    def select(
        self,
        selection: str,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> None:
        """Changes which experts run at inference, and nothing else.

        What was compiled before does not see it: see `set_active_experts`.

        Args:
            selection: String, `"all"`, `"top_k"`, `"threshold"` or
                `"batch_threshold"`: which experts a token meets at inference;
                see `DSMoERouter`.
            top_k: Integer in `[1, num_experts]`, for `"top_k"` alone. Defaults
                to `None`.
            threshold: Float, at least 0, for the two thresholds alone. Defaults
                to `None`.

        Raises:
            TypeError, ValueError: As the router. Nothing was changed then.
        """
        selection = checks.check_choice("selection", selection, SELECTIONS)
        for name, value, users in (
            ("top_k", top_k, (TOP_K,)),
            ("threshold", threshold, (THRESHOLD, BATCH_THRESHOLD)),
        ):
            if (value is not None) != (selection in users):
                raise ValueError(
                    f"`{name}` must be given with the selections "
                    f"{list(users)} and no other. Received: selection="
                    f"{selection!r} and {name}={value!r}. "
                    + ("Leave it out." if value is not None else "Pass one.")
                )
        if top_k is not None:
            top_k = checks.check_count("top_k", top_k)
            if self.num_experts is not None:
                _check_top_k(top_k, self.num_experts)
        if threshold is not None:
            threshold = checks.check_number(
                "threshold", threshold, at_least=0.0
            )
        self.selection = selection
        self.top_k = top_k
        self.threshold = threshold

    def check(self, num_experts):
        if self.top_k is not None:
            _check_top_k(self.top_k, num_experts)

    def choose(self, logits, mask, training) -> TokenChoice:
        num_experts = logits.shape[-1]
        if training:
            if self.mutual_information_loss:
                loss = losses.mutual_information(
                    functional.probabilities(logits), mask
                )
                self.penalize("mutual_information", loss)
            # No expert is left out, so the weights sum to 1 as they are.
            return functional.top_k(
                logits, num_experts, normalize=False, mask=mask
            )
        most = self._most(num_experts)
        if self.threshold is None:
            return functional.top_k(
                logits, most, normalize=self.normalize, mask=mask
            )
        ranked = functional.top_k(logits, most, normalize=False, mask=mask)
        above = num_experts * ranked.weights > self.threshold  # no padding is
        if self.selection == THRESHOLD:
            count = ops.sum(ops.cast(above, "int32"), axis=-1, keepdims=True)
            count = ops.maximum(count, 1)
        else:
            count = _mean_count(above, mask)
        kept = ops.arange(most, dtype="int32") < count
        experts = ops.where(kept, ranked.experts, num_experts)
        weights = functional.weights_of_kept(
            ranked.weights, experts < num_experts, self.normalize
        )
        return TokenChoice(
            experts, weights, experts, None, None, partial=most > 1
        )

    def losses_by_name(self):
        known = super().losses_by_name()
        if self.mutual_information_loss:
            known["mutual_information"] = self.mutual_information_loss
        return known

    @property
    def mixes_tokens(self):
        return self.selection == BATCH_THRESHOLD

    def average_experts_per_token(self, num_experts, length=None):
        """All of them: what training costs. At inference it is less."""
        return num_experts

    def meets_all_of_equals(self, num_experts: int) -> bool:
        """Whether at inference too equal logits choose all experts."""
        if self.selection == TOP_K:
            return self.top_k == num_experts
        return self.threshold is None or self.threshold < 1.0

    def get_config(self):
        return {
            **super().get_config(),
            "selection": self.selection,
            "top_k": self.top_k,
            "threshold": self.threshold,
            "normalize": self.normalize,
            "mutual_information_loss": self.mutual_information_loss,
        }

    def _most(self, num_experts: int) -> int:
        """The most experts that a token can meet at inference."""
        if self.selection == TOP_K and self.top_k:
            return self.top_k
        if self.threshold is None or self.threshold <= 1.0:
            return num_experts
        # Fewer than N / threshold probabilities exceed threshold / N; a
        # little more, since they sum to 1 but for rounding.
        return max(1, math.floor(num_experts / self.threshold + 1e-3))


def _check_top_k(top_k: int, num_experts: int) -> None:
    if top_k > num_experts:
        raise ValueError(
            "`top_k` must be between 1 and `num_experts`. Received: "
            f"top_k={top_k}, num_experts={num_experts}. Lower `top_k` or add "
            "experts."
        )


def _mean_count(above: Tensor, mask: Any) -> Tensor:
    """How many experts a real token has above the threshold, on average.

    int32 scalar: rounded, halves up, and at least 1.
    """
    total = ops.sum(ops.cast(above, "int32"))
    real = ops.ones_like(above[..., 0]) if mask is None else mask
    tokens = ops.maximum(ops.sum(ops.cast(real, "int32")), 1)
    return ops.maximum((2 * total + tokens) // (2 * tokens), 1)


RECIPE = Recipe(
    name="ds_moe",
    paper="Pan et al., Dense Training, Sparse Inference, arXiv 2404.05567",
    changes=(
        "experts are slices, attention heads are experts; all train, few run"
    ),
    costs="trains at about the dense cost; no parameters",
    fails=(
        "behind the dense model at 3B (perplexity 15.48 against 14.77): the "
        "gain is speed"
    ),
    choices={
        ANY: (
            Choice(
                "router",
                (DSMoERouter, {"mutual_information_loss": 6.3e-4}),
                "the paper's weight for feed-forward experts of its 1B model, "
                "of a loss a layer, added up as here (ModuleFormer's code); "
                "it predicts with all experts until `set_active_experts`",
            ),
            Choice(
                "expert_init",
                "feed_forward_slices",
                "ours: the paper trains from scratch. Slices with a router of "
                "zeros start as the dense model, at its size",
            ),
            Choice(
                "layers",
                "all",
                "the paper: every layer, the first too",
            ),
            Note(
                "number of experts",
                "32 of width 256, 384 or 512",
                "the paper, of its 1B, 3B and 6B models",
            ),
            Note(
                "active experts",
                "top_k 6 or 4 of 32, or threshold 0.48",
                "the paper, of its 3B and 6B models; chosen after training",
            ),
            Choice(
                "attention",
                AttentionExperts(DSMoERouter(mutual_information_loss=3.5e-4)),
                "the paper's weight for attention experts of its 1B model; one "
                "query head of each key-value head is an expert, and where "
                "heads have their own, each head. At inference all run, as in "
                "the paper's Top-K, or those above a threshold",
            ),
            Note(
                "learning rate",
                "AdamW, 3e-4, cosine, weight decay 0.01, clipped at 1",
                "the paper, from scratch",
            ),
        ),
    },
)
add_recipe(RECIPE)

"""`predict_upcycling`: whether upcycling is worth it, by a published law."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from keras_upcycle import checks, tables

DENSE, UPCYCLED, SCRATCH = "dense", "upcycled", "scratch"
# About what was trained: sizes of the dense model, tokens of either run, and
# the mixture. Elsewhere the law is carried further than it was fitted.
PARAMETERS = (1e8, 1e9)
TOKENS = (1e9, 5e11)
NUM_EXPERTS, TOP_K = 8, 2
# Two experts a token in every block of a Llama, whose feed-forward networks
# are two thirds of it.
FLOPS_RATIO = 5 / 3
# Budgets looked at, in tokens and as a multiple of those spent: far out terms
# that do not depend on tokens would decide, of which the law knows little.
_LEAST, _MOST, _STEPS = 1e8, 100.0, 400


class Law(NamedTuple):
    """Coefficients of `A * D^-a + B * N^-b + E`; see `predict_upcycling`."""

    a: float
    b: float
    tokens: float
    parameters: float


# Liew, Kato and Takase (arXiv 2502.03009), table 2: tokens and parameters of
# the dense model are plain numbers, and E is one for all.
IRREDUCIBLE = 0.165
OF_DENSE = Law(8.83, 12.3, 0.088, 0.116)
OF_SCRATCH = Law(32.0, 7.05, 0.161, 0.080)
OF_UPCYCLED = Law(16.3, 8.53, 0.085, 0.112)
# Of the dense model's tokens, alone and with those that follow.
SPENT, TOGETHER = 0.043, 7.98e-4


@dataclass(frozen=True)
class UpcyclingPrediction:
    """What `predict_upcycling` found. Print it.

    Attributes:
        parameters: Float, of the dense model.
        tokens_spent: Float, that it was trained on.
        tokens_left: Float, that it could be trained on for what is left.
        flops_ratio: Float, operations of the mixture for a token, dense = 1.
        losses: From `"dense"`, `"upcycled"` and `"scratch"` to the predicted
            loss in nats a token.
        tokens: From the same to the tokens that each is trained on from now.
        outside: Tuple of strings, in what the law is carried further than it
            was fitted; empty if in nothing.

    Example:
        >>> print(predict_upcycling(1e9, 7.4e10, 3.7e10).best)
        upcycled
    """

    parameters: float
    tokens_spent: float
    tokens_left: float
    flops_ratio: float
    losses: dict[str, float]
    tokens: dict[str, float]
    outside: tuple[str, ...]

    @property
    def best(self) -> str:
        """Whose predicted loss is least."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def scratch_wins_from(self) -> float | None:
        """Tokens left at which a mixture from scratch first ends lowest.

        To a few percent; `None` if it does not within a hundred times the
        tokens spent.
        """
        most = max(_MOST * self.tokens_spent, _LEAST)
        for left in np.geomspace(_LEAST, most, _STEPS):
            losses, _ = _losses(
                self.parameters, self.tokens_spent, left, self.flops_ratio
            )
            if losses[SCRATCH] < min(losses[DENSE], losses[UPCYCLED]):
                return float(left)
        return None

    def __str__(self) -> str:
        names = {
            DENSE: "dense, trained on",
            UPCYCLED: "upcycled",
            SCRATCH: "a mixture from scratch",
        }
        text = tables.text(
            ("", "tokens", "predicted loss"),
            [
                (
                    name,
                    tables.count(self.tokens[key]),
                    f"{self.losses[key]:.3f}",
                )
                for key, name in names.items()
            ],
        )
        later = self.scratch_wins_from
        when = "at no budget looked at"
        if later is not None:
            when = f"from {tables.count(later)} tokens left on"
        said = (
            f"{tables.count(self.parameters)} parameters, "
            f"{tables.count(self.tokens_spent)} tokens spent, "
            f"{tables.count(self.tokens_left)} left: {names[self.best]} is "
            f"predicted to win. A mixture from scratch wins {when}.\n{text}\n"
            "By the law of Liew et al. (arXiv 2502.03009), fitted on Llamas of "
            "about 0.1B to 1B parameters and mixtures of 8 experts, 2 a token, "
            "in every block. Losses are of their data: compare them with one "
            "another, not with yours."
        )
        return "\n".join(
            [said, *(f"Outside: {each}." for each in self.outside)]
        )


def predict_upcycling(
    parameters: float,
    tokens_spent: float,
    tokens_left: float,
    *,
    flops_ratio: float = FLOPS_RATIO,
    num_experts: int = NUM_EXPERTS,
    top_k: int = TOP_K,
) -> UpcyclingPrediction:
    """Which ends lower: dense on, upcycled, or a mixture from scratch.

    For a dense model of `N` parameters that has seen `D1` tokens, the law
    predicts a loss of `A D^-a + B N^-b + E` for a model trained from scratch on
    `D` tokens, dense or a mixture, and for one upcycled and trained on `D2`
    more (equation 12) of
    `A D1^-a1 D2^(-a2 + a3 log(D1)) + B N^-b + E`:
    the longer the dense model was trained, the less each further token helps
    its mixture, so that with many tokens left a mixture from scratch wins.

    All three are given the same compute: a mixture sees fewer tokens by
    `flops_ratio`. What was spent on the dense model is not counted against the
    mixture from scratch, which could not use it.

    References: Liew, Kato and Takase, Scaling Laws for Upcycling
    Mixture-of-Experts Language Models (arXiv 2502.03009), equation 12 and table
    2. Skywork-MoE (2406.06563) found the same by hand: from scratch where more
    than twice the dense model's cost is left.

    Args:
        parameters: Float above 0, of the dense model (`N`).
        tokens_spent: Float, at least 1, that it was trained on (`D1`).
        tokens_left: Float, at least 1, that the dense model could still be
            trained on for what is left to spend.
        flops_ratio: Float above 0, operations of the mixture for a token,
            those of the dense model being 1, as `estimate_upcycle` has it.
            Defaults to 5/3, of 2 experts in every block of a Llama.
        num_experts: Integer, at least 1, of each block. Defaults to 8, as the
            law was fitted with: another number is said to be outside of it,
            and changes nothing else.
        top_k: Integer, at least 1, experts of a token. Defaults to 2; as
            `num_experts`.

    Returns:
        An `UpcyclingPrediction`.

    Raises:
        TypeError, ValueError: For what is no number in its range.

    Example:
        >>> prediction = predict_upcycling(1e9, 7.4e10, 3.7e10)
        >>> {name: round(loss, 2) for name, loss in prediction.losses.items()}
        {'dense': 2.22, 'upcycled': 2.18, 'scratch': 2.2}
    """
    parameters = checks.check_factor("parameters", parameters)
    spent, left = (
        checks.check_number(name, value, at_least=1.0)
        for name, value in (
            ("tokens_spent", tokens_spent),
            ("tokens_left", tokens_left),
        )
    )
    flops_ratio = checks.check_factor("flops_ratio", flops_ratio)
    num_experts = checks.check_count("num_experts", num_experts)
    top_k = checks.check_count("top_k", top_k)
    losses, tokens = _losses(parameters, spent, left, flops_ratio)
    outside = [
        f"{what} of {tables.count(value)}, where the law was fitted on "
        f"{tables.count(least)} to {tables.count(most)}"
        for what, value, (least, most) in (
            ("parameters", parameters, PARAMETERS),
            ("tokens spent", spent, TOKENS),
            ("tokens left", left, TOKENS),
        )
        if not least <= value <= most
    ]
    outside += [
        f"{what}={value}, where the law was fitted with {fitted}"
        for what, value, fitted in (
            ("num_experts", num_experts, NUM_EXPERTS),
            ("top_k", top_k, TOP_K),
        )
        if value != fitted
    ]
    if losses[UPCYCLED] > _power(OF_DENSE, parameters, spent):
        outside.append(
            "so few tokens left that the law puts the mixture above the dense "
            "model it starts as"
        )
    return UpcyclingPrediction(
        parameters, spent, left, flops_ratio, losses, tokens, tuple(outside)
    )


def _losses(parameters, spent, left, flops_ratio):
    """Predicted losses, and the tokens that each is trained on from now."""
    more = left / flops_ratio
    tokens = {DENSE: left, UPCYCLED: more, SCRATCH: more}
    exponent = -OF_UPCYCLED.tokens + TOGETHER * math.log(spent)
    return {
        DENSE: _power(OF_DENSE, parameters, spent + left),
        UPCYCLED: OF_UPCYCLED.a * spent**-SPENT * more**exponent
        + OF_UPCYCLED.b * parameters**-OF_UPCYCLED.parameters
        + IRREDUCIBLE,
        SCRATCH: _power(OF_SCRATCH, parameters, more),
    }, tokens


def _power(law, parameters, tokens):
    return (
        law.a * tokens**-law.tokens
        + law.b * parameters**-law.parameters
        + IRREDUCIBLE
    )

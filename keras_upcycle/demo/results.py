"""What a comparison is of and what came of it."""

import dataclasses

DENSE = "dense checkpoint"
CONTINUED = "dense continued"
UPCYCLED = "upcycled"


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one stage trains.

    Attributes:
        rounds: Epochs of `fit`.
        steps: Steps of a round.
        batch_size: Examples of a step.
        learning_rate: Adam's, constant after a short warm-up.
        cool_down: Share of the stage at its end in which the rate falls
            linearly to zero.
        step_cost: Cost of a step as a multiple of a dense step's.
        clip_norm: Gradients whose norm, over all weights, is larger are
            scaled down to it; `None` leaves them alone.
    """

    rounds: int
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    cool_down: float = 0.0
    step_cost: float = 1.0
    clip_norm: float | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.rounds * self.steps


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one stage.

    Attributes:
        name: `DENSE`, `CONTINUED` or `UPCYCLED`.
        seed: Of the stage.
        steps: Steps of the stage.
        step_cost: Of its stage.
        batch_size: Of its stage.
        seconds: Spent in training steps; compilation of the first step and
            tests are not in.
        parameters: Of the model.
        active_parameters: Of what an average token meets.
        start: `test_loss` and `test_accuracy` before the first step.
        rounds: For each round a dictionary of `train_loss` (mean over the
            round), `test_loss`, `test_accuracy` and `seconds`. Losses are the
            cross-entropy alone: a router's auxiliary losses are not in.
    """

    name: str
    seed: int
    steps: int
    step_cost: float
    batch_size: int
    seconds: float
    parameters: int
    active_parameters: int
    start: dict[str, float]
    rounds: list[dict[str, float]]

    def final(self, key: str) -> float:
        """A figure of the last round."""
        return self.rounds[-1][key]

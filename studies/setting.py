"""What a study needs to know of what is learned, and by which model."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_upcycle.conversion.estimate_report import UpcycleEstimate
from keras_upcycle.demo import language_model, training
from studies.arms import Arm
from studies.plans import Plan

TEST, VALIDATION = "test", "validation"


class Setting(abc.ABC):
    """Data and a dense model, as a `runs.Study` trains them.

    Attributes:
        plan: What is compared.
        name: Of the data, in words.
        batch_size: Examples of a step.
    """

    plan: Plan
    name: str
    batch_size: int

    @abc.abstractmethod
    def build(self) -> keras.Model:
        """The dense model, with random weights; gives logits."""

    @abc.abstractmethod
    def batches(self, seed: int, start: int) -> Iterator[tuple]:
        """Batches without end: the same for every arm of a seed.

        Args:
            seed: Of the stream.
            start: Place in it, in steps.
        """

    @abc.abstractmethod
    def held_out(self, model: keras.Model, part: str) -> dict[str, float]:
        """`cross_entropy` and `accuracy` on `TEST` or `VALIDATION`."""

    @abc.abstractmethod
    def estimate(self, **options: Any) -> UpcycleEstimate:
        """What `estimate_upcycle` counts for options of `upcycle_model`."""

    @abc.abstractmethod
    def uncounted_flops(self) -> int:
        """Forward operations that the estimate leaves out, for one example."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """In the names of checkpoints: another for other data and sizes."""

    def measured(
        self, model: keras.Model, arm: Arm, seed: int
    ) -> dict[str, Any]:
        """More entries of a row; the model keeps its state."""
        return {}

    def tuned(
        self,
        model: keras.Model,
        seed: int,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> dict[str, Any]:
        """Tunes a model on what comes after: entries of a row.

        Args:
            model: Compiled; may be left in any state.
            seed: Of the order of the examples.
            callbacks: More callbacks of Keras's `fit`.
        """
        raise NotImplementedError(f"Nothing comes after {self.name}.")

    def adam(self, learning_rate: float) -> keras.optimizers.Optimizer:
        """The optimizer of every arm."""
        return language_model.adam(learning_rate)

    def fit(
        self,
        model: keras.Model,
        rate: Any,
        *,
        seed: int,
        start: int,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> training.Outcome:
        """Trains a compiled model, `training.STRETCH` steps at each rate."""
        return training.fit(
            model, self.batches(seed, start), rate, callbacks=callbacks
        )

    def dense_flops(self) -> int:
        """Forward operations of the dense model, for one example."""
        estimate = self.estimate(**self.plan.arm("upcycled", 1.0).options())
        return estimate.dense_flops_per_example + self.uncounted_flops()

    def ratio(self, options: dict[str, Any]) -> float:
        """Operations of a sparse step as a multiple of a dense one's.

        What `estimate_upcycle` counts, and what it leaves out, attention's
        scores above all.

        Args:
            options: Of `upcycle_model`.
        """
        return language_model.operations_ratio(
            self.estimate(**options), self.uncounted_flops()
        )

"""Runs of the language study: checkpoints, and what goes on from them."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_upcycle as ku
from keras_upcycle import comparison, unfinished
from keras_upcycle.demo import language_model, sources, training
from studies import arms, donors
from studies.rows import Rows

STUDY = "language"
COOL_DOWN = 0.3  # share of a run's steps at its end


@dataclasses.dataclass
class _Compiled:
    model: keras.Model
    ratio: float


class Study:
    """Trains arms, each but once, and keeps a row of each.

    Args:
        text: What is learned.
        shape: Sizes of the dense model.
        rows: Where finished runs are.
        folder: For checkpoints.
        batch_size: Windows of a step.
        reporter: A `progress.Reporter`.
    """

    def __init__(
        self,
        text: sources.Text,
        shape: language_model.Shape,
        rows: Rows,
        folder: pathlib.Path,
        batch_size: int,
        reporter: Any,
    ):
        self.text = text
        self.model_shape = shape
        self.rows = rows
        self.folder = folder
        self.batch_size = batch_size
        self.reporter = reporter
        self._compiled: dict[tuple, _Compiled] = {}
        self.time_ratios: dict[tuple, float] = {}

    def run(
        self,
        arm: arms.Arm,
        seeds: Sequence[int],
        budgets: Sequence[float],
        **marks: Any,
    ) -> list[dict[str, Any]]:
        """Trains an arm for all seeds, to every budget.

        The rate holds up to each budget's cool-down, which branches off, so
        that all budgets share one run.

        Args:
            arm: An `Arm`.
            seeds: Of batches, routers and, of a scratch arm, weights; and
                which checkpoint.
            budgets: Extra compute as a share of the checkpoint's.
            **marks: More entries of the rows.

        Returns:
            The rows.
        """
        found = []
        for seed in seeds:
            wanted = [self._row(arm, seed, budget) for budget in budgets]
            missing = [row for row in wanted if self.rows.find(row) is None]
            if missing:
                self._train(arm, seed, missing, marks)
            found += [self.rows.find(row) for row in wanted]
        return found

    def _row(self, arm, seed, budget):
        row = dataclasses.asdict(arm)
        row["arm"] = row.pop("kind")
        row["layers"] = list(arm.layers)
        if arm.kind == arms.DENSE:
            for name in ("experts", "top_k", "layers", "router", "slots"):
                row[name] = None
        return {
            "study": STUDY,
            "text": self.text.name,
            "seed": seed,
            "extra_compute": budget,
            "width": self.model_shape.hidden_dim,
            "blocks": self.model_shape.num_layers,
            "backend": keras.backend.backend(),
            **row,
        }

    def _train(self, arm, seed, rows, marks):
        compiled, start_state = self._prepared(arm, seed)
        model = compiled.model
        scratch = arm.kind == arms.SCRATCH
        first = 0 if scratch else arm.checkpoint + arm.before
        ratio = compiled.ratio
        if arm.equal == arms.TIME:
            ratio = self.time_ratio(arm)
        training.set_state(model, start_state)
        before = training.held_out(model, self.text.test)["cross_entropy"]
        done, seconds = 0, 0.0
        for row in sorted(rows, key=lambda row: row["extra_compute"]):
            budget = row["extra_compute"] * arm.checkpoint - arm.before
            budget /= ratio
            steps = int(budget / training.STRETCH) * training.STRETCH
            fall = round(COOL_DOWN * steps / training.STRETCH)
            fall *= training.STRETCH
            title = (
                f"seed {seed}, {arm.kind} {arm.variant or ''} rate "
                f"{arm.learning_rate:g}, {row['extra_compute']:+.0%}"
            )
            hold = steps - fall - done
            if hold > 0:
                rate = training.rates(
                    arm.learning_rate,
                    hold,
                    warm_up=training.WARM_UP if scratch and not done else 0,
                )
                seconds += self._fit(model, rate, seed, first + done, title)[1]
                done += hold
            state = training.get_state(model)
            rate = training.rates(arm.learning_rate, fall, cool_down=1.0)
            last, more = self._fit(model, rate, seed, first + done, title)
            tested = training.held_out(model, self.text.test)
            active = {}
            if arm.router == "ds_moe":
                active = {"active": self._with_fewer(model, arm)}
            validation = training.held_out(model, self.text.validation)
            self.rows.add(
                {
                    **row,
                    **marks,
                    **active,
                    "held_out": tested["cross_entropy"],
                    "accuracy": tested["accuracy"],
                    "validation": validation["cross_entropy"],
                    "train": last,
                    "checkpoint_held_out": before,
                    "steps": steps,
                    "seconds": seconds + more,
                    "flops": self.dense_step
                    * (compiled.ratio * steps + arm.before),
                    "ratio": ratio,
                    "parameters": model.count_params(),
                }
            )
            self.reporter.line(f"{title}: {tested['cross_entropy']:.4f}")
            training.set_state(model, state)

    def _fit(self, model, rate, seed, start, title):
        outcome = training.train(
            model,
            self.text.train,
            rate,
            seed=seed,
            start=start,
            batch_size=self.batch_size,
            callbacks=[self.reporter.callback(title)],
        )
        return outcome.train, outcome.seconds

    def _with_fewer(self, model, arm):
        """Held-out loss by how many of DS-MoE's experts run."""
        found = {}
        for count in (arm.experts // 4, arm.experts // 2):
            ku.set_active_experts(model, top_k=count)
            tested = training.held_out(model, self.text.test)
            found[count] = tested["cross_entropy"]
        ku.set_active_experts(model)
        return found

    # Models.

    def prepared(
        self, arm: arms.Arm, seed: int
    ) -> tuple[keras.Model, list[list[np.ndarray]]]:
        """A compiled model, and the state in which the arm starts."""
        compiled, state = self._prepared(arm, seed)
        return compiled.model, state

    def _prepared(self, arm, seed):
        if arm.kind == arms.DENSE:
            state = self.checkpoint(arm, seed)
            return self._dense(), state
        keras.utils.set_random_seed(seed)
        if arm.kind == arms.SCRATCH:
            moe = ku.mixture_from_scratch(
                language_model.build(self.model_shape),
                seed=seed,
                **arm.options(),
            )
            optimizer = language_model.adam(arm.learning_rate)
        else:
            dense = self._dense().model
            training.set_state(dense, self.checkpoint(arm, seed))
            make = donors.MAKERS.get(arm.expert_init, _from_checkpoint)
            moe = make(self, arm, seed, dense)
            optimizer = _optimizer(arm, dense, moe)
        optimizer.build(moe.trainable_variables)
        state = training.state_of(moe, optimizer)

        def make():
            training.compile_for(moe, optimizer)
            return moe, self.ratio(arm)

        return self._of_shape(arm.shape(), make), state

    def _dense(self):
        def make():
            model = language_model.build(self.model_shape)
            training.compile_for(model, language_model.adam(1e-3))
            return model, 1.0

        return self._of_shape((arms.DENSE,), make)

    def _of_shape(self, key, make):
        if key not in self._compiled:
            model, ratio = make()
            self._compiled[key] = _Compiled(model, ratio)
        return self._compiled[key]

    @functools.cached_property
    def dense_step(self) -> int:
        """Operations of a dense training step, its backward pass included."""
        estimate = self._estimate(arms.Arm(arms.UPCYCLED))
        forward = estimate.dense_flops_per_example
        forward += self.model_shape.attention_flops()
        return 3 * self.batch_size * forward

    def ratio(self, arm: arms.Arm) -> float:
        """Operations of a sparse step as a multiple of a dense one's.

        What `estimate_upcycle` counts, and attention's scores, which it leaves
        out.
        """
        return self.model_shape.operations_ratio(self._estimate(arm))

    def _estimate(self, arm):
        return ku.estimate_upcycle(
            lambda: language_model.build(self.model_shape),
            sequence_length=self.model_shape.length,
            **arm.options(),
        )

    def time_ratio(self, arm: arms.Arm) -> float:
        """Time of a sparse step as a multiple of a dense one's, measured.

        The two take turns; the median over rounds of one's time against the
        other's.
        """
        if arm.shape() not in self.time_ratios:
            dense, _ = self._prepared(arms.Arm(arms.DENSE), 0)
            sparse, _ = self._prepared(arm, 0)
            rate = np.zeros(5)
            times = []
            for _ in range(9):
                both = [
                    self._fit(each.model, rate, 0, 0, "step times")[1]
                    for each in (dense, sparse)
                ]
                times.append(both[1] / both[0])
            self.time_ratios[arm.shape()] = float(np.median(times[1:]))
        return self.time_ratios[arm.shape()]

    # Checkpoints.

    def checkpoint(self, arm: arms.Arm, seed: int) -> list[list[np.ndarray]]:
        """Weights and optimizer of a dense run, trained if it is missing."""
        shape = self.model_shape
        path = self.folder / (
            f"dense-{zlib.crc32(self.text.train.tobytes()):x}-"
            f"{shape.hidden_dim}x{shape.num_layers}-"
            f"{arm.checkpoint_rate:g}-{arm.checkpoint}-{seed}.npz"
        )
        model = self._dense().model
        if not path.exists():
            keras.utils.set_random_seed(seed)
            fresh = language_model.build(shape)
            model.set_weights(fresh.get_weights())
            comparison.restart_optimizer(model)
            self._fit(
                model,
                training.rates(
                    arm.checkpoint_rate,
                    arm.checkpoint,
                    warm_up=training.WARM_UP,
                ),
                seed,
                0,
                f"seed {seed}, dense checkpoint",
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            state = training.get_state(model)
            unfinished.replace(path, lambda draft: _write(draft, state))
            loss = training.held_out(model, self.text.test)["cross_entropy"]
            self.reporter.line(
                f"seed {seed}, dense checkpoint, rate {arm.checkpoint_rate:g}, "
                f"{arm.checkpoint} steps: {loss:.4f}"
            )
        with np.load(path) as kept:
            return [
                [kept[f"{part}{i}"] for i in range(len(variables))]
                for part, variables in (
                    ("w", model.weights),
                    ("o", model.optimizer.variables),
                )
            ]


def _optimizer(arm, dense, moe):
    if arm.slots == "fresh":
        return language_model.adam(arm.learning_rate)
    return ku.upcycle_optimizer(
        dense.optimizer,
        dense,
        moe,
        slots="new" if arm.slots == "new" else "carry",
        rescale_moments=arm.slots == "rescaled",
    )


def _from_checkpoint(study, arm, seed, dense):
    """The mixture of the checkpoint alone."""
    return ku.upcycle_model(dense, seed=seed, **arm.options())


def _write(path, state):
    with open(path, "wb") as file:
        np.savez(
            file,
            **{
                f"{part}{index}": value
                for part, values in zip("wo", state, strict=True)
                for index, value in enumerate(values)
            },
        )

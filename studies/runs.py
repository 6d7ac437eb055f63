"""Runs of a study: checkpoints, what goes on from them, what comes after."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_upcycle as ku
from keras_upcycle import atomic_files
from keras_upcycle.demo import comparison, training
from studies import arms, donors
from studies.rows import Rows, key_of
from studies.setting import TEST, VALIDATION, Setting

COOL_DOWN = 0.3  # share of a run's steps at its end
OF_MIXTURES = ("experts", "top_k", "layers", "router", "slots")


@dataclasses.dataclass
class _Compiled:
    model: keras.Model
    ratio: float


class Study:
    """Trains arms, each but once, and keeps a row of each.

    Args:
        setting: What is learned, and by which dense model.
        rows: Where finished runs are.
        folder: For checkpoints.
        reporter: A `progress.Reporter`.
    """

    def __init__(
        self,
        setting: Setting,
        rows: Rows,
        folder: pathlib.Path,
        reporter: Any,
    ):
        self.setting = setting
        self.plan = setting.plan
        self.rows = rows
        self.folder = folder
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
                for row, model in self._train(arm, seed, missing):
                    if self.plan.tuned_on and not arm.variant:
                        self._keep(self._weights(row), model)
                    self.rows.add({**row, **marks})
            found += [self.rows.find(row) for row in wanted]
        return found

    def tune(self, arm: arms.Arm, seeds: Sequence[int], budget: float) -> None:
        """Tunes what an arm came to on what comes after.

        Args:
            arm: An `Arm`.
            seeds: Of the arm's runs, and of the tuning.
            budget: To which it was trained; 0 for the checkpoint itself.
        """
        for seed in seeds:
            row = self._row(arm, seed, budget)
            row["study"] = self.plan.tuned_on
            if self.rows.find(row) is not None:
                continue
            model = self._trained(arm, seed, budget)
            title = f"{self.plan.tuned_on}, seed {seed}, {row['arm']}"
            callback = self.reporter.callback(title)
            found = self.setting.tuned(model, seed, [callback])
            self.rows.add({**row, **found})
            self.reporter.line(f"{title}: {found['accuracy']:.2%}")

    def _trained(self, arm, seed, budget):
        """The model of a finished run, from its file if it is there."""
        row = self._row(arm, seed, budget)
        compiled, state = self._prepared(arm, seed)
        model = compiled.model
        training.set_state(model, state)
        path = self._weights(row)
        if path.exists():
            with np.load(path) as kept:
                model.set_weights([kept[f"w{i}"] for i in range(len(kept))])
        elif budget:
            for _ in self._train(arm, seed, [row]):
                break
        return model

    def _keep(self, path, model):
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = [training.get_state(model)[0]]
        atomic_files.replace(path, lambda draft: _write(draft, weights))

    def _weights(self, row):
        digest = zlib.crc32(key_of(row).encode())
        return self.folder / "arms" / f"{digest:x}.npz"

    def _row(self, arm, seed, budget):
        row = dataclasses.asdict(arm)
        row["arm"] = row.pop("kind")
        if not isinstance(arm.layers, str):
            row["layers"] = list(arm.layers)
        if arm.kind == arms.DENSE:
            row.update(dict.fromkeys(OF_MIXTURES))
        return {
            "study": self.plan.study,
            "text": self.setting.name,
            "seed": seed,
            "extra_compute": budget,
            "width": self.plan.width,
            "blocks": self.plan.blocks,
            "backend": keras.backend.backend(),
            **row,
        }

    def _train(self, arm, seed, rows):
        """Trains to each budget of `rows`; yields the whole row, the model."""
        compiled, start_state = self._prepared(arm, seed)
        model = compiled.model
        scratch = arm.kind == arms.SCRATCH
        first = 0 if scratch else arm.checkpoint + arm.before
        ratio = compiled.ratio
        if arm.equal == arms.TIME:
            ratio = self.time_ratio(arm)
        training.set_state(model, start_state)
        before = self.setting.held_out(model, TEST)["cross_entropy"]
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
            tested = self.setting.held_out(model, TEST)
            validation = self.setting.held_out(model, VALIDATION)
            self.reporter.line(f"{title}: {tested['cross_entropy']:.4f}")
            yield (
                {
                    **row,
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
                    **self.setting.measured(model, arm, seed),
                },
                model,
            )
            training.set_state(model, state)

    def _fit(self, model, rate, seed, start, title):
        outcome = self.setting.fit(
            model,
            rate,
            seed=seed,
            start=start,
            callbacks=[self.reporter.callback(title)],
        )
        return outcome.train, outcome.seconds

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
                self.setting.build(), seed=seed, **arm.options()
            )
            optimizer = self.setting.adam(arm.learning_rate)
        else:
            dense = self._dense().model
            training.set_state(dense, self.checkpoint(arm, seed))
            make = donors.MAKERS.get(arm.expert_init, _from_checkpoint)
            moe = make(self.setting, arm, seed, dense)
            optimizer = self._optimizer(arm, dense, moe)
        optimizer.build(moe.trainable_variables)
        state = training.state_of(moe, optimizer)

        def make():
            training.compile_for(moe, optimizer)
            return moe, self.setting.ratio(arm.options())

        return self._of_shape(arm.shape(), make), state

    def _optimizer(self, arm, dense, moe):
        if arm.slots == "fresh":
            return self.setting.adam(arm.learning_rate)
        return ku.upcycle_optimizer(
            dense.optimizer,
            dense,
            moe,
            slots="new" if arm.slots == "new" else "carry",
            rescale_moments=arm.slots == "rescaled",
        )

    def _dense(self):
        def make():
            model = self.setting.build()
            training.compile_for(model, self.setting.adam(1e-3))
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
        forward = self.setting.dense_flops()
        return 3 * self.setting.batch_size * forward

    def time_ratio(self, arm: arms.Arm) -> float:
        """Time of a sparse step as a multiple of a dense one's, measured.

        The two take turns; the median over rounds of one's time against the
        other's.
        """
        if arm.shape() not in self.time_ratios:
            dense = self._dense()
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
        path = self.folder / (
            f"dense-{self.setting.fingerprint()}-"
            f"{arm.checkpoint_rate:g}-{arm.checkpoint}-{seed}.npz"
        )
        model = self._dense().model
        if not path.exists():
            keras.utils.set_random_seed(seed)
            fresh = self.setting.build()
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
            atomic_files.replace(path, lambda draft: _write(draft, state))
            loss = self.setting.held_out(model, TEST)["cross_entropy"]
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


def _from_checkpoint(setting, arm, seed, dense):
    """The mixture of the checkpoint alone."""
    return ku.upcycle_model(dense, seed=seed, **arm.options())


def _write(path, state):
    """Weights, and the optimizer's variables where there are any."""
    with open(path, "wb") as file:
        np.savez(
            file,
            **{
                f"{part}{index}": value
                for part, values in zip("wo", state, strict=False)
                for index, value in enumerate(values)
            },
        )

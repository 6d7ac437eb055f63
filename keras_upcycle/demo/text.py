"""The demo: a trained language model goes on, dense and upcycled.

The dense checkpoint lies in the package: the cost that is sunk. It has learned
the sources of Python's standard library, which every machine has.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_upcycle import atomic_files, tables
from keras_upcycle.conversion.estimate import estimate_upcycle
from keras_upcycle.conversion.upcycle import upcycle_model
from keras_upcycle.conversion.upcycle_optimizer import upcycle_optimizer
from keras_upcycle.conversion.verify import verify_upcycle
from keras_upcycle.demo import (
    language_model,
    needed,
    saved,
    sources,
    summary,
    training,
)
from keras_upcycle.demo.results import CONTINUED, DENSE, UPCYCLED, Result
from keras_upcycle.demo.store import read_json, write_results

HERE = pathlib.Path(__file__).parent
CHECKPOINT, RECORD = HERE / "dense.keras", HERE / "dense.json"
ABOUT = """\
A small dense language model, trained for {steps:,} steps on bytes of Python's \
own sources, gets a quarter more compute: once as it is, once upcycled."""
BATCH_SIZE = 64
COOL_DOWN = 0.3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is trained.

    Attributes:
        seeds: Continuations, each with data order and routers of its own.
        steps: Of the dense continuation; the sparse one gets as many as cost
            the same.
        worth: The dense model also goes on for so many times `steps`, once, to
            tell how many dense steps the gain is worth.
        experts: Of the block that becomes an MoE layer.
        dense_rate: Learning rate of the dense continuation, and
        sparse_rate: of the sparse one: each the best of its own grid in
            `python -m studies headline`.
        points: Tests of a continuation.
    """

    seeds: int = 3
    steps: int = 750
    worth: int = 4
    experts: int = 16
    dense_rate: float = 3e-3
    sparse_rate: float = 6e-3
    points: int = 5


QUICK = Settings(seeds=1, steps=60, worth=2, points=2)


def run(output: pathlib.Path, settings: Settings) -> None:
    """Upcycles, trains on, compares, and writes everything to a folder.

    Args:
        output: Folder for `results.json`, `curves.png` and `upcycled.keras`.
        settings: A `Settings`.

    Raises:
        ImportError: If a package that only the demo needs is missing.
        FileNotFoundError: If this Python came without its sources.
    """
    needed.check(needed.ALWAYS)
    from keras_upcycle.demo import plots
    from keras_upcycle.training import progress

    output.mkdir(parents=True, exist_ok=True)
    text = sources.standard_library()
    with progress.Reporter() as reporter:
        demo = _Demo(settings, text, reporter)
        for seed in range(settings.seeds):
            demo.run_seed(seed)
        worth = demo.worth()
        verdict = summary.verdict(demo.results)
        same = saved.and_loaded(
            demo.sparse, output / "upcycled.keras", demo.some_ids()
        )
        write_results(
            output / "results.json",
            demo.results,
            text=text.name,
            settings=dataclasses.asdict(settings),
            estimate=demo.estimate,
            report=dataclasses.asdict(demo.report),
            long_dense=demo.long_dense,
            verdict=verdict,
            worth=worth,
        )
        plots.curves(
            [*demo.results, demo.long_dense],
            1000 * BATCH_SIZE,
            output / "curves.png",
            "A small language model on Python's sources trains on, dense or "
            f"upcycled to {settings.experts} experts",
            unit="thousand steps of the dense model",
        )
        table = tables.markdown(summary.HEADER, summary.rows(demo.results))
        reporter.line(
            f"\n{table}\n\n{verdict}\n\n{worth}\n\n{same}\n"
            f"Written to {output}: curves.png, results.json, upcycled.keras."
        )


def dense_checkpoint() -> keras.Model:
    """The dense model of the package, compiled, with its optimizer's state."""
    model = keras.models.load_model(CHECKPOINT)
    training.compile_for(model, model.optimizer)
    return model


def make_checkpoint(
    steps: int,
    learning_rate: float,
    seed: int,
    folder: pathlib.Path,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Trains the package's dense checkpoint anew.

    Args:
        steps: A multiple of ten times `training.STRETCH`.
        learning_rate: Constant after a rise; it has no cool-down, so that it
            can go on.
        seed: Of weights and batches.
        folder: Where `dense.keras` and its record, `dense.json`, are written.
        callbacks: Of `fit`.
    """
    text = sources.standard_library()
    keras.utils.set_random_seed(seed)
    model = language_model.build(language_model.Shape())
    training.compile_for(model, language_model.adam(learning_rate))
    rate = training.rates(learning_rate, steps, warm_up=training.WARM_UP)
    result = train_in_rounds(
        model,
        text,
        np.split(rate, 10),
        name=DENSE,
        seed=seed,
        start=0,
        callbacks=callbacks,
    )
    training.compile_for(model, model.optimizer, at_once=1)
    atomic_files.replace(folder / CHECKPOINT.name, model.save)
    write_results(
        folder / RECORD.name,
        [result],
        text=text.name,
        learning_rate=learning_rate,
    )


def train_in_rounds(
    model: keras.Model,
    text: sources.Text,
    rounds: Sequence[np.ndarray],
    *,
    name: str,
    seed: int,
    start: int,
    step_cost: float = 1.0,
    active_parameters: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Result:
    """Trains a model that `training.compile_for` compiled, with tests between.

    Args:
        model: Goes on from where it is.
        text: A `sources.Text`.
        rounds: Learning rates, a part of them for each round.
        name: Of the result.
        seed: Of the batches.
        start: Steps that were made before.
        step_cost: Of a step, as a multiple of a dense one's.
        active_parameters: Of the result.
        callbacks: Of `fit`.
    """
    before = training.held_out(model, text.test)
    records: list[Any] = []
    losses: list[float] = []
    done = start
    for rate in rounds:
        outcome = training.train(
            model,
            text.train,
            rate,
            seed=seed,
            start=done,
            batch_size=BATCH_SIZE,
            callbacks=callbacks,
        )
        done += len(rate) * training.STRETCH
        tested = training.held_out(model, text.test)
        losses += outcome.losses
        records.append(
            {
                "train_loss": float(np.mean(outcome.losses)),
                "test_loss": tested["cross_entropy"],
                "test_accuracy": tested["accuracy"],
                "seconds": outcome.seconds,
            }
        )
    parameters = model.count_params()
    return Result(
        name=name,
        seed=seed,
        steps=done - start,
        step_cost=step_cost,
        batch_size=BATCH_SIZE,
        seconds=sum(record["seconds"] for record in records),
        parameters=parameters,
        active_parameters=active_parameters or parameters,
        start={
            "test_loss": before["cross_entropy"],
            "test_accuracy": before["accuracy"],
        },
        rounds=records,
    )


class _Demo:
    """Two models, each compiled once and used for every seed."""

    def __init__(self, settings, text, reporter):
        self.settings = settings
        self.text = text
        self.reporter = reporter
        record = read_json(RECORD)
        dense = Result(**record["results"][0])
        self.results = [dense]
        self.start = dense.steps
        reporter.line(
            f"{ABOUT.format(steps=dense.steps)}\n"
            f"Backend: {keras.backend.backend()}. Text: {text.name}, "
            f"{text.files} files; {len(text.test):,} bytes of "
            "other files are held out.\n"
        )
        self.dense = dense_checkpoint()
        self.dense_state = training.get_state(self.dense)
        shape = language_model.Shape()
        self.estimate = estimate_upcycle(
            self.dense, settings.experts, sequence_length=shape.length
        )
        self.ratio = language_model.operations_ratio(
            self.estimate, shape.attention_flops()
        )
        reporter.line(
            f"{self.estimate}\n\nWith attention's scores, which depend on the "
            f"length, a sparse step takes {self.ratio:.3f} times the "
            "operations of a dense one.\n"
        )
        self.sparse, optimizer = self.upcycled(seed=0)
        training.compile_for(self.sparse, optimizer)
        self.report = verify_upcycle(self.dense, self.sparse, self.some_ids())
        reporter.line(f"Before any sparse training. {self.report}\n")

    def some_ids(self):
        """Held-out text, 64 examples."""
        ids = self.text.test[: 64 * language_model.Shape.length]
        return ids.astype("int32").reshape(64, -1)

    def upcycled(self, seed):
        """The mixture, and an optimizer that remembers."""
        training.set_state(self.dense, self.dense_state)
        moe = upcycle_model(self.dense, self.settings.experts, seed=seed)
        optimizer = upcycle_optimizer(self.dense.optimizer, self.dense, moe)
        return moe, optimizer

    def run_seed(self, seed):
        moe, optimizer = self.upcycled(seed)
        state = training.state_of(moe, optimizer)
        steps = self.settings.steps
        self.results += [
            self.stage(self.dense, self.dense_state, CONTINUED, steps, seed),
            self.stage(
                self.sparse, state, UPCYCLED, int(steps / self.ratio), seed
            ),
        ]

    def stage(self, model, state, name, steps, seed):
        training.set_state(model, state)
        sparse = name == UPCYCLED
        steps -= steps % training.STRETCH
        settings = self.settings
        rate = training.rates(
            settings.sparse_rate if sparse else settings.dense_rate,
            steps,
            cool_down=COOL_DOWN,
        )
        title = f"seed {seed}, {name}"
        result = train_in_rounds(
            model,
            self.text,
            np.array_split(rate, settings.points),
            name=name,
            seed=seed,
            start=self.start,
            step_cost=self.ratio if sparse else 1.0,
            active_parameters=self.estimate.active_params if sparse else None,
            callbacks=[self.reporter.curve(title)],
        )
        self.reporter.line(
            f"{title}: held-out loss {result.final('test_loss'):.4f} nats a "
            f"byte, next byte right {result.final('test_accuracy'):.2%}, "
            f"{result.steps} steps, {result.seconds:.0f} s"
        )
        return result

    def worth(self):
        """How many dense steps the gain of seed 0 is worth, in words."""
        settings = self.settings
        steps = settings.steps * settings.worth
        self.long_dense = self.stage(
            self.dense, self.dense_state, LONG, steps, 0
        )
        own = [r for r in self.results if r.seed == 0 and r.name != DENSE]
        short, sparse = (r.final("test_loss") for r in own)
        return worth(
            sparse,
            (own[0].steps, short),
            (self.long_dense.steps, self.long_dense.final("test_loss")),
        )


LONG = "dense, much longer"


def worth(
    loss: float, short: tuple[int, float], long: tuple[int, float]
) -> str:
    """How long the dense model must train to a loss, in words.

    Between two runs the loss is taken to fall with the logarithm of the steps.

    Args:
        loss: That the sparse model came to with the compute of `short`.
        short: Steps and loss of the dense model.
        long: The same of its longer run.

    Example:
        >>> worth(1.5, (100, 2.0), (400, 1.0))[:46]
        'Worth: the dense model needs about 200 steps f'
    """
    (steps, first), (more, last) = short, long
    about = f"With {more} steps (seed 0) it comes to {last:.4f}."
    if loss >= first:
        return f"Worth: nothing here; {steps} dense steps gave as much. {about}"
    if loss < last:
        return (
            f"Worth: the dense model needs more than {more} steps for what "
            f"upcycling gave with the compute of {steps} ({loss:.4f}). {about}"
        )
    needed = summary.compute_for(loss, short, long)
    return (
        f"Worth: the dense model needs about {needed:.0f} steps for what "
        f"upcycling gave with the compute of {steps} ({loss:.4f}), "
        f"so {1 - steps / needed:.0%} of that is saved. {about}"
    )

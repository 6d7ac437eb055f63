"""What the examples share: a dense checkpoint, two continuations, figures.

Stages that are finished are read back from the output folder; an unfinished
one starts at its last whole round.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import keras

import keras_upcycle as ku
from keras_upcycle import tables
from keras_upcycle.demo import comparison, plots, summary
from keras_upcycle.demo.batches import Data
from keras_upcycle.demo.results import CONTINUED, DENSE, UPCYCLED, Stage
from keras_upcycle.demo.store import Store, read_json, write_json, write_results
from keras_upcycle.training import progress

SETTINGS = "settings.json"
FREE = ("output", "data_dir", "seeds")  # may differ when a run goes on


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The models at the end, of the last seed, and what was measured of all.

    Attributes:
        continued: The dense model after it trained on.
        upcycled: The mixture.
        measures: What `measure` returned of every stage, in their order: of
            `"dense"`, `"continued-0"`, `"upcycled-0"`, `"continued-1"`, ...
    """

    continued: keras.Model
    upcycled: keras.Model
    measures: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(
    args: argparse.Namespace,
    output: pathlib.Path,
    task: keras.Model,
    data: Data,
    reporter: progress.Reporter,
    *,
    title: str,
    estimate: Any,
    options: dict[str, Any] | None = None,
    clip_norm: float | None = None,
    accuracy: Callable[[], keras.metrics.Metric] | None = None,
    measure: Callable[[str, keras.Model], Any] | None = None,
) -> Outcome:
    """Trains, upcycles, continues twice, and writes everything to a folder.

    Args:
        args: Options of the command line: `epochs` of the dense checkpoint
            and `more_epochs` of the upcycled model, `batch_size`,
            `learning_rate`, `seeds` and `experts`.
        output: Folder for `results.json`, `curves.png`, `dense.keras`,
            `upcycled.keras` and `stages/`.
        task: A dense model that returns logits; ends as the checkpoint.
        data: A `Data`.
        reporter: Where lines and bars go.
        title: Of the figure.
        estimate: What a sparse step costs, of `ku.estimate_upcycle`.
        options: More arguments of `ku.upcycle_model`.
        clip_norm: See `Stage`.
        accuracy: Makes the metric of `comparison.trainer`, one for a stage.
        measure: Function `(key, model)` of every stage's model at its end, to
            what JSON holds; a run that goes on asks again.
    """
    begin(args, output)
    store = Store(output / "stages")
    reporter.line(f"{keras.backend.backend()}. {estimate}\n")
    first = Stage(
        rounds=args.epochs,
        steps=max(len(data.train[0]) // args.batch_size, 1),
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        clip_norm=clip_norm,
    )
    more, sparse = comparison.continued_stages(
        first,
        args.more_epochs,
        estimate.flops_ratio,
    )
    measures = {}

    def run_stage(key, model, stage, name, seed, active=None):
        result = store.load(key, model)
        if result is None:
            result = comparison.train(
                comparison.trainer(model, stage, accuracy and accuracy()),
                data,
                stage,
                name=name,
                seed=seed,
                active_parameters=active,
                callbacks=[reporter.callback(key)],
                backup=store.backup(key),
            )
            store.save(key, model, result)
        reporter.line(
            f"{key}: test accuracy {result.final('test_accuracy'):.2%}, test "
            f"loss {result.final('test_loss'):.3f}, {result.seconds:.0f} s"
        )
        if measure:
            measures[key] = measure(key, model)
        return result

    results = [run_stage("dense", task, first, DENSE, 0)]
    report = None
    for seed in range(args.seeds):
        # Both start from the dense checkpoint; a model of their own each.
        moe = ku.upcycle_model(task, args.experts, seed=seed, **(options or {}))
        if report is None:
            report = ku.verify_upcycle(task, moe, data.test_inputs(64))
            reporter.line(f"\nStep 0, before any training. {report}\n")
        dense = type(task).from_config(task.get_config())
        dense.preprocessor = task.preprocessor  # no config holds a vocabulary
        dense.set_weights(task.get_weights())
        results += [
            run_stage(f"continued-{seed}", dense, more, CONTINUED, seed),
            run_stage(
                f"upcycled-{seed}",
                moe,
                sparse,
                UPCYCLED,
                seed,
                estimate.active_params,
            ),
        ]
    dense.save(output / "dense.keras")
    moe.save(output / "upcycled.keras")
    verdict = summary.verdict(results)
    write_results(
        output / "results.json",
        results,
        settings=vars(args),
        estimate=estimate,
        report=report,
        verdict=verdict,
        **({"measures": measures} if measure else {}),
    )
    plots.curves(results, len(data.train[0]), output / "curves.png", title)
    table = tables.markdown(summary.HEADER, summary.rows(results))
    reporter.line(f"\n{table}\n\n{verdict}\n\nWritten to {output}.")
    return Outcome(continued=dense, upcycled=moe, measures=measures)


def open_output(args: argparse.Namespace) -> pathlib.Path:
    """The output folder, which holds one run with one set of settings."""
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = _settings(args)
    kept = settings
    if has_begun(output):
        kept = read_json(output / SETTINGS)
    if kept != settings:
        changed = {k: v for k, v in kept.items() if settings.get(k) != v}
        raise ValueError(
            f"`--output` must be a new folder, or one of a run with the same "
            f"settings. Received: {output}, of a run with {changed}."
        )
    return output


def has_begun(output: pathlib.Path) -> bool:
    """Whether the folder holds a run: what it has made must be kept."""
    return (output / SETTINGS).exists()


def begin(args: argparse.Namespace, output: pathlib.Path) -> None:
    """Keeps the settings. After all checks: a wrong command keeps nothing."""
    write_json(output / SETTINGS, _settings(args))


def _settings(args):
    return {k: v for k, v in vars(args).items() if k not in FREE}

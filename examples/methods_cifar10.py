"""Every upcycling method from one dense ViT on CIFAR-10, at equal compute.

What it shows
    A small dense KerasHub ViT is trained once. From it each method makes a
    sparse model, which trains on with the same number of floating-point
    operations as the dense model does, over several seeds of batches and of
    what a method draws. One table, with what `verify_upcycle` says of the
    start, and one picture. It is a comparison at small scale: a few million
    images say nothing about a few hundred billion tokens, where the papers
    report their gains.

    Branch-Train-MiX and UpIT are not in it: they spend their compute on models
    tuned before the mixture is made. `examples/upit_t5.py` has UpIT.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/methods_cifar10.py --output runs/methods

    The data are read by `tfds.load("cifar10", data_dir=...)`, which downloads
    them unless `--data-dir` holds them. `--epochs 1 --more-steps 100 --seeds
    1 --limit 3000` tries everything in minutes. A run that was interrupted
    goes on from its last finished training. `--only` trains some methods, in
    a second process beside the first if you like; a last run without it
    gathers what is there.

Writes
    `results.json`, `methods.png`, and what they are made of in `stages/`.

Expected result
    With `--more-steps 1000` (`examples/figures/methods.json`): test loss
    1.047 for the dense model trained on, 1.047 to 1.049 for the methods that
    start as it does or close to it, 1.053 to 1.061 for the others. Nothing is
    gained at this size; `guides/methods.md` has the table.

Hardware and time
    Two CPU cores: an hour and a half with `--more-steps 1000`, most of it 36
    trainings of a minute or more; twice that by default.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np
import two_continuations
import vit_cifar10

from keras_upcycle import tables
from keras_upcycle.demo import comparison
from keras_upcycle.demo.batches import Data
from keras_upcycle.demo.results import Stage
from keras_upcycle.demo.store import Store, read_json, write_json
from keras_upcycle.training import progress

DENSE = "dense, trained on"
FIGURES = ("steps", "seconds", "start", "rounds")  # of a training
ROUND = 100  # steps between two tests


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to make a dense model sparse.

    Attributes:
        name: In the table.
        arguments: Function that makes the arguments of `upcycle_model`.
        parts: Experts in place of one, for those that are cut from it.
    """

    name: str
    arguments: Callable[[], dict]
    parts: int = 1


def top_k(count=2, **settings):
    """Dropless Top-K, so that methods differ in nothing else."""
    return ku.TopKRouter(count, capacity_factor=None, **settings)


def _with(init, **router):
    return lambda: {"expert_init": init, "router": top_k(**router)}


def default_moe(forward):
    """Copies, and default vectors for what does not run."""
    return lambda: {
        "router": ku.DefaultMoERouter(
            2, default_forward=forward, capacity_factor=None
        )
    }


METHODS = (
    Method(
        "copies, Expert Choice",
        lambda: {"router": ku.ExpertChoiceRouter(2.0)},
    ),
    Method("copies, Top-2", _with("copy")),
    Method("random noise", _with(ku.RandomNoise())),
    Method("Drop-Upcycling, shared", _with(ku.DropUpcycling())),
    Method(
        "Drop-Upcycling, independent",
        _with(ku.DropUpcycling(index_sharing="independent")),
    ),
    Method("Default MoE, backward only", default_moe("backward_only")),
    Method("Default MoE, paper", default_moe("paper")),
    Method("virtual groups, G=4", _with(ku.VirtualGroups(4), count=8)),
    Method("shared expert", _with(ku.SharedExperts())),
    Method(
        "Qwen2's cut, Top-8 of 4 x E",
        _with(ku.ReplicateShuffleCut(), count=8),
        parts=4,
    ),
    Method(
        "DS-MoE, all experts",
        lambda: {"recipe": "ds_moe", "attention": False},
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Trains everything, prints the table and draws the picture."""
    args = parse(arguments)
    only = vars(args).pop("only") or [m.name for m in METHODS] + [DENSE]
    try:
        output = two_continuations.open_output(args)
        task, prepare = vit_cifar10.dense_model(args)
        train, test = vit_cifar10.load_cifar10(args.data_dir, args.limit)
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def batch(rows, rng, training):
        images, labels = rows
        if training:
            images = vit_cifar10.crop_and_flip(images, rng)
        return prepare(images), labels

    two_continuations.begin(args, output)
    data = Data(train, test, batch)
    with progress.Reporter() as reporter:
        reporter.line(f"Backend: {keras.backend.backend()}.")
        found = run(args, only, output / "stages", task, data, reporter)
        reporter.line(f"\n{table(found)}\n\nWritten to {output}.")
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("output", "data_dir", "preset")
    }
    write_json(
        output / "results.json", {"settings": settings, "methods": found}
    )
    draw(found, output / "methods.png")
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=pathlib.Path, default="runs/methods")
    add("--data-dir", help="folder that holds TFDS's cifar10")
    add("--epochs", type=int, default=20, help="of the dense checkpoint")
    add("--more-steps", type=int, default=2000, help="of the dense model")
    add("--seeds", type=int, default=3)
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=1e-3)
    add("--more-learning-rate", type=float, default=5e-4)
    add("--width", type=int, default=48, help="of the tokens")
    add("--intermediate", type=int, default=96, help="of a feed-forward")
    add("--blocks", type=int, default=6)
    add("--patch", type=int, default=8, help="side of a patch, in pixels")
    add("--experts", type=int, default=8)
    add(
        "--only",
        nargs="+",
        metavar="METHOD",
        choices=[*(method.name for method in METHODS), DENSE],
        help="of the table's; all by default",
    )
    add("--limit", type=int, help="use only so many images, to try things")
    args = parser.parse_args(arguments)
    args.preset = None
    return args


def run(args, only, folder, task, data, reporter) -> dict:
    """The dense model, and every method's continuation from it.

    What is in `folder` already is read and not trained again.
    """
    per_epoch = max(len(data.train[0]) // args.batch_size, 1)
    first = Stage(args.epochs, per_epoch, args.batch_size, args.learning_rate)
    store = Store(folder)
    if store.load("checkpoint", task) is None:
        title = "dense checkpoint"
        result = train(task, first, data, title, 0, title, reporter, store)
        store.save("checkpoint", task, result)
    weights = task.get_weights()
    inputs = data.test_inputs(256)

    def continued(key, name, seed, stage, make):
        path = folder / f"{key}.json"
        if not path.exists():
            model, report = make(seed)
            title = f"{name}, seed {seed}"
            result = train(model, stage, data, name, seed, title, reporter)
            figures = {k: getattr(result, k) for k in FIGURES}
            write_json(path, receipt(report) | figures)
        return read_json(path)

    found = {}
    for number, method in enumerate(METHODS):
        if method.name not in only:
            continue
        arguments = {"layers": "last_half", **method.arguments()}
        experts = method.parts * args.experts
        cost = ku.estimate_upcycle(task, experts, **arguments)
        stage = further(args, cost.flops_ratio)

        def sparse(seed, experts=experts, arguments=arguments):
            moe = ku.upcycle_model(task, experts, seed=seed, **arguments)
            return moe, ku.verify_upcycle(task, moe, inputs)

        runs = [
            continued(f"{number:02d}-{seed}", method.name, seed, stage, sparse)
            for seed in range(args.seeds)
        ]
        found[method.name] = {
            "step_cost": cost.flops_ratio,
            "parameters": cost.total_params,
            "runs": runs,
        }
    if DENSE in only:

        def dense(seed):
            del seed  # all start from the checkpoint
            task.set_weights(weights)
            return task, None

        runs = [
            continued(f"dense-{seed}", DENSE, seed, further(args), dense)
            for seed in range(args.seeds)
        ]
        found[DENSE] = {
            "step_cost": 1.0,
            "parameters": task.count_params(),
            "runs": runs,
        }
    return found


def further(args, step_cost: float = 1.0) -> Stage:
    """As many steps as cost what the dense model's further steps do."""
    rounds = max(1, round(args.more_steps / step_cost / ROUND))
    return Stage(
        rounds,
        ROUND,
        args.batch_size,
        args.more_learning_rate,
        cool_down=0.5,
        step_cost=step_cost,
    )


def train(task, stage, data, name, seed, title, reporter, store=None):
    """Trains on, and says how it went; with a store from where it was cut."""
    result = comparison.train(
        comparison.trainer(task, stage),
        data,
        stage,
        name=name,
        seed=seed,
        callbacks=[reporter.callback(title)],
        backup=store and store.backup("checkpoint"),
    )
    reporter.line(
        f"{title}: test accuracy {result.start['test_accuracy']:.2%}, then "
        f"{result.final('test_accuracy'):.2%}, {result.seconds:.0f} s"
    )
    return result


def receipt(report: ku.UpcycleReport | None) -> dict:
    """What `verify_upcycle` says of the start, means over blocks."""
    if report is None:
        return {}
    names = ("intact_neurons", "expert_cosine", "active_share")
    return {
        "relative_difference": report.relative_difference,
        **{
            name: float(np.mean([getattr(b, name) for b in report.layers]))
            for name in names
        },
    }


def table(found) -> str:
    """The start as it was measured, and the end: mean and spread."""
    rows = []
    for name, each in found.items():
        runs = each["runs"]
        first = runs[0]
        start = ("-",) * 4
        if name != DENSE:
            start = (
                f"{first['relative_difference']:.1e}",
                f"{first['intact_neurons']:.0%}",
                f"{first['expert_cosine']:.2f}",
                f"{first['active_share']:.0%}",
            )
        rows.append(
            (
                name,
                *start,
                f"{first['steps']:,}",
                _spread([r["start"]["test_accuracy"] for r in runs], "%"),
                _spread([r["rounds"][-1]["test_accuracy"] for r in runs], "%"),
                _spread([r["rounds"][-1]["test_loss"] for r in runs]),
            )
        )
    return tables.markdown(
        (
            "method",
            "step-0 difference",
            "intact neurons",
            "expert cosine",
            "active",
            "steps",
            "accuracy at step 0",
            "test accuracy",
            "test loss",
        ),
        rows,
    )


def _spread(values, unit=""):
    values = np.array(values) * (100 if unit else 1)
    digits = 2 if unit else 4
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return f"{text} {unit}".strip()


def draw(found, path) -> None:
    """Test loss against compute, and where each method ended."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(
        "CIFAR-10, a small ViT: further training at equal compute", fontsize=12
    )
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(found)
    for number, name in enumerate(names):
        each = found[name]
        colour = "#222222" if name == DENSE else f"C{number % 10}"
        style = ":" if number >= 10 else "-"
        style = "--" if name == DENSE else style
        losses = np.array(
            [
                [r["start"]["test_loss"]]
                + [x["test_loss"] for x in r["rounds"]]
                for r in each["runs"]
            ]
        )
        compute = each["step_cost"] * ROUND * np.arange(losses.shape[1])
        curves.plot(
            compute,
            losses.mean(0),
            style,
            color=colour,
            linewidth=1.4,
            label=name,
        )
        ends.plot(
            losses[:, -1],
            [number] * len(losses),
            "o",
            color=colour,
            markersize=4,
            alpha=0.6,
        )
        ends.plot(losses[:, -1].mean(), number, "|", color=colour, ms=16)
    curves.set_xlabel("compute since, in steps of the dense model")
    curves.set_ylabel("test loss")
    curves.legend(fontsize=7, frameon=False)
    ends.set_yticks(range(len(names)), names, fontsize=8)
    ends.invert_yaxis()
    ends.xaxis.set_major_locator(MaxNLocator(4))
    ends.set_xlabel("test loss at the end, each seed and the mean")
    for panel in (curves, ends):
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())

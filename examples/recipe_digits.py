"""What the choices of an upcycling recipe do to the loss, on digits.

    KERAS_BACKEND=jax python examples/recipe_digits.py --output runs/recipe

One dense ViT is trained for each seed. From it start many continuations of the
same length, which differ in one choice each: the learning rate, its schedule,
the router's initialisation, noise on its logits, renormalised combine weights,
and what becomes of the optimizer's state. One table and one picture, with the
mean over seeds of the test loss; what does harm is shown too. `--only` tries
some of the choices, such as the schedule in a longer run:

    python examples/recipe_digits.py --output runs/long \\
        --only schedule --more-rounds 90
"""

import argparse
import dataclasses
import pathlib

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np

from keras_upcycle import tables
from keras_upcycle.demo import images as demo
from keras_upcycle.demo.batches import TestBatches, TrainBatches
from keras_upcycle.demo.results import Stage
from keras_upcycle.demo.store import write_json
from keras_upcycle.training import progress

EXPERTS = 8
BATCH = 60
STEPS_A_ROUND = 20
PEAK_RATE = 3e-3
WARM_UP = 100
BASE = "base"
DENSE = "dense continued"
PEAK = "peak"
CONSTANT, TO_ZERO, GOES_ON, ANEW = "constant", "to 0", "goes on", "anew"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One continuation.

    Attributes:
        question: Which choice it is about.
        name: Which value.
        router: Arguments of the router; `top_k` in them makes it Top-K.
        rate: Learning rate as a multiple of the dense model's last one, or
            `"peak"`: the highest it had.
        schedule: `"constant"`; `"to 0"`, a cosine over the continuation;
            `"goes on"`, the dense model's where it stood; or `"anew"`, that
            from its beginning, warm-up and all.
        state: `"new"`, `"carried"`, or `"rescaled"` for carried moments that
            are scaled to what experts' gradients will be.
        dense: Whether it is the dense model that goes on, for comparison.
    """

    question: str
    name: str
    router: dict = dataclasses.field(default_factory=dict)
    rate: float | str = 1.0
    schedule: str = CONSTANT
    state: str = "new"
    dense: bool = False

    @property
    def key(self) -> tuple:
        """What is the same for variants that do the same."""
        router = tuple(sorted(self.router.items()))
        return (router, self.rate, self.schedule, self.state, self.dense)

    def learning_rate(self, last: float, done: int, steps: int):
        """What its optimizer gets.

        Args:
            last: The dense model's last rate.
            done: Its steps.
            steps: Of the continuation.
        """
        schedule = ku.InverseSquareRoot(PEAK_RATE, WARM_UP)
        if self.schedule == ANEW:
            return schedule
        if self.schedule == GOES_ON:
            return Later(schedule, done)
        first = PEAK_RATE if self.rate == PEAK else self.rate * last
        if self.schedule == TO_ZERO:
            return keras.optimizers.schedules.CosineDecay(first, steps)
        return first

    def make_router(self) -> ku.Router:
        """A new router with these arguments."""
        settings = dict(self.router)
        std = settings.pop("std", 0.02)
        kernel = keras.initializers.RandomNormal(stddev=std) if std else "zeros"
        kind = ku.TopKRouter if "top_k" in settings else ku.ExpertChoiceRouter
        return kind(kernel_initializer=kernel, **settings)


class Later(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule from some step on, for an optimizer that is new.

    Args:
        schedule: The other.
        start: The step that this one's first is there.
    """

    def __init__(self, schedule, start):
        self.schedule = schedule
        self.start = start

    def __call__(self, step):
        return self.schedule(step + self.start)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "start": self.start}


def _top_2(**settings):
    return {"top_k": 2, "capacity_factor": None, **settings}


VARIANTS = (
    Variant("learning rate", "x 0.1", rate=0.1),
    Variant("learning rate", "x 0.3", rate=0.3),
    Variant("learning rate", "x 1", rate=1.0),
    Variant("learning rate", "x 3", rate=3.0),
    Variant("learning rate", "x 10", rate=10.0),
    Variant("schedule", "goes on", schedule=GOES_ON),
    Variant("schedule", "from the last rate to 0", schedule=TO_ZERO),
    Variant("schedule", "from the peak to 0", rate=PEAK, schedule=TO_ZERO),
    Variant("schedule", "anew, with its warm-up", schedule=ANEW),
    Variant("schedule", "dense, last rate to 0", schedule=TO_ZERO, dense=True),
    Variant(
        "schedule",
        "dense, peak to 0",
        rate=PEAK,
        schedule=TO_ZERO,
        dense=True,
    ),
    Variant("router's initialisation", "zeros", {"std": 0.0}),
    Variant("router's initialisation", "std 0.002", {"std": 0.002}),
    Variant("router's initialisation", "std 0.02", {}),
    Variant("router's initialisation", "std 0.2", {"std": 0.2}),
    Variant("router's initialisation", "std 2", {"std": 2.0}),
    Variant("noise on Top-2", "none", _top_2()),
    Variant("noise on Top-2", "1/E", _top_2(noise_stddev=1 / EXPERTS)),
    Variant("noise on Top-2", "1", _top_2(noise_stddev=1.0)),
    Variant("combine weights", "renormalised", {}),
    Variant("combine weights", "raw", {"normalize": False}),
    Variant("combine weights", "Top-2, renormalised", _top_2()),
    Variant("combine weights", "Top-2, raw", _top_2(normalize=False)),
    Variant("optimizer's state", "new"),
    Variant("optimizer's state", "carried", state="carried"),
    Variant("optimizer's state", "carried, rescaled", state="rescaled"),
)


def main(arguments=None) -> None:
    """Trains everything, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, default="runs/recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense-rounds", type=int, default=60)
    parser.add_argument("--more-rounds", type=int, default=30)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=_questions(),
        metavar="CHOICE",
        help=f"some of {', '.join(_questions())} (default: all)",
    )
    args = parser.parse_args(arguments)
    args.only = args.only or _questions()
    args.output.mkdir(parents=True, exist_ok=True)
    data = demo.digits()
    curves: dict[str, list[list[float]]] = {}
    with progress.Reporter() as reporter:
        reporter.line(f"Backend: {keras.backend.backend()}.")
        for seed in range(args.seeds):
            run_seed(seed, args, data, curves, reporter)
        rows = table(curves)
        write_json(
            args.output / "results.json",
            {
                "settings": {
                    name: value
                    for name, value in vars(args).items()
                    if name != "output"
                },
                "steps_a_round": STEPS_A_ROUND,
                "test_loss": curves,
            },
        )
        draw(curves, args.output / "recipe.png")
        reporter.line(f"\n{rows}\n\nWritten to {args.output}.")


def run_seed(seed, args, data, curves, reporter) -> None:
    """A dense model, and every continuation from it."""
    keras.utils.set_random_seed(seed)
    dense = demo.dense_model(demo.Settings())
    schedule = ku.InverseSquareRoot(PEAK_RATE, WARM_UP)
    _compile(dense, keras.optimizers.Adam(schedule))
    first = _batches(data, args.dense_rounds, seed)
    _train(dense, first, data, reporter, f"seed {seed}, dense")
    weights = dense.get_weights()
    optimizer = dense.optimizer
    last_rate = float(schedule(optimizer.iterations))
    more = _batches(data, args.more_rounds, seed + 1000)
    lengths = [STEPS_A_ROUND * n for n in (args.dense_rounds, args.more_rounds)]
    done: dict[tuple, list[float]] = {}
    asked = [v for v in VARIANTS if v.question in args.only]
    for variant in (*asked, Variant(DENSE, "", dense=True)):
        name = f"{variant.question}: {variant.name}".removesuffix(": ")
        # Several questions share the variant that changes nothing.
        if variant.key not in done:
            adam = keras.optimizers.Adam(
                variant.learning_rate(last_rate, *lengths)
            )
            if variant.dense:
                model = demo.dense_model(demo.Settings())
                model.set_weights(weights)
            else:
                model = ku.upcycle_model(
                    dense, EXPERTS, router=variant.make_router(), seed=seed
                )
            if variant.state != "new":
                adam = ku.upcycle_optimizer(
                    optimizer,
                    dense,
                    model,
                    rescale_moments=variant.state == "rescaled",
                )
            _compile(model, adam)
            title = f"seed {seed}, {name}"
            done[variant.key] = _train(model, more, data, reporter, title)
        curves.setdefault(name, []).append(done[variant.key])


def _questions():
    return list(dict.fromkeys(v.question for v in VARIANTS))


def _batches(data, rounds, seed):
    """Augmented images of all steps in their order, made once for all."""
    stage = Stage(rounds, STEPS_A_ROUND, BATCH)
    batches = TrainBatches(data, stage, seed)
    parts = []
    for number in range(rounds):
        batches.round = number
        steps = [batches[step] for step in range(STEPS_A_ROUND)]
        parts.append(tuple(np.concatenate(p) for p in zip(*steps, strict=True)))
    return parts


def _compile(model, optimizer):
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
    )


def _train(model, rounds, data, reporter, title) -> list[float]:
    """Test losses: before the first step, and after every round."""
    test = TestBatches(data)
    images, labels = (
        np.concatenate(part)
        for part in zip(*(test[n] for n in range(len(test))), strict=True)
    )

    def loss():
        return float(model.evaluate(images, labels, batch_size=199, verbose=0))

    losses = [loss()]
    task = reporter.bars.add_task(title, total=len(rounds) * STEPS_A_ROUND)
    for x, y in rounds:
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        losses.append(loss())
        reporter.bars.advance(task, STEPS_A_ROUND)
    reporter.bars.remove_task(task)
    reporter.line(f"{title}: test loss {losses[0]:.3f}, then {losses[-1]:.3f}")
    return losses


def table(curves) -> str:
    """Test losses of all variants: first, worst and last."""
    rows = []
    for name, runs in curves.items():
        runs = np.array(runs)
        rows.append(
            (
                name,
                *(
                    _mean(values)
                    for values in (runs[:, 0], runs.max(1), runs[:, -1])
                ),
            )
        )
    return tables.markdown(("", "at step 0", "at worst", "at the end"), rows)


def _mean(values):
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return text


def draw(curves, path) -> None:
    """A panel for each question, the dense continuation in all of them."""
    from matplotlib.figure import Figure

    questions = [
        question
        for question in _questions()
        if any(name.startswith(f"{question}: ") for name in curves)
    ]
    columns = min(3, len(questions))
    rows = -(-len(questions) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes[len(questions) :]:
        panel.remove()
    axes = axes[: len(questions)]
    # Losses after a rate that is too high go far beyond the others'.
    wild = ("learning rate", "schedule")
    tame = [a for a, q in zip(axes, questions, strict=True) if q not in wild]
    for panel in tame[1:]:
        panel.sharey(tame[0])
    dense = np.mean(curves[DENSE], axis=0)
    steps = STEPS_A_ROUND * np.arange(len(dense))
    for panel, question in zip(axes, questions, strict=True):
        panel.plot(steps, dense, color="#555555", linestyle="--", label=DENSE)
        own = [v for v in VARIANTS if v.question == question]
        colours = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
        colours += ("#CC79A7",)
        for variant, colour in zip(own, colours, strict=False):
            runs = np.array(curves[f"{question}: {variant.name}"])
            panel.plot(
                steps,
                runs.mean(0),
                color=colour,
                linestyle="--" if variant.dense else "-",
                label=variant.name,
            )
        panel.set_title(question, fontsize=10)
        panel.set_xlabel("steps after upcycling")
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    for panel in axes[::columns]:
        panel.set_ylabel("test loss")
    for panel, question in zip(axes, questions, strict=True):
        if question in wild:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

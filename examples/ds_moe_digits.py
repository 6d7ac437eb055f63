"""Dense training, sparse inference, on digits: accuracy for each share.

    KERAS_BACKEND=jax python examples/ds_moe_digits.py --output runs/ds_moe

Five minutes a seed on two cores; `--seeds 3` draws the mean of three.

A dense ViT is trained. Its feed-forward blocks are cut into slices, one expert
each, which starts as the same model at the same size. It trains on with all
experts, once for each weight of the mutual-information loss, and the dense
model trains on beside them. Then, without further training, fewer and fewer
experts are left at inference, by `top_k` and by a threshold: a table, and a
picture of the accuracy against the share of the experts' parameters that a
token meets. The paper's weights of the loss, up to 0.00063, are for runs far
longer than this one, in which they change nothing that can be seen.
"""

import argparse
import pathlib

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np

from keras_upcycle import tables
from keras_upcycle.demo import images as demo
from keras_upcycle.demo.batches import TrainBatches
from keras_upcycle.demo.results import Stage
from keras_upcycle.demo.store import write_json
from keras_upcycle.training import progress

EXPERTS = 16
SETTINGS = demo.Settings(intermediate=128)
BATCH = 60
STEPS_A_ROUND = 20
FIRST_RATE, SECOND_RATE = 3e-3, 1e-3
TOP_K = (1, 2, 4, 8, 12, 16)
THRESHOLDS = (4.0, 2.0, 1.5, 1.0, 0.75, 0.48, 0.2)
SWEEPS = {
    "top_k": [{"top_k": k} for k in TOP_K],
    "threshold": [{"threshold": t} for t in THRESHOLDS],
}
DENSE = "dense"


def main(arguments=None) -> None:
    """Trains everything, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, default="runs/ds_moe")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dense-rounds", type=int, default=40)
    parser.add_argument("--more-rounds", type=int, default=60)
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.5],
        metavar="W",
        help="of the mutual-information loss (default: 0, 0.1, 0.5)",
    )
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    data = demo.digits()
    found: dict[str, list] = {}
    with progress.Reporter() as reporter:
        reporter.line(f"Backend: {keras.backend.backend()}.")
        for seed in range(args.seeds):
            run_seed(seed, args, data, found, reporter)
        rows = table(found)
        write_json(
            args.output / "results.json",
            {
                "settings": {
                    name: value
                    for name, value in vars(args).items()
                    if name != "output"
                },
                "experts": EXPERTS,
                "steps_a_round": STEPS_A_ROUND,
                "found": found,
            },
        )
        draw(found, args.output / "ds_moe.png")
        reporter.line(f"\n{rows}\n\nWritten to {args.output}.")


def run_seed(seed, args, data, found, reporter) -> None:
    """A dense model, and what becomes of it.

    `found` gets, for each kind of training, a list over seeds: an accuracy
    for the dense model, and for the others a list of dictionaries, one for
    each choice of experts.
    """
    keras.utils.set_random_seed(seed)
    dense = demo.dense_model(SETTINGS)
    _train(dense, data, args.dense_rounds, FIRST_RATE, seed)
    reporter.line(f"seed {seed}: dense {_accuracy(dense, data):.2%}")
    for weight in args.weights:
        moe = ku.upcycle_model(
            dense,
            EXPERTS,
            recipe="ds_moe",
            attention=False,
            layers="all_but_first",
            router=ku.DSMoERouter(mutual_information_loss=weight),
            seed=seed,
        )
        _train(moe, data, args.more_rounds, SECOND_RATE, seed + 1000)
        points = [
            _point(moe, data, choice)
            for choices in SWEEPS.values()
            for choice in choices
        ]
        found.setdefault(f"{weight:g}", []).append(points)
        whole = max(points, key=lambda point: point["expert_share"])
        reporter.line(
            f"seed {seed}, loss weight {weight:g}: with all experts "
            f"{whole['accuracy']:.2%}"
        )
    # The same weights go on, so that nothing is trained twice.
    _train(dense, data, args.more_rounds, SECOND_RATE, seed + 1000)
    accuracy = _accuracy(dense, data)
    found.setdefault(DENSE, []).append(accuracy)
    reporter.line(f"seed {seed}: dense, trained as long, {accuracy:.2%}")


def _train(model, data, rounds, rate, seed) -> None:
    stage = Stage(rounds, STEPS_A_ROUND, BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(rate, stage.total_steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
    )
    batches = TrainBatches(data, stage, seed)
    steps = []
    for batches.round in range(rounds):
        steps += [batches[step] for step in range(STEPS_A_ROUND)]
    x, y = (np.concatenate(part) for part in zip(*steps, strict=True))
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def _accuracy(model, data) -> float:
    logits = model(data.test_inputs(), training=False)
    guessed = keras.ops.convert_to_numpy(keras.ops.argmax(logits, axis=-1))
    return float(np.mean(guessed == data.test[1]))


def _point(moe, data, choice) -> dict:
    """What the model does with a choice of experts, without retraining."""
    ku.set_active_experts(moe, **choice)
    report = ku.measure_active_experts(moe, data.test_inputs())
    return {
        **choice,
        "expert_share": report.expert_share,
        "active_share": report.active_share,
        "accuracy": _accuracy(moe, data),
    }


def _means(runs) -> list[dict]:
    """Points of one kind of training, with means over seeds."""
    return [
        {name: float(np.mean([p[name] for p in points])) for name in points[0]}
        for points in zip(*runs, strict=True)
    ]


def table(found) -> str:
    """Accuracies of all choices, mean over seeds, a column each weight."""
    weights = [name for name in found if name != DENSE]
    means = {weight: _means(found[weight]) for weight in weights}
    header = ["at inference"]
    for weight in weights:
        header += [f"experts' share, {weight}", f"accuracy, {weight}"]
    rows = []
    for points in zip(*means.values(), strict=True):
        choice = next(iter(points[0].items()))
        row = [f"{choice[0]}={choice[1]:g}"]
        for point in points:
            row += [f"{point['expert_share']:.1%}", f"{point['accuracy']:.2%}"]
        rows.append(tuple(row))
    dense = f"{np.mean(found[DENSE]):.2%}"
    rows.append(("dense model", *("100.0%", dense) * len(weights)))
    return tables.markdown(tuple(header), rows)


def draw(found, path) -> None:
    """Accuracy against the share of experts: a panel each selector."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(
        f"Digits: a small ViT of {EXPERTS} slices a block, trained with all, "
        "run with fewer",
        fontsize=12,
    )
    colours = ("#555555", "#0072B2", "#D55E00", "#009E73", "#E69F00")
    panels = figure.subplots(1, len(SWEEPS), sharey=True)
    for panel, name in zip(panels, SWEEPS, strict=True):
        panel.axhline(
            np.mean(found[DENSE]),
            color="#222222",
            linestyle="--",
            linewidth=1,
            label="dense model, trained as long",
        )
        weights = [weight for weight in found if weight != DENSE]
        for weight, colour in zip(weights, colours, strict=False):
            for number, points in enumerate(
                [_means(found[weight]), *found[weight]]
            ):
                own = sorted(
                    (p["expert_share"], p["accuracy"])
                    for p in points
                    if name in p
                )
                style = {"linewidth": 0.7, "alpha": 0.35}
                if number == 0:
                    label = f"mutual-information loss x {weight}"
                    style = {"linewidth": 2, "marker": "o", "label": label}
                    style["markersize"] = 4
                panel.plot(*zip(*own, strict=True), color=colour, **style)
        panel.set_title(f"by {name}", fontsize=10)
        panel.set_xlabel("share of the experts' parameters that a token meets")
        panel.set_xscale("log")
        ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        panel.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy")
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

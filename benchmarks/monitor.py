"""What `RouterMonitor` costs: `fit` with it against `fit` without.

    KERAS_BACKEND=jax python -m benchmarks.monitor

The same sparse ViT trains on the same batches, in turn with no callback, with
a callback that does nothing (Keras itself waits differently then), and with
the monitor at several distances between readings. The time is that of an
epoch's steps and of what the callback does at the epoch's end, where the
monitor measures the distances of experts.
"""

import argparse
import json
import statistics
import time

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np

from benchmarks import timing
from keras_upcycle import tables
from keras_upcycle.layers.moe_layers import named_mixtures

NONE, IDLE = "no callback", "an idle callback"


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", type=int, nargs="*", default=[50, 10, 1])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=7)
    args = timing.parsed(parser)
    figures = measure(args)
    print(
        f"{figures['backend']}: ViT, {args.blocks} blocks of width "
        f"{args.width}, E={args.num_experts}, batch {args.batch_size}, medians "
        f"of {args.rounds} epochs of {args.steps} steps"
    )
    print(
        tables.markdown(
            ("fit with", "ms a step", f"x {NONE}"),
            [
                (name, f"{f['ms']:.1f}", f"{f['ratio']:.3f}")
                for name, f in figures["rows"].items()
            ],
        )
    )
    print(f"One reading: {figures['reading_ms']:.1f} ms.")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


def measure(args) -> dict:
    """Times of `fit`, callback by callback."""
    keras.utils.set_random_seed(0)
    dense = keras_hub.models.ViTImageClassifier(
        keras_hub.models.ViTBackbone(
            image_shape=(32, 32, 3),
            patch_size=4,
            num_layers=args.blocks,
            num_heads=3,
            hidden_dim=args.width,
            mlp_dim=4 * args.width,
        ),
        num_classes=10,
    )
    rng = np.random.default_rng(0)
    count = args.batch_size * args.steps
    x = rng.normal(size=(count, 32, 32, 3)).astype("float32")
    y = rng.integers(10, size=count)
    callbacks = {NONE: None, IDLE: Idle()}
    for every in args.every:
        name = f"RouterMonitor(every={every})"
        callbacks[name] = ku.RouterMonitor(every, max_dropped=1.0)
    models = {}
    for name in callbacks:
        models[name] = ku.upcycle_model(dense, args.num_experts)
        models[name].compile(
            "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )

    clock, before, after = timing.StepClock(args.steps), EpochEnd(), EpochEnd()

    def run(name):
        own = [callbacks[name]] if callbacks[name] else []
        models[name].fit(
            x,
            y,
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[before, *own, after, clock],
        )
        return clock.seconds + after.at - before.at

    times = timing.in_turn(
        {name: lambda name=name: run(name) for name in models}, args.rounds
    )
    return {
        "backend": keras.backend.backend(),
        "reading_ms": 1e3 * _reading(models[name]),
        "rows": {
            name: {
                "ms": 1e3 * statistics.median(own) / args.steps,
                "ratio": timing.median_ratio(times, name, NONE),
            }
            for name, own in times.items()
        },
    }


def _reading(model):
    """Seconds of reading all counters of a model, a median of ten."""
    routers = [layer.router for layer in named_mixtures(model).values()]
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for router in routers:
            router.statistics.read()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class EpochEnd(keras.callbacks.Callback):
    """Notes when Keras, going through its callbacks in turn, reaches it."""

    def on_epoch_end(self, epoch, logs=None):
        """Notes the time."""
        self.at = time.perf_counter()


class Idle(keras.callbacks.Callback):
    """Does nothing at the end of a batch, which Keras then waits for."""

    def on_train_batch_end(self, batch, logs=None):
        """Nothing."""


if __name__ == "__main__":
    main()

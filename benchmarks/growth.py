"""How cost grows: with tokens, with experts at fixed work, and with skew.

    KERAS_BACKEND=jax python -m benchmarks.growth

Four questions about forward and backward of one layer, each answered by
ratios within one process:

* twice the tokens: how much longer?
* 8, 32 and 128 experts with the same number of assignments: how much longer,
  and how much more temporary memory? "products alone" is the floor: the
  experts on rows that already lie expert by expert, without any routing.
  "kernels moved" says why it rises: what reading the added kernels twice and
  writing as many gradients takes by itself, on top of the products at E=8;
* one expert taking half of all tokens: what does `dropless` cost against
  `capacity`, and against every expert on every token?
* several layers one after the other, with and without `remat`: what does it
  cost in time, and save in memory?
"""

import argparse
import dataclasses
import gc
import json
import statistics

import keras_upcycle  # noqa: F401  (before keras: chooses the backend)

# isort: split
import keras
import numpy as np
from keras import ops

from benchmarks import competitors, programs, shapes, timing
from benchmarks.layer import tokens
from keras_upcycle import tables

SETTINGS = ("tokens", "hidden_dim", "intermediate_dim", "num_experts")
EXPERTS = (8, 32, 128)
ENGINES = ("capacity", "dropless", "expert choice")
DEPTH = 6


def main() -> None:
    """Prints four Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes.add_options(parser, SETTINGS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60.0)
    args = timing.parsed(parser)
    base = shapes.of_options(args)
    print(f"{keras.backend.backend()}: {base}, forward and backward")
    figures = {}
    for question in (of_tokens, of_experts, of_skew, of_depth):
        figures[question.__name__] = question(base, args)
        gc.collect()
    if args.json:
        backend = keras.backend.backend()
        with open(args.json, "w") as file:
            json.dump({"backend": backend, **figures}, file, indent=1)


def of_tokens(base, args) -> list[dict]:
    """Twice the tokens, engine by engine."""
    more = dataclasses.replace(base, tokens=2 * base.tokens)
    figures = []
    for engine in ENGINES:
        times, _ = _timed(
            {
                shape.tokens: (competitors.build(engine, shape), tokens(shape))
                for shape in (base, more)
            },
            args,
        )
        figures.append(
            {
                "engine": engine,
                "ratio": timing.median_ratio(times, more.tokens, base.tokens),
            }
        )
    _print(("engine", "twice the tokens takes"), figures, ("engine", "ratio"))
    return figures


def of_experts(base, args) -> list[dict]:
    """More experts for the same assignments."""
    figures, medians = [], {}
    for engine in (competitors.FLOOR, competitors.MEMORY, *ENGINES):
        # A factor of 1 keeps the assignments: E times C slots are K * T.
        made = {}
        for count in EXPERTS:
            shape = dataclasses.replace(base, num_experts=count)
            made[count] = (competitors.build(engine, shape), tokens(shape))
        moving = engine == competitors.MEMORY
        program = programs.forward if moving else programs.both
        times, memory = _timed(made, args, program)
        medians[engine] = {n: statistics.median(t) for n, t in times.items()}
        for count in EXPERTS:
            ratio = timing.median_ratio(times, count, EXPERTS[0])
            if moving:
                moved = medians[engine][count] - medians[engine][EXPERTS[0]]
                ratio = 1.0 + moved / medians[competitors.FLOOR][EXPERTS[0]]
            figures.append(
                {
                    "engine": engine,
                    "num_experts": count,
                    "ms": 1e3 * medians[engine][count],
                    "ratio": ratio,
                    "temporary_mib": None if moving else memory[count],
                }
            )
        del made
        gc.collect()
    _print(
        ("engine", "E", "ms", f"x time at E={EXPERTS[0]}", "temporary MiB"),
        figures,
        ("engine", "num_experts", "ms", "ratio", "temporary_mib"),
    )
    return figures


def of_skew(base, args) -> list[dict]:
    """Balanced, and one expert taking half of all tokens."""
    figures = []
    for name, skewed in (("balanced", False), ("half to one", True)):
        x = tokens(base)
        made = {}
        for engine in ("capacity", "dropless", "every expert"):
            layer = competitors.build(engine, base)
            if skewed:
                x = _skew(layer, x)
            made[engine] = (layer, x)
        share = _largest_share(made["dropless"][0], x)
        times, _ = _timed(made, args)
        figures.append(
            {
                "routing": name,
                "largest_share": share,
                "to_capacity": timing.median_ratio(
                    times, "dropless", "capacity"
                ),
                "to_every_expert": timing.median_ratio(
                    times, "dropless", "every expert"
                ),
            }
        )
    _print(
        ("routing", "tokens at one expert", "x capacity", "x every expert"),
        figures,
        ("routing", "largest_share", "to_capacity", "to_every_expert"),
    )
    return figures


def of_depth(base, args) -> list[dict]:
    """A stack of layers whose hidden layers are kept, or computed again."""
    shape = dataclasses.replace(base, tokens=base.tokens // 4, num_experts=8)
    made = {
        name: (Stack(shape, DEPTH, remat), tokens(shape))
        for name, remat in (("kept", False), ("remat", True))
    }
    times, memory = _timed(made, args)
    figures = [
        {
            "hidden_layers": name,
            "ratio": timing.median_ratio(times, name, "kept"),
            "temporary_mib": memory[name],
        }
        for name in made
    ]
    _print(
        (f"{DEPTH} layers", "x time", "temporary MiB"),
        figures,
        ("hidden_layers", "ratio", "temporary_mib"),
    )
    return figures


class Stack(keras.layers.Layer):
    """Several mixtures in a row, each added to what it was given."""

    def __init__(self, shape, depth, remat):
        super().__init__(dtype=shape.dtype)
        self.mixtures = [
            competitors.ours("capacity", shape, remat=remat)
            for _ in range(depth)
        ]
        self.built = True

    def call(self, x, training=None):
        for mixture in self.mixtures:
            x = x + mixture(x, training=training)
        return x


def _skew(layer, x):
    """Half of the tokens get a feature that sends them to expert 0 first.

    Logits vary by 1 and that of expert 0 is 12 above: no more, or the others'
    probabilities would vanish, and all second choices tie at expert 1.
    """
    kernel = ops.convert_to_numpy(layer.router.kernel).copy()
    kernel[0] = 0.0
    kernel[0, 0] = 1.0
    layer.router.kernel.assign(kernel)
    x = ops.convert_to_numpy(x).copy()
    x[0, :, 0] = 0.0
    x[0, ::2, 0] = 12.0
    return ops.convert_to_tensor(x)


def _largest_share(layer, x):
    chosen = ops.convert_to_numpy(layer.router(x).experts)
    counts = np.bincount(chosen.reshape(-1), minlength=layer.num_experts)
    return float(counts.max() / chosen[..., 0].size)


def _timed(made, args, program=programs.both):
    """Times of a program of each, and temporary MiB, name by name."""
    ready = {name: program(layer, x) for name, (layer, x) in made.items()}
    times = timing.interleaved(
        {name: one.run for name, one in ready.items()}, args.rounds, args.budget
    )
    memory = {}
    for name, one in ready.items():
        size = one.temporary_bytes()
        memory[name] = None if size is None else size / 2**20
        print(f"  {name}: {1e3 * statistics.median(times[name]):.0f} ms")
    return times, memory


def _print(head, figures, names):
    def text(value):
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.2f}" if value < 100 else f"{value:.0f}"
        return str(value)

    print(tables.markdown(head, [[text(f[n]) for n in names] for f in figures]))


if __name__ == "__main__":
    main()

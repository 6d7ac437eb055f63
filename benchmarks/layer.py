"""One layer against its limit and its peers.

    KERAS_BACKEND=jax python -m benchmarks.layer
    KERAS_BACKEND=jax python -m benchmarks.layer --sweep --json layer.json

The limit is `K` dense feed-forwards of the same width: the arithmetic that a
token's experts do, with no routing at all. Every competitor holds the same
weights, and what a peer computes is compared with ours before any time counts;
see `benchmarks/competitors.py`. Times are medians of interleaved runs in one
process, ratios are taken round by round. Compile time and temporary memory
(see `benchmarks/programs.py`) are apart.
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
from keras_upcycle import tables

HEAD = (
    "",
    "forward ms",
    "x limit",
    "forward+backward ms",
    "x limit",
    "temporary MiB",
    "compile s",
)


def main() -> None:
    """Prints a Markdown table for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [field.name for field in dataclasses.fields(shapes.Shape)]
    shapes.add_options(parser, names)
    parser.add_argument("--both-kinds", action="store_true")
    parser.add_argument(
        "--sweep", action="store_true", help="vary one setting at a time"
    )
    parser.add_argument(
        "--full", action="store_true", help="all combinations: many hours"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--budget",
        type=float,
        default=20.0,
        help="seconds a competitor may take for its rounds; it gets fewer",
    )
    parser.add_argument("--only", nargs="*", help="competitors to run")
    parser.add_argument("--skip-peers", action="store_true")
    args = timing.parsed(parser)
    base = shapes.of_options(args)
    wanted = [base]
    if args.both_kinds:
        wanted = [dataclasses.replace(base, gated=g) for g in (False, True)]
    if args.sweep:
        wanted = shapes.one_at_a_time(base)
    if args.full:
        wanted = shapes.product(base)
    figures = []
    for shape in wanted:
        print(f"\n{keras.backend.backend()}: {shape}, {args.rounds} rounds")
        figures.append(measure(shape, args))
        rows = figures[-1]["rows"]
        print(tables.markdown(HEAD, [_row(n, f) for n, f in rows.items()]))
        for name, reason in figures[-1]["left_out"].items():
            print(f"{name} is left out: {reason}.")
        if args.json:
            backend = keras.backend.backend()
            with open(args.json, "w") as file:
                json.dump({"backend": backend, "shapes": figures}, file)


def measure(shape: shapes.Shape, args) -> dict:
    """Figures of every competitor at one shape."""
    names = competitors.names(shape.gated)
    if args.skip_peers:
        names = [n for n in names if n not in competitors.PEERS]
    if args.only:
        names = [n for n in names if n in (*args.only, competitors.LIMIT)]
    layers, left_out = {}, {}
    for name in names:
        try:
            layers[name] = competitors.build(name, shape)
        except competitors.Unavailable as reason:
            left_out[name] = str(reason)
    x = tokens(shape)
    rows = {name: {} for name in layers}
    for part, program in (
        ("forward", programs.forward),
        ("both", programs.both),
    ):
        made = {name: program(layer, x) for name, layer in layers.items()}
        times = timing.interleaved(
            {name: program.run for name, program in made.items()},
            args.rounds,
            args.budget,
        )
        for name, figures in rows.items():
            figures[f"{part}_ms"] = 1e3 * statistics.median(times[name])
            figures[f"{part}_ratio"] = timing.median_ratio(
                times, name, competitors.LIMIT
            )
            figures[f"{part}_rounds"] = len(times[name])
            figures[f"{part}_compile_s"] = made[name].compile_seconds
            figures[f"{part}_temporary"] = made[name].temporary_bytes()
        del made
        gc.collect()
    return {
        "shape": dataclasses.asdict(shape),
        "rows": rows,
        "left_out": left_out,
    }


def tokens(shape: shapes.Shape):
    """`(1, T, D)`, random."""
    x = np.random.default_rng(0).normal(
        size=(1, shape.tokens, shape.hidden_dim)
    )
    return ops.cast(ops.convert_to_tensor(x.astype("float32")), shape.dtype)


def _row(name, figures):
    compiled, temporary = figures["both_compile_s"], figures["both_temporary"]
    return (
        name,
        f"{figures['forward_ms']:.1f}",
        f"{figures['forward_ratio']:.2f}",
        f"{figures['both_ms']:.1f}",
        f"{figures['both_ratio']:.2f}",
        "-" if temporary is None else f"{temporary / 2**20:.0f}",
        "-" if compiled is None else f"{compiled:.1f}",
    )


if __name__ == "__main__":
    main()

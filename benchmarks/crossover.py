"""Which engine is fastest for how few tokens: what `dispatch="auto"` rests on.

    KERAS_BACKEND=jax python -m benchmarks.crossover --num-experts 8
    KERAS_BACKEND=jax python -m benchmarks.crossover --training

`auto` is what `dispatch.choose` picks, "one dense" one dense feed-forward on
the same tokens. All hold the same weights; "chosen" is how many experts the
tokens chose. Nothing is dropped unless `--buffers` says so: buffers hold every
token then.
"""

import argparse
import json
import statistics

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np
from keras import ops

from benchmarks import competitors, programs, shapes, timing
from benchmarks.layer import tokens
from keras_upcycle import tables
from keras_upcycle.layers import dispatch


def main() -> None:
    """Prints a Markdown table, one row for each number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden-dim", type=int, default=512)
    parser.add_argument("--intermediate-dim", type=int, default=2048)
    parser.add_argument("--num-experts", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="not gated")
    parser.add_argument(
        "--buffers",
        action="store_true",
        help="in training buffers of 1.25 times the fair share, and drops",
    )
    parser.add_argument(
        "--training", action="store_true", help="forward and backward"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32, 64, 128, 256],
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = timing.parsed(parser)
    figures = []
    for num_experts in args.num_experts:
        figures += measure(num_experts, args)
    names = (*dispatch.ENGINES, "auto", "one dense")
    print(
        f"{keras.backend.backend()}: D={args.hidden_dim} "
        f"F={args.intermediate_dim} K={args.top_k}, ms, medians of "
        f"{args.rounds} interleaved runs"
        + (", forward and backward" if args.training else " at inference")
    )
    print(
        tables.markdown(
            ("E", "tokens", "chosen", *names, "auto / every expert"),
            [
                (
                    str(f["num_experts"]),
                    str(f["tokens"]),
                    str(f["chosen"]),
                    *(f"{f['ms'][name]:.2f}" for name in names),
                    f"{f['auto_ratio']:.2f}",
                )
                for f in figures
            ],
        )
    )
    if args.json:
        backend = keras.backend.backend()
        with open(args.json, "w") as file:
            json.dump({"backend": backend, "rows": figures}, file)


def measure(num_experts, args) -> list[dict]:
    """Milliseconds of each engine, for each number of tokens."""
    base = shapes.Shape(
        hidden_dim=args.hidden_dim,
        intermediate_dim=args.intermediate_dim,
        num_experts=num_experts,
        top_k=args.top_k,
        gated=not args.plain,
    )
    layers, weights = {}, competitors.Weights.drawn(base)
    for name in (*dispatch.ENGINES, "auto"):
        router = ku.TopKRouter(
            args.top_k, capacity_factor=1.25 if args.buffers else None
        )
        layers[name] = competitors.ours(
            "dropless", base, router=router, dispatch=name
        )
        competitors.fill(layers[name], weights)
    layers["one dense"] = competitors.dense_blocks(base, 1)
    program = programs.both if args.training else programs.forward
    figures = []
    for count in args.tokens:
        x = tokens(shapes.Shape(tokens=count, hidden_dim=args.hidden_dim))
        times = timing.interleaved(
            {n: program(layer, x).run for n, layer in layers.items()},
            args.rounds,
        )
        chosen = ops.convert_to_numpy(layers["auto"].router(x).experts)
        figures.append(
            {
                "num_experts": num_experts,
                "tokens": count,
                "chosen": len(np.unique(chosen)),
                "ms": {n: 1e3 * statistics.median(times[n]) for n in times},
                "auto_ratio": timing.median_ratio(times, "auto", "dense"),
            }
        )
    return figures


if __name__ == "__main__":
    main()

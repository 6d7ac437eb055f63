"""Every expert on every token: as one network, or expert by expert.

    KERAS_BACKEND=jax python -m benchmarks.all_experts

What `dispatch="dense"` chooses between where experts are slices of a block, as
in DS-MoE. The limit is the block that they are cut from: the same arithmetic,
and no weights on experts.
"""

import argparse
import json
import statistics

import keras_upcycle  # noqa: F401  (before keras: chooses the backend)

# isort: split
import keras
from keras import ops

from benchmarks import competitors, programs, shapes, timing
from benchmarks.layer import tokens
from keras_upcycle import tables

LIMIT = "one block"
WAYS = ("as one", "one by one")


def main() -> None:
    """Prints a Markdown table, one row for each number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden-dim", type=int, default=384)
    parser.add_argument("--intermediate-dim", type=int, default=1536)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[16, 64, 256, 2048]
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = timing.parsed(parser)
    print(
        f"{keras.backend.backend()}: D={args.hidden_dim}, a block of "
        f"F={args.intermediate_dim} in {args.num_experts} slices, medians of "
        f"{args.rounds} interleaved runs"
    )
    rows = [measure(count, args) for count in args.tokens]
    print(
        tables.markdown(
            (
                "tokens",
                *(f"{way}, forward x block" for way in WAYS),
                *(f"{way}, forward+backward x block" for way in WAYS),
            ),
            [
                (
                    str(row["tokens"]),
                    *(f"{row['forward'][way]:.2f}" for way in WAYS),
                    *(f"{row['both'][way]:.2f}" for way in WAYS),
                )
                for row in rows
            ],
        )
    )
    if args.json:
        backend = keras.backend.backend()
        with open(args.json, "w") as file:
            json.dump({"backend": backend, "rows": rows}, file)


def measure(count, args) -> dict:
    """Ratios to the block, forward and forward with backward."""
    block = shapes.Shape(
        tokens=count,
        hidden_dim=args.hidden_dim,
        intermediate_dim=args.intermediate_dim,
    )
    slices = shapes.Shape(
        tokens=count,
        hidden_dim=args.hidden_dim,
        intermediate_dim=args.intermediate_dim // args.num_experts,
        num_experts=args.num_experts,
    )
    layers = {LIMIT: competitors.dense_blocks(block, 1)}
    layers |= {way: AllExperts(slices, way) for way in WAYS}
    x = tokens(block)
    row = {"tokens": count}
    for part in ("forward", "both"):
        program = getattr(programs, part)
        times = timing.interleaved(
            {name: program(layer, x).run for name, layer in layers.items()},
            args.rounds,
        )
        row[part] = {
            way: timing.median_ratio(times, way, LIMIT) for way in WAYS
        }
        row[f"{part}_ms"] = {
            name: 1e3 * statistics.median(each) for name, each in times.items()
        }
    return row


class AllExperts(keras.layers.Layer):
    """The experts of one of our layers, each with a weight of 1."""

    def __init__(self, shape, way):
        super().__init__(dtype=shape.dtype)
        self.experts = competitors.ours("every expert", shape).experts
        self.way = way
        self.built = True

    def call(self, x, training=None):
        rows = x[0]
        weights = ops.ones((rows.shape[0], self.experts.num_experts), x.dtype)
        if self.way == "as one":
            outputs = self.experts.apply_as_one(rows, weights, training)
            return outputs[None]
        slots = ops.broadcast_to(x, (self.experts.num_experts, *rows.shape))
        outputs = self.experts.apply_slots(slots, training)
        return ops.einsum("etd,te->td", outputs, weights)[None]


if __name__ == "__main__":
    main()

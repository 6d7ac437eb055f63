"""What a router that learns from all experts costs, against plain Top-K.

    KERAS_BACKEND=jax python -m benchmarks.default_moe

One layer in training, forward and backward, by engine: Default MoE in both its
forms, whose vectors stand for the experts that a token does not meet, and
DenseMixer, which runs them. All layers of an engine hold the same weights.
"""

import argparse
import gc
import json
import statistics

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras

from benchmarks import competitors, growth, programs, shapes, timing
from benchmarks.layer import tokens
from keras_upcycle import tables

SETTINGS = (*growth.SETTINGS, "gated")
TOP_K = "Top-K"
ENGINES = ("capacity", "dropless")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes.add_options(parser, SETTINGS)
    parser.add_argument("--rounds", type=int, default=15)
    args = timing.parsed(parser)
    shape = shapes.of_options(args)
    print(
        f"{keras.backend.backend()}: {shape}, forward and backward, medians "
        f"of {args.rounds} interleaved runs"
    )
    rows = []
    for engine in ENGINES:
        rows += measure(engine, shape, args.rounds)
        gc.collect()
    print(
        tables.markdown(
            ("engine", "router", "ms", f"x {TOP_K}"),
            [
                (
                    r["engine"],
                    r["router"],
                    f"{r['ms']:.0f}",
                    f"{r['ratio']:.3f}",
                )
                for r in rows
            ],
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"backend": keras.backend.backend(), "rows": rows}, file)


def measure(engine, shape, rounds) -> list[dict]:
    """Times with one engine, router by router."""
    factor = shape.capacity_factor if engine == "capacity" else None
    settings = {
        "capacity_factor": factor,
        "eval_capacity_factor": factor,
        "load_balance_loss": 0.0,
    }
    routers = {TOP_K: ku.TopKRouter(shape.top_k, **settings)}
    for form in ("backward_only", "paper"):
        routers[f"Default MoE, {form}"] = ku.DefaultMoERouter(
            shape.top_k, default_forward=form, **settings
        )
    routers["DenseMixer"] = ku.TopKRouter(
        shape.top_k, router_gradient="dense_mixer", **settings
    )
    weights = competitors.Weights.drawn(shape)
    x = tokens(shape)
    made = {}
    for name, router in routers.items():
        layer = competitors.ours(engine, shape, router=router)
        competitors.fill(layer, weights)
        made[name] = programs.both(layer, x).run
    times = timing.interleaved(made, rounds)
    return [
        {
            "engine": engine,
            "router": name,
            "ms": 1e3 * statistics.median(times[name]),
            "ratio": timing.median_ratio(times, name, TOP_K),
        }
        for name in made
    ]


if __name__ == "__main__":
    main()

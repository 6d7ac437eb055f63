"""KerasHub's own mixtures beside the same with our MoE layers.

    KERAS_BACKEND=jax python -m benchmarks.adopt

A block of a stock Qwen3-MoE (or another) with random weights, and the block
of its adopted copy: their mixtures alone, and the whole blocks with attention.
The stock layer runs every expert on every token. Outputs are compared first.
Forward is inference; both is a training step's forward and backward pass.
Ratios are medians over interleaved rounds in one process.
"""

import argparse
import gc
import json
import statistics

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np
from keras import ops

from benchmarks import programs, timing
from keras_upcycle import tables

HEAD = (
    "model",
    "experts",
    "part",
    "pass",
    "stock ms",
    "adopted ms",
    "times faster",
)


class First(keras.layers.Layer):
    """A layer's outputs without what it returns beside them."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.built = True

    def call(self, inputs, training=None):
        del training  # Keras hands it down to those that take it
        outputs = self.inner(inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs


def qwen3_moe(args, num_experts, top_k):
    """A stock Qwen3-MoE of one block."""
    return keras_hub.models.Qwen3MoeBackbone(
        **_shared(args, num_experts, top_k),
        head_dim=64,
        moe_intermediate_dim=args.intermediate_dim,
        norm_top_k_prob=True,
    )


def mixtral(args, num_experts, top_k):
    """A stock Mixtral of one block."""
    return keras_hub.models.MixtralBackbone(**_shared(args, num_experts, top_k))


def gpt_oss(args, num_experts, top_k):
    """A stock GPT-OSS of one block."""
    return keras_hub.models.GptOssBackbone(
        **_shared(args, num_experts, top_k), head_dim=64
    )


MODELS = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}
# Where each keeps its mixture.
PLACES = {
    "qwen3_moe": "mlp",
    "mixtral": "_sparse_moe_block",
    "gpt_oss": "sparse_moe_block",
}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["qwen3_moe"])
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--intermediate-dim", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--cases",
        nargs="*",
        default=["32x2", "64x2"],
        help="experts x experts of a token",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=30.0)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    print(
        f"{keras.backend.backend()}: D={args.hidden_dim} "
        f"F={args.intermediate_dim}, {args.batch_size} x {args.length} tokens, "
        f"{args.rounds} rounds"
    )
    figures = []
    for name in args.models:
        for case in args.cases:
            figures += measure(name, *map(int, case.split("x")), args)
            gc.collect()
    rows = [
        (
            f["model"],
            f"{f['top_k']} of {f['num_experts']}",
            f["part"],
            f["pass"],
            f"{f['stock_ms']:.1f}",
            f"{f['adopted_ms']:.1f}",
            f"{f['times_faster']:.1f}",
        )
        for f in figures
    ]
    print(tables.markdown(HEAD, rows))
    if args.json:
        with open(args.json, "w") as file:
            backend = keras.backend.backend()
            json.dump({"backend": backend, "rows": figures}, file, indent=1)


def measure(name, num_experts, top_k, args):
    """Figures of one model, of both parts and both passes."""
    keras.utils.set_random_seed(0)
    stock = MODELS[name](args, num_experts, top_k)
    adopted = ku.adopt_model(stock)
    shape = (args.batch_size, args.length, args.hidden_dim)
    x = ops.convert_to_tensor(
        np.random.default_rng(0).normal(size=shape), "float32"
    )
    figures = []
    for part in ("mixture", "block"):
        layers = {}
        for which, model in (("stock", stock), ("adopted", adopted)):
            block = model.transformer_layers[0]
            inner = block
            if part == "mixture":
                inner = getattr(block, PLACES[name])
            layers[which] = First(inner)
        _check_equal(layers, x)
        for way, program in (
            ("forward", programs.forward),
            ("both", programs.both),
        ):
            made = {n: program(layer, x) for n, layer in layers.items()}
            times = timing.interleaved(
                {n: each.run for n, each in made.items()},
                args.rounds,
                args.budget,
            )
            figures.append(
                {
                    "model": name,
                    "num_experts": num_experts,
                    "top_k": top_k,
                    "part": part,
                    "pass": way,
                    "stock_ms": 1e3 * statistics.median(times["stock"]),
                    "adopted_ms": 1e3 * statistics.median(times["adopted"]),
                    "times_faster": timing.median_ratio(
                        times, "stock", "adopted"
                    ),
                }
            )
            del made
            gc.collect()
    return figures


def _shared(args, num_experts, top_k):
    return {
        "vocabulary_size": 64,
        "num_layers": 1,
        "num_query_heads": args.hidden_dim // 64,
        "num_key_value_heads": args.hidden_dim // 64,
        "hidden_dim": args.hidden_dim,
        "intermediate_dim": args.intermediate_dim,
        "num_experts": num_experts,
        "top_k": top_k,
    }


def _check_equal(layers, x):
    stock, adopted = (
        ops.convert_to_numpy(layer(x, training=False))
        for layer in layers.values()
    )
    gap = np.abs(stock - adopted).max() / np.abs(stock).max()
    if not gap < 1e-5:
        raise RuntimeError(f"The two differ by {gap:.1e} of their size.")


if __name__ == "__main__":
    main()

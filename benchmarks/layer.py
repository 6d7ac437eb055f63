"""One layer against its limit and its peers.

    KERAS_BACKEND=jax python -m benchmarks.layer
    KERAS_BACKEND=jax python -m benchmarks.layer --crossover --num-experts 8

The limit is `K` dense feed-forwards of the same width: the arithmetic that a
token's experts do, with no routing at all. The peer is KerasHub's
`Qwen3SparseMoeBlock`, gated and without biases, against our layer in the same
configuration, holding the same weights; their outputs are checked equal before
any time counts.
"""

import argparse
import json

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np
from keras import ops

from benchmarks import timing
from keras_upcycle import dispatch, tables


def main() -> None:
    """Prints a Markdown table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden-dim", type=int, default=512)
    parser.add_argument("--intermediate-dim", type=int, default=2048)
    parser.add_argument("--num-experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--capacity-factor", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--only", nargs="*", help="rows to run")
    parser.add_argument("--plain", action="store_true", help="no gated rows")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument(
        "--crossover",
        action="store_true",
        help="time the engines at few tokens instead",
    )
    parser.add_argument(
        "--crossover-tokens",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32, 64, 128, 256],
    )
    parser.add_argument(
        "--system-allocator",
        action="store_true",
        help="let the allocator give memory back; see benchmarks/timing.py",
    )
    args = parser.parse_args()
    if not args.system_allocator:
        timing.keep_freed_memory()
    if args.crossover:
        rows = crossover(args)
        names = ("tokens", *dispatch.ENGINES, "auto", "one dense")
        print(
            f"{keras.backend.backend()}: D={args.hidden_dim} "
            f"F={args.intermediate_dim} E={args.num_experts} K={args.top_k}, "
            f"ms, medians of {args.rounds} interleaved runs at inference"
        )
        print(tables.markdown(names, rows))
        return
    figures = measure(args)
    backend = keras.backend.backend()
    print(
        f"{backend}: T={args.tokens} D={args.hidden_dim} "
        f"F={args.intermediate_dim} E={args.num_experts} K={args.top_k} "
        f"C={args.capacity_factor}, medians of {args.rounds} interleaved runs"
    )
    rows = [
        (
            name,
            f"{f['forward_ms']:.0f}",
            f"{f['forward_ratio']:.2f}",
            f"{f['both_ms']:.0f}",
            f"{f['both_ratio']:.2f}",
        )
        for name, f in figures.items()
    ]
    print(
        tables.markdown(
            ("", "forward ms", "x limit", "forward+backward ms", "x limit"),
            rows,
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"backend": backend, "rows": figures}, file, indent=1)


def measure(args) -> dict:
    """Times of every row, and ratios to the `K` dense blocks of its kind."""
    rows = {}
    for gated in (False,) if args.plain else (False, True):
        kind = "gated" if gated else "plain"
        layers = competitors(args, gated)
        if args.only:
            keep = [n for n in layers if n in args.only or "dense" in n]
            layers = {n: layers[n] for n in keep}
        if len(layers) == 1:
            continue
        x = ops.convert_to_tensor(
            np.random.default_rng(0)
            .normal(size=(1, args.tokens, args.hidden_dim))
            .astype("float32")
        )
        forward = {n: forward_of(layer, x) for n, layer in layers.items()}
        both = {n: both_of(layer, x) for n, layer in layers.items()}
        limit = next(iter(layers))
        forward_times = timing.interleaved(forward, args.rounds)
        both_times = timing.interleaved(both, args.rounds)
        for name in layers:
            rows[f"{name}, {kind}"] = {
                "forward_ms": 1e3 * float(np.median(forward_times[name])),
                "forward_ratio": timing.median_ratio(
                    forward_times, name, limit
                ),
                "both_ms": 1e3 * float(np.median(both_times[name])),
                "both_ratio": timing.median_ratio(both_times, name, limit),
            }
    return rows


def competitors(args, gated: bool) -> dict:
    """Name to built layer; the limit comes first."""
    dim, inner = args.hidden_dim, args.intermediate_dim
    experts, top_k = args.num_experts, args.top_k
    settings = {
        "activation": "silu" if gated else "gelu",
        "gated": gated,
        "use_bias": not gated,
    }

    def ours(router, engine):
        layer = ku.MoEFeedForward(
            experts, inner, router=router, dispatch=engine, **settings
        )
        layer.build((None, None, dim))
        return layer

    def top(capacity_factor):
        return ku.TopKRouter(
            top_k,
            capacity_factor=capacity_factor,
            eval_capacity_factor=capacity_factor,
            load_balance_loss=0.0,
        )

    dense = DenseBlocks(top_k, inner, **settings)
    dense.build((None, None, dim))
    layers = {
        f"{top_k} dense blocks (limit)": dense,
        "capacity": ours(top(args.capacity_factor), "capacity"),
        "dropless": ours(top(None), "dropless"),
        "expert choice": ours(ku.ExpertChoiceRouter(float(top_k)), "capacity"),
    }
    if gated and not args.skip_peer:
        peer = qwen3(dim, inner, experts, top_k)
        check_equal(peer, layers["dropless"], dim, inner)
        layers["KerasHub Qwen3SparseMoeBlock"] = peer
    return layers


class DenseBlocks(keras.layers.Layer):
    """`count` feed-forward blocks on the same tokens, added up."""

    def __init__(self, count, inner, activation, gated, use_bias):
        super().__init__()
        self.inner, self.gated, self.use_bias = inner, gated, use_bias
        self.function = keras.activations.get(activation)
        self.count = count

    def build(self, input_shape):
        def dense(units):
            layer = keras.layers.Dense(units, use_bias=self.use_bias)
            return layer

        self.up = [dense(self.inner) for _ in range(self.count)]
        self.gate = [dense(self.inner) for _ in range(self.count)]
        self.down = [dense(input_shape[-1]) for _ in range(self.count)]
        for i in range(self.count):
            self.up[i].build(input_shape)
            if self.gated:
                self.gate[i].build(input_shape)
            self.down[i].build((*input_shape[:-1], self.inner))

    def call(self, x):
        total = 0.0
        for i in range(self.count):
            hidden = self.function(self.up[i](x))
            if self.gated:
                hidden = hidden * self.gate[i](x)
            total = total + self.down[i](hidden)
        return total


def qwen3(dim, inner, experts, top_k):
    """KerasHub's block, as its decoder builds it."""
    from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import (
        Qwen3SparseMoeBlock,
    )

    block = Qwen3SparseMoeBlock(dim, inner, experts, top_k, True)
    block.build((None, None, dim))
    return block


def check_equal(peer, ours, dim, inner):
    """Copies our weights into the peer and compares outputs."""
    gate = ours.experts.expert_up.kernel.value  # the activated one
    up = ours.experts.expert_gate.kernel.value
    down = ours.experts.expert_down.kernel.value
    values = {
        (dim, ours.num_experts): ours.router.kernel.value,
        (ours.num_experts, dim, 2 * inner): ops.concatenate([gate, up], -1),
        (ours.num_experts, inner, dim): down,
    }
    for weight in peer.weights:
        weight.assign(values[tuple(weight.shape)])
    x = np.random.default_rng(1).normal(size=(1, 64, dim)).astype("float32")
    expected = peer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    worst = np.abs(
        ops.convert_to_numpy(expected) - ops.convert_to_numpy(ours(x))
    ).max()
    if worst > 1e-4:
        raise RuntimeError(
            f"The peer and our layer hold the same weights but differ by "
            f"{worst}; no time would mean anything."
        )


def forward_of(layer, x):
    """A compiled function of no arguments: the layer at inference."""
    if keras.backend.backend() == "torch":
        import torch

        def run():
            with torch.no_grad():
                return first(layer(x))

        return run
    if keras.backend.backend() == "jax":
        trainable, other = state_of(layer)

        def call(trainable, other, x):
            return first(layer.stateless_call(trainable, other, x)[0])

        function = timing.compiled(call)
        return lambda: function(trainable, other, x)
    function = timing.compiled(lambda x: first(layer(x)))
    return lambda: function(x)


def both_of(layer, x):
    """A compiled function: value and gradients by weights and inputs."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        trainable, other = state_of(layer)

        def loss(trainable, x):
            out, _ = layer.stateless_call(
                trainable, other, x, **training(layer)
            )
            return ops.sum(ops.square(first(out)))

        function = timing.compiled(jax.value_and_grad(loss, argnums=(0, 1)))
        return lambda: function(trainable, x)
    if backend == "tensorflow":
        import tensorflow as tf

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                out = first(layer(x, **training(layer)))
                loss = tf.reduce_sum(out * out)
            sources = [v.value for v in layer.trainable_variables]
            return tape.gradient(loss, [*sources, x])

        function = timing.compiled(step)
        return lambda: function(x)
    import torch

    values = [v.value for v in layer.trainable_variables]
    x = x.clone().requires_grad_()

    def step():
        out = first(layer(x, **training(layer)))
        return torch.autograd.grad(
            (out * out).sum(), [*values, x], allow_unused=True
        )

    return step


def crossover(args) -> list:
    """Milliseconds of each engine at inference, for few tokens.

    With `--num-experts` and `--top-k`; `auto` is what `dispatch.choose` picks.
    The last column is one dense feed-forward on the same tokens.
    """
    layers = {}
    for name in (*dispatch.ENGINES, "auto"):
        layers[name] = ku.MoEFeedForward(
            args.num_experts,
            args.intermediate_dim,
            router=ku.TopKRouter(args.top_k, capacity_factor=None),
            gated=not args.plain,
            dispatch=name,
        )
        layers[name].build((None, None, args.hidden_dim))
    layers["one dense"] = DenseBlocks(
        1, args.intermediate_dim, "gelu", not args.plain, True
    )
    layers["one dense"].build((None, None, args.hidden_dim))
    rows = []
    for tokens in args.crossover_tokens:
        x = np.ones((1, tokens, args.hidden_dim), "float32")
        x += np.random.default_rng(0).normal(size=x.shape)
        x = ops.convert_to_tensor(x.astype("float32"))
        functions = {n: forward_of(layer, x) for n, layer in layers.items()}
        times = timing.interleaved(functions, args.rounds)
        rows.append(
            (
                str(tokens),
                *(f"{1e3 * np.median(times[n]):.2f}" for n in functions),
            )
        )
    return rows


def training(layer):
    """The keyword that makes a layer train; a peer may not know it."""
    return {"training": True} if isinstance(layer, ku.MoEFeedForward) else {}


def state_of(layer):
    """Trainable and other values, as `stateless_call` takes them."""
    return (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


def first(outputs):
    """The output alone, where a peer returns its router logits too."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


if __name__ == "__main__":
    main()

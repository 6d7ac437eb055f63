"""What a step of cached T5 generation costs, sparse against dense.

    KERAS_BACKEND=jax python -m benchmarks.generate

A step is timed as the difference of two calls of `generate` that run the same
program on the same shapes: their prompts leave `--few` and `--many` tokens to
write, so the encoder and the pass that fills the cache fall out. Greedy, no
stop tokens, no preprocessor. Every other decoder block is a mixture, Top-2.

The floor is what a step would cost if a mixture were nothing but the
arithmetic it cannot avoid: the dense step, plus the feed-forwards of exactly
the experts that the tokens of a step chose, less the dense ones they stand
for. Both are timed in this process as plain feed-forwards with a matrix for
each kernel, no routing and no stacking. How many experts a step touches is
counted in the routings of the text that was generated; each gets its share of
the batch's assignments, rounded up. The matrices change from round to round:
within a step nothing finds its kernels in a cache either.

Ratios are medians over interleaved rounds; milliseconds are medians.
"""

import argparse
import json
import math
import statistics
import time

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np
from keras import ops

from benchmarks import timing
from keras_upcycle import tables
from keras_upcycle.layers import call_context

AUTO, EVERY = "auto", "dense"  # what `dispatch` is set to
HEAD = (
    "batch",
    "E",
    "touched",
    "dense ms",
    "sparse ms",
    "x dense",
    "x every expert",
    "x floor",
)


def main() -> None:
    """Prints a Markdown table, one row for each batch and number of experts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-dim", type=int, default=768)
    parser.add_argument("--intermediate-dim", type=int, default=2048)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--source", type=int, default=32)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--many", type=int, default=40)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument(
        "--cases",
        nargs="*",
        default=["1x8", "16x8", "1x32"],
        help="batch x number of experts",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    dense = keras_hub.models.T5Seq2SeqLM(
        keras_hub.models.T5Backbone(
            vocabulary_size=args.vocabulary,
            num_layers=args.num_layers,
            num_heads=args.hidden_dim // 64,
            hidden_dim=args.hidden_dim,
            intermediate_dim=args.intermediate_dim,
            key_value_dim=64,
            activation="gelu",
            use_gated_activation=True,
            tie_embedding_weights=False,
        )
    )
    write_texts_that_differ(dense)
    print(
        f"{keras.backend.backend()}: D={args.hidden_dim} "
        f"F={args.intermediate_dim}, {args.num_layers} layers, "
        f"K={args.top_k}, {args.rounds} rounds"
    )
    figures = []
    for case in args.cases:
        batch, num_experts = map(int, case.split("x"))
        figures.append(measure(dense, batch, num_experts, args))
    rows = [
        (
            str(f["batch"]),
            str(f["num_experts"]),
            f"{f['touched']:.1f}",
            f"{f['dense_ms']:.2f}",
            f"{f['sparse_ms']:.2f}",
            f"{f['to_dense']:.2f}",
            f"{f['to_every_expert']:.2f}",
            f"{f['to_floor']:.2f}",
        )
        for f in figures
    ]
    print(tables.markdown(HEAD, rows))
    if args.json:
        backend = keras.backend.backend()
        with open(args.json, "w") as file:
            json.dump({"backend": backend, "rows": figures}, file, indent=1)


def write_texts_that_differ(model) -> None:
    """Makes the likeliest token the one whose number comes next.

    KerasHub draws T5's embeddings around 1: all tokens look alike, all
    examples write the same, and a batch chooses no more experts than one
    token does. These are drawn around 0, large beside what the blocks add.
    """
    embedding = model.backbone.token_embedding
    rng = np.random.default_rng(0)
    values = 8 * rng.standard_normal(embedding.embeddings.shape, "float32")
    embedding.embeddings.assign(values)
    embedding.reverse_embeddings.assign(np.roll(values, 1, axis=0).T)


def measure(dense, batch: int, num_experts: int, args) -> dict:
    """One row: a step of each competitor, and the floor."""
    sparse = ku.upcycle_model(
        dense,
        num_experts,
        router={"encoder": None, "decoder": ku.TopKRouter(args.top_k)},
        layers={"encoder": None, "decoder": "every_other"},
        seed=0,
    )
    competitors = {
        "dense": Generation(dense, batch, args),
        "sparse": Generation(sparse, batch, args, AUTO),
        "every": Generation(sparse, batch, args, EVERY),
    }
    for generation in competitors.values():
        generation.step()  # compiles
    touched, mixtures = touched_experts(sparse, competitors["sparse"], args)
    arithmetic = Arithmetic(batch, num_experts, round(touched), mixtures, args)
    arithmetic.run(0)
    times: dict[str, list[float]] = {name: [] for name in competitors}
    more = []
    for turn in range(args.rounds):
        for name, generation in competitors.items():
            times[name].append(generation.step())
        more += [arithmetic.run(20 * turn + i) for i in range(20)]
    more_seconds = statistics.median(more)
    times["floor"] = [seconds + more_seconds for seconds in times["dense"]]
    return {
        "batch": batch,
        "num_experts": num_experts,
        "touched": touched,
        **{
            f"{name}_ms": 1e3 * statistics.median(seconds)
            for name, seconds in times.items()
        },
        "to_dense": timing.median_ratio(times, "sparse", "dense"),
        "to_every_expert": timing.median_ratio(times, "sparse", "every"),
        "to_floor": timing.median_ratio(times, "sparse", "floor"),
    }


class Generation:
    """Calls of `generate` of one model, under one way to dispatch."""

    def __init__(self, model, batch, args, dispatch=None):
        model.compile(sampler="greedy")
        model.generate_function = None
        self.model, self.dispatch = model, dispatch
        self.function = model.make_generate_function()
        model.generate_function = None
        self.few, self.many = args.few, args.many
        length = args.many + 1  # of the decoder, prompt and all
        rng = np.random.default_rng(0)
        self.inputs = {
            "encoder_token_ids": rng.integers(
                3, args.vocabulary, (batch, args.source)
            ).astype("int32"),
            "encoder_padding_mask": np.ones((batch, args.source), "int32"),
            "decoder_token_ids": rng.integers(
                3, args.vocabulary, (batch, length)
            ).astype("int32"),
        }

    def step(self) -> float:
        """Seconds of one step."""
        seconds = self.seconds(self.many) - self.seconds(self.few)
        return seconds / (self.many - self.few)

    def seconds(self, tokens: int) -> float:
        """Seconds of a call that writes so many tokens."""
        start = time.perf_counter()
        self.generate(tokens)
        return time.perf_counter() - start

    def generate(self, tokens: int):
        """The ids of a call that writes so many tokens."""
        for layer in mixtures_of(self.model):
            layer.dispatch = self.dispatch
        ids = self.inputs["decoder_token_ids"]
        prompt = np.arange(ids.shape[1]) < ids.shape[1] - tokens
        mask = np.broadcast_to(prompt, ids.shape).astype("int32")
        self.model.generate_function = self.function
        outputs = self.model.generate(
            {**self.inputs, "decoder_padding_mask": mask}, stop_token_ids=None
        )
        return np.asarray(outputs["decoder_token_ids"])


def mixtures_of(model) -> list:
    """The mixtures of a model, in no special order."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, ku.MoEFeedForward)
    ]


def touched_experts(sparse, generation, args) -> tuple[float, int]:
    """Experts that a step's tokens chose, on average; number of mixtures."""
    ids = generation.generate(args.many)
    with call_context.record_calls() as calls:
        sparse.backbone(
            {
                **generation.inputs,
                "decoder_token_ids": ids,
                "decoder_padding_mask": np.ones_like(ids),
            }
        )
    found = []
    for call in calls:
        experts = ops.convert_to_numpy(call.routing.experts)
        by_step = experts.reshape(*ids.shape, -1).swapaxes(0, 1)
        # What the shorter prompt leaves to write beyond the longer one: a
        # step reads the token before the one it writes.
        steps = by_step[: args.many - args.few]
        found += [len(np.unique(chosen)) for chosen in steps]
    return statistics.mean(found), len(calls)


class Arithmetic:
    """What the floor adds to a dense step; see the module."""

    def __init__(self, batch, num_experts, touched, mixtures, args):
        self.touched, self.mixtures = touched, mixtures
        rng = np.random.default_rng(0)
        dim, inner = args.hidden_dim, args.intermediate_dim

        def kernel(*shape):
            values = rng.standard_normal(shape, "float32")
            return ops.convert_to_tensor(values / math.sqrt(shape[0]))

        # More than a step needs, so that the next round finds others.
        self.kernels = [
            (kernel(dim, inner), kernel(dim, inner), kernel(inner, dim))
            for _ in range(max(2 * touched, 8) * mixtures)
        ]
        rows = -(-batch * args.top_k // touched)
        self.share = kernel(rows, dim)
        self.batch = kernel(batch, dim)
        self.function = timing.compiled(feed_forwards)

    def run(self, turn: int) -> float:
        """Seconds of the touched experts, less those of the dense blocks."""
        start = turn * (self.touched + 1) * self.mixtures
        chosen = self.some(start, self.touched * self.mixtures)
        stood_for = self.some(start + len(chosen), self.mixtures)
        return self.seconds(self.share, chosen) - self.seconds(
            self.batch, stood_for
        )

    def some(self, start, count):
        size = len(self.kernels)
        return [self.kernels[(start + i) % size] for i in range(count)]

    def seconds(self, rows, kernels):
        start = time.perf_counter()
        self.function(rows, kernels)
        return time.perf_counter() - start


def feed_forwards(rows, kernels):
    """Gated feed-forwards on the same rows, added up."""
    total = 0.0
    for gate, up, down in kernels:
        hidden = ops.gelu(ops.matmul(rows, gate)) * ops.matmul(rows, up)
        total = total + ops.matmul(hidden, down)
    return total


if __name__ == "__main__":
    main()

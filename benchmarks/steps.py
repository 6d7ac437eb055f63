"""A training step of a whole model, sparse against dense, and against FLOPs.

    KERAS_BACKEND=jax python -m benchmarks.steps --model vit_s16
    KERAS_BACKEND=jax python -m benchmarks.steps --model t5_small --remat
    KERAS_BACKEND=jax python -m benchmarks.steps --model lm_64 --recipe none

What `estimate_upcycle` predicts is the ratio of the matrix products' forward
operations; for the study's language models, `lm_...`, attention's scores, which
count at their size, are added to it. The measured ratio is that of the time of
`fit`'s steps on the same batches.
Both models are compiled alike and run in one process, in turn. The optimizer's
pass over all parameters is in the measured time and not in the prediction:
`--optimizer sgd` makes it small.
"""

import argparse
import json
import statistics

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np

from benchmarks import timing
from keras_upcycle import tables
from keras_upcycle.demo import language_model


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="vit_s16")
    parser.add_argument(
        "--recipe", default="sparse_upcycling", help='"none": copies, Top-2'
    )
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--remat", action="store_true", help="also with rematerialised experts"
    )
    args = timing.parsed(parser)
    figures = measure(args)
    print(
        f"{figures['backend']}: {args.model}, {args.recipe}, "
        f"batch {args.batch_size}, E={args.num_experts}, {args.optimizer}, "
        f"{args.dtype}, medians of "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    print(
        tables.markdown(
            ("", "ms a step", "x dense", "FLOPs x dense", "measured / FLOPs"),
            [
                (
                    name,
                    f"{f['ms']:.0f}",
                    f"{f['ratio']:.3f}",
                    f"{f['flops_ratio']:.3f}",
                    f"{f['ratio'] / f['flops_ratio']:.3f}",
                )
                for name, f in figures["rows"].items()
            ],
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


def measure(args) -> dict:
    """Times of dense and sparse `fit`, and the predicted ratio."""
    keras.config.set_dtype_policy(args.dtype)
    make, data, lengths = MODELS[args.model]
    recipe = None if args.recipe == "none" else args.recipe
    dense = make()
    estimate = ku.estimate_upcycle(
        dense, args.num_experts, recipe=recipe, sequence_length=lengths
    )
    predicted = estimate.flops_ratio
    if args.model.startswith("lm_"):
        predicted = language_model.operations_ratio(
            estimate, lm_shape(args.model).attention_flops()
        )
    models = {"dense": dense}
    kinds = {"sparse": {}}
    if args.remat:
        kinds["sparse, remat"] = {"remat": True}
    for name, settings in kinds.items():
        models[name] = ku.upcycle_model(
            dense, args.num_experts, recipe=recipe, **settings
        )
    x, y = data(args.batch_size * args.steps)

    clock = timing.StepClock(args.steps)

    def run(model):
        model.fit(
            x,
            y,
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[clock],
        )
        return clock.seconds / args.steps

    for model in models.values():
        model.compile(
            optimizer=keras.optimizers.get(args.optimizer),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        run(model)  # what a first step sets up is not in any round
    times = timing.in_turn(
        {
            name: lambda model=model: run(model)
            for name, model in models.items()
        },
        args.rounds,
    )
    return {
        "backend": keras.backend.backend(),
        "model": args.model,
        "rows": {
            name: {
                "ms": 1e3 * statistics.median(times[name]),
                "ratio": timing.median_ratio(times, name, "dense"),
                "flops_ratio": 1.0 if name == "dense" else predicted,
            }
            for name in models
        },
    }


def vit(hidden_dim, num_heads):
    """A ViT/16 classifier of 224 x 224 images, as the paper's."""

    def make():
        return keras_hub.models.ViTImageClassifier(
            keras_hub.models.ViTBackbone(
                image_shape=(224, 224, 3),
                patch_size=16,
                num_layers=12,
                num_heads=num_heads,
                hidden_dim=hidden_dim,
                mlp_dim=4 * hidden_dim,
            ),
            num_classes=1000,
        )

    return make


def images(count):
    """Random images and labels."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(count, 224, 224, 3)).astype("float32"),
        rng.integers(1000, size=count),
    )


SOURCE, TARGET = 256, 64


def t5_small():
    """T5 1.1 Small."""
    return keras_hub.models.T5Seq2SeqLM(
        keras_hub.models.T5Backbone(
            vocabulary_size=32128,
            num_layers=8,
            num_heads=6,
            hidden_dim=512,
            intermediate_dim=1024,
            key_value_dim=64,
            activation="gelu",
            use_gated_activation=True,
            tie_embedding_weights=False,
        )
    )


def texts(count):
    """Random ids, no padding, and the ids that follow."""
    rng = np.random.default_rng(0)
    sizes = {"encoder": SOURCE, "decoder": TARGET}
    inputs = {}
    for stack, size in sizes.items():
        inputs[f"{stack}_token_ids"] = rng.integers(
            3, 32128, size=(count, size)
        ).astype("int32")
        inputs[f"{stack}_padding_mask"] = np.ones((count, size), "int32")
    return inputs, rng.integers(3, 32128, size=(count, TARGET))


def lm_shape(name):
    """The study's language model of a width, as in `lm_64`."""
    width = int(name.removeprefix("lm_"))
    return language_model.Shape(hidden_dim=width, intermediate_dim=4 * width)


def language(name):
    """The study's model, windows of bytes, and its length."""
    shape = lm_shape(name)

    def windows(count):
        ids = np.random.default_rng(0).integers(
            shape.vocabulary_size, size=(count, shape.length + 1)
        )
        return ids[:, :-1].astype("int32"), ids[:, 1:]

    return (lambda: language_model.build(shape)), windows, shape.length


# Of each: what makes it, its data, and its tokens an example.
MODELS = {
    **{name: language(name) for name in ("lm_32", "lm_64", "lm_128", "lm_256")},
    "vit_s16": (vit(384, 6), images, {"encoder": 197}),
    "vit_b16": (vit(768, 12), images, {"encoder": 197}),
    "t5_small": (t5_small, texts, {"encoder": SOURCE, "decoder": TARGET}),
}


if __name__ == "__main__":
    main()

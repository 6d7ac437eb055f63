"""A small Vision Transformer on CIFAR-10: trained, upcycled, compared.

What it shows
    A dense KerasHub ViT trains to near its plateau. Then it trains on twice
    from the same weights: as it is, and upcycled to 16 experts in its last
    three blocks (Expert Choice, C=2). Both continuations spend the same
    floating-point operations, so the dense one takes more steps. Capacity pays
    once the dense model is near its plateau; with far fewer dense epochs, or a
    wider model, do not expect a gain.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/vit_cifar10.py --output runs/vit_cifar10

    The data are read by `tfds.load("cifar10", data_dir=...)`, which downloads
    them unless `--data-dir` holds them. `KERAS_BACKEND` chooses the backend.
    After an interruption the same command goes on where it was: finished
    stages are read back, an unfinished one starts at its last whole epoch.
    `--epochs 2 --more-epochs 2 --limit 2000` tries everything in minutes.

    With a network, `--preset vit_base_patch16_224_imagenet21k --epochs 3
    --more-epochs 2 --learning-rate 1e-5` starts from a KerasHub preset; that
    wants a GPU.

Writes
    `results.json`, `curves.png`, `dense.keras` (after it trained on),
    `upcycled.keras`, and under `stages/` the weights and figures of every
    stage. `examples/ten_shot.py` measures the features of both models.

Expected result
    JAX, one seed (`examples/figures/cifar10.json`), both continuations at
    equal compute: test accuracy 64.17 % for the checkpoint, 68.32 % dense,
    68.56 % upcycled; test loss 0.896 and 0.898; train loss 0.750 and 0.741.
    The upcycled model fits better, and the test can hardly tell: without the
    spread over seeds neither is ahead.

Hardware and time
    Two CPU cores, shared with other work: 2,541 s for the checkpoint, 837 s
    and 946 s for the continuations.
"""

import argparse
import math
import sys

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import tfds_reader
import two_continuations
from augmentation import crop_and_flip

from keras_upcycle.demo.batches import Data
from keras_upcycle.training import progress


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; see the top of this file."""
    args = parse(arguments)
    try:
        output = two_continuations.open_output(args)
        task, prepare = dense_model(args)
        train, test = load_cifar10(args.data_dir, args.limit)
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def batch(rows, rng, training):
        images, labels = rows
        images = crop_and_flip(images, rng) if training else images
        return prepare(images), labels

    data = Data(train, test, batch)
    with progress.Reporter(every_round=True) as reporter:
        run(args, output, task, data, reporter)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="runs/vit_cifar10", help="folder of the results")
    add("--data-dir", help="folder that holds TFDS's cifar10")
    add("--preset", help="start from this KerasHub ViT, a name or a folder")
    add("--epochs", type=int, default=36, help="of the dense checkpoint")
    add("--more-epochs", type=int, default=12, help="of the upcycled model")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=1e-3)
    add("--seeds", type=int, default=1, help="pairs of continuations")
    add("--width", type=int, default=48, help="of the tokens")
    add("--intermediate", type=int, default=96, help="of a feed-forward")
    add("--blocks", type=int, default=6)
    add("--patch", type=int, default=8, help="side of a patch, in pixels")
    add("--experts", type=int, default=16)
    add("--capacity", type=float, default=2.0, help="Expert Choice's factor")
    add("--limit", type=int, help="use only so many images, to try things")
    return parser.parse_args(arguments)


def run(args, output, task, data, reporter):
    """All stages, each skipped where its result is kept in `output`."""
    options = {
        "router": ku.ExpertChoiceRouter(capacity_factor=args.capacity),
        "layers": "last_half",
    }
    # An expert takes whole tokens, so what it costs is rounded up.
    tokens = task.backbone.output.shape[1]
    taken = math.ceil(args.capacity * tokens / args.experts)
    charged = ku.ExpertChoiceRouter(taken * args.experts / tokens)
    two_continuations.run(
        args,
        output,
        task,
        data,
        reporter,
        title=f"CIFAR-10, a ViT of width {args.width}: more dense training or "
        f"{args.experts} experts",
        estimate=ku.estimate_upcycle(
            task, args.experts, router=charged, layers=options["layers"]
        ),
        options=options,
    )


def dense_model(args):
    """A ViT classifier that returns logits, and what prepares its images."""
    keras.utils.set_random_seed(0)
    if args.preset:
        task = keras_hub.models.ViTImageClassifier.from_preset(
            args.preset, num_classes=10, activation=None
        )
        converter = task.preprocessor and task.preprocessor.image_converter
        task.preprocessor = None  # images come prepared
        return task, preparation(task.backbone.image_shape[:2], converter)
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=args.patch,
        num_layers=args.blocks,
        num_heads=4,
        hidden_dim=args.width,
        mlp_dim=args.intermediate,
        # 16 tokens: each of 16 experts takes exactly its two (C=2). With a
        # class token it would take three of 17, which is not what C=2 costs.
        use_class_token=False,
    )
    task = keras_hub.models.ViTImageClassifier(
        backbone, num_classes=10, pooling="gap"
    )
    return task, preparation((32, 32))


def preparation(size, converter=None):
    """What makes bytes of pixels a model's input: -1 to 1, or a converter's.

    Args:
        size: Height and width that the model takes.
        converter: A KerasHub image converter, or `None`.
    """
    size = tuple(size)

    def prepare(images):
        images = images.astype("float32")
        if images.shape[1:3] != size:
            resized = keras.ops.image.resize(images, size)
            images = keras.ops.convert_to_numpy(resized)
        if converter is None:
            return images / 127.5 - 1.0
        return keras.ops.convert_to_numpy(converter(images))

    return prepare


def load_cifar10(data_dir, limit=None):
    """`(images, labels)` of the training and of the test split."""
    splits = []
    for split in ("train", "test"):
        part = split if limit is None else f"{split}[:{limit}]"
        loaded = tfds_reader.load("cifar10", part, data_dir)
        splits.append((loaded["image"], loaded["label"].astype("int32")))
    return splits


if __name__ == "__main__":
    sys.exit(main())

"""Ten examples a class: how good the features of saved classifiers are.

What it shows
    The upstream measure for vision of Sparse Upcycling (arXiv 2212.05055,
    section 4.1 and appendix A): what a classifier makes of an image right
    before its head, ridge regression from ten random examples of each class,
    and the accuracy on all test images, mean of five draws. Nothing is trained
    by gradients, and every model gets the same draws. `ku.few_shot_probe` is
    the same for features of your own.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/vit_cifar10.py --output runs/vit_cifar10
    python examples/ten_shot.py runs/vit_cifar10/dense.keras \\
        runs/vit_cifar10/upcycled.keras --dataset cifar10

    A model is a `.keras` file or a KerasHub preset, by name or folder. Its head
    is the Dense layer that makes its output; where that cannot be told,
    `--layer NAME` names the layer whose input the features are. Of a KerasHub
    backbone the output is taken. The data are read by `tfds.load(dataset,
    data_dir=...)`, which downloads them unless `--data-dir` holds them; any
    dataset with "image" and "label" will do whose images are of one size.
    Images are resized to the model's size, and go through its preprocessor;
    without one, pixels run from `--pixels -1 1`, as `vit_cifar10.py` has them.

Writes
    With `--output results.json`, every draw's accuracy; else nothing.

Expected result
    JAX, one seed of training, five draws (mean and standard deviation), the two
    models of `vit_cifar10.py --width 32 --intermediate 64 --blocks 4 --experts
    8 --epochs 6 --more-epochs 2 --limit 10000`, examples drawn from all 50,000
    images and judged on 10,000 (`examples/figures/ten_shot.json`): dense
    32.79 % ± 1.16, upcycled 32.08 % ± 1.22. So small and so briefly trained,
    neither is ahead: the spread over draws is larger than the difference.

Hardware and time
    Two CPU cores, shared with other work: a minute for both models; three
    minutes before that, to make them.
"""

import argparse
import pathlib
import sys

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np
import tfds_reader
import vit_cifar10

from keras_upcycle import tables
from keras_upcycle.demo.store import write_json
from keras_upcycle.training import progress

# Between a head and the output: nothing that has weights.
WITHOUT_WEIGHTS = (
    keras.layers.Activation,
    keras.layers.Softmax,
    keras.layers.Dropout,
)


def main(arguments: list[str] | None = None) -> int:
    """Measures every model; see the top of this file."""
    args = parse(arguments)
    try:
        train, test = (
            load_images(args, split, args.limit)
            for split in (args.train_split, args.test_split)
        )
        check_shots(train[1], args.shots)
        models = [prepared(name, args, train[0]) for name in args.models]
        with progress.Reporter() as reporter:
            found = [
                probe(name, *model, train, test, args, reporter)
                for name, model in zip(args.models, models, strict=True)
            ]
            reporter.line(table(args.models, found))
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        write(args, found)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", help="a .keras file or a KerasHub preset")
    add("--dataset", default="cifar10", help="of TFDS, with image and label")
    add("--data-dir", help="folder that holds the dataset")
    add("--train-split", default="train", help="to draw examples from")
    add("--test-split", default="test", help="to be judged")
    add("--shots", type=int, default=10, help="examples of a class")
    add("--draws", type=int, default=5, help="of these examples")
    add("--l2", type=float, default=1024.0, help="of the ridge regression")
    add("--seed", type=int, default=0, help="of the draws")
    add("--layer", help="the layer whose input the features are")
    add(
        "--pixels",
        nargs=2,
        type=float,
        default=(-1.0, 1.0),
        help="least and largest, of a model without a preprocessor",
    )
    add("--batch-size", type=int, default=256)
    add("--limit", type=int, help="use only so many images of a split")
    add("--output", help="a .json file for the results")
    return parser.parse_args(arguments)


def load_images(args, split, limit=None):
    """`(images, labels)` of a split."""
    part = split if limit is None else f"{split}[:{limit}]"
    loaded = tfds_reader.load(args.dataset, part, args.data_dir)
    if not {"image", "label"} <= loaded.keys():
        raise ValueError(
            '`--dataset` must have "image" and "label". Received: '
            f"{args.dataset}, with {', '.join(loaded)}. Choose a dataset for "
            "classification."
        )
    return loaded["image"], loaded["label"].astype("int32")


def check_shots(labels, shots) -> None:
    """Before features are computed for minutes: enough of each class?"""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < shots:
        raise ValueError(
            f"Each class must have {shots} examples to be drawn. Received: "
            f"{counts.min()} of class {classes[counts.argmin()]}. Raise "
            "`--limit` or lower `--shots`."
        )


# Models and their features.


def prepared(name, args, images):
    """A saved model up to its features, and what prepares its images."""
    model, converter = load(name)
    features = up_to_features(model, name, args.layer)
    shape = features.input_shape
    if len(shape) != 4 or shape[-1] != images.shape[-1]:
        raise ValueError(
            f"A model must take images of {images.shape[-1]} channels, as "
            f"`--dataset {args.dataset}` has them. Received: {name}, which "
            f"takes {shape}. Choose another dataset or model."
        )
    size = [
        own or given
        for own, given in zip(shape[1:3], images.shape[1:3], strict=True)
    ]
    return features, vit_cifar10.preparation(
        size, converter or scaling(*args.pixels)
    )


def scaling(least, largest):
    """What makes pixels from 0 to 255 run from one number to another."""
    return lambda images: least + images * ((largest - least) / 255)


def load(name: str):
    """A classifier, or a backbone, and its image converter if it has one."""
    if name.endswith(".keras"):
        if not pathlib.Path(name).is_file():
            raise FileNotFoundError(
                f"A model must be a file that is there. Received: {name}. "
                "examples/vit_cifar10.py writes such files."
            )
        model = keras.models.load_model(name, compile=False)
    else:
        try:
            model = keras_hub.models.ImageClassifier.from_preset(name)
        except (TypeError, OSError, ValueError):  # a backbone alone, it may be
            backbone = keras_hub.models.Backbone.from_preset(name)
            return backbone, own_converter(name)
    preprocessor = getattr(model, "preprocessor", None)
    return model, getattr(preprocessor, "image_converter", None)


def own_converter(preset: str):
    """The image converter of a backbone's preset; `None` if it has none."""
    try:
        return keras_hub.layers.ImageConverter.from_preset(preset)
    except (OSError, ValueError):
        return None


def up_to_features(model, name: str, layer: str | None = None) -> keras.Model:
    """The model that ends where the head begins.

    Args:
        model: A Keras model.
        name: Of the model, for messages.
        layer: Of the layer whose input is taken; the head if `None`.
    """
    if layer is None and isinstance(model, keras_hub.models.Backbone):
        return model
    head = model.get_layer(layer) if layer else head_of(model)
    taken = attribute(head, "input") if head else None
    if not isinstance(taken, keras.KerasTensor):
        raise ValueError(
            "A model must be a graph of layers that ends in a Dense head. "
            f"Received: {name}, a {type(model).__name__} "
            + (
                f"whose layer {layer!r} has no one input."
                if layer
                else "whose head cannot be told."
            )
            + " Name the layer whose input the features are by `--layer`: "
            f"{', '.join(each.name for each in model.layers[-5:])} are the "
            "last of it."
        )
    inputs = model.inputs
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, taken)


def head_of(model):
    """The Dense layer that makes a model's output; `None` if there is none."""
    outputs = attribute(model, "outputs") or []
    tensor = outputs[0] if len(outputs) == 1 else None
    while isinstance(tensor, keras.KerasTensor):
        layer = next(
            (
                each
                for each in model.layers
                if attribute(each, "output") is tensor
            ),
            None,
        )
        if isinstance(layer, keras.layers.Dense):
            return layer
        if not isinstance(layer, WITHOUT_WEIGHTS):
            return None
        tensor = attribute(layer, "input")
    return None


def attribute(layer, name):
    """A layer's `input` or `output`; `None` where it has none, or several."""
    try:
        return getattr(layer, name)
    except (AttributeError, ValueError):
        return None


def probe(name, model, prepare, train, test, args, reporter):
    """A model's `FewShotResult`."""
    count = sum(-(-len(part[0]) // args.batch_size) for part in (train, test))
    with reporter.steps(name, count) as step:
        made = [
            (features(model, prepare, images, args.batch_size, step), labels)
            for images, labels in (train, test)
        ]
    return ku.few_shot_probe(
        *made, shots=args.shots, l2=args.l2, draws=args.draws, seed=args.seed
    )


def features(model, prepare, images, batch_size, step):
    """Features of all images; over positions, if any, their mean."""
    found = []
    for start in range(0, len(images), batch_size):
        batch = prepare(images[start : start + batch_size])
        made = model.predict_on_batch(batch)
        found.append(made.reshape(len(made), -1, made.shape[-1]).mean(axis=1))
        step()
    return np.concatenate(found)


# What was found.


def table(names, found) -> str:
    """A row a model."""
    return tables.markdown(
        ("model", "mean", "std"),
        [
            (name, f"{100 * each.mean:.2f} %", f"{100 * each.std:.2f}")
            for name, each in zip(names, found, strict=True)
        ],
    )


def write(args, found) -> None:
    """All figures, with the settings that they were made with."""
    output = pathlib.Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("models", "output", "data_dir")
    }
    results = [
        {"model": name, **each._asdict()}
        for name, each in zip(args.models, found, strict=True)
    ]
    backend = {"backend": keras.backend.backend()}
    write_json(output, {**backend, "settings": settings, "results": results})


if __name__ == "__main__":
    sys.exit(main())

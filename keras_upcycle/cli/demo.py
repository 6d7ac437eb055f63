"""`keras-upcycle demo`."""

import argparse
import dataclasses
import pathlib

from keras_upcycle.cli import arguments, quiet


def add(subparsers) -> None:
    """Adds `demo`."""
    parser = arguments.add_command(
        subparsers,
        "demo",
        summary="upcycle a trained language model, and see it pay",
        description=(
            "Takes a small dense language model, trained on Python's own "
            "sources, and trains it on: as it is, and upcycled, with the same "
            "compute. A table, curves.png, results.json and upcycled.keras. "
            "Under four minutes on two CPU cores. With --images: a small ViT "
            "on handwritten digits, trained, upcycled and trained on."
        ),
        examples=arguments.examples(
            "keras-upcycle demo",
            "keras-upcycle demo --seeds 5 --output runs/five",
            "keras-upcycle demo --quick",
            "keras-upcycle demo --images",
        ),
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/demo"),
        metavar="DIR",
        help="folder for what the demo writes (default: runs/demo)",
    )
    parser.add_argument(
        "--seeds",
        type=arguments.count,
        metavar="N",
        help="how often everything is repeated (default: 3)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed and hardly any training: does it all work here?",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="a ViT on scikit-learn's digits instead of text",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `demo`."""
    with quiet.imports():
        from keras_upcycle.demo import images, text

    demo = images if args.images else text
    settings = demo.QUICK if args.quick else demo.Settings()
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=args.seeds)
    demo.run(args.output, settings)

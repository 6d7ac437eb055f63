"""`keras-upcycle demo`."""

import argparse
import dataclasses
import pathlib

from keras_upcycle.cli import arguments


def add(subparsers) -> None:
    """Adds `demo`."""
    parser = arguments.add_command(
        subparsers,
        "demo",
        summary="train, upcycle and compare a small ViT on handwritten digits",
        description=(
            "Trains a small dense ViT on scikit-learn's digits, upcycles it, "
            "trains both on with the same compute, and compares them: a "
            "table, curves.png, results.json and upcycled.keras. A few "
            "minutes on two CPU cores."
        ),
        examples=arguments.examples(
            "keras-upcycle demo",
            "keras-upcycle demo --seeds 5 --output runs/five",
            "keras-upcycle demo --quick",
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `demo`."""
    from keras_upcycle import demo

    settings = demo.QUICK if args.quick else demo.Settings()
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=args.seeds)
    demo.run(args.output, settings)

"""The `keras-upcycle` command. A subcommand is a function in `COMMANDS`."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from keras_upcycle.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: After the program's name; those of the process if `None`.

    Returns:
        The exit code: 0, or 2 for a command that cannot be carried out.
    """
    parser = argparse.ArgumentParser(
        prog="keras-upcycle",
        description="Sparse upcycling for Keras 3.",
        epilog=(
            "examples:\n"
            "  keras-upcycle demo\n"
            "  KERAS_BACKEND=tensorflow keras-upcycle demo --output runs/tf\n"
            "  keras-upcycle demo --help"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="command"
    )
    for add in COMMANDS:
        add(subparsers)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_demo(subparsers) -> None:
    """Adds `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="train, upcycle and compare a small ViT on handwritten digits",
        description=(
            "Trains a small dense ViT on scikit-learn's digits, upcycles it, "
            "trains both on with the same compute, and compares them: a "
            "table, curves.png, results.json and upcycled.keras. A few "
            "minutes on two CPU cores."
        ),
        epilog=(
            "examples:\n"
            "  keras-upcycle demo\n"
            "  keras-upcycle demo --seeds 5 --output runs/five\n"
            "  keras-upcycle demo --quick"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        type=_count,
        metavar="N",
        help="how often everything is repeated (default: 3)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed and hardly any training: does it all work here?",
    )
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    """Runs `demo`."""
    from keras_upcycle import demo

    settings = demo.QUICK if args.quick else demo.Settings()
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=args.seeds)
    demo.run(args.output, settings)


def _count(text):
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1. Received: {text}."
        )
    return number


COMMANDS = (add_demo,)

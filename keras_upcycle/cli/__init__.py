"""The `keras-upcycle` command. A subcommand is a function in `COMMANDS`.

Exit codes: 0 fine; 1 a check failed, such as a verification beyond its
tolerance; 2 a command that cannot be carried out; 128 and the signal's number
for one that was interrupted.

No file of this folder imports Keras before a command needs it, so `--help`
does not wait for it.
"""

import argparse
import functools
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from keras_upcycle.cli import (
    arguments,
    convert,
    demo,
    export,
    inspect,
    report,
    signals,
    verify,
)
from keras_upcycle.version import __version__

COMMANDS = (
    inspect.add,
    convert.add,
    verify.add,
    export.add,
    report.add,
    demo.add,
)
# What the library says of bad input, a missing package or a full disk.
EXPECTED = (ImportError, MemoryError, OSError, ValueError)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        given: After the program's name; those of the process if `None`.

    Returns:
        The exit code; see the module.
    """
    # TensorFlow, which KerasHub imports, reads it when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = build_parser().parse_args(given)
    try:
        with signals.as_exceptions(), warnings.catch_warnings():
            warnings.showwarning = functools.partial(_warn, args.command)
            return args.run(args) or 0
    except EXPECTED as error:
        return _failed(args, error)
    except KeyboardInterrupt as stop:
        print(f"keras-upcycle {args.command}: interrupted", file=sys.stderr)
        return signals.exit_code(stop)
    except Exception as error:
        # A bug, ours or another's: 1 would say that a check had failed.
        traceback.print_exc()
        return _failed(args, error)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="keras-upcycle",
        description=(
            "Sparse upcycling for Keras 3: a trained dense Transformer "
            "becomes a mixture of experts."
        ),
        epilog=arguments.examples(
            "keras-upcycle inspect vit_base_patch16_224_imagenet",
            "keras-upcycle convert ./vit ./vit_moe --num-experts 8",
            "keras-upcycle convert dense.keras moe.keras --num-experts 4",
            "keras-upcycle verify ./vit ./vit_moe",
            "keras-upcycle export ./llama_moe ./mixtral",
            "keras-upcycle report routers.csv --plot load.png",
            "KERAS_BACKEND=tensorflow keras-upcycle demo --output runs/tf",
            "keras-upcycle convert --help",
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
    return parser


def _failed(args: argparse.Namespace, error: Exception) -> int:
    """Says in one line why a command was not carried out."""
    text = _one_line(error) or type(error).__name__
    print(f"keras-upcycle {args.command}: error: {text}", file=sys.stderr)
    if getattr(args, "json", False):
        print(json.dumps({"command": args.command, "error": text}))
    return 2


def _warn(command: str, message: Warning | str, *where: Any, **more: Any):
    """As `warnings.showwarning`, for people who do not read our source."""
    del where, more
    text = _one_line(message)
    print(f"keras-upcycle {command}: warning: {text}", file=sys.stderr)


def _one_line(message: Any) -> str:
    # Keras sets what matters in bold.
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(message)).split())

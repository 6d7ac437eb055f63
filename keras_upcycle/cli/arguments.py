"""Arguments that commands share, and what the words of an argument may be."""

import argparse
import math
import re
from typing import Any

# The words of an option by the stack they are for; `None` stands for all.
ByStack = dict[str | None, list[str]]

TOLERANCE = 1e-4

MODEL_HELP = (
    "a .keras file, a KerasHub preset folder, or a preset's name such as "
    "vit_base_patch16_224_imagenet, hf://user/model or "
    "kaggle://user/model/keras/variant"
)


def add_command(
    subparsers,
    name: str,
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command, with examples at the end of its help."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\n  ".join(("examples:", *lines))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on standard output, and nothing else there",
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds `--inputs`."""
    parser.add_argument(
        "--inputs",
        metavar="NPZ",
        help=(
            "a NumPy file with an array for each of the model's inputs, as "
            "after preprocessing; without it inputs are made up"
        ),
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        metavar="POLICY",
        help=(
            "load a preset with this dtype policy, such as mixed_bfloat16; to "
            "be trained a model needs float32 weights, which bfloat16 does "
            "not give; a .keras file keeps its own"
        ),
    )


def by_stack(text: str) -> ByStack:
    """Words between commas; `stack=` before one begins a stack's.

    Example:
        >>> by_stack("1,3")
        {None: ['1', '3']}
        >>> by_stack("encoder=1,3,decoder=none")
        {'encoder': ['1', '3'], 'decoder': ['none']}
    """
    found: ByStack = {}
    stack = None
    for part in re.split("[,;]", text):
        name, equals, word = (piece.strip() for piece in part.rpartition("="))
        if equals:
            if not name or name in found or None in found:
                raise argparse.ArgumentTypeError(
                    "must be one setting, or each stack once with its own, as "
                    f"in encoder=all,decoder=none. Received: {text}."
                )
            stack = name
        if not word:
            raise argparse.ArgumentTypeError(
                f"must have a word between commas. Received: {text}."
            )
        found.setdefault(stack, []).append(word)
    return found


def lengths(text: str) -> int | dict[str, int]:
    """Tokens of an example, one number or each stack's."""
    found = by_stack(text)
    if any(len(words) != 1 for words in found.values()):
        raise argparse.ArgumentTypeError(
            "must be one number, or one for each stack, as in "
            f"encoder=512,decoder=114. Received: {text}."
        )
    numbers: dict[Any, Any] = {
        stack: count(words[0]) for stack, words in found.items()
    }
    return numbers.get(None, numbers)


def rates(text: str) -> tuple[float, float]:
    """Two positive numbers, operations and bytes a second."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if len(found) != 2 or not all(0 < each < float("inf") for each in found):
        raise argparse.ArgumentTypeError(
            "must be two numbers above 0, operations and bytes a second, as "
            f"in 1e14,5e10. Received: {text}."
        )
    return found[0], found[1]


def count(text: str) -> int:
    """An integer of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1. Received: {text}."
        )
    return number


def seed(text: str) -> int:
    """An integer that every backend takes for a seed."""
    # It brings NumPy, for which `--help` is not to wait.
    from keras_upcycle import checks

    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= checks.LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"must be an integer from 0 to {checks.LARGEST_SEED}. Received: "
            f"{text}."
        )
    return number


def tolerance(text: str) -> float:
    """A finite number of at least 0."""
    value = number(text)
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(
            f"must be a number of at least 0, such as 1e-4. Received: {text}."
        )
    return value


def number(text: str) -> float | None:
    """A finite number; `None` for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

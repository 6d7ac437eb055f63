"""What a command says on standard output: words, or one JSON object."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    Attributes:
        text: For people.
        record: The same for programs: what JSON can hold, and floats that
            need not be finite.
        passed: Whether the checks that the command made all passed.
    """

    text: str
    record: Mapping[str, Any]
    passed: bool = True


def give(
    command: Callable[[argparse.Namespace], Answer], args: argparse.Namespace
) -> int:
    """Runs a command, prints its answer and returns the exit code.

    Whatever else is printed meanwhile, by Keras say or a download, goes to
    standard error.
    """
    with contextlib.redirect_stdout(sys.stderr):
        answer = command(args)
    if args.json:
        record = {"command": args.command, "passed": answer.passed}
        print(json.dumps(_finite({**record, **answer.record})))
    else:
        print(answer.text)
    return 0 if answer.passed else 1


def fields(result: Any) -> dict[str, Any]:
    """A report or an estimate, as a record holds it."""
    return dataclasses.asdict(result)


def _finite(value):
    """The value with `None` for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

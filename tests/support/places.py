"""Where the checkout is, and scripts of this folder in their own process."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]


def run_script(name: str, *arguments: str | Path) -> str:
    """What a script of this folder prints; its error fails the test.

    Args:
        name: Of the file.
        *arguments: Of its command line.
    """
    paths = (ROOT, SUPPORT, ROOT / "tests")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", SUPPORT / name, *arguments],
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def gaps_in(printed: str) -> list[tuple[str, float]]:
    """Lines of a name and a number."""
    lines = [line.rsplit(" ", 1) for line in printed.splitlines()]
    return [(name, float(gap)) for name, gap in lines]

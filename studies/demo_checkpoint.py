"""Trains the dense model that lies in the package, for the demo.

    python -m studies.demo_checkpoint          # two minutes on two cores

It is the study's checkpoint of seed 0; its record lies beside it.
"""

import argparse
import pathlib

import keras_upcycle  # noqa: F401  before keras: chooses the backend

# isort: split
from keras_upcycle.demo import text
from keras_upcycle.training import progress
from studies import plans

PLAN = plans.language()


def main() -> None:
    """Writes `dense.keras` and `dense.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=text.HERE)
    parser.add_argument("--steps", type=int, default=PLAN.checkpoint)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with progress.Reporter() as reporter:
        text.make_checkpoint(
            args.steps,
            PLAN.base["checkpoint_rate"],
            0,
            args.output,
            callbacks=[reporter.curve("dense checkpoint")],
        )


if __name__ == "__main__":
    main()

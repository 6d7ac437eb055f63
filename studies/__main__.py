"""Does upcycling pay? Dense continued, upcycled, from scratch, equal compute.

    python -m studies headline          # +25 %, five seeds: half an hour
    python -m studies                   # everything: some hours
    python -m studies curves --seeds 0 1

A small causal language model learns the sources of Python's own standard
library, which need no download; `--data` takes a folder or a file of text, or
a set of TensorFlow Datasets (`--data tfds:tiny_shakespeare`). `--study images`
is a Vision Transformer on CIFAR-10, `--study spans` a T5 that fills holes in
the same text and then answers SST-2; their data come from TensorFlow Datasets.
Every finished run is one line of JSON in `runs/study/rows.jsonl`; a study that
was stopped goes on where it was, and prints its tables at the end. The rows
behind the README lie in `benchmarks/results/study.jsonl`
(`python -m studies.tables`, `python -m studies.figures`). Two cores are enough;
nothing else should run meanwhile.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
FOLDER = pathlib.Path("runs/study")
# Each program is compiled once, not once for each start of the command.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import keras_upcycle  # noqa: F401  before keras: chooses the backend

# isort: split
from keras_upcycle.training import progress
from studies import data, opening, parts, plans, rows, runs, tables


def main(arguments: list[str] | None = None) -> int:
    """Runs parts of a study."""
    args = parse(arguments)
    plan = plans.chosen(args.study, args.width, args.blocks)
    with progress.Reporter() as reporter:
        try:
            setting = opening.open_setting(args, plan)
        except (OSError, ImportError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        reporter.line(f"{plan.about}: {setting.name}")
        study = runs.Study(
            setting, rows.Rows(args.rows), args.output / "checkpoints", reporter
        )
        for name in args.parts or plan.parts:
            part = parts.PARTS[name]
            reporter.line(f"\n{part.name}: {part.about}")
            part.run(study, args.seeds)
        reporter.line("\n" + tables.everything(study.rows.all, plan))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n"
        + "\n".join(f"  {p.name:12} {p.about}" for p in parts.PARTS.values()),
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="part")
    add("--study", choices=plans.PLANS, default="language")
    add("--seeds", type=int, nargs="+", help="instead of the part's own")
    add("--data", help=data.read.__doc__.splitlines()[0])
    add("--data-dir", help="folder of TFDS's data")
    add(
        "--sst2",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="tsv files of sentences and labels; else TFDS's glue/sst2",
    )
    add("--no-sst2", action="store_true", help="leave that out of `spans`")
    add("--rows", type=pathlib.Path, default=FOLDER / "rows.jsonl")
    add("--output", type=pathlib.Path, default=FOLDER)
    add("--width", type=int, help="of the dense model")
    add("--blocks", type=int, help="of the dense model")
    add("--batch-size", type=int, default=64)
    args = parser.parse_args(arguments)
    unknown = [name for name in args.parts if name not in parts.PARTS]
    if unknown:
        parser.error(
            f"unknown parts {unknown}; known: {', '.join(parts.PARTS)}"
        )
    plan = plans.PLANS[args.study]()
    lacking = [
        name
        for name in args.parts
        if name not in plan.parts and not plan.sweeps.get(name)
    ]
    if lacking:
        parser.error(
            f"the study {args.study!r} has no parts {lacking}; it has: "
            f"{', '.join(plan.parts)}"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())

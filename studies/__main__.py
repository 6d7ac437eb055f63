"""Does upcycling pay? Dense continued, upcycled, from scratch, equal compute.

    python -m studies headline          # +25 %, five seeds: half an hour
    python -m studies                   # everything: some hours
    python -m studies curves --seeds 0 1

A small causal language model learns the sources of Python's own standard
library, which need no download; `--data` takes a folder or a file of text, or
a set of TensorFlow Datasets (`--data tfds:tiny_shakespeare`).
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
from keras_upcycle import progress
from keras_upcycle.demo import language_model
from studies import data, language, parts, rows, tables


def main(arguments: list[str] | None = None) -> int:
    """Runs parts of the study."""
    args = parse(arguments)
    with progress.Reporter() as reporter:
        try:
            text = data.read(args.data, args.data_dir)
        except (OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sizes = (len(text.train), len(text.validation), len(text.test))
        reporter.line(
            f"{text.name}: {text.files} files; bytes to train on, to choose "
            f"by and to test on: {sizes[0]:,}, {sizes[1]:,}, {sizes[2]:,}."
        )
        study = language.Study(
            text,
            language_model.Shape(
                num_layers=args.blocks,
                hidden_dim=args.width,
                intermediate_dim=4 * args.width,
            ),
            rows.Rows(args.rows),
            args.output / "checkpoints",
            args.batch_size,
            reporter,
        )
        for name in args.parts or parts.PARTS:
            part = parts.PARTS[name]
            reporter.line(f"\n{part.name}: {part.about}")
            part.run(study, args.seeds)
        reporter.line("\n" + tables.everything(study.rows.all))
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
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="instead of the part's own"
    )
    parser.add_argument("--data", help=data.read.__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of TFDS's data")
    parser.add_argument("--rows", type=pathlib.Path, default=parts.RESULTS)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(arguments)
    unknown = [name for name in args.parts if name not in parts.PARTS]
    if unknown:
        parser.error(
            f"unknown parts {unknown}; known: {', '.join(parts.PARTS)}"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())

"""What `keras-upcycle convert` adds to what it is made of.

    KERAS_BACKEND=jax python -m benchmarks.command

A ViT-B/16 classifier with random weights is saved as a preset and converted by
the command, without the verification, in this process. It is compared with

- the same by hand: `from_preset`, `upcycle_model`, `save_to_preset`;
- the bytes: that `upcycle_model`, plus reading the preset's bytes and writing
  the result's as plain files. Building the dense model anew is not in there.
"""

import argparse
import contextlib
import gc
import io
import json
import pathlib
import statistics
import tempfile
import time

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub

from benchmarks import convert
from keras_upcycle import cli, tables

COLUMNS = ("command", "by_hand", "upcycle_model", "read", "write")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--hidden-dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary one")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        save_dense(args.num_layers, args.hidden_dim, folder / "dense")
        by_hand(folder, args.num_experts)  # warm
        remove(folder / "moe")
        rounds = [
            one_round(folder, args.num_experts) for _ in range(args.rounds)
        ]
    figures = {
        "backend": keras.backend.backend(),
        "num_experts": args.num_experts,
        "rounds": rounds,
        "ratio_to_by_hand": median(rounds, "command", ("by_hand",)),
        "ratio_to_bytes": median(
            rounds, "command", ("upcycle_model", "read", "write")
        ),
    }
    print(
        f"{figures['backend']}: {tables.size(rounds[0]['bytes_read'])} read, "
        f"{tables.size(rounds[0]['bytes_written'])} written. Median of "
        f"{args.rounds} rounds: the command takes "
        f"{figures['ratio_to_by_hand']:.2f} times as long as the same by hand, "
        f"and {figures['ratio_to_bytes']:.2f} times as long as `upcycle_model` "
        "and the bytes. Seconds:\n"
    )
    stages = tuple(rounds[0]["seconds"])
    print(
        tables.markdown(
            (*stages, *COLUMNS),
            [
                [
                    *(f"{row['seconds'][stage]:.2f}" for stage in stages),
                    *(f"{row[name]:.2f}" for name in COLUMNS),
                ]
                for row in rounds
            ],
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


def save_dense(num_layers, hidden_dim, path) -> None:
    """A preset of a task whose weights are random."""
    backbone = convert.vit_b16(num_layers, hidden_dim, 4 * hidden_dim)
    model = keras_hub.models.ViTImageClassifier(backbone, num_classes=1000)
    model.save_to_preset(str(path))


def one_round(folder, num_experts) -> dict:
    """Seconds of the command, of its stages and of what it is compared with."""
    dense, moe = folder / "dense", folder / "moe"
    command = ["convert", str(dense), str(moe), "--no-verify", "--json"]
    command += ["--num-experts", str(num_experts)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        seconds, code = timed(cli.main, command)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}.")
    remove(moe)
    hand, upcycling = timed(by_hand, folder, num_experts)
    read, data = timed(read_files, dense)
    bytes_read = sum(map(len, data))
    data = read_files(moe)
    remove(moe)
    write, _ = timed(write_files, moe, data)
    remove(moe)
    return {
        "seconds": json.loads(printed.getvalue())["seconds"],
        "command": seconds,
        "by_hand": hand,
        "upcycle_model": upcycling,
        "read": read,
        "write": write,
        "bytes_read": bytes_read,
        "bytes_written": sum(map(len, data)),
    }


def by_hand(folder, num_experts) -> float:
    """What the command does; the seconds of its middle part."""
    classifier = keras_hub.models.ViTImageClassifier
    dense = classifier.from_preset(str(folder / "dense"))
    seconds, moe = timed(ku.upcycle_model, dense, num_experts)
    moe.save_to_preset(str(folder / "moe"))
    return seconds


def timed(function, *arguments):
    """`(seconds, result)`, with the garbage of what came before collected."""
    gc.collect()
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def read_files(folder) -> list[bytes]:
    """The contents of the files in a folder."""
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def write_files(folder, contents) -> None:
    """A file for each."""
    folder.mkdir()
    for number, data in enumerate(contents):
        (folder / str(number)).write_bytes(data)


def remove(folder) -> None:
    """A folder of files."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def median(rounds, above, below) -> float:
    """Of the ratios, round by round."""
    return statistics.median(
        row[above] / sum(row[name] for name in below) for row in rounds
    )


if __name__ == "__main__":
    main()

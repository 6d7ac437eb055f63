"""What `keras-upcycle convert` adds to the conversion and to the disk.

    KERAS_BACKEND=jax python -m benchmarks.command
    KERAS_BACKEND=jax python -m benchmarks.command --verify

A ViT-B/16 classifier with random weights is saved as a preset and converted by
the command, in this process. The yardstick is `upcycle_model` itself, as timed
within the command, plus reading the preset's bytes and writing the result's as
plain files, each file forced to the disk or not as the command leaves it: not.
"""

import argparse
import contextlib
import io
import json
import pathlib
import statistics
import tempfile
import time

import keras_upcycle  # noqa: F401, before keras: chooses the backend

# isort: split
import keras
import keras_hub

from benchmarks import convert
from keras_upcycle import cli, tables


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--hidden-dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--folder", help="where to write; a temporary one")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        save_dense(args.num_layers, args.hidden_dim, folder / "dense")
        rounds = [one_round(args, folder) for _ in range(args.rounds)]
    figures = {
        "backend": keras.backend.backend(),
        "num_experts": args.num_experts,
        "rounds": rounds,
        "time_ratio": statistics.median(r["ratio"] for r in rounds),
    }
    print(
        f"{figures['backend']}: {tables.size(rounds[0]['bytes_read'])} read, "
        f"{tables.size(rounds[0]['bytes_written'])} written; median ratio "
        f"{figures['time_ratio']:.2f}"
    )
    stages = list(rounds[0]["seconds"])
    header = (*stages, "command", "read", "write", "yardstick", "ratio")
    print(
        tables.markdown(
            header,
            [
                [
                    *(f"{r['seconds'][stage]:.2f}" for stage in stages),
                    *(f"{r[name]:.2f}" for name in header[len(stages) :]),
                ]
                for r in rounds
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


def one_round(args, folder) -> dict:
    """Seconds of the command, of its stages and of the yardstick."""
    dense, moe = folder / "dense", folder / "moe"
    command = ["convert", str(dense), str(moe), "--json"]
    command += ["--num-experts", str(args.num_experts)]
    if not args.verify:
        command.append("--no-verify")
    printed = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(printed):
        code = cli.main(command)
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}.")
    record = json.loads(printed.getvalue())
    read, (_, bytes_read) = timed(read_files, dense)
    _, (data, bytes_written) = timed(read_files, moe)
    for path in moe.iterdir():
        path.unlink()
    moe.rmdir()
    write, _ = timed(write_files, folder / "plain", data)
    yardstick = record["seconds"]["convert"] + read + write
    return {
        "seconds": record["seconds"],
        "command": seconds,
        "read": read,
        "write": write,
        "yardstick": yardstick,
        "ratio": seconds / yardstick,
        "bytes_read": bytes_read,
        "bytes_written": bytes_written,
    }


def timed(function, *arguments):
    """`(seconds, result)`."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def read_files(folder):
    """`(contents, bytes)` of the files in a folder."""
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    return contents, sum(map(len, contents))


def write_files(path, contents) -> None:
    """Writes each, and leaves nothing behind."""
    for data in contents:
        path.write_bytes(data)
        path.unlink()


if __name__ == "__main__":
    main()

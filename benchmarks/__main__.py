"""Every benchmark on every installed backend: one table page, one JSON each.

    python -m benchmarks                      # what the README quotes
    python -m benchmarks layer growth --backends jax
    python -m benchmarks --list

Each benchmark runs in a process of its own for each backend, and compares its
competitors within it. Nothing else should run on the machine meanwhile.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")
# Name: module, arguments, backends it makes sense on.
SUITES = {
    "layer": ("layer", [], BACKENDS),
    "layer-gated": ("layer", ["--gated"], BACKENDS),
    "layer-bfloat16": ("layer", ["--gated", "--dtype", "bfloat16"], BACKENDS),
    "growth": ("growth", [], BACKENDS),
    "crossover": ("crossover", [], BACKENDS),
    "crossover-training": ("crossover", ["--training"], BACKENDS),
    "step-vit": ("steps", ["--model", "vit_s16", "--remat"], BACKENDS),
    "step-vit-b16": (
        "steps",
        ["--model", "vit_b16", "--batch-size", "8"],
        BACKENDS[:1],
    ),
    "step-t5": ("steps", ["--model", "t5_small", "--remat"], BACKENDS),
    "step-vit-ds-moe": (
        "steps",
        ["--model", "vit_s16", "--recipe", "ds_moe", "--num-experts", "16"],
        BACKENDS,
    ),
    **{
        f"step-lm-{width}": (
            "steps",
            shlex.split(
                f"--model lm_{width} --recipe none --num-experts 16 "
                f"--batch-size 64 --steps {steps} --rounds 7"
            ),
            BACKENDS,
        )
        # A round lasts seconds at every width.
        for width, steps in ((32, 40), (64, 40), (128, 40), (256, 6))
    },
    "step-lm-256-sgd": (
        "steps",
        shlex.split(
            "--model lm_256 --recipe none --num-experts 16 "
            "--batch-size 64 --steps 6 --rounds 7 --optimizer sgd"
        ),
        BACKENDS,
    ),
    "monitor": ("monitor", ["--width", "128", "--blocks", "4"], BACKENDS[:2]),
    "default-moe": ("default_moe", [], BACKENDS),
    "all-experts": ("all_experts", [], BACKENDS),
    "convert-vit": ("convert", ["--model", "vit_b16"], BACKENDS),
    "convert-t5": ("convert", ["--model", "t5_base"], BACKENDS[:2]),
    "command-vit": ("command", [], BACKENDS),
    "generate": ("generate", [], BACKENDS[:1]),
}
# Only when asked for by name: an hour and more.
LONG = {"sweep": ("layer", ["--sweep"], BACKENDS)}


def main() -> int:
    """Runs what is asked for; the exit code says whether all of it ran."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="suite")
    parser.add_argument("--list", action="store_true", help="name the suites")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the pages and figures",
    )
    args = parser.parse_args()
    known = SUITES | LONG
    if args.list:
        for name, (module, options, _) in known.items():
            print(f"{name:20} benchmarks.{module} {' '.join(options)}")
        return 0
    unknown = [name for name in args.suites if name not in known]
    if unknown:
        parser.error(f"unknown suites {unknown}; known: {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for backend in args.backends or BACKENDS:
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed: left out.")
            continue
        for name in args.suites or SUITES:
            module, options, backends = known[name]
            if backend in backends and not run(
                name, module, options, backend, args.out
            ):
                failed.append(f"{name} on {backend}")
    if failed:
        print(f"Did not run to the end: {', '.join(failed)}.")
    return 1 if failed else 0


def run(name, module, options, backend, out: Path) -> bool:
    """One benchmark; its page and figures are written if it ends well."""
    command = ["python", "-m", f"benchmarks.{module}", *options]
    print(f"\n== KERAS_BACKEND={backend} {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command[1:], "--json", figures],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait():
            return False
        record = {
            "command": f"KERAS_BACKEND={backend} {shlex.join(command)}",
            "machine": machine(backend),
            "seconds": round(time.perf_counter() - start),
            "figures": json.loads(figures.read_text()),
        }
    stem = out / f"{name}-{backend}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(
        f"`{record['command']}`\n\n{record['machine']}\n\n{''.join(lines)}"
    )
    return True


def machine(backend: str) -> str:
    """What the figures were taken on, in words."""
    versions = [
        f"{package} {metadata.version(package)}"
        for package in ("keras", "keras-hub", backend)
    ]
    return (
        f"{os.cpu_count()} cores of {_processor()}, Python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def _processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())

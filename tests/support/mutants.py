"""Whether the tests catch a broken line: one line in each room, one at a time.

    python tests/support/mutants.py             # some minutes, on JAX
    python tests/support/mutants.py routing cli
    python tests/support/mutants.py --backend tensorflow

Each line is broken in a copy of the checkout, and the tests of its own room
run there. A mutant that lives says what no test of the room looks at.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Room, file, the line's text, what stands there instead.
MUTANTS = (
    (
        "keras_internals",
        "variables.py",
        "*layer._non_trainable_variables,",
        "",
    ),
    (
        "backend",
        "jax_products.py",
        '_product("...nd,...nf->...df", rows, gradient)',
        '_product("...nd,...nf->...df", rows, -gradient)',
    ),
    (
        "state",
        "random_state.py",
        "if len(values) == len(states):",
        "if len(values) > len(states):",
    ),
    (
        "optimizers",
        "../keras_internals/optimizer_classes.py",
        "variable, learning_rate * factor)",
        "variable, learning_rate / factor)",
    ),
    (
        "routing",
        "functional.py",
        "return -((-share.numerator * num_tokens) // share.denominator)",
        "return (share.numerator * num_tokens) // share.denominator",
    ),
    (
        "layers",
        "packings.py",
        "place = ranks + ops.where(ranks < slots, flat * slots, first)",
        "place = ranks + ops.where(ranks <= slots, flat * slots, first)",
    ),
    (
        "families",
        "surgery.py",
        "b.trainable = a.trainable",
        "b.trainable = True",
    ),
    (
        "analysis",
        "similarity.py",
        "squares[e] += float(ops.sum(ops.square(kernel[e] - mean)))",
        "squares[e] += float(ops.sum(ops.square(kernel[0] - mean)))",
    ),
    (
        "conversion",
        "pairing.py",
        "relation = STACKED if alike else CUT",
        "relation = STACKED",
    ),
    (
        "training",
        "freezing.py",
        "variable.trainable = trainable",
        "variable.trainable = True",
    ),
    (
        "methods",
        "drop_upcycling.py",
        "count = int(width * self.ratio)",
        "count = int(width * (1 - self.ratio))",
    ),
    (
        "demo",
        "summary.py",
        "[ends[UPCYCLED, seed] - ends[CONTINUED, seed] for seed in seeds]",
        "[ends[CONTINUED, seed] - ends[UPCYCLED, seed] for seed in seeds]",
    ),
    ("cli", "paths.py", "if os.path.lexists(path):", "if path.is_file():"),
)
# What stands for the line of `backend` on the others.
OF_BACKEND = {
    "tensorflow": (
        "tensorflow.py",
        "return tf.add_n(by_rows), by_weights",
        "return tf.add_n(by_rows[:1]), by_weights",
    ),
    "torch": (
        "torch.py",
        "return (index + first[:, None]).flatten()",
        "return (index + first[:1, None]).flatten()",
    ),
}
# Rooms whose lines the others test too: the rest is marked `one_backend`.
EVERYWHERE = (
    "keras_internals",
    "backend",
    "state",
    "optimizers",
    "routing",
    "layers",
    "analysis",
    "training",
    "methods",
)


def main() -> int:
    """Breaks and tests; the exit code says whether all were caught."""
    rooms = [room for room, *_ in MUTANTS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rooms", nargs="*", metavar="room")
    parser.add_argument(
        "--backend", default="jax", choices=("jax", *OF_BACKEND)
    )
    args = parser.parse_args()
    if args.backend != "jax":
        rooms = [room for room in rooms if room in EVERYWHERE]
    if unknown := set(args.rooms) - set(rooms):
        parser.error(f"no mutants in {sorted(unknown)}; known: {rooms}")
    lived = []
    for room, file, old, new in MUTANTS:
        if room not in (args.rooms or rooms):
            continue
        if room == "backend":
            file, old, new = OF_BACKEND.get(args.backend, (file, old, new))
        start = time.perf_counter()
        caught = is_caught(room, file, old, new, args.backend)
        seconds = time.perf_counter() - start
        verdict = "caught" if caught else "LIVES"
        print(f"{room:16} {verdict:7} {seconds:4.0f} s  {old}", flush=True)
        if not caught:
            lived.append(room)
    return 1 if lived else 0


def is_caught(room: str, file: str, old: str, new: str, backend: str) -> bool:
    """Whether a test of the room fails once the line is broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / "keras_upcycle" / room / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(
                f"A line to break must stand once in {room}/{file}. Received: "
                f"{old!r}, which stands {text.count(old)} times."
            )
        path.write_text(text.replace(old, new))
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-x", "-n", "2"),
                *("--dist", "loadfile", f"tests/{room}"),
            ],
            cwd=copy,
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/xla"),
                "PYTHONPATH": str(copy),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    if ran.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {ran.returncode} in {room}.")
    return ran.returncode != 0


if __name__ == "__main__":
    sys.exit(main())

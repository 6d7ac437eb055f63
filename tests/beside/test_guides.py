"""Every guide runs, with its constants made small."""

import ast
import os
import re
import subprocess
import sys

import keras
import pytest
from places import ROOT

one_backend = pytest.mark.one_backend
GUIDES = ROOT / "guides"
HEADER = (
    "Title",
    "Author",
    "Date created",
    "Last modified",
    "Description",
    "Accelerator",
)
# By guide: constants that the test replaces, and with what.
SMALL = {
    "monitoring.py": {
        "IMAGE_SIZE": 8,
        "TRAIN_IMAGES": 128,
        "WIDTH": 8,
        "NUM_BLOCKS": 2,
        "NUM_EXPERTS": 4,
        "DENSE_EPOCHS": 1,
        "MORE_EPOCHS": 1,
        "BATCH_SIZE": 16,
    },
    "upcycling_a_vit.py": {
        "IMAGE_SIZE": 8,
        "TRAIN_IMAGES": 128,
        "TEST_IMAGES": 64,
        "WIDTH": 8,
        "NUM_EXPERTS": 4,
        "DENSE_EPOCHS": 1,
        "MORE_EPOCHS": 1,
    },
    "upcycling_t5.py": {
        "WIDTH": 8,
        "TRAIN_EXAMPLES": 64,
        "TEST_EXAMPLES": 64,
        "DENSE_EPOCHS": 1,
        "MORE_EPOCHS": 1,
        "LENGTH": 16,
    },
}
# By guide: what its run has to print.
PRINTED = {
    "monitoring.py": (
        r"The sparse model computes what the dense one does",
        r"transformer_block_2 +8 ",
        r"Told: Experts \[.*\] of 'transformer_block_2' processed no token",
        r"Expert Choice: busiest 1.0 x, 0 dead",
    ),
    "upcycling_a_vit.py": (r"Top-K, top_k=2: 0.0% unrouted",),
    "upcycling_t5.py": (
        r"Same words: True",
        r"T5 1.1 XL: 2,849,757,184 parameters become 26,255,546,368",
        r"Recipe 'sparse_upcycling'",
    ),
}


def with_constants(source, constants):
    for name, value in constants.items():
        source, found = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.M
        )
        assert found == 1, f"the guide has {found} lines `{name} = ...`"
    return source


# Asks for devices before Keras is there: runs in a process of its own.
OF_DEVICES = "upcycling_over_a_tpu_slice.py"


def guides():
    found = sorted(path.name for path in GUIDES.glob("*.py"))
    return [name for name in found if name != OF_DEVICES]


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Keras lays variables out over devices on JAX alone",
)
@pytest.mark.slow
def test_the_guide_of_devices_runs(tmp_path):
    small = {"EXAMPLES": 64, "DENSE_EPOCHS": 1, "MORE_EPOCHS": 1}
    source = with_constants((GUIDES / OF_DEVICES).read_text(), small)
    script = tmp_path / OF_DEVICES
    script.write_text(source)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not run.returncode, run.stderr[-3000:]
    assert "data 8 x expert 8" in run.stdout
    assert "(8, 32, 128) lies as (2, 32, 128)" in run.stdout
    (gap,) = re.findall(r"Eight devices and one differ by (\S+)\.", run.stdout)
    assert float(gap) < 1e-4
    (gap,) = re.findall(r"difference at the start: (\S+)", run.stdout)
    assert float(gap) < 1e-4


@one_backend
def test_every_guide_is_known_here():
    assert guides() == sorted(SMALL)


eager = pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="compiles for a minute what torch, and test_t5.py, run call by call",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=eager if "t5" in name else one_backend)
        for name in guides()
    ],
)
def test_guide_runs(name, capsys):
    source = with_constants((GUIDES / name).read_text(), SMALL[name])
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "Largest difference: 0.0" in printed
    for pattern in PRINTED[name]:
        assert re.search(pattern, printed), pattern


PAGES = {
    "finetuning.md": {
        "STEPS": 1,
        "BATCH_SIZE": 4,
        "RUNS": 1,
        "WIDTH": 8,
    },
}


@one_backend
@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_code_of_a_page_runs(name, capsys):
    text = (GUIDES / name).read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    source = with_constants(code, {"SOURCE, TARGET": (6, 5), **PAGES[name]})
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "upcycled large" in printed
    assert re.search(r"moe +experts +0.1 +0.3", printed)


@one_backend
def test_the_page_has_the_numbers_of_the_paper():
    """Appendix A of arXiv 2212.05055, as `RECIPES` and as the table."""
    text = (GUIDES / "finetuning.md").read_text()
    for line in (
        "STEPS = 200_000",
        "BATCH_SIZE = 128",
        "SOURCE, TARGET = 512, 62",
        "RUNS = 3",
        '"dense": (1e-3, 0.1, None)',
        '"upcycled base": (1e-4, 0.1, 0.1)',
        '"upcycled large": (1e-3, 0.1, 0.3)',
        "| dense | Adafactor, 1e-3 | 0.1 | |",
        "| upcycled, Base | Adafactor, 1e-4 | 0.1 | 0.1 |",
        "| upcycled, Large | Adafactor, 1e-3 | 0.1 | 0.3 |",
    ):
        assert line in text


@one_backend
@pytest.mark.parametrize("name", guides())
def test_guide_has_the_format_of_keras_io(name):
    source = (GUIDES / name).read_text()
    header = ast.get_docstring(ast.parse(source))
    assert re.findall(r"^([A-Z][a-z ]+):", header, flags=re.M) == list(HEADER)
    assert all(len(line) < 90 for line in source.splitlines())
    # Public names only.
    assert "from keras_upcycle." not in source
    assert not re.search(r"\b\w+\._[a-z]", source)


@one_backend
def test_a_constant_that_is_gone_is_found():
    with pytest.raises(AssertionError, match="0 lines `EPOCHS"):
        with_constants("STEPS = 3\n", {"EPOCHS": 1})

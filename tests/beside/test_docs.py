"""Every example in a docstring and in the README runs."""

import doctest
import importlib
import pkgutil
import re
import tempfile

import keras
import keras_hub
import numpy as np
import pytest
from places import ROOT

import keras_upcycle

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# The other backends' primitives, and what runs when imported.
SKIPPED = ("keras_upcycle.backend.", "keras_upcycle.__main__")


def modules():
    found = pkgutil.walk_packages(keras_upcycle.__path__, "keras_upcycle.")
    names = [m.name for m in found if not m.name.startswith(SKIPPED)]
    return [*names, "keras_upcycle.backend.portable"]


def examples(module):
    """The module's doctests, with every name of the package in scope."""
    names = {
        **vars(keras_upcycle),
        "keras_upcycle": keras_upcycle,
        "keras": keras,
        "keras_hub": keras_hub,
        "tempfile": tempfile,
        "np": np,
        "ops": keras.ops,
        **vars(module),
    }
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        test for test in finder.find(module, extraglobs=names) if test.examples
    ]


@pytest.mark.one_backend
@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name, capsys):
    module = importlib.import_module(name)
    for test in examples(module):
        runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
        report = []
        runner.run(test, out=report.append, clear_globs=False)
        assert runner.failures == 0, "".join(report)


@pytest.mark.one_backend
def test_docstring_examples_are_found():
    found = {
        test.name
        for name in modules()
        for test in examples(importlib.import_module(name))
    }
    assert "keras_upcycle.conversion.upcycle.upcycle_model" in found
    assert "keras_upcycle.routing.functional.top_k" in found


@pytest.mark.one_backend
def test_a_wrong_docstring_example_is_caught():
    test = doctest.DocTestParser().get_doctest(
        ">>> 1 + 1\n3\n", {}, "wrong", None, 0
    )
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(test, out=lambda text: None)
    assert runner.failures == 1


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.one_backend("jax")
def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing"
    blocks = python_blocks(readme.read_text())
    assert blocks, "README.md shows no code"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        if "set_distribution" in block and keras.backend.backend() != "jax":
            continue  # as the page says
        code = compile(block, f"README.md, python block {number}", "exec")
        try:
            exec(code, names)
        finally:
            keras.distribution.set_distribution(None)


@pytest.mark.one_backend
def test_python_blocks_are_told_from_others():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y\n"]

"""The package's wings: imports go one way, private names stay in one place.

The order of the wings is the package's design, and `keras_upcycle/README.md`
draws it. A new wing gets a line here and there; a new file in a wing needs
nothing.
"""

import ast
import re
from pathlib import Path

import pytest

import keras_upcycle

pytestmark = pytest.mark.one_backend

PACKAGE = Path(keras_upcycle.__file__).parent
# Lowest first. A wing imports only what stands before it; within a wing files
# import each other, but not in circles.
WINGS = (
    "types",
    "errors",
    "version",
    "checks",
    "tables",
    "atomic_files",
    "freed_memory",
    "named",
    "keras_internals",
    "backend",
    "state",
    "optimizers",
    "distribution",
    "routing",
    "layers",
    "families",
    "analysis",
    "conversion",
    "training",
    "export",
    "methods",
    "demo",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, name in enumerate(WINGS)}
# Nothing but the command and the public names knows these.
ENDS = {"methods", "demo"}
FRAMEWORKS = {"jax", "torch", "tensorflow"}
PRIVATE_PACKAGES = ("keras.src", "keras_hub.src")


def imported(tree):
    """`(line, dotted name)` of everything that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def is_private(node):
    return (
        isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr != "_replace"  # public, of a named tuple
        and not (
            isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        )
        and not isinstance(node.value, ast.Call)  # super()._method()
    )


def modules_of(root):
    """From dotted name to path and syntax tree."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        found[name] = place, ast.parse(path.read_text())
    return found


def own_imports(tree, known):
    """`(line, module)` of the package's modules that a module imports."""
    for line, dotted in imported(tree):
        if not dotted.startswith("keras_upcycle."):
            continue
        module = dotted.removeprefix("keras_upcycle.")
        while module and module not in known:
            shorter = module.rpartition(".")[0]
            if not shorter:
                break
            module = shorter
        yield line, module


def violations(root):
    modules = modules_of(root)
    for name, (place, tree) in modules.items():
        if name == "__init__":  # the public names; imports what it likes
            continue
        wing = name.partition(".")[0]
        if wing not in RANK:
            yield (
                f"{place}: has no wing. Put it into one of {list(WINGS)}, or "
                "add a wing to this test and to the package's README."
            )
            continue
        for line, dotted in imported(tree):
            top = dotted.partition(".")[0]
            if top in FRAMEWORKS and wing != "backend":
                yield (
                    f"{place}:{line} imports {top} outside backend. Add a "
                    "function to backend/portable.py, and its faster form to "
                    f"backend/{top}.py."
                )
            if dotted.startswith(PRIVATE_PACKAGES) and (
                wing != "keras_internals"
            ):
                yield (
                    f"{place}:{line} imports {dotted}, which is private. Give "
                    "it a public name in keras_internals."
                )
        for line, module in own_imports(tree, modules):
            other = module.partition(".")[0]
            if other == wing or other not in RANK:
                continue
            if RANK[other] > RANK[wing]:
                yield (
                    f"{place}:{line} {wing} -> {other} points up. Move what "
                    f"is needed into {wing} or lower, or let {other} hand it "
                    "over: as an argument, or by registering itself."
                )
            elif other in ENDS and wing not in ("cli", "__main__"):
                yield (
                    f"{place}:{line} {wing} -> {other}: only the command and "
                    f"the public names know {other}."
                )
        for node in ast.walk(tree):
            if is_private(node) and wing != "keras_internals":
                yield (
                    f"{place}:{node.lineno} touches private .{node.attr}. Ask "
                    "for it by a function of keras_internals."
                )
    yield from circles(modules)


def circles(modules):
    """Files that import each other in a circle; a folder's own list aside."""
    arrows = {
        name: {
            module
            for _, module in own_imports(tree, modules)
            if module in modules and module != name
        }
        for name, (place, tree) in modules.items()
        if place.name != "__init__.py"
    }
    done, open_ = set(), []

    def visit(name):
        if name in open_:
            circle = [*open_[open_.index(name) :], name]
            yield (
                f"{' -> '.join(circle)} is a circle. Move what both need into "
                "a file of its own."
            )
            return
        if name in done or name not in arrows:
            return
        open_.append(name)
        for module in sorted(arrows[name]):
            yield from visit(module)
        open_.pop()
        done.add(name)

    for name in arrows:
        yield from visit(name)


def test_the_package_keeps_its_wings():
    assert list(violations(PACKAGE)) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("routing/a.py", "from keras_upcycle.layers import b", "points up"),
        ("routing/a.py", "import keras_upcycle.layers.b", "points up"),
        ("layers/a.py", "from keras_upcycle import families", "points up"),
        ("layers/a.py", "def f():\n    import keras_upcycle.cli", "points up"),
        ("state/a.py", "from keras_upcycle.demo.b import c", "points up"),
        ("demo/a.py", "from keras_upcycle.methods import b", "only the comm"),
        ("layers/a.py", "import jax.numpy as jnp", "imports jax"),
        ("demo/a.py", "from tensorflow import data", "imports tensorflow"),
        ("layers/a.py", "from keras.src import tree", "is private"),
        ("families/a.py", "from keras_hub.src.models import b", "is private"),
        ("layers/a.py", "def f(x):\n    return x._layers", "private ._layers"),
        ("odds_and_ends.py", "", "has no wing"),
        ("odds/ends.py", "", "has no wing"),
        ("layers/a.py", "from keras_upcycle.layers import a", None),
        ("layers/a.py", "from keras_upcycle.routing import b", None),
        ("layers/a.py", "from keras_upcycle import backend, checks", None),
        ("cli/a.py", "import keras_upcycle.methods", None),
        ("keras_internals/a.py", "def f(x):\n    return x._layers", None),
        ("keras_internals/a.py", "from keras.src import tree", None),
        ("layers/a.py", "def f(self):\n    return self._x, f.__z__", None),
    ],
)
def test_a_planted_violation_is_caught(file, source, found, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    told = list(violations(tmp_path))
    if found is None:
        assert told == []
    else:
        (violation,) = told
        assert found in violation


def test_a_circle_is_caught(tmp_path):
    (tmp_path / "layers").mkdir()
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        source = f"from keras_upcycle.layers import {other}"
        (tmp_path / f"layers/{one}.py").write_text(source)
    (violation,) = violations(tmp_path)
    assert "layers.a -> layers.b -> layers.c -> layers.a is a circle" in (
        violation
    )


def test_the_readme_draws_the_wings_in_their_order():
    picture = (PACKAGE / "README.md").read_text().split("```")[1]
    drawn = [
        word.rstrip("/")
        for line in picture.splitlines()
        for word in line[:32].replace("|", " ").split()
    ]
    assert [word for word in drawn if word != "__init__"] == list(WINGS)


def test_the_readme_names_every_file():
    named = set(
        re.findall(r"`(?:\w+/)?(\w+)/?`", (PACKAGE / "README.md").read_text())
    )
    lacking = {
        path.stem
        for path in PACKAGE.glob("*/*.py")
        if path.stem != "__init__" and path.stem not in named
    }
    assert not lacking


def test_every_wing_exists():
    known = {name.partition(".")[0] for name in modules_of(PACKAGE)}
    assert known - {"__init__"} == set(WINGS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_no_module_is_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, (
        f"{path.relative_to(PACKAGE)} has {lines} lines. Take a thing with a "
        "name out of it, into a file of that name."
    )

"""Imports only point down, backends stay in `backend/`, privates in one file.

The order of the modules is the package's design; a new module gets a line.
"""

import ast
from pathlib import Path

import pytest

import keras_upcycle

pytestmark = pytest.mark.one_backend

PACKAGE = Path(keras_upcycle.__file__).parent
# Lowest first. Modules of one line do not import each other.
RANKS = (
    (
        "types",
        "errors",
        "version",
        "freed_memory",
        "settings",
        "tables",
        "neuron_clusters",
    ),
    ("activations", "unfinished"),
    ("keras_internals", "few_shot"),
    ("backend.portable",),
    ("backend.jax", "backend.tensorflow", "backend.torch"),
    ("backend",),
    (
        "expert_optimizers",
        "first_values",
        "half_precision",
        "quantization",
        "random_state",
        "remaking",
        "routing",
        "token_groups",
        "training_steps",
    ),
    ("layer_state",),
    ("router_losses", "router_statistics"),
    ("dispatch", "router_log"),
    ("experts", "expert_init", "output_bias"),
    ("routers", "recipe", "hidden_slices"),
    (
        "default_moe",
        "donor_recipes",
        "drop_upcycling",
        "ds_moe",
        "shared_experts",
        "sparse_upcycling",
        "virtual_groups",
    ),
    ("feed_forward_slices", "random_experts", "replicate_shuffle_cut"),
    ("expert_inits", "recipes", "routers_by_name"),
    ("moe_feed_forward", "schedules", "update_scaling"),
    ("mixtures", "expert_distance", "optimizer_settings"),
    ("assignments",),
    ("surgery", "freezing", "dropout"),
    (
        "families.adapter_biases",
        "families.adapters",
        "families.base",
        "families.plain_layers",
        "families.training",
    ),
    ("families.unread_layers",),
    (
        "families.dense_pair",
        "families.keras_hub_t5",
        "families.keras_hub_vit",
        "families.nested",
    ),
    ("families",),
    ("plan", "active_experts", "expert_receipt", "compile_settings"),
    ("converted", "expert_weights"),
    ("differences",),
    ("upcycling", "estimate", "verify", "optimizers", "densify"),
    ("pruning", "donors", "depth_tiling", "scratch"),
    ("router_monitor", "comparison"),
    ("plots", "progress", "router_plots", "summary"),
    ("upit",),
    ("upit.checkpoints", "upit.expansion", "upit.working_copy"),
    ("upit.buckets",),
    ("upit.routing_vectors",),
    ("upit.assembly",),
    ("upit.pipeline",),
    ("demo",),
    ("demo.needed", "demo.saved", "demo.sources"),
    ("demo.images",),
    ("demo.language_model",),
    ("demo.training",),
    ("demo.text",),
    (
        "cli.answers",
        "cli.arguments",
        "cli.example_inputs",
        "cli.places",
        "cli.signals",
        "cli.stages",
    ),
    ("cli.conversion", "cli.models"),
    ("cli.convert", "cli.demo", "cli.inspect", "cli.report", "cli.verify"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FRAMEWORKS = {"jax", "torch", "tensorflow"}


def imported(tree):
    """`(line, dotted name)` of everything that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def module_of(dotted):
    """The package's module that a dotted name is, or is a part of."""
    own = dotted.removeprefix("keras_upcycle.")
    while own and own not in RANK:
        own = own.rpartition(".")[0]
    return own


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


def violations(root):
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        if name == "__init__":  # the public names; imports what it likes
            continue
        if name not in RANK:
            yield f"{place}: has no rank"
            continue
        for line, dotted in imported(tree):
            top = dotted.partition(".")[0]
            if top in FRAMEWORKS and place.parts[0] != "backend":
                yield f"{place}:{line} imports {top} outside backend"
            if top != "keras_upcycle":
                continue
            module = module_of(dotted)
            inside = name.partition(".")[0] == module.partition(".")[0]
            if module.startswith(("families.", "backend.")) and not (
                inside or module == "families.dense_pair"
            ):
                yield f"{place}:{line} reaches into {module}"
            if module and RANK[module] >= RANK[name]:
                yield f"{place}:{line} {name} -> {module} points up"
        for node in ast.walk(tree):
            if is_private(node) and name != "keras_internals":
                yield f"{place}:{node.lineno} touches private .{node.attr}"


def test_the_package_keeps_its_layers():
    assert list(violations(PACKAGE)) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("routing.py", "from keras_upcycle import experts", "points up"),
        ("routing.py", "from keras_upcycle.plan import make", "points up"),
        ("verify.py", "from keras_upcycle import estimate", "points up"),
        ("surgery.py", "def f():\n    import keras_upcycle.plan", "points up"),
        ("experts.py", "import jax.numpy as jnp", "imports jax"),
        ("demo.py", "from tensorflow import data", "imports tensorflow"),
        ("plan.py", "def f(x):\n    return x._layers", "private ._layers"),
        (
            "plan.py",
            "from keras_upcycle.families.nested import NestedFamily",
            "reaches into families.nested",
        ),
        ("odds_and_ends.py", "", "has no rank"),
    ],
)
def test_a_planted_violation_is_caught(file, source, found, tmp_path):
    (tmp_path / file).write_text(source)
    (violation,) = violations(tmp_path)
    assert found in violation


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("experts.py", "from keras_upcycle.types import Tensor"),
        ("experts.py", "from keras_upcycle import backend, routing"),
        ("keras_internals.py", "def f(x):\n    return x._layers"),
        ("plan.py", "def f(self):\n    return self._x, super()._y, f.__z__"),
        (
            "upcycling.py",
            "from keras_upcycle.families.dense_pair import DensePairFamily",
        ),
    ],
)
def test_what_is_allowed_is_not_caught(file, source, tmp_path):
    (tmp_path / file).write_text(source)
    assert list(violations(tmp_path)) == []


def test_every_ranked_module_exists():
    known = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
    }
    known |= {name.removesuffix(".__init__") for name in known}
    assert set(RANK) <= known

"""What every test shares: the import path, the backend's quiet, the seed.

`KERAS_BACKEND` picks the backend; JAX where it is unset.
"""

import collections
import gc
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Hundreds of tiny programs are compiled once and run once: what XLA would
# spend on making them fast is most of the suite's time, and many are the same
# in both workers and in the processes that tests start.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= tests them as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ.get("KERAS_BACKEND", "jax") == "jax" and metadata.version(
    "jaxlib"
).startswith("0.10."):  # others may not know it, and XLA would stop
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1",
    )
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(ROOT / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# `KERAS_UPCYCLE_TEST_MESH=2x4` runs any test where experts are spread over that
# many devices, on JAX; those of numbers of experts that four divides pass.
MESH = [
    int(n)
    for n in os.environ.get("KERAS_UPCYCLE_TEST_MESH", "").split("x")
    if n
]
if MESH:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={MESH[0] * MESH[1]}"
    )
# Each worker has a core of its own, and its tensors are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# Thousands of models come and go in a worker: what they leave goes back.
os.environ.setdefault("KERAS_UPCYCLE_ALLOCATOR", "system")
# Examples import their neighbours, as they do when they are run; tests what
# they share.
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT))

# Before keras: it chooses the backend where nobody did.
import keras_upcycle  # noqa: I001

import keras
import psutil
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # As for XLA: graphs that run once are not worth rewriting.
    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": True}
    )


# Whole suites of tiny models take torch, which compiles nothing, a quarter of
# the time that they take the others.
QUICKEST = ("torch", "jax", "tensorflow")


def first_of(*backends):
    """The first of these that is installed."""
    return next(name for name in backends if importlib.util.find_spec(name))


def pytest_collection_modifyitems(items):
    """What does not depend on the backend runs once, on the quickest.

    Or on the one that `one_backend` names. Of a matrix whose cases do not
    depend on it, the quickest runs all and the others a few.
    """
    here = keras.backend.backend()
    matrices = {}
    for item in items:
        if mark := item.get_closest_marker("one_backend"):
            there = first_of(*mark.args, *QUICKEST)
            if there != here:
                reason = "does not depend on the backend: it runs once, on "
                item.add_marker(pytest.mark.skip(reason=reason + there))
        elif (mark := item.get_closest_marker("thinned")) and hasattr(
            item, "callspec"
        ):
            key = item.nodeid.split("[")[0]
            matrices.setdefault(key, (mark.args, []))[1].append(item)
    # Files that take long first: at the end a worker would wait for them.
    slow = collections.Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow")
        and not item.get_closest_marker("skip")
    )
    items.sort(key=lambda item: -slow[item.path])
    there = first_of(*QUICKEST)
    if there == here:
        return
    thin = pytest.mark.skip(
        reason=f"this case runs on {there}, some of the others here too"
    )
    for names, cases in matrices.values():
        for case in set(cases) - set(covering(cases, names)):
            case.add_marker(thin)


def covering(cases, names):
    """Few of a test's cases, in which each value of its arguments `names` is.

    `"a * b"` as a name is each pair of values of both. The first case is
    always one of them, and all there is where no name is given.
    """

    def values(case):
        at = case.callspec.params
        return {
            (name, *(id(at[part]) for part in name.split(" * ")))
            for name in names
        }

    kept, seen, most = [], set(), cases[0]
    while not kept or values(most) - seen:
        kept.append(most)
        seen |= values(most)
        most = max(cases, key=lambda case: len(values(case) - seen))
    return kept


def pytest_collection_finish():
    """What was imported stays: Python need not look at it for garbage.

    Keras collects garbage in full for each layer that it quantizes, and Python
    by itself now and then: of millions of objects, a third of all time.
    """
    gc.collect()
    gc.freeze()


def _held():
    return psutil.Process().memory_info().rss


# Bytes that a worker may hold at the end of a file before it lets go: there
# are two of them, and processes that tests start.
MUCH = psutil.virtual_memory().total // 5
# And how many more each time after that: not all that is let go goes back.
MORE = 2**30


@pytest.fixture(scope="session")
def _limit():
    return [MUCH]


@pytest.fixture(autouse=True, scope="module")
def _forgotten(_limit):
    """What files compiled is not kept: the whole suite would take 20 GB.

    Letting go takes seconds, and what is used again is compiled again, so it
    is done where there is much. What is kept is not looked at until then.
    """
    yield
    if much := _held() > _limit[-1]:
        _let_go()
        gc.unfreeze()
    gc.collect()
    gc.freeze()
    if much:
        _limit.append(max(MUCH, _held() + MORE))


def _let_go():
    """Of what Keras and its backend remember of models that are gone."""
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    if keras.backend.backend() == "tensorflow":
        # Of each custom gradient that it traced TensorFlow keeps the graph.
        from tensorflow.python.framework import ops

        known = ops.gradient_registry._registry
        for name in [n for n in known if n.startswith("CustomGradient-")]:
            del known[name]


@pytest.fixture(autouse=True, scope="module")
def _mesh():
    """What `MESH` asks for, before any model of a file is made."""
    if MESH:
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh(MESH, ["data", "expert"], devices)
        keras.distribution.set_distribution(
            keras_upcycle.distribution.ExpertParallel(mesh)
        )


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of dense models on disk, which no test may change.

    `vit` and `t5` are presets of tasks, `t5_backbone` one of a backbone with a
    tokenizer beside it; `pairs.keras` is compiled.
    """
    import models

    folder = tmp_path_factory.mktemp("saved")
    models.vit_classifier().save_to_preset(str(folder / "vit"))
    preprocessor = models.t5_preprocessor()
    models.t5_lm(preprocessor=preprocessor).save_to_preset(str(folder / "t5"))
    for part in (models.t5_backbone(), preprocessor.tokenizer):
        part.save_to_preset(str(folder / "t5_backbone"))
    pairs = models.dense_pairs()
    pairs.compile("sgd", "mse")
    pairs.save(folder / "pairs.keras")
    return folder

"""What every test shares: the import path, the backend's quiet, the seed.

`KERAS_BACKEND` picks the backend; JAX where it is unset.
"""

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Hundreds of tiny programs are compiled once and run once: what XLA would
# spend on making them fast is most of the suite's time, and many are the same
# in both workers and in the processes that tests start.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests them as users run them.
for _name, _value in {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(_name, _value)
# Examples import their neighbours, as they do when they are run.
sys.path.insert(0, str(_ROOT / "examples"))
sys.path.insert(0, str(_ROOT))

# Before keras: it chooses the backend where nobody did.
import keras_upcycle  # noqa: F401, I001

import keras
import pytest


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)

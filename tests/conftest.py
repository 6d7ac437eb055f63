"""What every test shares: the import path, the backend's quiet, the seed.

`KERAS_BACKEND` picks the backend; JAX where it is unset.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Examples import their neighbours, as they do when they are run.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before keras: it chooses the backend where nobody did.
import keras_upcycle  # noqa: F401, I001

import keras
import pytest


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)

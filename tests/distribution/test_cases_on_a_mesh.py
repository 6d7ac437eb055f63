"""What holds of models of KerasHub's on one device holds on a mesh of 8.

The very tests of rows and tasks, in a process in which `ExpertParallel` is set
before any model is made: step 0, `.keras` files, presets, stock entry points.
"""

import os
import re
import subprocess
import sys

import keras
import pytest
from places import ROOT

FILES = (
    "tests/families/test_every_row.py",
    "tests/families/test_every_task.py",
    "tests/families/test_routed_attention.py",
)


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Keras lays variables out over devices on JAX alone",
)
@pytest.mark.slow
def test_step_0_and_files_hold_on_a_mesh():
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *(*FILES, "-k", "starts or files or file or entry_points"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "KERAS_UPCYCLE_TEST_MESH": "2x4"},
    )
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 12

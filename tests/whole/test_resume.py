"""A killed training run, started again, ends as one that was left alone.

All of it at once: router noise, dropout, an optimizer that was upcycled and
scaled, a schedule; see `resumable_training.py`. To the last bit.
"""

import importlib.util

import numpy as np
import pytest
from places import run_script


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.thinned
@pytest.mark.parametrize("callback", ["backup", "orbax"])
def test_a_killed_run_ends_as_an_uninterrupted_one(callback, tmp_path):
    if callback == "orbax" and not importlib.util.find_spec("orbax"):
        pytest.skip("`OrbaxCheckpoint` needs orbax-checkpoint, not installed")
    run_script("resumable_training.py", tmp_path, callback)
    with (
        np.load(tmp_path / "whole.npz") as whole,
        np.load(tmp_path / "resumed.npz") as resumed,
    ):
        assert len(whole.files) > 100
        for name in whole.files:
            np.testing.assert_array_equal(resumed[name], whole[name])

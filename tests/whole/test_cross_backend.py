"""A model saved on one backend is the same on the other two.

All six pairs from one place: this process is JAX, and each other backend has
one of its own for all models together. Each writes, then reads the others'.
"""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys

import files_for_others
import keras
import models
import numpy as np
import pytest
from keras import ops
from places import ROOT, SUPPORT

import keras_upcycle
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.types import TokenChoice

pytestmark = [pytest.mark.one_backend("jax"), pytest.mark.slow]

# A choice closer than the backends' rounding could go either way.
MARGIN = 1e-4


def margin(call):
    """How far the closest decision was from going the other way."""
    inputs = models.array(call.inputs)
    inputs = inputs.reshape(-1, inputs.shape[-2], inputs.shape[-1])
    logits = inputs @ models.array(call.layer.router.kernel)
    scores = np.exp(logits - np.max(logits, -1, keepdims=True))
    scores /= np.sum(scores, -1, keepdims=True)
    if isinstance(call.routing, TokenChoice):
        count = call.layer.router.top_k
    else:
        scores = np.swapaxes(scores, 1, 2)
        count = call.routing.tokens.shape[-1]
    ranked = np.sort(scores, -1)[..., ::-1]
    return float(np.min(ranked[..., count - 1] - ranked[..., count]))


def started(backend, root):
    """A process that writes its models to a folder of `root`."""
    with open(root / f"{backend}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, files_for_others.__file__, str(root)],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": os.pathsep.join(
                    map(str, (ROOT, ROOT / "tests", SUPPORT))
                ),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of what all wrote and read, and this process's models."""
    root = tmp_path_factory.mktemp("saved")
    with contextlib.ExitStack() as stack:
        others = {
            backend: stack.enter_context(started(backend, root))
            for backend in files_for_others.BACKENDS
            if backend != keras.backend.backend()
            and importlib.util.find_spec(backend)
        }
        made = files_for_others.write(root)
        for backend, process in others.items():
            if "written\n" not in process.stdout:  # reads up to it
                raise RuntimeError(
                    (root / f"{backend}.log").read_text()[-3000:]
                )
        for process in others.values():
            process.stdin.write("read\n")
            process.stdin.close()
        files_for_others.read(root)
        for backend, process in others.items():
            if process.wait():
                raise RuntimeError(
                    (root / f"{backend}.log").read_text()[-3000:]
                )
    return root, made


def test_no_choice_is_close(saved):
    _, made = saved
    for name, model in made.items():
        with record_calls() as calls:
            model(files_for_others.WRITTEN[name][2](), training=False)
        assert calls
        assert min(margin(call) for call in calls) > MARGIN, name


@pytest.mark.parametrize(
    ("writer", "reader"),
    itertools.permutations(files_for_others.BACKENDS, 2),
)
def test_the_models_are_the_same_there(writer, reader, saved):
    for backend in (writer, reader):
        if importlib.util.find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed")
    root, made = saved
    readings = 0
    for name in made:
        expected, *written = np.load(root / writer / f"{name}.npz").values()
        for path in (root / writer).glob(f"{name}.*.{reader}.npz"):
            readings += 1
            received, *loaded = np.load(path).values()
            gap = np.max(np.abs(received - expected))
            assert gap <= 1e-5 * max(1.0, np.max(np.abs(expected)))
            for a, b in zip(loaded, written, strict=True):
                np.testing.assert_array_equal(a, b)
    assert readings == len(made) + len(files_for_others.PRESETS)


def test_margins_are_measured_from_the_decision():
    """The margin of a router of zeros is 0: every choice is a tie."""
    moe = keras_upcycle.upcycle_model(models.sequential(), 4)
    (layer,) = models.mixtures(moe)
    layer.router.kernel.assign(ops.zeros(layer.router.kernel.shape))
    with record_calls() as calls:
        moe(models.tokens(5, models.WIDTH))
    assert margin(calls[0]) == 0.0

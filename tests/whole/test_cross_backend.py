"""A model saved on one backend is the same on the other two.

Each other backend gets one fresh interpreter for all models together.
"""

import importlib.util
import os
import subprocess
import sys

import keras
import models
import numpy as np
import pytest
from keras import ops
from places import ROOT, SUPPORT

import keras_upcycle
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.types import TokenChoice

BACKENDS = ("jax", "tensorflow", "torch")
# A choice closer than the backends' rounding could go either way.
MARGIN = 1e-4

READER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import keras_upcycle, keras, keras_hub, models, numpy as np
root = Path(sys.argv[1])
for path in sorted(root.glob("*.inputs.npz")):
    name = path.name.removesuffix(".inputs.npz")
    readers = [lambda: keras.saving.load_model(root / f"{name}.keras")]
    if (root / f"{name}.preset").exists():
        task = "Seq2SeqLM" if name == "t5" else "ImageClassifier"
        readers.append(lambda: getattr(keras_hub.models, task).from_preset(
            str(root / f"{name}.preset")))
    inputs = dict(np.load(path))
    for number, read in enumerate(readers):
        model = read()
        assert models.mixtures(model)
        np.savez(root / f"{name}.{number}.{keras.backend.backend()}.npz",
                 models.output(model, inputs.get("only", inputs)),
                 *models.weights(model))
"""


def vit_classifier():
    return models.vit_classifier(intermediate_dim=8)


WRITTEN = {
    "vit_expert_choice": (
        vit_classifier,
        {"router": "expert_choice"},
        models.images,
    ),
    "vit_top_k": (
        models.vit_backbone,
        {"router": keras_upcycle.TopKRouter(top_k=2)},
        models.images,
    ),
    # Methods whose layers or routers hold more than kernels, or run otherwise.
    "vit_default_moe": (
        vit_classifier,
        {
            "router": keras_upcycle.DefaultMoERouter(
                2, default_forward="paper", capacity_factor=None
            )
        },
        models.images,
    ),
    "vit_ds_moe": (
        vit_classifier,
        {"recipe": "ds_moe"},  # of which two experts are then left active
        models.images,
    ),
    "vit_shared_experts": (
        vit_classifier,
        {
            "router": keras_upcycle.TopKRouter(2, capacity_factor=None),
            "expert_init": keras_upcycle.SharedExperts(
                routed=keras_upcycle.VirtualGroups(2)
            ),
        },
        lambda: models.images(seed=1),
    ),
    "t5": (
        models.t5_lm,
        {"router": {"decoder": keras_upcycle.TopKRouter(top_k=2)}},
        models.t5_inputs,
    ),
    "pairs": (
        models.sequence_dense_pairs,
        {"router": keras_upcycle.TopKRouter(top_k=1, normalize=False)},
        lambda: models.tokens(3, 6, models.WIDTH),
    ),
    "sequential": (
        models.sequential,
        {"router": "top_k"},
        lambda: models.tokens(5, models.WIDTH),
    ),
}

PRESETS = (
    "vit_expert_choice",
    "vit_default_moe",
    "vit_ds_moe",
    "vit_shared_experts",
    "t5",
)


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of saved models, and the models."""
    root = tmp_path_factory.mktemp("saved")
    made = {}
    for name, (build, arguments, inputs) in WRITTEN.items():
        moe = keras_upcycle.upcycle_model(build(), 4, **arguments)
        if name == "vit_ds_moe":
            keras_upcycle.set_active_experts(moe, top_k=2)
        made[name] = models.fixed(moe)
        moe.save(root / f"{name}.keras")
        if name in PRESETS:
            moe.save_to_preset(str(root / f"{name}.preset"))
        given = inputs()
        given = given if isinstance(given, dict) else {"only": given}
        np.savez(root / f"{name}.inputs.npz", **given)
    return root, made


def test_no_choice_is_close(saved):
    _, made = saved
    for name, model in made.items():
        with record_calls() as calls:
            model(WRITTEN[name][2](), training=False)
        assert calls
        assert min(margin(call) for call in calls) > MARGIN, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_models_are_the_same_there(backend, saved):
    if backend == keras.backend.backend():
        pytest.skip("this is where they were saved; see test_saving.py")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    root, made = saved
    package = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-c", READER, str(root), package, str(SUPPORT)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Each model runs once: compiling would take the time.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    readings = 0
    for name, model in made.items():
        expected = models.output(model, WRITTEN[name][2]())
        for path in root.glob(f"{name}.*.{backend}.npz"):
            readings += 1
            received, *loaded = np.load(path).values()
            gap = np.max(np.abs(received - expected))
            assert gap <= 1e-5 * max(1.0, np.max(np.abs(expected)))
            for a, b in zip(loaded, models.weights(model), strict=True):
                np.testing.assert_array_equal(a, b)
    assert readings == len(made) + len(PRESETS)


def test_margins_are_measured_from_the_decision():
    """The margin of a router of zeros is 0: every choice is a tie."""
    moe = keras_upcycle.upcycle_model(models.sequential(), 4)
    (layer,) = models.mixtures(moe)
    layer.router.kernel.assign(ops.zeros(layer.router.kernel.shape))
    with record_calls() as calls:
        moe(models.tokens(5, models.WIDTH))
    assert margin(calls[0]) == 0.0

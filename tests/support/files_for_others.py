"""Models that every backend writes, and reads of the other two.

`python tests/support/files_for_others.py FOLDER`: writes those of the backend
that runs, says `written`, waits for a line, and reads what stands there of the
others then.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401  the backend's settings, as in other tests
import keras
import keras_hub
import models
import numpy as np

import keras_upcycle as ku

BACKENDS = ("jax", "tensorflow", "torch")


def vit_classifier():
    return models.vit_classifier(intermediate_dim=8)


# Dense model, how it is upcycled, and its inputs.
WRITTEN = {
    "vit_expert_choice": (
        vit_classifier,
        {"router": "expert_choice"},
        models.images,
    ),
    # Methods whose layers or routers hold more than kernels, or run otherwise.
    "vit_default_moe": (
        vit_classifier,
        {
            "router": ku.DefaultMoERouter(
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
            "router": ku.TopKRouter(2, capacity_factor=None),
            "expert_init": ku.SharedExperts(routed=ku.VirtualGroups(2)),
        },
        lambda: models.images(seed=1),
    ),
    "t5": (
        models.t5_lm,
        {"router": {"decoder": ku.TopKRouter(top_k=2)}},
        models.t5_inputs,
    ),
    "pairs": (
        models.sequence_dense_pairs,
        {"router": ku.TopKRouter(top_k=1, normalize=False)},
        lambda: models.tokens(3, 6, models.WIDTH),
    ),
}

# Those of tasks, which are saved as presets too.
PRESETS = {
    "vit_expert_choice": "ImageClassifier",
    "vit_default_moe": "ImageClassifier",
    "vit_ds_moe": "ImageClassifier",
    "vit_shared_experts": "ImageClassifier",
    "t5": "Seq2SeqLM",
}


def write(root):
    """The models, their files in a folder of `root`, and what they predict."""
    folder = root / keras.backend.backend()
    folder.mkdir()
    made = {}
    for name, (build, arguments, inputs) in WRITTEN.items():
        moe = ku.upcycle_model(build(), 4, **arguments)
        if name == "vit_ds_moe":
            ku.set_active_experts(moe, top_k=2)
        made[name] = models.fixed(moe)
        moe.save(folder / f"{name}.keras")
        if name in PRESETS:
            moe.save_to_preset(str(folder / f"{name}.preset"))
        _note(folder / f"{name}.npz", moe, inputs())
    return made


def read(root):
    """What models of each other backend in `root` hold and predict here."""
    here = keras.backend.backend()
    for there in BACKENDS:
        folder = root / there
        if there == here or not folder.exists():
            continue
        for name, (*_, inputs) in WRITTEN.items():
            readers = {"file": keras.saving.load_model}
            if name in PRESETS:
                task = getattr(keras_hub.models, PRESETS[name])
                readers["preset"] = task.from_preset
            paths = (f"{name}.keras", f"{name}.preset")
            for (how, reader), path in zip(
                readers.items(), paths, strict=False
            ):
                model = reader(str(folder / path))
                assert models.mixtures(model)
                _note(folder / f"{name}.{how}.{here}.npz", model, inputs())


def _note(path, model, inputs):
    np.savez(path, models.output(model, inputs), *models.weights(model))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print("written", flush=True)
    if sys.stdin.readline():
        read(Path(sys.argv[1]))

"""Files that earlier versions wrote are read, or refused by their version.

`tests/support/files_of_before.tar.xz` was written on JAX by the last version
whose modules stood side by side, `format_1_*` by the last one that called the
linear kernel of a gated unit the gate. Beside each model stand its inputs and
what it predicted.
"""

import tarfile
from pathlib import Path

import keras
import keras_hub
import models
import numpy as np
import pytest
from places import SUPPORT

import keras_upcycle as ku

# Of another machine and another backend.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = (
    "compiled",
    "default_moe",
    "drop_upcycling",
    "ds_moe",
    "expert_choice",
    "format_1_plain",
    "gated",
    "shared_experts",
    "top_k",
    "virtual_group",
)
OTHER_WAY_ROUND = "exchanged without a word. Convert the dense model again"


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(SUPPORT / "files_of_before.tar.xz") as archive:
        # Python 3.11 before 3.11.4 knows no filters.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)
    return folder


def written(before, name):
    with np.load(before / f"{name}.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_predicts_what_it_did(before, name):
    model = keras.saving.load_model(before / f"{name}.keras")
    then = written(before, name)
    assert models.mixtures(model)
    np.testing.assert_allclose(
        models.array(model(then["x"])), then["y"], **CLOSE
    )


def test_weights_alone_are_read(before):
    model = keras.saving.load_model(before / "gated.keras")
    then = written(before, "gated")
    models.randomized(model, seed=9)
    assert not np.allclose(models.array(model(then["x"])), then["y"])
    model.load_weights(before / "gated.weights.h5")
    np.testing.assert_allclose(
        models.array(model(then["x"])), then["y"], **CLOSE
    )


def test_a_compiled_model_trains_on_as_it_did(before):
    model = keras.saving.load_model(before / "compiled.keras")
    then = written(before, "compiled")
    assert int(model.optimizer.iterations) == 3
    # As it was on JAX; torch's compiler would take a minute for one step.
    model.jit_compile &= keras.backend.backend() != "torch"
    model.fit(then["x"], then["x"], shuffle=False, verbose=0)
    np.testing.assert_allclose(
        models.array(model(then["x"])), then["after"], **CLOSE
    )


def test_presets_are_found_by_their_stock_classes(before):
    then = written(before, "vit_preset")
    vit = keras_hub.models.ImageClassifier.from_preset(
        str(before / "vit_preset")
    )
    np.testing.assert_allclose(
        vit.predict(then["x"], verbose=0), then["y"], **CLOSE
    )
    then = written(before, "t5_preset")
    t5 = keras_hub.models.Seq2SeqLM.from_preset(str(before / "t5_preset"))
    expected = then.pop("y")
    found = t5.backbone(then)["decoder_sequence_output"]
    np.testing.assert_allclose(models.array(found), expected, **CLOSE)


def test_a_file_of_expert_weights_makes_experts(before):
    dense = keras.saving.load_model(before / "dense.keras")
    donor = ku.ExpertWeights.load(before / "expert_weights.npz")
    init = ku.BranchTrainMix([dense, donor], other_weights="base")
    moe = ku.upcycle_model(dense, 2, layers="all", expert_init=init)
    x = models.tokens(3, 5, 6)
    np.testing.assert_allclose(
        models.array(moe(x)), models.array(dense(x)), **CLOSE
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_gated_files_of_format_1_are_refused(before, suffix):
    path = before / f"format_1_gated{suffix}"
    layer = ku.MoEFeedForward(2, 8, activation="silu", gated=True, name="moe")
    model = keras.Sequential([keras.Input((5, 6)), layer], name="old")
    read = keras.saving.load_model if suffix == ".keras" else model.load_weights
    with pytest.raises(Exception, match=OTHER_WAY_ROUND):
        read(path)

"""The gate is what the activation is applied to; files of before are told."""

import json
import zipfile

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

REMEDY = "exchanged without a word. Convert the dense model again"


def gated_layer(**settings):
    layer = ku.MoEFeedForward(
        2, 12, activation="silu", gated=True, name="moe", **settings
    )
    return keras.Sequential([keras.Input((5, 8)), layer], name="sparse")


def silu(x):
    return x / (1.0 + np.exp(-x))


def without_formats(value):
    """A config as it was written before there was a format."""
    if isinstance(value, dict):
        return {
            key: without_formats(inner)
            for key, inner in value.items()
            if key != "format"
        }
    if isinstance(value, list):
        return [without_formats(inner) for inner in value]
    return value


@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "dense"])
def test_a_gated_unit_is_that_of_llama(dispatch):
    model = gated_layer(dispatch=dispatch)
    experts = model.layers[0].experts
    rng = np.random.default_rng(0)
    own = {}
    for role, projection in experts.projections.items():
        kernel, bias = (
            rng.normal(size=v.shape[1:])
            for v in (projection.kernel, projection.bias)
        )
        for variable, value in (
            (projection.kernel, kernel),
            (projection.bias, bias),
        ):
            variable.assign(np.stack([value, value]))
        own[role] = kernel, bias[0]
    assert list(own) == ["gate", "up", "down"]
    x = rng.normal(size=(3, 5, 8)).astype("float32")

    def project(rows, role):
        kernel, bias = own[role]
        return rows @ kernel + bias

    expected = project(silu(project(x, "gate")) * project(x, "up"), "down")
    received = model.predict(x, verbose=0)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.one_backend
def test_t5s_input_projector_is_the_gate():
    """KerasHub activates `input_projector` and calls the linear one gate."""
    dense = models.t5_backbone()
    (site, *_) = ku.find_feed_forwards(dense)
    block = dense.encoder_transformer_layers[0]
    assert site.kernels["gate_kernel"] is block.input_projector.kernel
    assert site.kernels["up_kernel"] is block.gate_projector.kernel
    assert site.kernels["down_kernel"] is block.output_projector.kernel


@pytest.mark.one_backend
def test_a_gated_config_of_before_is_refused_and_a_plain_one_is_read():
    config = without_formats(gated_layer().layers[0].get_config())
    with pytest.raises(ku.UpcycleError, match=REMEDY):
        ku.MoEFeedForward.from_config(config)
    layer = ku.MoEFeedForward.from_config({**config, "gated": False})
    assert not layer.gated


def rewritten(path, new):
    """A `.keras` file with another config."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as file:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                content = json.dumps(without_formats(config)).encode()
            file.writestr(name, content)
    return new


@pytest.mark.one_backend
def test_a_gated_file_of_before_is_refused(tmp_path):
    gated_layer().save(tmp_path / "new.keras")
    old = rewritten(tmp_path / "new.keras", tmp_path / "old.keras")
    with pytest.raises(ku.UpcycleError, match=REMEDY):
        keras.saving.load_model(old)


@pytest.mark.one_backend
def test_a_t5_of_before_is_refused(tmp_path):
    moe = ku.upcycle_model(models.t5_backbone(), 2, seed=0)
    moe.save(tmp_path / "new.keras")
    old = rewritten(tmp_path / "new.keras", tmp_path / "old.keras")
    with pytest.raises(Exception, match=REMEDY):
        keras.saving.load_model(old)


@pytest.mark.one_backend
def test_a_gated_weights_file_of_before_is_refused(tmp_path):
    """A file of weights alone has no config that could tell."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "m.weights.h5"
    model = gated_layer()
    model.save_weights(path)
    again = gated_layer()
    again.load_weights(path)
    models.assert_same_weights(again, models.weights(model))
    with h5py.File(path, "a") as file:
        held = [
            name
            for name in _groups(file)
            if "format" in file[name] and name.endswith("vars")
        ]
        assert len(held) == 1
        del file[held[0]]["format"]
    with pytest.raises(ValueError, match=REMEDY):
        again.load_weights(path)
    models.assert_same_weights(again, model)


def _groups(file):
    found = []
    file.visit(lambda name: found.append(name))
    return [name for name in found if hasattr(file[name], "keys")]


def strip(path):
    """A weights file as it was before files said what mixture they are of."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "a") as file:
        held = [n for n in _groups(file) if "sizes" in file[n]]
        assert held
        for name in held:
            del file[name]


@pytest.mark.one_backend
def test_a_plain_weights_file_of_before_is_read(tmp_path):
    path = tmp_path / "m.weights.h5"
    moe = ku.upcycle_model(models.dense_pairs(), 2, seed=0)
    models.randomized(moe).save_weights(path)
    strip(path)
    again = ku.upcycle_model(models.dense_pairs(), 2, seed=1)
    again.load_weights(path)
    models.assert_same_weights(again, moe)


@pytest.mark.one_backend
def test_a_gated_weights_file_of_before_fills_no_plain_layer(tmp_path):
    path = tmp_path / "m.weights.h5"
    gated_layer().save_weights(path)
    strip(path)
    layer = ku.MoEFeedForward(2, 12, activation="silu", name="moe")
    plain = keras.Sequential([keras.Input((5, 8)), layer], name="sparse")
    with pytest.raises(ValueError, match=REMEDY):
        plain.load_weights(path)


@pytest.mark.one_backend
def test_expert_weights_of_before_are_read_unless_gated(tmp_path):
    cases = ((models.t5_backbone, True), (models.vit_backbone, False))
    for build, refused in cases:
        weights = ku.ExpertWeights.from_model(build())
        weights.save(tmp_path / "one.npz")
        with np.load(tmp_path / "one.npz") as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        about["format"] = "keras_upcycle.ExpertWeights/1"
        np.savez(tmp_path / "old.npz", about=json.dumps(about), **arrays)
        if refused:
            with pytest.raises(ValueError, match=r"of another version"):
                ku.ExpertWeights.load(tmp_path / "old.npz")
        else:
            again = ku.ExpertWeights.load(tmp_path / "old.npz")
            assert len(again.blocks) == len(weights.blocks)

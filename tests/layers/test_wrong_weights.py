"""Weights of another mixture: refused, in words of mixtures."""

import json
import warnings

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

WIDTH = 6


def model(num_experts=4, intermediate_dim=8, width=WIDTH, **more):
    layer = ku.MoEFeedForward(
        num_experts, intermediate_dim, router="top_k", name="moe", **more
    )
    built = keras.Sequential(
        [
            keras.Input((width,)),
            layer,
            keras.layers.Dense(2, name="head"),
        ]
    )
    return models.randomized(built)


# What the file's mixture has, what the layer's has, what is said.
DIFFERENT = {
    "fewer": ({}, {"num_experts": 2}, ["4 experts", "2 experts"]),
    "more": ({"num_experts": 1}, {}, ["1 expert ", "4 experts"]),
    "narrower": (
        {},
        {"intermediate_dim": 4},
        ["intermediate_dim=8 in the file", "intermediate_dim=4 in the layer"],
    ),
    "gated into plain": ({"gated": True}, {}, ["gated=True in the file"]),
    "plain into gated": ({}, {"gated": True}, ["gated=True in the layer"]),
    "no biases": ({"use_bias": False}, {}, ["use_bias=False in the file"]),
    "shared lost": (
        {"shared_intermediate_dim": 4},
        {},
        ["shared_intermediate_dim=4 in the file"],
    ),
    "shared missing": (
        {},
        {"shared_intermediate_dim": 4},
        ["shared_intermediate_dim=None in the file"],
    ),
    "shared narrower": (
        {"shared_intermediate_dim": 4},
        {"shared_intermediate_dim": 2},
        ["shared_intermediate_dim=4 in the file"],
    ),
    "gate of the shared lost": (
        {"shared_intermediate_dim": 4, "shared_gate": True},
        {"shared_intermediate_dim": 4},
        ["shared_gate=True in the file"],
    ),
    "inputs narrower": ({}, {"width": 5}, ["hidden_dim=6 in the file"]),
}
FILES = {
    "weights": ("w.weights.h5", {}),
    "shards": ("w.weights.json", {"max_shard_size": 1e-6}),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("files", list(FILES))
@pytest.mark.parametrize("how", list(DIFFERENT))
def test_another_mixtures_weights_are_refused(how, files, tmp_path):
    saved, loading, words = DIFFERENT[how]
    name, settings = FILES[files]
    model(**saved).save_weights(tmp_path / name, **settings)
    with pytest.raises(
        ValueError, match="MoE layer of the same sizes"
    ) as error:
        model(**loading).load_weights(tmp_path / name)
    for word in [*words, "moe", "Make the model as the saved one was"]:
        assert word in str(error.value)


@pytest.mark.one_backend
@pytest.mark.parametrize("how", list(DIFFERENT))
def test_where_mismatches_are_skipped_the_same_is_said(how, tmp_path):
    saved, loading, words = DIFFERENT[how]
    model(**saved).save_weights(tmp_path / "w.weights.h5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**loading).load_weights(
            tmp_path / "w.weights.h5", skip_mismatch=True
        )
    said = "\n".join(str(each.message) for each in caught)
    for word in words:
        assert word in said


@pytest.mark.parametrize("files", list(FILES))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gated": True, "use_bias": False},
        {"shared_intermediate_dim": 4},
        {"shared_intermediate_dim": 4, "shared_gate": True},
        {"num_experts": 1, "dropout": 0.5},
    ],
    ids=["plain", "gated", "shared", "shared_gate", "one"],
)
def test_the_same_mixtures_weights_are_loaded(settings, files, tmp_path):
    saved, loading = model(**settings), model(**settings)
    name, how = FILES[files]
    saved.save_weights(tmp_path / name, **how)
    loading.load_weights(tmp_path / name)
    models.assert_same_weights(loading, saved)


@pytest.mark.one_backend
def test_a_dense_models_weights_are_refused(tmp_path):
    dense = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(2)])
    dense.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match=r"holds none.*upcycle_model") as error:
        model().load_weights(tmp_path / "w.weights.h5")
    assert "4 experts" in str(error.value)


@pytest.mark.one_backend
def test_a_config_that_was_changed_is_refused(tmp_path):
    """As of a `.keras` file whose `config.json` somebody edited."""
    import zipfile

    model().save(tmp_path / "m.keras")
    with (
        zipfile.ZipFile(tmp_path / "m.keras") as old,
        zipfile.ZipFile(tmp_path / "n.keras", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                content = content.replace(
                    b'"num_experts": 4', b'"num_experts": 2'
                )
            new.writestr(name, content)
    with pytest.raises(ValueError, match=r"4 experts.*2 experts"):
        keras.models.load_model(tmp_path / "n.keras")


@pytest.mark.one_backend
@pytest.mark.parametrize("dense", [models.vit_backbone, models.t5_backbone])
def test_a_presets_weights_are_refused(dense, tmp_path):
    four, two = (
        ku.upcycle_model(dense(), count, router="top_k") for count in (4, 2)
    )
    four.save_to_preset(tmp_path / "four")
    with pytest.raises(ValueError, match=r"4 experts.*2 experts"):
        two.load_weights(tmp_path / "four" / "model.weights.h5")
    config = tmp_path / "four" / "config.json"
    text = config.read_text()
    assert '"num_experts": 4' in text
    config.write_text(
        json.dumps(
            json.loads(text.replace('"num_experts": 4', '"num_experts": 2'))
        )
    )
    with pytest.raises(ValueError, match=r"4 experts.*2 experts"):
        type(four).from_preset(str(tmp_path / "four"))


@pytest.mark.one_backend
def test_a_router_of_another_kind_is_told_apart(tmp_path):
    dense = models.dense_pairs()
    ku.upcycle_model(dense, 2, router="default_moe").save_weights(
        tmp_path / "w.weights.h5"
    )
    with pytest.raises(ValueError, match="router") as error:
        ku.upcycle_model(dense, 2, router="top_k").load_weights(
            tmp_path / "w.weights.h5"
        )
    assert "default_vectors" in str(error.value)


@pytest.mark.one_backend
@pytest.mark.parametrize("dense", [models.vit_backbone, models.t5_backbone])
def test_adapters_of_other_mixtures_are_refused(dense, tmp_path):
    four, two = (
        ku.upcycle_model(dense(), count, router="top_k") for count in (4, 2)
    )
    four.enable_lora(2, ["expert_up", "expert_down"])
    four.save_lora_weights(tmp_path / "a.lora.h5")
    before = [np.array(w) for w in models.weights(two)]
    with pytest.raises(ValueError, match=r"num_experts") as error:
        two.load_lora_weights(tmp_path / "a.lora.h5")
    assert "[2]" in str(error.value)
    del before

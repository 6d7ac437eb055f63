"""`keras-upcycle convert`: what comes out, and how that is verified."""

import json
import sys
import zipfile

import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import cli
from keras_upcycle.cli import model_files as cli_models
from keras_upcycle.cli import options as conversion
from keras_upcycle.cli import paths
from keras_upcycle.conversion import upcycle


def convert(*given):
    return cli.main(["convert", *map(str, given)])


def answer(capsys, *given, code=0):
    """The JSON object of a conversion."""
    assert convert(*given, "--json") == code
    return json.loads(capsys.readouterr().out)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What comes out.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name", ["LlamaBackbone", "BertBackbone", "SigLIPBackbone"]
)
def test_a_preset_of_any_row_is_converted(name, tmp_path, capsys):
    hub_models.dense(name).save_to_preset(str(tmp_path / "dense"))
    capsys.readouterr()
    found = answer(
        capsys,
        *(tmp_path / "dense", tmp_path / "moe", "--num-experts", 3),
        *("--router", "top_k", "--capacity-factor", "none", "--layers", "*_1*"),
    )
    assert found["passed"]
    assert found["kept"]
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "moe"))
    assert type(loaded).__name__ == f"Upcycled{name}"


@pytest.mark.one_backend
def test_a_vit_task_preset_is_what_the_library_makes(saved, tmp_path, capsys):
    found = answer(
        capsys,
        *(saved / "vit", tmp_path / "moe", "--num-experts", 4, "--seed", 3),
    )
    assert names(tmp_path) == ["moe"]
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path / "moe"))
    dense = keras_hub.models.ImageClassifier.from_preset(str(saved / "vit"))
    expected = ku.upcycle_model(dense, 4, seed=3)
    assert type(loaded) is type(expected)
    models.assert_same_weights(loaded, expected)
    raw = models.images(scale=255.0)
    np.testing.assert_array_equal(
        models.array(loaded.preprocessor(raw)),
        models.array(dense.preprocessor(raw)),
    )
    assert found["passed"]
    assert found["kept"]
    assert found["changed_weights"] == []
    assert found["output"] == str(tmp_path / "moe")
    assert found["bytes"] == paths.size(tmp_path / "moe")
    stages = ["load", "inputs", "convert", "save", "verify"]
    assert list(found["seconds"]) == stages
    assert found["estimate"]["total_params"] == loaded.count_params()
    (layer,) = found["report"]["layers"]
    assert layer["relative_difference"] < 1e-5


@pytest.mark.one_backend
def test_a_t5_task_keeps_its_tokenizer_and_stacks_differ(saved, tmp_path):
    code = convert(
        *(saved / "t5", tmp_path / "moe", "--num-experts", 4),
        *("--router", "encoder=expert_choice,decoder=top_k", "--top-k", 1),
        *("--layers", "encoder=0,1,decoder=every_other"),
    )
    assert code == 0
    loaded = keras_hub.models.Seq2SeqLM.from_preset(str(tmp_path / "moe"))
    routers = [layer.router for layer in models.mixtures(loaded)]
    assert [type(router) for router in routers] == [
        *(2 * [ku.ExpertChoiceRouter]),
        ku.TopKRouter,
    ]
    assert routers[2].top_k == 1
    text = "the quick brown fox"
    np.testing.assert_array_equal(
        loaded.preprocessor.tokenizer(text),
        models.t5_preprocessor().tokenizer(text),
    )


@pytest.mark.one_backend
def test_a_tokenizer_beside_a_backbone_is_kept(saved, tmp_path):
    moe = tmp_path / "moe"
    arguments = (saved / "t5_backbone", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    backbone = keras_hub.models.Backbone.from_preset(str(moe))
    assert len(models.mixtures(backbone)) == 2
    assert not (moe / "task.json").exists()
    text = "the quick brown fox"
    expected = models.t5_preprocessor().tokenizer(text)
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(moe))
    np.testing.assert_array_equal(tokenizer(text), expected)
    task = keras_hub.models.Seq2SeqLM.from_preset(str(moe))
    np.testing.assert_array_equal(task.preprocessor.tokenizer(text), expected)


@pytest.mark.one_backend
def test_a_file_of_a_backbone_says_what_it_leaves_out(saved, tmp_path, capsys):
    arguments = (saved / "t5_backbone", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2, "--no-verify") == 0
    message = capsys.readouterr().err
    assert "warning: The preset's T5Tokenizer is not kept" in message
    assert len(models.mixtures(keras.models.load_model(arguments[1]))) == 2


@pytest.mark.one_backend
def test_a_keras_file_stays_compiled(saved, tmp_path, capsys):
    moe = tmp_path / "moe.keras"
    assert convert(saved / "pairs.keras", moe, "--num-experts", 4) == 0
    printed = capsys.readouterr()
    assert "1 blocks to 4 experts each." in printed.out
    assert "computes what the dense one does" in printed.out
    assert "every weight is as it was written" in printed.out
    assert printed.out.endswith(f"{paths.size(moe) / 1024:.3g} KiB.\n")
    for stage in ("load", "inputs", "convert", "save", "verify"):
        assert f"{stage}: " in printed.err
    loaded = keras.models.load_model(moe)
    assert loaded.compiled
    assert loaded.loss == "mse"
    assert len(models.mixtures(loaded)) == 1


@pytest.mark.one_backend
def test_a_loss_that_cannot_be_read_is_left_out(tmp_path, capsys):
    def strange(y, predicted):
        return keras.ops.mean(y - predicted)

    dense = models.dense_pairs()
    dense.compile("sgd", strange)
    dense.save(tmp_path / "dense.keras")
    moe = tmp_path / "moe.keras"
    arguments = (tmp_path / "dense.keras", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    assert "warning: The compile settings" in capsys.readouterr().err
    assert not keras.models.load_model(moe).compiled


@pytest.mark.one_backend
def test_what_a_file_cannot_say_is_left_out_alone(tmp_path, capsys):
    def strange(y, predicted):
        return keras.ops.mean(y - predicted, axis=-1)

    dense = models.dense_pairs()
    dense.compile(
        keras.optimizers.AdamW(0.25, weight_decay=0.5, clipnorm=2.0),
        keras.losses.MeanAbsoluteError(),
        metrics=["mse", strange],
    )
    dense.save(tmp_path / "dense.keras")
    moe = tmp_path / "moe.keras"
    arguments = (tmp_path / "dense.keras", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    message = capsys.readouterr().err
    assert "warning: The metric 'strange' could not be read" in message
    loaded = keras.models.load_model(moe)
    assert loaded.optimizer.get_config() == dense.optimizer.get_config()
    assert isinstance(loaded.loss, keras.losses.MeanAbsoluteError)
    y = models.output(dense, models.tokens(4, models.WIDTH))
    logs = loaded.evaluate(
        models.tokens(4, models.WIDTH), y, verbose=0, return_dict=True
    )
    assert set(logs) == {"loss", "mse"}


@pytest.mark.one_backend
def test_a_task_in_a_file_keeps_its_settings(tmp_path, capsys):
    dense = models.vit_classifier()
    dense.compile(keras.optimizers.SGD(0.25, clipnorm=2.0), "mse", metrics=[])
    dense.save(tmp_path / "dense.keras")
    moe = tmp_path / "moe.keras"
    arguments = (tmp_path / "dense.keras", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    assert "compile" not in capsys.readouterr().err
    with zipfile.ZipFile(moe) as file:
        config = json.loads(file.read("config.json"))["compile_config"]
    assert config["optimizer"]["config"]["clipnorm"] == 2.0
    assert config["loss"] == "mse"


@pytest.mark.one_backend
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_weights_that_will_not_train_are_told(saved, tmp_path, capsys, policy):
    arguments = (saved / "vit", tmp_path / "moe", "--num-experts", 2)
    assert convert(*arguments, "--no-verify", "--dtype", policy) == 0
    message = capsys.readouterr().err
    told = "`--dtype mixed_bfloat16`" in message
    assert told == (policy == "bfloat16")


@pytest.mark.one_backend
def test_a_task_preset_may_become_a_file(saved, tmp_path):
    moe = tmp_path / "moe.keras"
    arguments = (saved / "t5", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    loaded = keras.models.load_model(moe)
    np.testing.assert_array_equal(
        loaded.preprocessor.tokenizer("the fox"),
        models.t5_preprocessor().tokenizer("the fox"),
    )


@pytest.mark.one_backend
def test_a_preset_may_be_read_in_another_dtype(saved, tmp_path, capsys):
    found = answer(
        capsys,
        *(saved / "vit", tmp_path / "moe", "--num-experts", 2),
        *("--dtype", "bfloat16", "--no-verify"),
    )
    assert list(found["seconds"]) == ["load", "convert", "save"]
    half = found["estimate"]["dense_weight_bytes"]
    assert half == 2 * found["estimate"]["dense_params"]
    dense, moe = (
        keras_hub.models.ImageClassifier.from_preset(str(p), dtype="bfloat16")
        for p in (saved / "vit", tmp_path / "moe")
    )
    assert moe.dtype_policy.name == "bfloat16"
    expected = ku.upcycle_model(dense, 2)
    added = [models.mixtures(m)[0].router.kernel for m in (moe, expected)]
    added[1].assign(added[0])
    models.assert_same_weights(moe, expected)


@pytest.mark.one_backend
def test_a_name_is_asked_of_kerashub(saved, tmp_path, monkeypatch):
    asked = []

    def download(handle, path):
        asked.append(handle)
        if not (saved / "vit" / path).exists():
            raise ValueError(f"{path} is not present in the model files")
        return str(saved / "vit" / path)

    hub = sys.modules["keras_hub.src.utils.preset_utils"]
    monkeypatch.setattr(hub.kagglehub, "model_download", download)
    name = "vit_base_patch16_224_imagenet"
    moe = tmp_path / "moe"
    assert convert(name, moe, "--num-experts", 2, "--no-verify") == 0
    (handle,) = set(asked)
    assert hub.BUILTIN_PRESETS[name]["kaggle_handle"] == f"kaggle://{handle}"
    loaded = keras_hub.models.ImageClassifier.from_preset(str(moe))
    assert len(models.mixtures(loaded)) == 1


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("--router top_k", {"router": "top_k"}),
        ("--layers all", {"layers": "all"}),
        ("--layers 1,3", {"layers": [1, 3]}),
        ("--layers=-2,-1", {"layers": [-2, -1]}),
        ("--layers a=all,b=none", {"layers": {"a": "all", "b": None}}),
        ("--layers a=1,2,b=all", {"layers": {"a": [1, 2], "b": "all"}}),
        ("--router a=top_k,b=none", {"router": {"a": "top_k", "b": None}}),
        ("--layers all_but_first", {"layers": "all_but_first"}),
        ("--recipe sparse_upcycling", {"recipe": "sparse_upcycling"}),
        ("--expert-init random", {"expert_init": "random"}),
        ("--target mixtral", {"target": "mixtral"}),
    ],
)
def test_options_are_the_arguments_of_upcycle_model(options, expected):
    args = cli.build_parser().parse_args(["inspect", "m", *options.split()])
    assert conversion.read(args) == {
        "router": None,
        "layers": None,
        "expert_init": None,
        "recipe": None,
        "target": None,
        **expected,
    }


@pytest.mark.one_backend
def test_options_of_routers_reach_those_that_have_them():
    given = "--router a=top_k,b=expert_choice --top-k 3 --capacity-factor 1.5"
    args = cli.build_parser().parse_args(["inspect", "m", *given.split()])
    routers = conversion.read(args)["router"]
    assert (routers["a"].top_k, routers["a"].capacity_factor) == (3, 1.5)
    assert routers["b"].capacity_factor == 1.5
    given = "--router top_k --capacity-factor none"
    args = cli.build_parser().parse_args(["inspect", "m", *given.split()])
    router = conversion.read(args)["router"]
    assert (router.top_k, router.capacity_factor) == (2, None)


# Verification.


@pytest.mark.one_backend
@pytest.mark.parametrize("which", ["expert_down", "router", "head/bias"])
def test_a_weight_that_changed_on_its_way_is_found(
    which, saved, tmp_path, capsys, monkeypatch
):
    save = cli_models.save

    def spoil(model, path, parts):
        (layer,) = models.mixtures(model)
        spoiled = {
            "expert_down": layer.experts.expert_down.kernel,
            "router": layer.router.kernel,
            "head/bias": model.get_layer("head").bias,
        }[which]
        value = models.array(spoiled)
        value[-1] = np.nextafter(value[-1], np.inf)
        spoiled.assign(value)
        save(model, path, parts)

    monkeypatch.setattr(cli_models, "save", spoil)
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    found = answer(capsys, *arguments, "--num-experts", 2, code=1)
    assert not found["passed"]
    assert not found["kept"]
    (changed,) = found["changed_weights"]
    assert which in changed
    assert names(tmp_path) == []
    assert convert(*arguments, "--num-experts", 2) == 1
    text = capsys.readouterr().out
    assert f"1 weights are not as written: {changed}" in text
    assert "Nothing was kept" in text


@pytest.mark.one_backend
def test_an_output_that_is_no_number_fails(
    saved, tmp_path, capsys, monkeypatch
):
    """Whatever the tolerance, and if the weights were as they should be."""
    save = cli_models.save

    def spoil(model, path, parts):
        bias = model.get_layer("head").bias
        bias.assign(keras.ops.full(bias.shape, float("nan")))
        save(model, path, parts)

    monkeypatch.setattr(cli_models, "save", spoil)
    monkeypatch.setattr(cli_models, "changed", lambda *given: [])
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2) == 1
    assert "not a finite number" in capsys.readouterr().out
    assert names(tmp_path) == []


@pytest.mark.one_backend
def test_a_tolerance_is_kept_to(saved, tmp_path, capsys):
    """Experts that take few tokens leave most of them to none.

    In the first block, so that the class token hears of it in the second.
    """
    few = ("--router", "expert_choice", "--capacity-factor", 0.25)
    few = (*few, "--layers", 0)
    arguments = (saved / "vit", tmp_path / "moe", "--num-experts", 2, *few)
    assert convert(*arguments, "--tolerance", 1e-4) == 1
    text = capsys.readouterr().out
    assert "meet no expert" in text
    assert "The output differs by more than 0.0001." in text
    assert names(tmp_path) == []
    assert answer(capsys, *arguments)["report"]["relative_difference"] > 1e-4
    assert names(tmp_path) == ["moe"]


@pytest.mark.one_backend
def test_inputs_may_be_given(saved, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "x.npz", anything=models.tokens(7, models.WIDTH))
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    inputs = ("--inputs", tmp_path / "x.npz")
    assert convert(*arguments, "--num-experts", 2, *inputs) == 0
    monkeypatch.setattr(upcycle, "upcycle_model", None)
    np.savez(tmp_path / "y.npz", anything=models.tokens(7, models.WIDTH + 1))
    capsys.readouterr()
    arguments = (saved / "pairs.keras", tmp_path / "no.keras")
    inputs = ("--inputs", tmp_path / "y.npz")
    assert convert(*arguments, "--num-experts", 2, *inputs) == 2
    message = capsys.readouterr().err
    assert "(None, 16)" in message
    assert "(7, 17)" in message

"""`keras-upcycle export`: what is written, and what is said where it is not."""

import json

import hub_models
import keras_hub
import pytest

import keras_upcycle as ku
from keras_upcycle import cli

pytestmark = pytest.mark.one_backend
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """A folder of sparse models, which no test may change."""
    folder = tmp_path_factory.mktemp("presets")
    dense = hub_models.dense("LlamaBackbone")
    ku.upcycle_model(dense, 4, target="mixtral").save_to_preset(
        str(folder / "llama_moe")
    )
    ku.upcycle_model(dense, 4).save_to_preset(str(folder / "half_moe"))
    hub_models.mixture("Qwen3MoeBackbone").save_to_preset(str(folder / "qwen"))
    return folder


def answer(capsys, *given, code=0):
    capsys.readouterr()
    assert cli.main(["export", *map(str, given), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_folder_of_hugging_face_is_written(presets, tmp_path, capsys):
    found = answer(
        capsys, presets / "llama_moe", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert found["written"]
    assert found["target"] == "mixtral"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json")
    }


def test_a_stock_model_is_written(presets, tmp_path, capsys):
    for name in ("out", "out.keras"):
        answer(
            capsys,
            *(presets / "llama_moe", tmp_path / name),
            *("--format", "keras_hub"),
        )
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "out"))
    assert type(loaded) is keras_hub.models.MixtralBackbone
    assert (tmp_path / "out.keras").is_file()


def test_a_mixture_of_kerashubs_own_is_taken(presets, tmp_path, capsys):
    found = answer(capsys, presets / "qwen", tmp_path / "out")
    assert found["target"] == "qwen3_moe"
    assert found["written"]


def test_why_not_is_said_and_nothing_is_written(presets, tmp_path, capsys):
    found = answer(capsys, presets / "half_moe", tmp_path / "out", code=1)
    assert not found["written"]
    assert 'layers="all"' in " ".join(found["reasons"])
    assert list(tmp_path.iterdir()) == []


def test_a_check_writes_nothing(presets, capsys):
    before = sorted(presets.iterdir())
    assert cli.main(["export", str(presets / "llama_moe"), "--check"]) == 0
    assert (
        "can be exported to hugging_face (mixtral)" in capsys.readouterr().out
    )
    assert cli.main(["export", str(presets / "half_moe"), "--check"]) == 1
    assert 'layers="all"' in capsys.readouterr().out
    assert sorted(presets.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "`output` must say where"),
        (["out", "--format", "onnx"], "format"),
        (["out", "--target", "switch"], "target"),
        (["out", "--dtype", "int4"], "dtype"),
    ],
    ids=["no output", "format", "target", "dtype"],
)
def test_nonsense_is_refused(
    presets, tmp_path, capsys, monkeypatch, more, said
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(presets / "llama_moe"), *more]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_for_a_target_can_be_exported(tmp_path, capsys):
    hub_models.dense("LlamaBackbone").save_to_preset(str(tmp_path / "dense"))
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    given = ["convert", dense, moe, "--num-experts", 3, "--target", "mixtral"]
    assert cli.main(list(map(str, given))) == 0
    assert "2 blocks to 3 experts" in capsys.readouterr().out
    assert cli.main(["export", str(moe), str(tmp_path / "out")]) == 0


def test_files_are_as_large_as_is_asked(presets, tmp_path, capsys):
    found = {}
    for size in ("10KB", "1e-5"):
        answer(
            capsys,
            *(presets / "llama_moe", tmp_path / size),
            *("--max-shard-size", size),
        )
        found[size] = sorted(p.name for p in (tmp_path / size).iterdir())
    assert found["10KB"] == found["1e-5"]
    assert "model.safetensors.index.json" in found["10KB"]
    with pytest.raises(SystemExit):
        cli.main(["export", "a", "b", "--max-shard-size", "5XB"])
    assert "'16GB'" in capsys.readouterr().err

"""`keras-upcycle inspect`: blocks, reasons and costs, as the library's own."""

import dataclasses
import json

import keras
import keras_hub
import models
import pytest

import keras_upcycle as ku
from keras_upcycle import cli

pytestmark = pytest.mark.one_backend


def inspect(*given):
    return cli.main(["inspect", *map(str, given)])


def answer(capsys, *given, code=0):
    assert inspect(*given, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_a_vit_in_words(saved, capsys):
    assert inspect(saved / "vit") == 0
    text = capsys.readouterr().out
    assert "2 feed-forward blocks found, 0 turned down" in text
    first, second = (line for line in text.splitlines() if "16 -> 32" in line)
    assert first.endswith("stays dense")
    assert second.endswith("ExpertChoiceRouter")
    assert "1 blocks to 8 experts each." in text


def test_the_numbers_are_the_librarys(saved, capsys):
    found = answer(
        capsys,
        *(saved / "t5", "--num-experts", 4, "--router", "decoder=none"),
        *("--layers", "encoder=0,1"),
        *("--sequence-length", "encoder=10,decoder=3"),
    )
    dense = keras_hub.models.Seq2SeqLM.from_preset(str(saved / "t5"))
    estimate = ku.estimate_upcycle(
        dense,
        4,
        router={"decoder": None},
        layers={"encoder": [0, 1]},
        sequence_length={"encoder": 10, "decoder": 3},
    )
    expected = json.loads(json.dumps(dataclasses.asdict(estimate)))
    assert found["estimate"] == expected
    assert found["parameters"] == dense.count_params()
    assert found["class"] == "T5Seq2SeqLM"
    assert [
        (block["path"], block["hidden_dim"], block["intermediate_dim"])
        for block in found["blocks"]
    ] == [
        (site.path, site.hidden_dim, site.intermediate_dim)
        for site in ku.find_feed_forwards(dense)
    ]
    assert [
        (block["stack"], block["number"], block["converted"])
        for block in found["blocks"]
    ] == [
        ("encoder", 0, True),
        ("encoder", 1, True),
        ("decoder", 0, False),
        ("decoder", 1, False),
    ]


def test_meshes_of_so_many_devices(saved, capsys):
    options = ("--devices", 8, "--tokens-per-device", 64, "--speed", "1e9,1e6")
    found = answer(capsys, saved / "vit", *options)
    dense = keras_hub.models.ImageClassifier.from_preset(str(saved / "vit"))
    estimate = ku.estimate_upcycle(dense, 8, mesh=8, tokens_per_device=64)
    expected = [dataclasses.asdict(mesh) for mesh in estimate.meshes]
    assert len(expected) == 4
    assert found["estimate"]["meshes"] == expected
    assert inspect(saved / "vit", *options) == 0
    text = capsys.readouterr().out
    assert "data x expert" in text
    seconds = estimate.meshes[-1].step_seconds(1e9, 1e6)
    assert f"1 x 8: {seconds:.3g} s." in text


@pytest.mark.parametrize("speed", ["fast", "1e9", "1e9,0"])
def test_a_speed_is_two_numbers(speed, saved, capsys):
    with pytest.raises(SystemExit):
        inspect(saved / "vit", "--devices", 8, "--speed", speed)
    assert "two numbers above 0" in capsys.readouterr().err


def test_what_is_turned_down_comes_with_its_reason(saved, capsys):
    assert inspect(saved / "pairs.keras") == 0
    text = capsys.readouterr().out
    assert "Turned down: head: its output is an output of the model." in text
    found = answer(capsys, saved / "pairs.keras")
    assert found["turned_down"] == [
        {"path": "head", "reason": "its output is an output of the model"}
    ]


def single():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def diverged():
    model = models.dense_pairs()
    bias = model.get_layer("up_0").bias
    bias.assign(keras.ops.full(bias.shape, float("nan")))
    return model


def sparse():
    return ku.upcycle_model(models.dense_pairs(), 2)


@pytest.mark.parametrize(
    ("build", "blocks", "problem"),
    [
        (single, 0, "No feed-forward block found"),
        (diverged, 2, "must be finite"),
        (sparse, 1, "must be dense"),
    ],
)
def test_what_cannot_be_converted_is_exit_code_1(
    build, blocks, problem, tmp_path, capsys
):
    path = tmp_path / "model.keras"
    build().save(path)
    found = answer(capsys, path, code=1)
    assert problem in found["problem"]
    assert len(found["blocks"]) == blocks
    assert inspect(path) == 1
    assert f"Cannot be converted so. {found['problem']}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers encoder=7", "with 7"),
        ("--sequence-length decoder=3", "`sequence_length` must give"),
        ("--shard-dense", "Pass `mesh`"),
    ],
)
def test_bad_options_are_exit_code_2(options, message, saved, capsys):
    assert inspect(saved / "pairs.keras", *options.split()) == 2
    assert message in capsys.readouterr().err


def test_whether_it_is_worth_it_is_the_librarys_prediction(saved, capsys):
    given = ("--tokens-spent", "7.4e10", "--tokens-left", "3.7e10")
    found = answer(capsys, saved / "vit", *given)
    dense = keras_hub.models.ImageClassifier.from_preset(str(saved / "vit"))
    ratio = ku.estimate_upcycle(dense, 8).flops_ratio
    expected = ku.predict_upcycling(
        dense.count_params(), 7.4e10, 3.7e10, flops_ratio=ratio
    )
    assert found["prediction"] == json.loads(
        json.dumps(dataclasses.asdict(expected))
    )
    assert inspect(saved / "vit", *given) == 0
    assert str(expected) in capsys.readouterr().out
    assert inspect(saved / "vit", *given[:2]) == 2
    assert "Pass both or neither" in capsys.readouterr().err

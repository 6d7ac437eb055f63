"""`keras-upcycle convert`: what is refused; nothing half done stays."""

import os
import sys

import keras
import pytest

from keras_upcycle import cli
from keras_upcycle.cli import model_files, paths
from keras_upcycle.conversion import upcycle

pytestmark = pytest.mark.one_backend


def convert(*given):
    return cli.main(["convert", *map(str, given)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is refused, before anything is read or written.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--router nonsense",
            "['carving', 'default_moe', 'ds_moe', 'expert_choice', 'skywork', "
            "'top_k']",
        ),
        ("--router none", "`--router encoder=none`"),
        ("--layers none", "`--layers encoder=none`"),
        ("--layers 1,x", "Received: --layers='1,x'"),
        ("--top-k 2", "Add `--router top_k`"),
        ("--router expert_choice --top-k 2", "no such router"),
        ("--capacity-factor 2", "`--router` must name one"),
        ("--router expert_choice --capacity-factor none", "capacity_factor"),
        ("--recipe soup", "recipe='soup'"),
        ("--expert-init soup", "--expert-init='soup'"),
        ("--inputs nowhere.npz", "where there is no file"),
    ],
)
def test_options_are_checked_before_a_model_is_read(
    options, message, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(model_files, "load", None)
    arguments = (saved / "vit", tmp_path / "moe", "--num-experts", 2)
    assert convert(*arguments, *options.split()) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
@pytest.mark.parametrize("name", ["moe", "moe.keras"])
def test_nothing_is_overwritten(
    kind, name, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(model_files, "load", None)
    taken = tmp_path / name
    if kind == "file":
        taken.write_text("mine")
    elif kind == "folder":
        taken.mkdir()
    else:
        taken.symlink_to(tmp_path / "gone")
    assert convert(saved / "vit", taken, "--num-experts", 2) == 2
    message = capsys.readouterr().err
    assert "must not exist yet" in message
    assert repr(str(taken)) in message
    assert names(tmp_path) == [name]
    assert kind != "file" or taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("vit", "no/such/moe", "there is no folder"),
        ("vit", "moe.h5", "the name of an HDF5 file"),
        ("pairs.keras", "moe", "Write 'moe.keras' instead"),
        ("nowhere.keras", "moe.keras", "where there is nothing"),
        ("no/where", "moe", "where there is nothing"),
        ("", "moe", "holds a config.json"),
        ("vit/config.json", "moe", "must be a .keras file"),
    ],
)
def test_places_are_checked(model, output, message, saved, tmp_path, capsys):
    code = convert(saved / model, tmp_path / output, "--num-experts", 2)
    assert code == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["./vit_base", "~/vit_base", "a/b", "x.keras"])
def test_a_path_is_never_taken_for_a_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_files, "load", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert convert(name, tmp_path / "moe", "--num-experts", 2) == 2
    message = capsys.readouterr().err
    assert "where there is nothing" in message
    assert f"as a path it is {tmp_path}/" in message


def test_a_folder_goes_before_a_preset_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "vit_base_patch16_224_imagenet"
    assert paths.source(folder.name).kind == paths.NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert paths.source(folder.name) == paths.Source(str(folder), paths.FOLDER)


def test_an_unknown_name_says_what_was_tried(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert("no_such_preset", "moe", "--num-experts", 2) == 2
    message = capsys.readouterr().err
    assert "Cannot read the preset 'no_such_preset'" in message
    assert "Unknown preset identifier" in message
    assert str(tmp_path / "no_such_preset") in message
    assert message.count("\n") == 1


def test_a_download_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    def download(handle, path):
        raise RuntimeError("no route to host")

    hub = sys.modules["keras_hub.src.utils.preset_utils"]
    monkeypatch.setattr(hub.kagglehub, "model_download", download)
    name = "vit_base_patch16_224_imagenet"
    assert convert(name, tmp_path / "moe", "--num-experts", 2) == 2
    message = capsys.readouterr().err
    assert f"{name}': RuntimeError: no route to host" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 1,9", "with 9"),
        ("--router top_k --top-k 3", "top_k=3, num_experts=2"),
        ("--layers trunk=all", "The stacks are ['encoder']"),
        ("--dtype nonsense", "nonsense"),
    ],
)
def test_a_plan_is_checked_before_the_work(
    options, message, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(upcycle, "upcycle_model", None)
    arguments = (saved / "vit", tmp_path / "moe", "--num-experts", 2)
    assert convert(*arguments, *options.split()) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_dtype_is_not_for_files(saved, tmp_path, capsys):
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2, "--dtype", "bfloat16") == 2
    assert "keeps the policies" in capsys.readouterr().err


def test_a_full_disk_is_foreseen(saved, tmp_path, capsys, monkeypatch):
    usage = paths.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(upcycle, "upcycle_model", None)
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2) == 2
    assert "has 1000 B free" in capsys.readouterr().err


def test_a_broken_file_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.keras").write_bytes(b"PK but not a zip file")
    arguments = (tmp_path / "broken.keras", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2) == 2
    message = capsys.readouterr().err
    assert "Cannot read the file" in message
    assert message.count("\n") == 1
    assert names(tmp_path) == ["broken.keras"]


# Nothing half done.

STAGES = {
    "convert": (upcycle, "upcycle_model"),
    "save": (model_files, "save"),
    "verify": (model_files, "changed"),
}


def failing(stage, error, monkeypatch):
    """Lets a stage do its work, and fail at the end of it."""
    module, name = STAGES[stage]
    work = getattr(module, name)

    def fail(*given, **more):
        work(*given, **more)
        raise error

    monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize(
    ("model", "output"), [("vit", "moe"), ("pairs.keras", "moe.keras")]
)
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError("disk"), 2), (KeyError(), 2), (KeyboardInterrupt(), 130)],
    ids=["error", "bug", "ctrl-c"],
)
def test_a_failure_leaves_nothing(
    stage, error, code, model, output, saved, tmp_path, capsys, monkeypatch
):
    failing(stage, error, monkeypatch)
    # Of another process, dead or alive.
    (tmp_path / ".moe.incomplete-1-x").mkdir()
    arguments = (saved / model, tmp_path / output, "--num-experts", 2)
    assert convert(*arguments) == code
    assert names(tmp_path) == [".moe.incomplete-1-x"]
    printed = capsys.readouterr()
    assert "keras-upcycle convert: " in printed.err
    assert printed.out == ""


def test_what_another_process_left_is_not_the_output(saved, tmp_path):
    left = tmp_path / ".moe.keras.incomplete-1-x"
    left.mkdir()
    (left / "moe.keras").write_text("half")
    arguments = (saved / "pairs.keras", tmp_path / "moe.keras")
    assert convert(*arguments, "--num-experts", 2, "--no-verify") == 0
    assert names(tmp_path) == [left.name, "moe.keras"]
    assert (left / "moe.keras").read_text() == "half"
    keras.models.load_model(tmp_path / "moe.keras")


def test_while_it_works_the_output_does_not_exist(saved, tmp_path, monkeypatch):
    seen = []
    save = model_files.save

    def look(model, path, parts):
        save(model, path, parts)
        seen.append((names(tmp_path), path))

    monkeypatch.setattr(model_files, "save", look)
    arguments = (saved / "vit", tmp_path / "moe", "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 0
    ((during, path),) = seen
    (temporary,) = during
    assert temporary.startswith(f".moe.incomplete-{os.getpid()}-")
    assert path == tmp_path / temporary / "moe"
    assert names(tmp_path) == ["moe"]


def test_a_name_that_is_taken_meanwhile_is_left_alone(
    saved, tmp_path, capsys, monkeypatch
):
    moe = tmp_path / "moe.keras"
    save = model_files.save

    def race(*given):
        save(*given)
        moe.write_text("theirs")

    monkeypatch.setattr(model_files, "save", race)
    arguments = (saved / "pairs.keras", moe, "--num-experts", 2)
    assert convert(*arguments, "--no-verify") == 2
    assert "made by somebody else meanwhile" in capsys.readouterr().err
    assert names(tmp_path) == ["moe.keras"]
    assert moe.read_text() == "theirs"

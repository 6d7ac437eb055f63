"""What killed processes leave: mentioned, removed, and nothing else is."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

import keras
import models
import numpy as np
import pytest
from places import ROOT

import keras_upcycle as ku
from keras_upcycle import atomic_files, cli
from keras_upcycle.analysis import router_log

pytestmark = pytest.mark.one_backend

NAME = "moe.keras"


@pytest.fixture
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder, process, name=NAME, end="abcdefgh", machine=None):
    """What a killed process left."""
    machine = "" if machine is None else f"@{machine}"
    left = folder / f".{name}.incomplete-{process}-{end}{machine}"
    left.mkdir()
    (left / name).write_text("half")
    return left


def clean(folder, name=NAME):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        atomic_files.clean(folder, re.escape(name))
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("machine", [None, "this"])
def test_what_a_dead_process_left_is_removed(machine, dead, tmp_path):
    if machine is not None:
        machine = atomic_files._machine()
    left = [
        leave(tmp_path, dead, machine=machine),
        leave(tmp_path, dead, end="other", machine=machine),
        leave(tmp_path, 2**40, machine=machine),  # no number of a process
    ]
    (left[0] / "assets").mkdir()
    (left[0] / "assets" / "vocabulary").write_text("a" * 2048)
    said = clean(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 3
    for entry in left:
        assert any(str(entry) in each for each in said)
    assert "removed: " in said[0]


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    try:
        for number in (process.pid, os.getpid(), 1):
            left = leave(tmp_path, number)
            (said,) = clean(tmp_path)
            assert (left / NAME).read_text() == "half"
            assert str(left) in said
            assert "still runs" in said
            (left / NAME).unlink()
            left.rmdir()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(
    atomic_files._started(os.getpid()) is None, reason="needs /proc"
)
def test_a_number_that_is_used_again_is_not_that_process(tmp_path):
    """The folder is older than the process: containers count from 1."""
    for number in (os.getpid(), 1):
        left = leave(tmp_path, number)
        past = time.time() - 10 * 365 * 86400
        os.utime(left, (past, past))
        (said,) = clean(tmp_path)
        assert not left.exists()
        assert "removed" in said
    started = atomic_files._started(os.getpid())
    assert started <= time.time() + 1
    assert started > time.time() - 86400


def test_another_machines_are_left_alone(dead, tmp_path):
    left = leave(tmp_path, dead, machine="elsewhere")
    (said,) = clean(tmp_path)
    assert left.exists()
    assert "'elsewhere'" in said
    assert "remove it" in said


def test_nothing_of_anybody_elses_is_touched(dead, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("x")
    kept = [
        leave(tmp_path, dead, name="other.keras"),
        leave(tmp_path, dead, name="a.moe.keras"),
        tmp_path / f".{NAME}.incomplete-notes",
        tmp_path / f".{NAME}.incomplete-{dead}",
        tmp_path / f"{NAME}.incomplete-{dead}-abcdefgh",
        tmp_path / f".{NAME}.incomplete-x{dead}-abcdefgh",
    ]
    for folder in kept[2:]:
        folder.mkdir()
    file = tmp_path / f".{NAME}.incomplete-{dead}-file"
    file.write_text("x")
    link = tmp_path / f".{NAME}.incomplete-{dead}-link"
    link.symlink_to(theirs)
    assert clean(tmp_path) == []
    assert all(folder.is_dir() for folder in kept)
    assert file.read_text() == "x"
    assert link.is_symlink()
    assert (theirs / "precious").exists()
    # A name is no expression.
    leave(tmp_path, dead, name="moeXkeras")
    assert clean(tmp_path) == []
    assert clean(tmp_path / "missing") == []


def test_a_name_of_special_characters_is_found(dead, tmp_path):
    name = "a+b (1).keras"
    leave(tmp_path, dead, name=name)
    assert len(clean(tmp_path, name)) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_said(dead, tmp_path, monkeypatch):
    left = leave(tmp_path, dead)
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda *a, **k: None)
    (said,) = clean(tmp_path)
    assert "could not be removed. Remove it yourself" in said
    assert left.exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_it_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(draft):
        draft.write_text("ne")
        raise error

    with pytest.raises(error):
        atomic_files.replace(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_files.replace(path, lambda draft: draft.write_text("new"))
    assert path.read_text() == "new"


# What writes.


def dense_model():
    return models.dense_pairs()


def write_checkpoints(folder):
    dense = dense_model()
    dense.compile("sgd", "mse")
    x = np.ones((4, models.WIDTH), "float32")
    y = np.ones((4, models.CLASSES), "float32")
    checkpoints = ku.ExpertCheckpoints(every_steps=1, directory=folder)
    dense.fit(x, y, batch_size=2, verbose=0, callbacks=[checkpoints])
    assert checkpoints.steps == [1, 2]


def write_log(folder):
    model = keras.Sequential(
        [keras.Input((6, 8)), ku.MoEFeedForward(4, 16, name="moe")]
    )
    model.compile("sgd", "mse")
    x = np.ones((8, 6, 8), "float32")
    for _ in range(2):
        monitor = ku.RouterMonitor(every=1, log=folder / "log.csv")
        model.fit(x, x, batch_size=2, verbose=0, callbacks=[monitor])
    return monitor.readings


WRITERS = {
    "ExpertWeights.save": (
        "expert.npz",
        lambda folder: ku.ExpertWeights.from_model(dense_model()).save(
            folder / "expert.npz"
        ),
    ),
    "ExpertCheckpoints": ("expert_step_000000007.npz", write_checkpoints),
    "RouterMonitor": ("log.csv", write_log),
}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_every_writer_cleans_up_after_a_killed_one(writer, dead, tmp_path):
    name, write = WRITERS[writer]
    left = leave(tmp_path, dead, name=name)
    with pytest.warns(UserWarning, match="that was stopped. It was removed"):
        write(tmp_path)
    assert not left.exists()
    assert [p for p in tmp_path.iterdir() if "incomplete" in p.name] == []


def test_report_plots_whole_pictures_only(dead, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    write_log(tmp_path)
    left = leave(tmp_path, dead, name="load.png")
    picture = tmp_path / "load.png"
    command = ["report", str(tmp_path / "log.csv"), "--plot", str(picture)]
    assert cli.main(command) == 0
    assert left.name in capsys.readouterr().err
    assert not left.exists()
    whole = picture.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def half(self, path, **more):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    assert cli.main(command) == 128 + signal.SIGINT
    assert picture.read_bytes() == whole
    assert router_log.read(tmp_path / "log.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "load.png",
        "log.csv",
    ]


# The command, stopped in a real process.

# In the background of a shell, Ctrl-C is ignored by whoever is started there.
HALF_WRITTEN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import keras_upcycle
from keras_upcycle import cli
from keras_upcycle.cli import model_files

def half(model, path, parts):
    path.mkdir() if path.suffix == "" else path.write_text("half a model")
    print("writing", flush=True)
    time.sleep(600)

model_files.save = half
sys.exit(cli.main(sys.argv[1:]))
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_next_convert_removes_what_a_killed_one_left(tmp_path, capsys):
    dense_model().save(tmp_path / "dense.keras")
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    started = {}
    for number in signals:
        folder = tmp_path / number.name
        folder.mkdir()
        command = ["convert", str(tmp_path / "dense.keras"), NAME]
        started[number] = subprocess.Popen(
            [sys.executable, "-c", HALF_WRITTEN, *command, "--num-experts=2"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
    for number, process in started.items():
        folder = tmp_path / number.name
        with process:
            assert any("writing" in line for line in process.stderr)
            (temporary,) = names(folder)
            assert temporary.startswith(f".{NAME}.incomplete-{process.pid}-")
            if number == signal.SIGKILL:
                # Meanwhile another one leaves it alone.
                assert convert(tmp_path, folder / NAME) == 0
                assert "still runs" in capsys.readouterr().err
                assert names(folder) == sorted([temporary, NAME])
                (folder / NAME).unlink()
            process.send_signal(number)
            process.wait(timeout=60)
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number
            assert names(folder) == []
            continue
        assert names(folder) == [temporary]
        assert convert(tmp_path, folder / NAME) == 0
        said = capsys.readouterr().err
        assert temporary in said
        assert "removed" in said
        assert names(folder) == [NAME]
        keras.models.load_model(folder / NAME)


def convert(folder, output):
    return cli.main(
        ["convert", str(folder / "dense.keras"), str(output), "--num-experts=2"]
    )


def test_room_is_made_before_it_is_asked_for(
    dead, tmp_path, monkeypatch, capsys
):
    """What a killed convert left may fill the disk."""
    dense_model().save(tmp_path / "dense.keras")
    left = leave(tmp_path, dead)
    from keras_upcycle.cli import paths

    def check_space(path, size):
        assert not left.exists()

    monkeypatch.setattr(paths, "check_space", check_space)
    assert convert(tmp_path, tmp_path / NAME) == 0
    capsys.readouterr()

"""The command line: help, version, bad input, exit codes."""

import runpy
import sys

import pytest

from keras_upcycle import cli, demo, version


def exit_code(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"keras-upcycle {version.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_examples(arguments, capsys):
    assert exit_code(arguments) == 0
    assert "examples:\n  keras-upcycle demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--seeds", "0"], "at least 1. Received: 0"),
        (["demo", "--seeds", "x"], "at least 1. Received: x"),
        (["demo", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert exit_code(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_the_demo_misses_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(demo.NEEDED, "no_such_module", "no-such-package")
    assert cli.main(["demo", "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert 'pip install "keras-upcycle[demo]"' in message
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keras-upcycle", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("keras_upcycle", run_name="__main__")
    assert caught.value.code == 0
    assert version.__version__ in capsys.readouterr().out

"""The command line: help, version, bad input, exit codes, what is printed."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import warnings

import keras
import models
import pytest
from places import ROOT

import keras_upcycle as ku
from keras_upcycle import cli, version
from keras_upcycle.cli import arguments, output, signals
from keras_upcycle.demo import needed

pytestmark = pytest.mark.one_backend

COMMANDS = ("inspect", "convert", "verify", "demo")


def exit_code(given):
    with pytest.raises(SystemExit) as caught:
        cli.main(given)
    return caught.value.code


@pytest.fixture
def pretend(monkeypatch):
    """Puts a function in the place of `inspect`'s work."""

    def put(run):
        monkeypatch.setattr(cli.inspect, "run", run)
        return ["inspect", "anything"]

    return put


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"keras-upcycle {version.__version__}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_examples_that_the_parser_takes(command, capsys, pretend):
    assert exit_code([command, "--help"] if command else ["--help"]) == 0
    text = capsys.readouterr().out
    examples = text.partition("examples:\n")[2].splitlines()
    assert len(examples) > 1
    for example in examples:
        words = shlex.split(example)
        given = words[words.index("keras-upcycle") + 1 :]
        if command:
            assert given[0] == command
        if "--help" not in given:
            args = cli.build_parser().parse_args(given)
            assert args.command == given[0]


def test_help_names_every_command(capsys):
    exit_code(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--seeds", "0"], "at least 1. Received: 0"),
        (["demo", "--seeds", "x"], "at least 1. Received: x"),
        (["demo", "--nonsense"], "--nonsense"),
        (["inspect"], "required: model"),
        (["inspect", "m", "--num-experts", "-1"], "at least 1. Received: -1"),
        (["inspect", "m", "--router", "a,encoder=b"], "each stack once"),
        (["inspect", "m", "--layers", "encoder="], "word between commas"),
        (["inspect", "m", "--layers", "=all"], "each stack once"),
        (["inspect", "m", "--layers", "a=1,a=2"], "each stack once"),
        (["inspect", "m", "--capacity-factor", "0"], "positive number"),
        (["inspect", "m", "--capacity-factor", "nan"], "Received: nan"),
        (["inspect", "m", "--sequence-length", "1,2"], "one number"),
        (["inspect", "m", "--sequence-length", "a=x"], "Received: x"),
        (["convert", "m"], "output, --num-experts"),
        (["convert", "m", "o", "--num-experts", "2", "--seed=-1"], "from 0 to"),
        (["convert", "m", "o", "--num-experts", "2", "--force"], "--force"),
        (["verify", "m"], "required: sparse"),
        (["verify", "m", "s", "--tolerance", "inf"], "Received: inf"),
        (["verify", "m", "s", "--tolerance", "-1"], "--tolerance"),
    ],
)
def test_bad_arguments(given, message, capsys):
    assert exit_code(given) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_what_the_demo_misses_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(needed.ALWAYS, "no_such_module", "no-such-package")
    assert cli.main(["demo", "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert "pip install no-such-package" in message
    assert not (tmp_path / "new").exists()


def test_a_demo_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keras-upcycle", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("keras_upcycle", run_name="__main__")
    assert caught.value.code == 0
    assert version.__version__ in capsys.readouterr().out


# What is printed, and the exit code.


@pytest.mark.parametrize("passed", [True, False])
def test_words_or_one_json_object(passed, pretend, capsys):
    def run(args):
        print("chatter of a library")
        record = {"worst": float("nan"), "parts": ({"far": float("inf")},)}
        return output.Answer("the words", record, passed)

    given = pretend(run)
    assert cli.main(given) == (0 if passed else 1)
    printed = capsys.readouterr()
    assert printed.out == "the words\n"
    assert printed.err == "chatter of a library\n"
    cli.main([*given, "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "command": "inspect",
        "passed": passed,
        "worst": None,
        "parts": [{"far": None}],
    }
    assert printed.err == "chatter of a library\n"


@pytest.mark.parametrize(
    "error",
    [
        ku.UpcycleError("first line\n  second line"),
        OSError("first \x1b[1mline\x1b[0m second line"),
        ImportError("first line second line"),
        MemoryError("first line second line"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_line(error, pretend, capsys):
    def run(args):
        raise error

    given = pretend(run)
    assert cli.main(given) == 2
    printed = capsys.readouterr()
    line = "keras-upcycle inspect: error: first line second line\n"
    assert printed.err == line
    assert printed.out == ""
    assert cli.main([*given, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err == line
    assert json.loads(printed.out)["error"] == "first line second line"


def test_a_bug_shows_where_and_is_no_failed_check(pretend, capsys):
    def run(args):
        raise ZeroDivisionError

    assert cli.main(pretend(run)) == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.endswith("inspect: error: ZeroDivisionError\n")


def test_a_warning_is_one_line(pretend, capsys):
    def run(args):
        warnings.warn("look\nout", stacklevel=1)
        return output.Answer("", {})

    before = warnings.showwarning
    assert cli.main(pretend(run)) == 0
    message = capsys.readouterr().err
    assert message == "keras-upcycle inspect: warning: look out\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up_and_is_the_exit_code(name, pretend, capsys):
    number = getattr(signal, name)
    cleaned = []

    def run(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(name)

    # As in a shell's foreground: tests may run under `nohup`, which has the
    # signal ignored.
    usual = signal.SIG_DFL
    if name == "SIGINT":
        usual = signal.default_int_handler
    found = signal.signal(number, usual)
    try:
        assert cli.main(pretend(run)) == 128 + number
        assert cleaned == [name]
        assert "inspect: interrupted" in capsys.readouterr().err
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, found)


def test_a_handler_of_somebody_else_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.as_exceptions():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all", {None: ["all"]}),
        ("1, 3", {None: ["1", "3"]}),
        ("a=x,b=y", {"a": ["x"], "b": ["y"]}),
        ("a=x;b=1,2", {"a": ["x"], "b": ["1", "2"]}),
        ("trunk/a=1,2,b=none", {"trunk/a": ["1", "2"], "b": ["none"]}),
    ],
)
def test_words_by_stack(text, words):
    assert arguments.by_stack(text) == words


def test_lengths_by_stack():
    assert arguments.lengths("512") == 512
    assert arguments.lengths("a=5,b=6") == {"a": 5, "b": 6}


# The process.


def test_help_does_not_wait_for_keras():
    """The installed script is a file of this name that imports `cli.main`."""
    code = """
import sys
sys.argv = ["/somewhere/bin/keras-upcycle", "convert", "--help"]
from keras_upcycle.cli import main
try:
    main()
finally:
    heavy = {"keras", "keras_hub", "jax", "tensorflow", "torch", "numpy"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.endswith("imported: []\n")
    assert "examples:" in result.stdout


@pytest.mark.slow
def test_its_own_process_knows_what_files_name(tmp_path):
    """It imports module by module, and a file may name any class of ours."""
    dense = models.dense_pairs()
    dense.compile(keras.optimizers.Adam(ku.InverseSquareRoot(1e-2)), "mse")
    dense.save(tmp_path / "dense.keras")
    code = """
import sys
sys.argv[0] = "keras-upcycle"
from keras_upcycle import cli
code = cli.main("convert dense.keras moe.keras --num-experts 2 "
                "--layers all --router default_moe".split())
code = code or cli.main("verify dense.keras moe.keras".split())
sys.exit(code)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    moe = keras.saving.load_model(tmp_path / "moe.keras")
    (router,) = {type(layer.router) for layer in models.mixtures(moe)}
    assert router is ku.DefaultMoERouter
    rate = moe.optimizer.get_config()["learning_rate"]
    assert rate["class_name"] == "InverseSquareRoot"


def test_a_layer_imported_alone_knows_the_routers():
    """As in the command's own process, which imports module by module."""
    code = """
import sys
sys.argv[0] = "keras-upcycle"
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
for router in ("top_k", "expert_choice"):
    MoEFeedForward(2, 8, router=router)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

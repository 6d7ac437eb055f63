"""What is left out of standard error while things are imported."""

import os

import pytest

from keras_upcycle.cli import quiet

pytestmark = pytest.mark.one_backend

NOISE = (
    b"WARNING: All log messages before absl::InitializeLog() is called are "
    b"written to STDERR\n"
    b"I0000 00:00:1795852399.441478    7820 port.cc:153] oneDNN is on.\n"
)
REST = b"E0000 00:00:1795852399.44 1 cuda.cc:52] failed\nWARNING: mine\nI am\n"


def test_only_what_tensorflow_says_of_itself_is_left_out(capfd):
    with quiet.imports():
        os.write(2, NOISE + REST)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == REST.decode() + "after\n"


def fails():
    os.write(2, NOISE + REST)
    raise ImportError("no such package")


def test_an_error_hides_nothing(capfd):
    with pytest.raises(ImportError, match="no such package"), quiet.imports():
        fails()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == REST.decode() + "after\n"

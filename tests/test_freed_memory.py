"""The allocator: asked to keep memory where that helps, and only there."""

import os
import subprocess
import sys

import pytest

from keras_upcycle import freed_memory

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("environment", "accelerator", "wanted"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"MALLOC_ARENA_MAX": "4"}, False, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, False, False),
        ({"KERAS_UPCYCLE_ALLOCATOR": "system"}, False, False),
        ({"KERAS_UPCYCLE_ALLOCATOR": "keep"}, True, True),
    ],
)
def test_what_is_decided_already_stays(
    monkeypatch, environment, accelerator, wanted
):
    found = ["/dev/nvidia0"] if accelerator else []
    monkeypatch.setattr(freed_memory.glob, "glob", lambda path: found)
    assert freed_memory.is_requested(environment) == wanted


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"must be .*Received: 'yes'"):
        freed_memory.is_requested({"KERAS_UPCYCLE_ALLOCATOR": "yes"})


# The module alone: importing the package would import Keras.
PROGRAM = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("freed_memory", sys.argv[1])
freed_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(freed_memory)
freed_memory.keep()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def faults_of_a_turn(size=80_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_turn()
print(faults_of_a_turn())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(os, "confstr"),
    reason="the allocator that is asked is glibc's",
)
@pytest.mark.parametrize("chosen", ["keep", "system"])
def test_a_block_that_was_freed_is_met_again_without_page_faults(chosen):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_")
    }
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, freed_memory.__file__],
        env={**environment, "KERAS_UPCYCLE_ALLOCATOR": chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    faults = int(answer.stdout)
    if chosen == "keep":
        assert faults < 100
    else:  # 19,531 pages of 4 KiB, or fewer huge ones
        assert faults > 30

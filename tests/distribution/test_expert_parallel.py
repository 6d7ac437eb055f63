"""Experts spread over a mesh of 8 devices, beside one device.

What the script `expert_parallel` finds in processes with 8 devices of the CPU.
"""

import json
import os
import subprocess
import sys

import keras
import pytest
from places import ROOT

import keras_upcycle as ku

SCRIPTS = ROOT / "tests" / "support"
jax_alone = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Keras lays variables out over devices on JAX alone",
)


def found_by(*parts):
    """What the script prints, by name."""
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            SCRIPTS / "expert_parallel.py",
            *parts,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)},
    )
    assert not run.returncode, run.stderr[-4000:]
    lines = [
        json.loads(line) for line in run.stdout.splitlines() if "{" in line
    ]
    return {line["name"]: line["value"] for line in lines}


@jax_alone
@pytest.mark.slow
def test_a_mesh_computes_and_trains_as_one_device():
    """Predictions, losses and weights of three steps, of unlike models."""
    found = found_by("equals_one_device")
    assert len(found) == 12
    for name, gap in found.items():
        assert gap < 1e-5, name


@jax_alone
@pytest.mark.slow
def test_two_exchanges_a_layer_and_no_gather():
    """Bytes of each, and operations of a device: an eighth."""
    found = found_by("exchanges")
    # G_local * E * C * D float32, 256 examples on 8 devices.
    assert found["all-to-all: functional"] == [32 * 8 * 3 * 32 * 4] * 4
    encoder, decoder = 32 * 8 * 3 * 16 * 4, 8 * 32 * 7 * 16 * 4
    assert sorted(found["all-to-all: T5"]) == sorted(
        [encoder] * 8 + [decoder] * 8
    )
    for name in ("functional", "T5"):
        assert found[f"all-gather: {name}"] == []
        assert found[f"share of operations: {name}"] < 1.2 / 8


@jax_alone
@pytest.mark.slow
def test_variables_lie_where_they_are_used_and_files_suit_any_mesh():
    found = found_by("layouts", "topologies")
    # Two of eight experts, of two kernels and two biases and their two slots.
    assert found["experts a device"] == [2]
    assert found["weights and slots of experts"] == 12
    assert found["router is whole"]
    assert found["share of a dense weight on a device"] == 1 / 8
    for count in (4, 1):
        assert found[f"saved on 8, loaded on {count}"] == 0
        assert found[f"trained on, {count}"] < 1e-6


WORDS = {
    "experts": ("num_experts=6", "'expert' of 4 devices", "Use 8 experts"),
    "a layer of experts": ("num_experts=6", "'expert' of 4 devices"),
    "axis": ("expert_axis='model'", "['data', 'expert']"),
    "batch axis": ("batch_axes='model'", "['data', 'expert']"),
    "no batch axis": ("batch_axes=[]", "Leave it out"),
    "map": ("layout_map={}", "LayoutMap"),
    "mesh": ("device_mesh=(2, 4)", "DeviceMesh"),
    "another mesh": ("(8, 1)", "(2, 4)", "from one `DeviceMesh`"),
    "map that does not divide": ("'odd/kernel'", "of 6", "4 devices"),
    "map of another rank": ("('expert',)", "(8, 6)"),
    "called late": ("up_moe/experts", "`keras.distribution.set_distribution`"),
    "fitted late": ("up_moe/experts", "`keras.distribution.set_distribution`"),
    "groups": ("4 groups of 16 examples", "group=4", "8 parts"),
}


@jax_alone
@pytest.mark.slow
def test_what_cannot_be_is_refused_by_name():
    found = found_by("refusals")
    assert found.keys() == {f"refused: {name}" for name in WORDS}
    for name, words in WORDS.items():
        text = found[f"refused: {name}"]
        for word in words:
            assert word in text, (name, text)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX is the one that can"
)
def test_other_backends_say_so():
    with pytest.raises(ValueError, match=r"JAX backend.*Received: backend"):
        ku.distribution.ExpertParallel()

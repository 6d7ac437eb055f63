"""Experts spread over a mesh of 8 devices, beside one device.

What the script `expert_parallel` finds in processes with 8 devices of the CPU.
"""

import json
import os
import socket
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


def started(script, *arguments, **settings):
    """A process that runs a script."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", SCRIPTS / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
    )


def said(*processes):
    """What the first of some processes printed; none may fail or hang."""
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, texts, strict=True):
        assert not process.returncode, errors[-4000:]
    return texts[0][0]


def found_by(*parts, script="expert_parallel.py", **settings):
    """What a script prints, by name."""
    return by_name(said(started(script, *parts, **settings)))


def by_name(text):
    lines = [json.loads(line) for line in text.splitlines() if "{" in line]
    return {line["name"]: line["value"] for line in lines}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


PARTS = (
    *("equals_one_device", "generates", "tensor_parallel", "exchanges"),
    *("layouts", "topologies", "refusals", "adopted"),
)


@pytest.fixture(scope="module")
def found():
    """All that one process finds."""
    return found_by(*PARTS)


@jax_alone
@pytest.mark.slow
def test_a_mesh_computes_and_trains_as_one_device(found):
    """Predictions, losses and weights of three steps, of unlike models."""
    gaps = {n: gap for n, gap in found.items() if n.startswith("equal: ")}
    assert len(gaps) == 10
    for name, gap in gaps.items():
        assert gap < 1e-5, name


@jax_alone
@pytest.mark.slow
def test_a_mixture_of_kerashubs_own_is_spread(found):
    assert found["adopted: gap"] < 1e-5
    assert found["adopted: experts a device"] == 3
    assert found["adopted: moved"] > 0


@jax_alone
@pytest.mark.slow
def test_a_decoder_says_the_same_and_takes_keras_hubs_own_layouts(found):
    assert found["generated: eight"]
    assert found["generated: one"]
    assert found["generated: words"] > 8
    assert found["dense weights that are cut"] > 0
    refused = found["refused: grouped heads"]
    assert "'batch' with 4 devices" in refused
    assert "self_attention/key/kernel" in refused


@jax_alone
@pytest.mark.slow
def test_two_exchanges_a_layer_and_no_gather(found):
    """Bytes of each, and operations of a device: an eighth."""
    # G_local * E * C * D float32, 256 examples on 8 devices.
    assert found["all-to-all: functional"] == [32 * 8 * 3 * 32 * 4] * 4
    encoder, decoder = 32 * 8 * 3 * 16 * 4, 8 * 32 * 7 * 16 * 4
    assert sorted(found["all-to-all: T5"]) == sorted(
        [encoder] * 4 + [decoder] * 4
    )
    for name in ("functional", "T5"):
        assert found[f"all-gather: {name}"] == []
        assert found[f"share of operations: {name}"] < 1.2 / 8


@jax_alone
@pytest.mark.slow
def test_variables_lie_where_they_are_used_and_files_suit_any_mesh(found):
    # Two of eight experts, of two kernels and two biases and their two slots.
    assert found["experts a device"] == [2]
    assert found["weights and slots of experts"] == 12
    assert found["router is whole"]
    assert found["share of a dense weight on a device"] == 1 / 8
    for count in (4, 1):
        assert found[f"saved on 8, loaded on {count}"] == 0
        assert found[f"trained on, {count}"] < 1e-6


@jax_alone
@pytest.mark.slow
def test_the_estimate_is_what_a_compiled_step_holds_and_sends():
    """Within a tenth; as users compile, and not as tests do."""
    found = found_by("estimates")
    assert len(found) == 5
    for name, ratio in found.items():
        assert 0.9 < ratio < 1.1, (name, ratio)


@jax_alone
@pytest.mark.slow
def test_a_plan_of_memory_is_what_a_step_on_one_device_holds():
    """Within a tenth, compiled as users or as tests do.

    Of the two that are hardest to tell; `tests/conversion` has all four.
    """
    found = found_by("plans")
    assert len(found) == 4
    for name, ratio in found.items():
        assert 0.9 < ratio < 1.1, (name, ratio)


@jax_alone
@pytest.mark.slow
def test_two_processes_train_save_and_go_on_as_one(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    port, folder = free_port(), tmp_path / "run"
    both = [
        started("two_processes.py", str(process), port, folder)
        for process in (0, 1)
    ]
    two = by_name(said(*both))
    one = found_by("0", "0", folder, script="two_processes.py")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["restored"] == two["next"]  # to the last bit
    assert one["restored"] == pytest.approx(two["next"], abs=1e-6)
    assert "OrbaxCheckpoint" in two["refused"]
    assert "up_moe/experts" in two["refused"]
    assert two["wrote"]


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the recipe is torch's"
)
def test_torchs_replicas_train_as_one_process():
    port = free_port()
    both = [
        started("replicas_in_torch.py", str(process), port)
        for process in (0, 1)
    ]
    gap, moved = map(float, said(*both).split())
    assert gap < 1e-6 < 1e-4 < moved


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: "run", "must be absolute.*'run'"),
        (lambda folder: folder, "must hold a checkpoint.*none"),
    ],
)
def test_a_folder_without_a_checkpoint(tmp_path, make, words):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=words):
        ku.distribution.load_checkpoint(model, make(tmp_path))


@jax_alone
def test_what_is_restored_must_be_there(tmp_path):
    (tmp_path / "3").mkdir()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    with pytest.raises(ValueError, match="A distribution must be set"):
        ku.distribution.load_checkpoint(model, tmp_path)
    with keras.distribution.DataParallel().scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        model.compile("adam", "mse", metrics=["mae"])
        with pytest.raises(ValueError, match="optimizer and metrics"):
            ku.distribution.load_checkpoint(model, tmp_path)


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
def test_what_cannot_be_is_refused_by_name(found):
    refused = {name for name in found if name.startswith("refused: ")}
    refused -= {"refused: grouped heads"}
    assert refused == {f"refused: {name}" for name in WORDS}
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

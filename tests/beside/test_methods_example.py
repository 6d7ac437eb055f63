"""The comparison of all methods runs, and its table says what it measured."""

import json

import methods_cifar10
import numpy as np
import pytest

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
def test_every_method_is_trained_tabled_and_drawn(
    tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(32, 32, 32, 3)).astype("uint8")
    labels = (np.arange(32) % 10).astype("int32")
    split = (images, labels)
    monkeypatch.setattr(
        methods_cifar10.vit_cifar10,
        "load_cifar10",
        lambda *_: [split, split],
    )
    monkeypatch.setattr(methods_cifar10, "ROUND", 1)
    kept = [
        method
        for method in methods_cifar10.METHODS
        if method.name
        in (
            "copies, Top-2",
            "Drop-Upcycling, shared",
            "Default MoE, paper",
            "Qwen2's cut, Top-8 of 4 x E",
        )
    ]
    monkeypatch.setattr(methods_cifar10, "METHODS", kept)
    code = methods_cifar10.main(
        [
            f"--output={tmp_path}",
            "--epochs=1",
            "--more-steps=1",
            "--seeds=1",
            "--batch-size=16",
            "--width=16",
            "--intermediate=32",
            "--blocks=2",
        ]
    )
    assert code == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert list(found) == [*(m.name for m in kept), methods_cifar10.DENSE]
    for name, each in found.items():
        assert f"| {name} |" in printed
        for run in each["runs"]:
            assert np.isfinite(run["rounds"][-1]["test_loss"])
    start = {n: e["runs"][0] for n, e in found.items()}
    dense = start.pop(methods_cifar10.DENSE)["start"]["test_loss"]
    assert start["copies, Top-2"]["relative_difference"] < 1e-4
    assert abs(start["copies, Top-2"]["start"]["test_loss"] - dense) < 1e-4
    dropped = start["Drop-Upcycling, shared"]
    assert dropped["relative_difference"] > 1e-2
    assert dropped["intact_neurons"] == 0.5
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")

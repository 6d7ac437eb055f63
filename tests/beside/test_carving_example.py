"""The example that carves the demo's model runs, and shows what it measured."""

import json

import carving_text
import pytest

from keras_upcycle.demo import training

pytestmark = pytest.mark.one_backend


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(training, "TESTED", 256)
    monkeypatch.setattr(carving_text, "WINDOWS", 32)
    monkeypatch.setattr(carving_text, "MET", (8,))


@pytest.mark.slow
def test_every_cut_is_tested_trained_and_tabled(tmp_path, capsys):
    carving_text.main([f"--output={tmp_path}", "--seeds=1", "--steps=10"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    assert [record["met"] for record in found] == [16, *[8] * 7]
    dense, carved, *_, cut = found
    assert dense["name"] == carving_text.DENSE
    assert dense["start"] < carved["start"] < cut["start"]
    assert carved["end"] < carved["start"]
    assert f"| 50% | carving | {carved['start']:.3f} ± 0.000 |" in printed


@pytest.mark.slow
def test_settings_are_compared(tmp_path, monkeypatch, capsys):
    settings = [{"active_neurons": 4, "normalize": True}]
    monkeypatch.setattr(carving_text, "SETTINGS", settings)
    carving_text.main([f"--output={tmp_path}", "--settings"])
    assert "| 4 | True | " in capsys.readouterr().out

"""The example of DS-MoE runs, and shows what it measured."""

import json

import ds_moe_digits
import pytest

from keras_upcycle.demo import images as demo

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
def test_every_choice_is_measured_tabled_and_drawn(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ds_moe_digits, "STEPS_A_ROUND", 2)
    monkeypatch.setattr(ds_moe_digits, "EXPERTS", 4)
    monkeypatch.setattr(ds_moe_digits, "SETTINGS", demo.Settings(blocks=2))
    monkeypatch.setattr(
        ds_moe_digits,
        "SWEEPS",
        {
            "top_k": [{"top_k": 1}, {"top_k": 4}],
            "threshold": [{"threshold": 1}],
        },
    )
    ds_moe_digits.main(
        [
            f"--output={tmp_path}",
            "--seeds=1",
            "--dense-rounds=1",
            "--more-rounds=1",
            "--weights",
            "0.5",
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    assert list(found) == ["0.5", ds_moe_digits.DENSE]
    one, everyone, some = found["0.5"][0]
    assert one["expert_share"] == pytest.approx(1 / 4)
    assert everyone["active_share"] == everyone["expert_share"] == 1.0
    assert 1 / 4 <= some["expert_share"] < 1.0
    assert "| top_k=1 | 25.0% |" in printed
    assert f"| {found[ds_moe_digits.DENSE][0]:.2%} |" in printed
    assert (tmp_path / "ds_moe.png").read_bytes().startswith(b"\x89PNG")

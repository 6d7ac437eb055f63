"""The example behind the recipe page runs, and shows what it compared."""

import json

import pytest
import recipe_digits

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
def test_every_variant_is_trained_tabled_and_drawn(
    tmp_path, monkeypatch, capsys
):
    kept = [
        variant
        for variant in recipe_digits.VARIANTS
        if variant.name
        in ("x 10", "1/E", "carried, rescaled", "goes on", "dense, peak to 0")
        or (variant.question, variant.name) == ("combine weights", "raw")
    ]
    monkeypatch.setattr(recipe_digits, "VARIANTS", kept)
    monkeypatch.setattr(recipe_digits, "STEPS_A_ROUND", 2)
    recipe_digits.main(
        [
            f"--output={tmp_path}",
            "--seeds=1",
            "--dense-rounds=1",
            "--more-rounds=1",
        ]
    )
    printed = capsys.readouterr().out
    losses = json.loads((tmp_path / "results.json").read_text())["test_loss"]
    names = [f"{v.question}: {v.name}" for v in kept]
    assert sorted(losses) == sorted([*names, recipe_digits.DENSE])
    for name, (curve,) in losses.items():
        assert len(curve) == 2
        assert f"| {name} | {curve[0]:.3f} |" in printed
    # Before any step the sparse models differ by what is said of them alone.
    start = {name: curve[0] for name, (curve,) in losses.items()}
    dense = start[recipe_digits.DENSE]
    assert abs(start["noise on Top-2: 1/E"] - dense) < 1e-4
    assert abs(start["combine weights: raw"] - dense) > 1e-4
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")


def test_schedules_are_what_they_are_called():
    def rates(name, steps):
        (variant,) = [
            v
            for v in recipe_digits.VARIANTS
            if (v.question, v.name) == ("schedule", name)
        ]
        rate = variant.learning_rate(last=5e-4, done=3600, steps=100)
        return [float(rate(step)) for step in steps]

    # 100 steps to 3e-3, then as the root of the step: 5e-4 at 3600.
    expected = [3e-3 * (100 / step) ** 0.5 for step in (3600, 3700)]
    assert rates("goes on", (0, 100)) == pytest.approx(expected)
    for name, first in (
        ("from the last rate to 0", 5e-4),
        ("from the peak to 0", 3e-3),
        ("dense, peak to 0", 3e-3),
    ):
        assert rates(name, (0, 50, 100)) == pytest.approx(
            [first, first / 2, 0.0], abs=1e-9
        )
    assert rates("anew, with its warm-up", (50, 100, 400)) == pytest.approx(
        [1.5e-3, 3e-3, 1.5e-3]
    )


@pytest.mark.slow
def test_some_choices_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_digits, "STEPS_A_ROUND", 2)
    kept = [
        v
        for v in recipe_digits.VARIANTS
        if v.name in ("x 10", "from the peak to 0")
    ]
    monkeypatch.setattr(recipe_digits, "VARIANTS", kept)
    recipe_digits.main(
        [
            f"--output={tmp_path}",
            *("--only", "schedule", "--seeds=1"),
            *("--dense-rounds=1", "--more-rounds=1"),
        ]
    )
    losses = json.loads((tmp_path / "results.json").read_text())["test_loss"]
    assert set(losses) == {"schedule: from the peak to 0", recipe_digits.DENSE}
    assert (tmp_path / "recipe.png").exists()

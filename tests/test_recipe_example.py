"""The example behind the recipe page runs, and shows what it compared."""

import json

import recipe_digits


def test_every_variant_is_trained_tabled_and_drawn(
    tmp_path, monkeypatch, capsys
):
    kept = [
        variant
        for variant in recipe_digits.VARIANTS
        if variant.name in ("x 10", "1/E", "carried, rescaled", "zeros")
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

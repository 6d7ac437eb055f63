"""The receipts of `examples/method_receipts.py`: one row a recipe, all true."""

import method_receipts
import pytest

from keras_upcycle.conversion.recipe import RECIPES

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
def test_every_recipe_that_needs_no_training_run_has_a_row(monkeypatch, capsys):
    monkeypatch.setattr(method_receipts, "BLOCKS", 2)
    method_receipts.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in lines
    ]
    found = {row[0]: row[1:] for row in rows if len(row) > 1}
    assert set(found) == set(RECIPES) - {"upit"}
    half = {"sparse_upcycling", "default_moe"}  # of two: all but the first
    for name, row in found.items():
        assert row[1] == ("1 of 2" if name in half else "2 of 2")
    # These start as the dense model; a half drawn anew does not.
    for name in ("default_moe", "ds_moe", "shared_experts"):
        assert float(found[name][2]) < 1e-5
    assert float(found["drop_upcycling"][2]) > 1e-2
    assert found["drop_upcycling"][3] == "50%"

"""The receipts of `studies.receipts`: one row a method, all true."""

import json

import pytest

from keras_upcycle.conversion.recipe import RECIPES
from studies import methods_table, receipts

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
def test_every_method_that_needs_no_training_run_is_measured(monkeypatch):
    monkeypatch.setattr(receipts, "BLOCKS", 2)
    found = receipts.measure()
    assert set(found) == (set(RECIPES) - {"upit"}) | set(receipts.OPTIONS)
    half = {"sparse_upcycling", "default_moe"}  # of two: all but the first
    for name, one in found.items():
        assert one["blocks"] == (1 if name in half else 2), name
    # These start as the dense model; a half drawn anew does not.
    exact = {name for name, one in found.items() if one["change"] < 1e-5}
    assert {
        *("default_moe", "ds_moe", "shared_experts", "skywork"),
        *("copies, Top-2", "DenseMixer", "low-rank experts"),
        *("attention heads", "temperature from 4 to 1", "copied attention"),
    } == exact
    assert found["drop_upcycling"]["intact"] == pytest.approx(0.5)
    committed = json.loads(receipts.PATH.read_text())
    assert set(committed) == set(found)
    for name, one in committed.items():
        assert (one["change"] < 1e-5) == (name in exact)


def test_the_table_has_every_method_and_where_it_failed():
    entries = methods_table.entries()
    names = {entry.name for entry in entries}
    assert {f'`recipe="{name}"`' for name in RECIPES} <= names
    assert len(names) == len(entries)
    for entry in entries:
        assert entry.changes, entry.name
        assert entry.costs, entry.name
        assert entry.fails, entry.name
        known = entry.receipt in receipts.OPTIONS or entry.receipt in RECIPES
        assert known or entry.receipt is None

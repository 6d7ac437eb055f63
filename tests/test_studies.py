"""The study: every part in small, resumed, and its tables and pictures."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_upcycle import progress
from keras_upcycle.demo import language_model, sources
from studies import arms, data, donors, figures, language, parts, rows, tables
from studies.arms import DENSE, SCRATCH, TIME, UPCYCLED, Arm

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="what it trains by is tested on every backend; it runs once",
)
SMALL = language_model.Shape(
    hidden_dim=8, intermediate_dim=16, length=8, vocabulary_size=16
)


def text():
    rng = np.random.default_rng(0)
    return sources.Text(
        *(rng.integers(16, size=n).astype("uint8") for n in (9000, 600, 600)),
        name="noise",
        files=3,
    )


def study(folder, file="rows.jsonl"):
    return language.Study(
        text(),
        SMALL,
        rows.Rows(folder / file),
        folder / "checkpoints",
        4,
        progress.Reporter(silent=True),
    )


def few(arm, **changes):
    return dataclasses.replace(
        arm, checkpoint=40, experts=4, checkpoint_rate=1e-2, **changes
    )


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    arm = few(Arm(UPCYCLED))
    first = study(tmp_path).run(arm, [0, 1], [1.0])
    again = study(tmp_path)
    monkeypatch.setattr(again, "_train", None)
    assert again.run(arm, [0, 1], [1.0]) == first
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 2
    # A line that was cut short is a run that is not there.
    (tmp_path / "rows.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    assert len(rows.Rows(tmp_path / "rows.jsonl").all) == 1


def test_all_budgets_of_a_run_share_its_trunk(tmp_path):
    """To a budget alone, or on the way to a larger one: the same."""
    arm = few(Arm(DENSE))
    (alone,) = study(tmp_path, "one").run(arm, [0], [2.0])
    shared = study(tmp_path, "two").run(arm, [0], [1.0, 2.0])
    assert shared[1]["held_out"] == pytest.approx(alone["held_out"], abs=1e-5)
    assert [row["steps"] for row in shared] == [40, 80]


def test_equal_compute_is_equal(tmp_path):
    made = study(tmp_path)
    (dense,) = made.run(few(Arm(DENSE)), [0], [5.0])
    (sparse,) = made.run(few(Arm(UPCYCLED)), [0], [5.0])
    (scratch,) = made.run(few(Arm(SCRATCH)), [0], [5.0])
    assert sparse["ratio"] > 1.1
    for row in (sparse, scratch):
        assert row["flops"] <= dense["flops"]
        assert row["flops"] > 0.9 * dense["flops"]
    assert sparse["parameters"] > dense["parameters"]
    # Both continuations start with the checkpoint's loss; scratch does not.
    assert sparse["checkpoint_held_out"] == pytest.approx(
        dense["checkpoint_held_out"], abs=1e-5
    )
    assert scratch["checkpoint_held_out"] != pytest.approx(
        dense["checkpoint_held_out"], abs=1e-3
    )
    (timed,) = made.run(few(Arm(UPCYCLED, equal=TIME)), [0], [5.0])
    assert timed["ratio"] == made.time_ratio(few(Arm(UPCYCLED)))


@pytest.mark.parametrize("name", [*parts.METHODS, *parts.SLOTS])
def test_every_variant_can_be_made(tmp_path, name):
    changes = {**parts.METHODS, **parts.SLOTS}[name]
    arm = few(Arm(UPCYCLED, **{**changes, "before": 0}))
    if changes.get("expert_init") in donors.MAKERS:
        pytest.skip("has a test of its own, with what it spends before")
    made = study(tmp_path)
    (row,) = made.run(arm, [0], [1.0])
    assert row["ratio"] == made.ratio(arm) > 1


@pytest.mark.parametrize("name", ["Branch-Train-MiX, 4 branches", "UpIT"])
def test_what_is_spent_before_the_mixture_counts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(donors, "SAMPLES", 16)
    arm = few(Arm(UPCYCLED, **{**parts.METHODS[name], "before": 120}))
    made = study(tmp_path)
    (row,) = made.run(arm, [0], [5.0])
    (dense,) = made.run(few(Arm(DENSE)), [0], [5.0])
    assert row["steps"] == int((200 - 120) / row["ratio"] / 10) * 10
    assert 0.9 * dense["flops"] < row["flops"] <= dense["flops"]


def test_experts_of_ds_moe_are_left_out_after_training(tmp_path):
    changes = parts.METHODS["DS-MoE, all of 16 slices"]
    arm = few(Arm(UPCYCLED, **changes))
    (row,) = study(tmp_path).run(arm, [0], [5.0])
    assert row["ratio"] < 1.1
    assert sorted(row["active"]) == [1, 2]
    assert all(loss != row["held_out"] for loss in row["active"].values())


@pytest.fixture
def whole():
    """Rows of every part, with losses that are known."""
    made = []
    for kind in (DENSE, UPCYCLED, SCRATCH):
        best = parts.RATES[kind][1]
        for rate in parts.RATES[kind]:
            for seed in range(3):
                for budget in parts.BUDGETS:
                    gain = {DENSE: 0.0, UPCYCLED: 0.05, SCRATCH: -0.3}[kind]
                    loss = 2 - 0.1 * np.log2(budget) - gain * (1 + seed / 100)
                    made.append(
                        {
                            "study": "language",
                            "arm": kind,
                            "seed": seed,
                            "variant": "",
                            "equal": "operations",
                            "extra_compute": budget,
                            "learning_rate": rate,
                            "checkpoint": Arm.checkpoint,
                            "checkpoint_rate": parts.CHECKPOINT_RATE,
                            "experts": 16,
                            "held_out": loss + abs(rate - best),
                            "validation": loss + abs(rate - best),
                            "accuracy": 0.5,
                            "ratio": 1.39,
                            "steps": 100,
                        }
                    )
    return made


def test_tables_say_what_the_rows_say(whole):
    rate = parts.best_rate(whole, DENSE)
    assert rate in parts.RATES[DENSE]
    ours = tables.own(
        whole,
        UPCYCLED,
        learning_rate=parts.best_rate(whole, UPCYCLED),
        extra_compute=parts.HEADLINE,
    )
    dense = tables.best_dense(whole, parts.HEADLINE)
    gains = tables.differences(ours, dense)
    np.testing.assert_allclose(gains, [-0.05, -0.0505, -0.051], atol=1e-9)
    # 0.05 is worth 2 ** 0.5 times the compute.
    loss = np.mean([row["held_out"] for row in dense]) - 0.05
    assert tables.worth(whole, loss) == pytest.approx(0.25 * 2**0.5)
    assert tables.worth(whole, -5.0) is None
    printed = tables.verdict(whole)
    assert "-0.0505 ± 0.0005" in printed
    assert "of the extra compute is saved" in printed
    assert tables.headline(whole).count("**") == 6
    assert "| 150% |" in tables.curves(whole)


def test_pictures_are_drawn(whole, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    monkeypatch.setattr(
        "sys.argv",
        ["figures", "--rows", str(path), "--output", str(tmp_path)],
    )
    figures.main()
    drawn = tmp_path / "study-curves.png"
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # One number of experts, and one checkpoint, are no curve.
    assert not (tmp_path / "study-experts.png").exists()
    more = [
        {**row, "experts": 32, "variant": "32 experts"}
        for row in whole
        if row["arm"] == UPCYCLED
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole + more))
    figures.main()
    assert (tmp_path / "study-experts.png").exists()


def test_a_set_of_tfds_is_read(monkeypatch):
    found = {"label": np.zeros(2), "text": np.array([b"ab" * 90_000] * 2)}
    asked = []
    monkeypatch.setattr(
        data.tfds_reader, "load", lambda *what: asked.append(what) or found
    )
    read = data.read("tfds:some/set", "folder")
    assert asked == [("some/set", "all", "folder")]
    assert set(np.unique(read.train)) <= set(b"ab\n") | {sources.END}
    del found["text"]
    with pytest.raises(OSError, match="whose features are"):
        data.read("tfds:some/set")


def test_settings_of_an_arm_reach_the_layer():
    arm = Arm(
        UPCYCLED, top_k=1, normalize=False, capacity_factor=None, experts=8
    )
    options = arm.options()
    assert options["num_experts"] == 8
    assert options["layers"] == (1,)
    router = options["router"]
    assert (router.top_k, router.normalize, router.capacity_factor) == (
        1,
        False,
        None,
    )
    assert arm.shape() != Arm(UPCYCLED).shape()
    assert Arm(UPCYCLED, learning_rate=1.0).shape() == Arm(UPCYCLED).shape()
    with pytest.raises(KeyError):
        arms.Arm(UPCYCLED, router="unknown").options()


# The committed rows, and what is told of them.


@pytest.fixture(scope="module")
def committed():
    return rows.read(parts.RESULTS)


def test_the_pages_say_what_the_rows_say(committed):
    readme = (ROOT / "README.md").read_text()
    page = (ROOT / "guides/study.md").read_text()
    assert tables.in_short(committed) in readme
    for text in (readme, page):
        assert tables.verdict(committed) in text
    for table in (tables.headline(committed), tables.curves(committed)):
        assert table in page
    for names in tables.SWEEPS.values():
        if any(row["variant"] in names for row in committed):
            assert tables.sweep(committed, list(names)) in page


def test_the_headline_is_more_than_twice_its_spread(committed):
    """The five seeds' rows, by hand."""
    rows_of = {
        (kind, rate): {
            row["seed"]: row
            for row in committed
            if row["arm"] == kind
            and row.get("headline")
            and row["equal"] == "operations"
            and row["learning_rate"] == rate
        }
        for kind in (DENSE, UPCYCLED)
        for rate in parts.RATES[kind]
    }
    best = {}
    for (kind, rate), own in rows_of.items():
        assert sorted(own) == [0, 1, 2, 3, 4]
        mean = np.mean([row["validation"] for row in own.values()])
        if kind not in best or mean < best[kind][0]:
            best[kind] = (mean, rate)
    dense, upcycled = (
        rows_of[kind, best[kind][1]] for kind in (DENSE, UPCYCLED)
    )
    gains = [upcycled[s]["held_out"] - dense[s]["held_out"] for s in range(5)]
    assert np.mean(gains) < -2 * np.std(gains, ddof=1)
    for seed in range(5):
        assert upcycled[seed]["flops"] <= dense[seed]["flops"]


def test_every_row_tells_what_it_was(committed):
    for row in committed:
        assert row["arm"] in (DENSE, UPCYCLED, SCRATCH)
        for name in ("held_out", "train", "seconds", "flops", "steps"):
            assert row[name] > 0
        assert row["versions"]["keras"]
        assert row["machine"]
    keys = [rows.key_of(row) for row in committed]
    assert len(set(keys)) == len(keys)

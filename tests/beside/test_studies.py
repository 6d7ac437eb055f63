"""The study: every part in small, resumed, and its tables and pictures."""

import dataclasses
import json

import numpy as np
import pytest
import span_corruption
from places import ROOT
from recorded_products import products_in

from keras_upcycle.demo import language_model, sources
from keras_upcycle.training import progress
from studies import (
    arms,
    causal_lm,
    comparisons,
    data,
    donors,
    figures,
    headline,
    images,
    pages,
    parts,
    plans,
    rows,
    runs,
    spans,
    specialisation,
    sweeps,
)
from studies.arms import DENSE, SCRATCH, TIME, UPCYCLED, Arm
from studies.language import Language

PLAN = plans.language()
# Pieces that no page shows: others say as much.
UNTOLD = {
    f"{study}:{name}"
    for study in (
        *("deeper", "newer", "llama", "heads", "gpt2"),
        *("images", "small_images", "spans"),
    )
    for name in ("verdict", "in_short")
}
pytestmark = pytest.mark.one_backend
# What reads the compiled program, or was tuned on the backend of the study.
on_jax = pytest.mark.one_backend("jax")
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
    return study_of(Language(text(), SMALL, PLAN, 4), folder, file)


def study_of(setting, folder, file="rows.jsonl"):
    return runs.Study(
        setting,
        rows.Rows(folder / file),
        folder / "checkpoints",
        progress.Reporter(silent=True),
    )


def few(arm, **changes):
    return dataclasses.replace(
        arm, checkpoint=40, experts=4, checkpoint_rate=1e-2, **changes
    )


@pytest.mark.slow
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


@on_jax
@pytest.mark.slow
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


VARIANTS = {**plans.METHODS, **plans.NEWER, **PLAN.sweeps["optimizer"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_made(tmp_path, name):
    changes = VARIANTS[name]
    arm = few(Arm(UPCYCLED, **{**changes, "before": 0}))
    if changes.get("expert_init") in donors.MAKERS:
        pytest.skip("has a test of its own, with what it spends before")
    made = study(tmp_path)
    (row,) = made.run(arm, [0], [1.0])
    assert row["ratio"] == made.setting.ratio(arm.options()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Branch-Train-MiX, 4 branches", "UpIT"])
def test_what_is_spent_before_the_mixture_counts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(donors, "SAMPLES", 16)
    arm = few(Arm(UPCYCLED, **{**plans.METHODS[name], "before": 120}))
    made = study(tmp_path)
    (row,) = made.run(arm, [0], [5.0])
    (dense,) = made.run(few(Arm(DENSE)), [0], [5.0])
    assert row["steps"] == int((200 - 120) / row["ratio"] / 10) * 10
    assert 0.9 * dense["flops"] < row["flops"] <= dense["flops"]


def test_experts_of_ds_moe_are_left_out_after_training(tmp_path):
    changes = plans.METHODS["DS-MoE, all of 16 slices"]
    arm = few(Arm(UPCYCLED, **changes))
    (row,) = study(tmp_path).run(arm, [0], [5.0])
    assert row["ratio"] < 1.1
    assert sorted(row["active"]) == [1, 2]
    assert all(loss != row["held_out"] for loss in row["active"].values())


def small(plan, **base):
    """A plan whose runs take no time."""
    base = {**plan.base, "checkpoint": 40, "experts": 4, **base}
    return dataclasses.replace(plan, base=base)


@pytest.mark.slow
def test_images_are_learned_and_probed(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 10
    shades = np.repeat(labels * 25, 16 * 16 * 3).reshape(-1, 16, 16, 3)
    noise = rng.integers(5, size=shades.shape)
    part = (shades + noise).astype("uint8"), labels.astype("int32")
    splits = dict.fromkeys(("train", "validation", "test"), part)
    plan = small(plans.images(8, 2), capacity_factor=2.0)
    made = study_of(images.Images(splits, plan, 8, 8), tmp_path)
    (dense,) = made.run(plan.arm(DENSE, 1e-2), [0], [5.0])
    (sparse,) = made.run(plan.arm(UPCYCLED, 1e-2), [0], [5.0])
    assert sparse["layers"] == "last_half"
    assert sparse["checkpoint_held_out"] == pytest.approx(
        dense["checkpoint_held_out"], abs=1e-5
    )
    assert 0.9 * dense["flops"] < sparse["flops"] <= dense["flops"]
    for row in (dense, sparse):  # ten shades, ten classes
        assert row["held_out"] < row["checkpoint_held_out"]
        assert 0.5 < row["ten_shot"] <= 1
    first = next(made.setting.batches(0, 3))
    again = next(made.setting.batches(0, 3))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def hub_setting(name):
    plan = small(plans.PLANS[name](8, 2), checkpoint_rate=3e-2)
    return plan, causal_lm.CausalLM(text(), plan, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_of_keras_hub_learn_the_text(tmp_path, name):
    plan, setting = hub_setting(name)
    made = study_of(setting, tmp_path)
    (dense,) = made.run(plan.arm(DENSE, 1e-2), [0], [1.0])
    (sparse,) = made.run(plan.arm(UPCYCLED, 1e-2), [0], [1.0])
    assert sparse["checkpoint_held_out"] == pytest.approx(
        dense["checkpoint_held_out"], abs=1e-5
    )
    assert 0.8 * dense["flops"] < sparse["flops"] <= dense["flops"]
    assert sparse["parameters"] > dense["parameters"]


@on_jax
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_operations_of_models_of_keras_hub_are_what_the_program_has(name):
    _, setting = hub_setting(name)
    inputs, _ = next(setting.batches(0, 0))
    one = {key: value[:1] for key, value in inputs.items()}
    found = products_in(setting.build(), one, training=False)
    if name != "gpt2":  # places times frequencies: of q and k, in two blocks
        found -= 2 * 2 * 2 * setting.shape.length * (8 // causal_lm.HEADS // 2)
    assert setting.dense_flops() == found


@on_jax
def test_operations_of_images_and_holes_are_what_the_program_has():
    """Products of a recorded forward pass, for one example."""
    part = np.zeros((1, 16, 16, 3), "uint8"), np.zeros(1, "int32")
    seen = images.Images({"test": part}, plans.images(8, 2), 8, 8)
    holes = spans.Spans(text(), plans.spans(8, 2))
    x = {
        **{
            f"{name}_token_ids": np.zeros((1, length), "int32")
            for name, length in holes.lengths.items()
        },
        **{
            f"{name}_padding_mask": np.ones((1, length), "int32")
            for name, length in holes.lengths.items()
        },
    }
    for setting, inputs in ((seen, images.scaled(part[0])), (holes, x)):
        found = products_in(setting.build(), inputs, training=False)
        assert setting.dense_flops() == found


@on_jax
@pytest.mark.slow
def test_holes_are_filled_and_sentences_answered(tmp_path, monkeypatch):
    monkeypatch.setitem(spans.TUNED, "steps", 200)
    monkeypatch.setitem(spans.TUNED, "batch_size", 8)
    monkeypatch.setitem(spans.TUNED, "rates", (1e-2, 3e-2))
    monkeypatch.setattr(spans, "SENTENCE", 12)
    monkeypatch.setattr(spans.training, "TESTED", 64)
    sentences = ["all good", "very bad"] * 30, np.arange(60) % 2 == 0
    sentences = sentences[0], sentences[1].astype("int32")
    plan = dataclasses.replace(
        small(plans.spans(8, 2), checkpoint=160),
        seeds=1,
        rates={DENSE: (6e-3,), UPCYCLED: (6e-3,)},
    )
    setting = spans.Spans(text(), plan, (sentences, sentences), 4)
    made = study_of(setting, tmp_path)
    for kind in (DENSE, UPCYCLED):
        for rate in plan.rates[kind]:
            (row,) = made.run(plan.arm(kind, rate), [0], [plan.headline])
            assert row["held_out"] > 0
    parts.PARTS["tuning"].run(made, None)
    tuned = rows.select(made.rows.all, study="sst2")
    assert [row["arm"] for row in tuned] == [DENSE, DENSE, UPCYCLED]
    for row in tuned:
        assert row["accuracy"] > 0.9
    # The dense run's files are as good as the run itself.
    arm = plan.arm(DENSE, plan.best_rate(made.rows.all, DENSE))
    kept = made._trained(arm, 0, plan.headline).get_weights()
    for path in (tmp_path / "checkpoints" / "arms").iterdir():
        path.unlink()
    again = made._trained(arm, 0, plan.headline).get_weights()
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert "| dense checkpoint |" in sweeps.tuning(made.rows.all, plan)


def test_a_window_with_holes_has_all_of_its_bytes():
    setting = spans.Spans(text(), plans.spans(8, 2), batch_size=3)
    x, labels = next(setting.batches(0, 0))
    encoder, decoder = setting.lengths.values()
    assert x["encoder_token_ids"].shape == (3, encoder)
    assert labels.shape == (3, decoder)
    assert x["encoder_padding_mask"].all()
    assert x["decoder_padding_mask"].all()
    train = setting.text.train.tobytes()
    for inputs, targets in zip(x["encoder_token_ids"], labels, strict=True):
        whole = span_corruption.restore(
            inputs[:-1], targets[:-1], spans.SENTINELS
        )
        assert (whole - spans.FIRST).astype("uint8").tobytes() in train


def test_sentences_are_bytes_and_one_byte_answers():
    x, labels = spans.answered(["a\u00e9", "b" * 500], np.array([1, 0]))
    assert labels.ravel().tolist() == [ord("p") + 2, ord("n") + 2]
    assert x["encoder_token_ids"].shape == (2, spans.SENTENCE)
    assert x["encoder_padding_mask"].sum(axis=1).tolist() == [
        4,
        spans.SENTENCE,
    ]
    assert x["decoder_token_ids"].ravel().tolist() == [0, 0]


@pytest.mark.slow
def test_specialisation_is_counted_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(specialisation, "EXAMPLES", 64)
    made = study(tmp_path)
    arm = few(Arm(UPCYCLED, learning_rate=1e-2))
    found = specialisation.measure(made, arm, (0, 20))
    assert [point["steps"] for point in found["points"]] == [0, 20]
    for point in found["points"]:
        share = np.array(point["share"])
        assert share.shape == (len(specialisation.CLASSES), 4)
        # Of its 16 bytes only the end of a line is of any class.
        expected = np.arange(len(share)) == 6
        np.testing.assert_allclose(share.sum(axis=1), expected, atol=1e-3)
        assert np.isfinite(point["mutual_information"])
        assert len(point["shown"]) == len(found["text"])
    picture = tmp_path / "drawn.png"
    specialisation.draw(found).savefig(picture, dpi=40)
    assert picture.stat().st_size > 1000


@pytest.fixture
def whole():
    """Rows of every part, with losses that are known."""
    made = []
    for kind in (DENSE, UPCYCLED, SCRATCH):
        best = PLAN.rates[kind][1]
        for rate in PLAN.rates[kind]:
            for seed in range(3):
                for budget in PLAN.budgets[DENSE]:
                    gain = {DENSE: 0.0, UPCYCLED: 0.05, SCRATCH: -0.3}[kind]
                    loss = 2 - 0.1 * np.log2(budget) - gain * (1 + seed / 100)
                    made.append(
                        {
                            "study": "language",
                            "width": 32,
                            "blocks": 2,
                            "arm": kind,
                            "seed": seed,
                            "variant": "",
                            "equal": "operations",
                            "extra_compute": budget,
                            "learning_rate": rate,
                            "checkpoint": Arm.checkpoint,
                            "checkpoint_rate": PLAN.base["checkpoint_rate"],
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
    rate = PLAN.best_rate(whole, DENSE)
    assert rate in PLAN.rates[DENSE]
    ours = PLAN.own(
        whole,
        UPCYCLED,
        learning_rate=PLAN.best_rate(whole, UPCYCLED),
        extra_compute=PLAN.headline,
    )
    dense = comparisons.best_dense(whole, PLAN, PLAN.headline)
    gains = comparisons.differences(ours, dense)
    np.testing.assert_allclose(gains, [-0.05, -0.0505, -0.051], atol=1e-9)
    # 0.05 is worth 2 ** 0.5 times the compute.
    loss = np.mean([row["held_out"] for row in dense]) - 0.05
    assert comparisons.worth(whole, PLAN, loss) == pytest.approx(0.25 * 2**0.5)
    assert comparisons.worth(whole, PLAN, -5.0) is None
    printed = headline.verdict(whole, PLAN)
    assert "-0.0505 ± 0.0005" in printed
    assert "of the extra compute is saved" in printed
    assert headline.headline(whole, PLAN).count("**") == 6
    assert "| 150% |" in sweeps.curves(whole, PLAN)


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
    pieces = pages.pieces(committed)
    told = set()
    for name in pages.PAGES:
        page = (ROOT / name).read_text()
        assert pages.filled(page, pieces) == page, "run studies.pages"
        told |= {match["name"] for match in pages.MARK.finditer(page)}
    assert told == set(pieces) - UNTOLD
    with pytest.raises(KeyError, match="unknown"):
        pages.filled("<!-- study unknown --> 1.0 <!-- end -->", pieces)
    page = "a <!-- study language:verdict --> wrong <!-- end --> b"
    verdict = pieces["language:verdict"]
    assert verdict in pages.filled(page, pieces)
    assert "wrong" not in pages.filled(page, pieces)


def test_the_headline_is_more_than_twice_its_spread(committed):
    """The five seeds' rows, by hand."""
    rows_of = {
        (kind, rate): {
            row["seed"]: row
            for row in committed
            if row["arm"] == kind
            and row["study"] == "language"
            and row["blocks"] == 2
            and row.get("headline")
            and row["equal"] == "operations"
            and row["learning_rate"] == rate
        }
        for kind in (DENSE, UPCYCLED)
        for rate in PLAN.rates[kind]
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
        for name in ("held_out", "train", "seconds", "steps"):
            assert row[name] > 0
        assert row["study"] == "sst2" or row["flops"] > 0
        assert row["versions"]["keras"]
        assert row["machine"]
    keys = [rows.key_of(row) for row in committed]
    assert len(set(keys)) == len(keys)

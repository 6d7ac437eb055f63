"""The T5 examples, on small texts made up here."""

import argparse
import json

import keras
import keras_hub
import numpy as np
import pytest
import t5_pretrain
import t5_sst2
import text_corpus
import two_continuations

from keras_upcycle.demo import comparison
from keras_upcycle.demo.results import DENSE, Stage

pytestmark = pytest.mark.one_backend

WORDS = "the a king queen fair sweet my lord come hither night day love".split()
RNG = np.random.default_rng(0)
# The answers' letters too.
LINES = ["sst2 sentence: positive negative"] * 12 + [
    " ".join(RNG.choice(WORDS, 8)) for _ in range(120)
]
SIZE = argparse.Namespace(width=8, heads=2, intermediate=8, blocks=1, dropout=0)
MODEL = "--width 8 --heads 2 --intermediate 8 --blocks 2 --vocabulary 40"
FEW = "--batch-size 8 --epochs 2 --more-epochs 2 --experts 2 --limit 16"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Both files of labelled sentences: good ones are fair."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [f"{line}\t{int('fair' in line)}\n" for line in LINES]
    for name, part in (("train", lines[:80]), ("validation", lines[80:])):
        (folder / f"{name}.tsv").write_text("".join(part))
    return [
        *("--train", str(folder / "train.tsv")),
        *("--validation", str(folder / "validation.tsv")),
    ]


def dense(sentinels=6):
    tokenizer = text_corpus.train_tokenizer("\n".join(LINES), 40, sentinels)
    return t5_pretrain.dense_model(SIZE, tokenizer)


@pytest.fixture(scope="module")
def task():
    return dense()


@pytest.fixture(scope="module")
def logits_of(task):
    """One compiled function for all tests, which must use one shape."""
    model = keras.Model(task.input, task.output)
    return lambda x: model.predict(x, verbose=0)


def random_inputs():
    return {
        "encoder_token_ids": RNG.integers(3, 40, (6, 8)),
        "encoder_padding_mask": np.ones((6, 8), bool),
        "decoder_token_ids": RNG.integers(3, 40, (6, 4)),
        "decoder_padding_mask": np.ones((6, 4), bool),
    }


# Span corruption as a task.


def test_batches_of_holes(task):
    args = t5_pretrain.parse("--chunk 16 --density 0.5 --mean-span 2".split())
    tokenizer = task.preprocessor.tokenizer
    batch = t5_pretrain.corruption(args, task, tokenizer)
    chunks = text_corpus.chunks("\n".join(LINES), tokenizer, 16)[:4]
    x, labels, weights = batch((chunks,), np.random.default_rng(0), True)
    again = batch((chunks,), np.random.default_rng(0), False)
    other = batch((chunks,), np.random.default_rng(1), True)
    places = t5_pretrain.packed_lengths(args)
    assert x["encoder_token_ids"].shape == (4, places[0])
    assert labels.shape == (4, places[1])
    # Chunks of one length leave no padding.
    assert x["encoder_padding_mask"].all()
    assert weights.all()
    np.testing.assert_array_equal(again[1], labels)
    assert not np.array_equal(other[1], labels)


def test_a_new_model_claims_nothing(logits_of):
    """Its loss is near that of equal odds, which a wide head's is not."""
    logits = logits_of(random_inputs())
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert -logits.mean() == pytest.approx(np.log(40), abs=1)


def test_a_run_that_began_keeps_its_tokenizer(tmp_path):
    args = argparse.Namespace(output=str(tmp_path), seeds=1)
    output = two_continuations.open_output(args)
    one, other = "\n".join(LINES), "\n".join(LINES[:90])
    t5_pretrain.own_tokenizer(output, other, 40, 6)
    first = t5_pretrain.own_tokenizer(output, one, 40, 6)
    two_continuations.begin(args, output)
    again = t5_pretrain.own_tokenizer(output, other, 40, 6)
    assert again.proto == first.proto


# Exact match.


def test_exact_match_by_hand():
    logits = np.eye(4)[[[1, 2, 3], [1, 2, 3], [1, 2, 3]]]
    labels = np.array([[1, 2, 3], [1, 0, 3], [1, 2, 0]])
    weights = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]])
    metric = t5_sst2.ExactMatch()
    metric.update_state(labels, logits, weights)
    assert float(metric.result()) == pytest.approx(2 / 3)
    metric.update_state(labels, logits)
    assert float(metric.result()) == pytest.approx(3 / 6)


def test_exact_match_is_what_greedy_generation_says(task, logits_of):
    """Targets that the model generates itself match, changed ones do not."""
    x = random_inputs()
    task.compile(sampler="greedy")
    prompt = {
        **x,
        "decoder_token_ids": np.zeros((6, 5), "int32"),
        "decoder_padding_mask": np.array([[True] + [False] * 4] * 6),
    }
    generate = task.make_generate_function()
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, prompt)
    said = generate(tensors, stop_token_ids=None)["decoder_token_ids"]
    said = np.array(keras.ops.convert_to_numpy(said))
    said[[1, 4], [2, 4]] = 3 + (said[[1, 4], [2, 4]] - 2) % 37
    x["decoder_token_ids"] = said[:, :-1]
    logits = logits_of(x)
    matches = []
    for row in range(6):
        metric = t5_sst2.ExactMatch()
        metric.update_state(said[row : row + 1, 1:], logits[row : row + 1])
        matches.append(float(metric.result()))
    assert matches == [1, 0, 1, 1, 0, 1]


def test_long_sentences_are_cut_like_keras_hub_cuts_them(task):
    args = t5_sst2.parse(["--length", "12"])
    sentences = ["my love", "come hither my fair sweet lord come hither"]
    data = t5_sst2.text_to_text(
        args, task, (sentences, np.array([1, 0])), (sentences, np.array([0, 1]))
    )
    expected, labels, weights = task.preprocessor(
        {
            "encoder_text": [f"sst2 sentence: {each}" for each in sentences],
            "decoder_text": ["positive", "negative"],
        }
    )
    x, answers, counted = data.batch(data.train, None, True)
    assert x["encoder_padding_mask"][1].all()
    for key, value in x.items():
        np.testing.assert_array_equal(value, expected[key])
    np.testing.assert_array_equal(answers, labels)
    np.testing.assert_array_equal(counted, weights)


# What goes wrong.


def said_of(main, arguments, tmp_path, capsys):
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--text nowhere.txt", "nowhere.txt"),
        ("--data-dir .", "no folder `tiny_shakespeare`"),
        ("--chunk 1", "at least 2 tokens"),
        ("--density 2", "density=2.0"),
        ("--text {text} --vocabulary 9000", "vocabulary_size=9000"),
        ("--text {text} {model} --chunk 999 --mean-span 99", "chunk of 999"),
    ],
)
def test_pretraining_says_what_is_wrong(
    options, expected, text, tmp_path, capsys
):
    arguments = options.format(text=text, model=MODEL).split()
    assert expected in said_of(t5_pretrain.main, arguments, tmp_path, capsys)


def test_a_preset_without_sentinels_is_refused(text, tmp_path, capsys):
    dense(sentinels=0).save_to_preset(str(tmp_path / "preset"))
    arguments = ["--text", text, "--preset", str(tmp_path / "preset")]
    error = said_of(t5_pretrain.main, arguments, tmp_path, capsys)
    assert "Missing: <extra_id_0>" in error


def test_fine_tuning_says_what_is_wrong(task, rows, tmp_path, capsys):
    error = said_of(t5_sst2.main, rows[:2], tmp_path, capsys)
    assert "must be given together" in error
    error = said_of(t5_sst2.main, ["--data-dir", "."], tmp_path, capsys)
    assert "no folder `glue`" in error
    tokenizer = text_corpus.train_tokenizer("\n".join(LINES[12:]), 30, 0)
    foreign = t5_pretrain.dense_model(SIZE, tokenizer)
    foreign.save_to_preset(str(tmp_path / "foreign"))
    arguments = [*rows, "--checkpoint", str(tmp_path / "foreign")]
    error = said_of(t5_sst2.main, arguments, tmp_path, capsys)
    assert "lacks some of their letters" in error
    path = tmp_path / "bare.keras"
    keras_hub.models.T5Seq2SeqLM(task.backbone).save(path)
    arguments = [*rows, "--checkpoint", str(path)]
    error = said_of(t5_sst2.main, arguments, tmp_path, capsys)
    assert "without a preprocessor" in error


# From one end to the other.


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrain")
    arguments = f"--text {text} --chunk 16 --held-out 0.3 {MODEL} {FEW}".split()
    assert t5_pretrain.main([*arguments, "--output", str(output)]) == 0
    return output


def check_results(output):
    written = json.loads((output / "results.json").read_text())
    dense, more, sparse = written["results"]
    assert sparse["parameters"] > more["parameters"] == dense["parameters"]
    assert more["steps"] == pytest.approx(
        sparse["steps"] * sparse["step_cost"], rel=0.3
    )
    # Both go on from where the checkpoint ended.
    assert more["start"]["test_loss"] == pytest.approx(
        dense["rounds"][-1]["test_loss"], rel=1e-4
    )
    assert (output / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return written


@pytest.mark.slow
def test_pretraining_writes_what_it_says(pretrained):
    check_results(pretrained)
    loaded = keras.models.load_model(pretrained / "upcycled.keras")
    preset = keras_hub.models.T5Seq2SeqLM.from_preset(
        str(pretrained / "upcycled_preset")
    )
    for one, other in zip(
        loaded.get_weights(), preset.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_preset(
    pretrained, rows, tmp_path, capsys, monkeypatch
):
    """The dense stage alone: the others are those of pretraining."""
    found = {}

    def dense_stage(args, output, task, data, reporter, **options):
        stage = Stage(rounds=1, steps=2, batch_size=8)
        model = comparison.trainer(task, stage, options["accuracy"]())
        found["result"] = comparison.train(
            model, data, stage, name=DENSE, seed=0
        )
        _, labels, weights = data.batch(data.test, None, False)
        said = model.predict(data.test_inputs(), verbose=0).argmax(-1)
        found["match"] = ((said == labels) | (weights == 0)).all(-1).mean()
        return two_continuations.Outcome(continued=task, upcycled=task)

    monkeypatch.setattr(two_continuations, "run", dense_stage)
    checkpoint = ["--checkpoint", str(pretrained / "dense_preset")]
    arguments = [*rows, *checkpoint, *f"--length 32 {FEW}".split()]
    assert t5_sst2.main([*arguments, "--output", str(tmp_path)]) == 0
    assert found["result"].final("test_accuracy") == pytest.approx(
        found["match"]
    )
    assert "held out: sst2 sentence: " in capsys.readouterr().out

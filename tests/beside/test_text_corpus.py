"""The corpus of the T5 examples, on a small text made up here."""

import sys
import types

import keras_hub
import numpy as np
import pytest
import span_corruption
import text_corpus

pytestmark = pytest.mark.one_backend

WORDS = "the a king queen fair sweet my lord come hither night day love".split()
RNG = np.random.default_rng(0)
TEXT = "\n".join(" ".join(RNG.choice(WORDS, 8)) for _ in range(200)) + "\n"


@pytest.fixture(scope="module")
def tokenizer():
    return text_corpus.train_tokenizer(TEXT, 48, sentinels=12)


def test_the_tokenizer_has_the_pieces_of_t5(tokenizer):
    assert isinstance(tokenizer, keras_hub.tokenizers.T5Tokenizer)
    assert tokenizer.vocabulary_size() == 48
    assert tokenizer.get_vocabulary()[:3] == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.end_token_id) == (0, 1)
    sentinels = span_corruption.sentinels_of(tokenizer, 12)
    assert [tokenizer.id_to_token(int(i)) for i in sentinels] == [
        f"<extra_id_{i}>" for i in range(12)
    ]


def test_a_sentinel_in_a_text_is_one_token(tokenizer):
    (tokens,) = text_corpus.encode(["my <extra_id_1> love"], tokenizer)
    sentinels = span_corruption.sentinels_of(tokenizer, 12)
    assert np.isin(tokens, sentinels).sum() == 1
    assert sentinels[1] in tokens


def test_padding_and_ends_are_not_said(tokenizer):
    texts = ["my sweet lord", "come<extra_id_0> night"]
    tokens = text_corpus.encode(texts, tokenizer)
    x, _, _ = span_corruption.pack(tokens, tokens, 32, 32, 48)
    for key in ("encoder_token_ids", "decoder_token_ids"):
        assert text_corpus.decode(x[key], tokenizer) == texts


def test_a_tokenizer_without_sentinels_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"Missing: <extra_id_12> to <extra_id_19> \(8 of 20\)"
    ):
        span_corruption.sentinels_of(tokenizer, 20)


def test_training_again_gives_the_same_tokenizer(tokenizer):
    again = text_corpus.train_tokenizer(TEXT, 48, sentinels=12)
    assert again.proto == tokenizer.proto


def test_chunks_are_the_text_in_order(tokenizer):
    chunks = text_corpus.chunks(TEXT, tokenizer, 32)
    assert chunks.shape[1] == 32
    assert chunks.dtype == "int32"
    (said,) = text_corpus.decode(chunks.reshape(1, -1), tokenizer)
    whole = " ".join(TEXT.split())
    assert whole.startswith(said.rstrip())
    # Less than a chunk is left over.
    left = text_corpus.encode([whole[len(said) :]], tokenizer)[0]
    assert len(left) <= 32


def test_packing_is_what_the_preprocessor_of_keras_hub_does(tokenizer):
    inputs = ["my sweet lord", "come", "a fair night my love my love my love"]
    targets = ["love", "hither hither", "day"]
    preprocessor = keras_hub.models.T5Seq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=24, decoder_sequence_length=12
    )
    expected = preprocessor({"encoder_text": inputs, "decoder_text": targets})
    received = span_corruption.pack(
        text_corpus.encode(inputs, tokenizer),
        text_corpus.encode(targets, tokenizer),
        24,
        12,
        tokenizer.vocabulary_size(),
    )
    assert set(received[0]) == set(expected[0])
    for key in expected[0]:
        np.testing.assert_array_equal(received[0][key], expected[0][key])
    np.testing.assert_array_equal(received[1], expected[1])
    np.testing.assert_array_equal(received[2], expected[2])


def test_a_file_or_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "c.md").write_text("not a text\n")
    assert text_corpus.read_text(tmp_path).split() == ["first", "second"]
    assert text_corpus.read_text(tmp_path / "b.txt") == "second\n"


def test_the_end_is_held_out():
    train, rest = text_corpus.split(TEXT, 0.25)
    assert train + rest == TEXT
    assert train.endswith("\n")
    assert len(rest) / len(TEXT) == pytest.approx(0.25, abs=0.02)


def test_labelled_sentences(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("a fine film\t1\nso dull\t0\n")
    sentences, labels = text_corpus.read_labelled(path)
    assert sentences == ["a fine film", "so dull"]
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "line", ["no label", "two\t2", "\t1", "", "label first\t1\t"]
)
def test_a_malformed_line_is_named(line, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(f"fine\t1\n{line}\nfine\t1\n")
    with pytest.raises(ValueError, match=r"line 2: .*Mend or remove it"):
        text_corpus.read_labelled(path)


def test_an_empty_corpus_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        text_corpus.read_text(path)
    with pytest.raises(ValueError, match="sentences must not be empty"):
        text_corpus.read_labelled(path)
    with pytest.raises(ValueError, match="needs a corpus"):
        text_corpus.train_tokenizer("\n", 60)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="has none"):
        text_corpus.read_text(tmp_path / "folder")


def test_a_corpus_that_is_too_small_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"chunk of 99 tokens.*shorter chunks"):
        text_corpus.chunks("my lord\n", tokenizer, 99)
    with pytest.raises(ValueError, match=r"vocabulary_size=5000 with 10 sent"):
        text_corpus.train_tokenizer(TEXT, 5000, sentinels=10)
    with pytest.raises(ValueError, match=r"vocabulary_size=20 with 18 sent"):
        text_corpus.train_tokenizer(TEXT, 20, sentinels=18)
    with pytest.raises(ValueError, match="Use a larger corpus"):
        text_corpus.split("a single line", 0.1)


def test_missing_data_of_tfds(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder `glue`"):
        text_corpus.sst2("train", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`tiny_shakespeare`"):
        text_corpus.tiny_shakespeare(str(tmp_path))
    (tmp_path / "glue").mkdir()
    broken = types.SimpleNamespace(load=lambda *args, **kwargs: {}["shard"])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", broken)
    with pytest.raises(OSError, match=r"KeyError: 'shard'.*`--data-dir`"):
        text_corpus.sst2("train", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install tensorflow-datasets"):
        text_corpus.sst2("train")

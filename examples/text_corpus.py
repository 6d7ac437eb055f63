"""Texts for the T5 examples: read, split, tokenized, cut into chunks."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
import tfds_reader

LABELS = {"0": 0, "1": 1}


def read_text(path: str | pathlib.Path) -> str:
    """A text file, or all `*.txt` of a folder in the order of their names."""
    path = pathlib.Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            "A folder of texts must hold files named *.txt. Received: "
            f"{path}, which has none."
        )
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not text.strip():
        raise ValueError(
            f"A corpus must not be empty. Received: {path}, which holds no "
            "text. Give another file or folder."
        )
    return text


def tiny_shakespeare(data_dir: str | None = None) -> str:
    """TFDS's `tiny_shakespeare`, its three splits in order: one text."""
    parts = [
        tfds_reader.load("tiny_shakespeare", split, data_dir)["text"]
        for split in ("train", "validation", "test")
    ]
    return b"".join(part for texts in parts for part in texts).decode("utf-8")


def split(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """The first part of a text, to train on, and its end, to test on.

    The cut is made at the end of a line.

    Args:
        text: The corpus.
        held_out: Share of the text that is held out. Defaults to 0.1.

    Returns:
        `(train, held_out)`.
    """
    if not 0 < held_out < 1:
        raise ValueError(
            "`held_out` must be between 0 and 1. Received: "
            f"held_out={held_out}."
        )
    place = text.rfind("\n", 0, round(len(text) * (1 - held_out)) + 1) + 1
    train, rest = text[:place], text[place:]
    if not train.strip() or not rest.strip():
        raise ValueError(
            "The corpus must have lines both to train on and to hold out. "
            f"Received: {text.count(chr(10))} line ends, {len(text)} "
            f"characters, held_out={held_out}. Use a larger corpus, or break "
            "it into lines."
        )
    return train, rest


def train_tokenizer(text: str, vocabulary_size: int, sentinels: int = 100):
    """Trains a T5 tokenizer, a SentencePiece unigram model, on a text.

    Its first pieces are T5's: `<pad>`, `</s>`, `<unk>`. Sentinels follow.

    Args:
        text: The corpus, in lines.
        vocabulary_size: Pieces of the vocabulary, sentinels included.
        sentinels: How many of `<extra_id_0>`, ... there are to be.

    Returns:
        A `keras_hub.tokenizers.T5Tokenizer`.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(
            "A tokenizer needs a corpus to be trained on. Received: an empty "
            "one. Give another file or folder."
        )
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=vocabulary_size,
            model_type="unigram",
            max_sentence_length=max(
                10, *(len(each.encode()) for each in lines)
            ),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            user_defined_symbols=[f"<extra_id_{i}>" for i in range(sentinels)],
            num_threads=1,  # sums in one order: the same pieces every time
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            "`vocabulary_size` must fit the corpus. Received: "
            f"vocabulary_size={vocabulary_size} with {sentinels} sentinels, "
            f"and {len(text)} characters of text. Choose another, or use a "
            f"larger corpus. SentencePiece says: {error}"
        ) from error
    import keras_hub

    return keras_hub.tokenizers.T5Tokenizer(proto=written.getvalue())


def encode(texts: Sequence[str], tokenizer) -> list[list[int]]:
    """Token ids of each text, as Python lists on every backend.

    Args:
        texts: Strings.
        tokenizer: A `keras_hub.tokenizers.T5Tokenizer`.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer.proto
    )
    return processor.encode(list(texts))


def decode(ids: np.ndarray, tokenizer) -> list[str]:
    """The text of each row of ids, without padding and `</s>`.

    Args:
        ids: Integers of shape `(texts, places)`.
        tokenizer: A `keras_hub.tokenizers.T5Tokenizer`.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer.proto
    )
    return processor.decode([row[row > 1].tolist() for row in ids])


def chunks(text: str, tokenizer, length: int) -> np.ndarray:
    """A text's tokens in chunks of one length; what is left over is not used.

    Args:
        text: The corpus.
        tokenizer: A `keras_hub.tokenizers.T5Tokenizer`.
        length: Tokens of a chunk.

    Returns:
        Integers of shape `(chunks, length)`.
    """
    lines = encode(text.splitlines(), tokenizer)
    tokens = np.array([token for line in lines for token in line], "int32")
    if len(tokens) < length:
        raise ValueError(
            f"A corpus must have at least one chunk of {length} tokens. "
            f"Received: {len(tokens)} tokens. Use a larger corpus or shorter "
            "chunks."
        )
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def read_labelled(path: str | pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Rows of a tsv file: a sentence, a tab, and 0 or 1.

    Args:
        path: Of the file.

    Returns:
        `(sentences, labels)`.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(
            "A file of labelled sentences must not be empty. Received: "
            f"{path}. Give another file."
        )
    sentences, labels = [], []
    # Not `splitlines`, which also breaks at rare characters of a sentence.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        sentence, tab, label = line.rpartition("\t")
        if not (tab and sentence.strip() and label in LABELS):
            raise ValueError(
                "A line must be a sentence, a tab, and 0 or 1. Received: "
                f"{path}, line {number}: {line[:80]!r}. Mend or remove it."
            )
        sentences.append(sentence.strip())
        labels.append(LABELS[label])
    return sentences, np.array(labels, "int32")


def sst2(
    split: str, data_dir: str | None = None
) -> tuple[list[str], np.ndarray]:
    """`(sentences, labels)` of a split of TFDS's `glue/sst2`."""
    loaded = tfds_reader.load("glue/sst2", split, data_dir)
    sentences = [each.decode("utf-8").strip() for each in loaded["sentence"]]
    return sentences, loaded["label"].astype("int32")

"""T5's span corruption, and batches of it as a KerasHub T5 takes them.

Spans of a text are dropped; each leaves one sentinel behind. The model is to
say what was there:

    text     Thank you for inviting me to your party last week .
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week .
    targets  <extra_id_0> for inviting <extra_id_1> last <extra_id_2>

This is the form of figure 2 and section 3.1.4 of "Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer"
(https://arxiv.org/abs/1910.10683): targets end with one more sentinel, always.
How many tokens are dropped and where follows the algorithm with which the
released checkpoints were made: a text begins with a span that stays and ends
with one that is dropped. (That code writes the last sentinel only after a text
whose end stays, so never; the paper's form costs a token more.) Packing puts
`</s>` at the end of inputs and of targets.

All of it is NumPy; a generator with the same seed gives the same spans.
"""

from collections.abc import Sequence

import numpy as np

DENSITY = 0.15
MEAN_SPAN = 3.0
PAD, END = 0, 1


def counts(
    length: int, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> tuple[int, int]:
    """How many tokens of a text are dropped, and in how many spans.

    Args:
        length: Tokens of the text, at least 2.
        density: Share of the tokens that is dropped, between 0 and 1.
        mean_span: Average length of a dropped span, at least 1.

    Returns:
        `(tokens, spans)`, each at least 1 and at most what fits.

    Example:
        >>> counts(128)
        (19, 6)
    """
    if length < 2:
        raise ValueError(
            "A text must have at least 2 tokens, one that stays and one that "
            f"is dropped. Received: {length}. Use longer texts."
        )
    if not 0 < density < 1:
        raise ValueError(
            f"`density` must be between 0 and 1. Received: density={density}."
        )
    if not mean_span >= 1:
        raise ValueError(
            "`mean_span` must be at least 1, the shortest span. Received: "
            f"mean_span={mean_span}."
        )
    tokens = min(max(round(length * density), 1), length - 1)
    # A span that stays goes before every span that is dropped.
    most = min(tokens, length - tokens)
    return tokens, min(max(round(tokens / mean_span), 1), most)


def lengths(
    length: int, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> tuple[int, int]:
    """Exact lengths of inputs and targets, without `</s>`.

    They depend on the length of the text alone, so chunks of one length make
    arrays of one shape.

    Args:
        length: Tokens of the text.
        density: See `counts`.
        mean_span: See `counts`.

    Returns:
        `(inputs, targets)`.

    Example:
        >>> lengths(128)
        (115, 26)
    """
    tokens, spans = counts(length, density, mean_span)
    return length - tokens + spans, tokens + spans + 1


def noise_mask(
    length: int,
    rng: np.random.Generator,
    density: float = DENSITY,
    mean_span: float = MEAN_SPAN,
) -> np.ndarray:
    """Which tokens are dropped: booleans of shape `(length,)`.

    Spans that stay and spans that are dropped take turns, beginning with one
    that stays; the lengths of either kind are a random way to divide their
    total.

    Args:
        length: Tokens of the text.
        rng: A `numpy.random.Generator`.
        density: See `counts`.
        mean_span: See `counts`.
    """
    tokens, spans = counts(length, density, mean_span)
    dropped = _divide(tokens, spans, rng)
    kept = _divide(length - tokens, spans, rng)
    in_turn = np.stack([kept, dropped], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, in_turn)


def corrupt(
    tokens: np.ndarray,
    sentinels: Sequence[int],
    rng: np.random.Generator,
    density: float = DENSITY,
    mean_span: float = MEAN_SPAN,
) -> tuple[np.ndarray, np.ndarray]:
    """Drops random spans of a text.

    Args:
        tokens: Ids of shape `(length,)`.
        sentinels: Ids of `<extra_id_0>`, `<extra_id_1>`, ...; see
            `sentinels_of`. One more than there are spans is needed.
        rng: A `numpy.random.Generator`.
        density: See `counts`.
        mean_span: See `counts`.

    Returns:
        `(inputs, targets)`, without `</s>`; their lengths are `lengths(...)`.
    """
    mask = noise_mask(len(tokens), rng, density, mean_span)
    return drop(tokens, mask, sentinels)


def drop(
    tokens: np.ndarray, mask: np.ndarray, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Drops the tokens that a mask marks; each run of them is a span.

    Args:
        tokens: Ids of shape `(length,)`.
        mask: Booleans of the same shape.
        sentinels: See `corrupt`.

    Returns:
        `(inputs, targets)`, without `</s>`.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    sentinels = np.asarray(sentinels)
    own = np.intersect1d(tokens, sentinels)
    if len(own):
        raise ValueError(
            "A text must not hold sentinels of its own. Received: tokens with "
            f"the ids {own.tolist()}. Take <extra_id_...> out of the corpus."
        )
    first = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(first.sum())
    if spans >= len(sentinels):
        raise ValueError(
            f"{spans} spans need {spans + 1} sentinels. Received: "
            f"{len(sentinels)} sentinels. Use shorter texts, longer spans or "
            "a vocabulary with more of them."
        )
    inputs = tokens.copy()
    inputs[first] = sentinels[:spans]
    before = np.flatnonzero(first[mask])
    targets = np.insert(tokens[mask], before, sentinels[:spans])
    return inputs[~mask | first], np.append(targets, sentinels[spans])


def restore(
    inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int]
) -> np.ndarray:
    """The text from which `corrupt` made inputs and targets.

    Args:
        inputs: Ids of shape `(inputs,)`, without `</s>`.
        targets: Ids of shape `(targets,)`, without `</s>`.
        sentinels: See `corrupt`.
    """
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    holes = np.flatnonzero(np.isin(inputs, sentinels))
    edges = np.flatnonzero(np.isin(targets, sentinels))
    expected = list(sentinels[: len(holes) + 1])
    if (
        inputs[holes].tolist() != expected[:-1]
        or targets[edges].tolist() != expected
        or edges[0] != 0
        or edges[-1] != len(targets) - 1
    ):
        raise ValueError(
            f"Inputs must hold the sentinels {expected[:-1]} in this order, "
            f"targets {expected}, the first and the last of them at its ends. "
            f"Received: inputs with {inputs[holes].tolist()}, targets with "
            f"{targets[edges].tolist()} at {edges.tolist()} of "
            f"{len(targets)}."
        )
    between = np.split(targets, edges)[1:-1]  # each with its sentinel in front
    around = np.split(inputs, holes)
    parts = [around[0]]
    for dropped, kept in zip(between, around[1:], strict=True):
        parts += [dropped[1:], kept[1:]]
    return np.concatenate(parts)


def sentinels_of(tokenizer, count: int = 100) -> np.ndarray:
    """Ids of `<extra_id_0>` and so on in a tokenizer's vocabulary.

    Args:
        tokenizer: A KerasHub tokenizer.
        count: How many are wanted. Defaults to 100, as many as T5 has.

    Returns:
        Integers of shape `(count,)`.
    """
    places = {piece: i for i, piece in enumerate(tokenizer.get_vocabulary())}
    wanted = [f"<extra_id_{index}>" for index in range(count)]
    missing = [piece for piece in wanted if piece not in places]
    if missing:
        raise ValueError(
            f"The tokenizer's vocabulary must hold {count} sentinels. "
            f"Missing: {missing[0]}"
            + (f" to {missing[-1]}" if len(missing) > 1 else "")
            + f" ({len(missing)} of {count}). Train a tokenizer with "
            "`text_corpus.train_tokenizer`, or ask for fewer: shorter chunks "
            "or longer spans."
        )
    return np.array([places[piece] for piece in wanted], "int32")


def pack(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    encoder_length: int,
    decoder_length: int,
    vocabulary_size: int,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Texts as a KerasHub T5 takes them, like its own preprocessor does.

    Both get `</s>` at the end. The decoder sees the targets one place to the
    right, with the padding token in front.

    Args:
        inputs: For each text, ids for the encoder.
        targets: For each text, ids that the decoder is to say.
        encoder_length: Places of the encoder, `</s>` included.
        decoder_length: Places of the decoder, `</s>` included.
        vocabulary_size: Ids must be smaller.

    Returns:
        `(x, labels, weights)`: a dictionary of four arrays of shape
        `(texts, places)`, labels of shape `(texts, decoder_length)`, and
        weights that are 0 where labels are padding.
    """
    encoder, encoder_mask = _padded(inputs, [], encoder_length, "encoder")
    decoder, decoder_mask = _padded(
        targets, [PAD], decoder_length + 1, "decoder"
    )
    check_ids(encoder, vocabulary_size)
    check_ids(decoder, vocabulary_size)
    x = {
        "encoder_token_ids": encoder,
        "encoder_padding_mask": encoder_mask,
        "decoder_token_ids": decoder[:, :-1],
        "decoder_padding_mask": decoder_mask[:, :-1],
    }
    return x, decoder[:, 1:], decoder_mask[:, 1:].astype("float32")


def check_ids(ids: np.ndarray, vocabulary_size: int) -> None:
    """Raises `ValueError` unless all ids are in the vocabulary.

    An embedding on JAX would answer with NaN, without a word.

    Args:
        ids: Integers of any shape.
        vocabulary_size: Integer.
    """
    outside = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(outside):
        raise ValueError(
            f"Token ids must be 0 to {vocabulary_size - 1}. Received: "
            f"{np.unique(outside)[:5].tolist()}. Tokenize with the tokenizer "
            "that the model was made for."
        )


def _padded(texts, start, length, name):
    """Ids and mask: each text between `start` and `</s>`, then padding."""
    ids = np.full((len(texts), length), PAD, "int32")
    mask = np.zeros(ids.shape, bool)
    for index, text in enumerate(texts):
        whole = [*start, *text, END]
        if len(whole) > length:
            raise ValueError(
                f"`{name}_length` must be at least {len(text) + 1}, a text "
                f"and `</s>`. Received: {length - len(start)}. Raise it, or "
                "shorten the text."
            )
        ids[index, : len(whole)] = whole
        mask[index, : len(whole)] = True
    return ids, mask


def _divide(total, parts, rng):
    """Random lengths of `parts` parts, each at least 1, that add to `total`."""
    cuts = rng.choice(total - 1, parts - 1, replace=False) + 1
    edges = np.concatenate([[0], np.sort(cuts), [total]])
    return np.diff(edges)

"""SST-2, text to text: a T5 fine-tuned, upcycled, compared.

What it shows
    A dense T5 learns to answer "sst2 sentence: a fine film" with "positive"
    or "negative". Then it trains on twice from the same weights: as it is, and
    upcycled in every other block of both stacks. Both continuations spend the
    same floating-point operations. 6,920 or 67,349 short texts are few for a
    mixture of experts: expect the path to work, not a large gain.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/t5_sst2.py --output runs/t5_sst2

    A small T5 and a tokenizer are trained from scratch on the sentences alone,
    unless `--checkpoint` names a dense T5 with its tokenizer: a preset, by name
    or folder, or a `.keras` file. The data are
    `tfds.load("glue/sst2", data_dir=...)`, downloaded unless `--data-dir`
    holds them, or two files of lines "sentence, tab, 0 or 1":
    `--train train.tsv --validation validation.tsv`. After an interruption the
    same command goes on where it was. `--epochs 1 --more-epochs 1
    --limit 500` tries everything in minutes.

Writes
    `results.json`, `curves.png`, `dense.keras` (after it trained on),
    `upcycled.keras`, and under `stages/` the weights and figures of every
    stage. "Accuracy" is exact match: the share
    of validation sentences for which greedy generation says exactly the right
    word and ends there. It is computed without generating: greedy generation
    gives the target if and only if, given the target up to any place, its next
    token is the likeliest.

Expected result
    JAX, one seed, 6,920 sentences to train on and 872 to test on, from scratch
    (`examples/figures/sst2.json`), both continuations at equal compute:
    accuracy 72.5 % for the checkpoint, 72.2 % dense, 73.4 % upcycled; test
    loss 0.276, 0.312 and 0.290. Both have begun to overfit; ten sentences of
    872 between the two, from one seed, prove nothing.

Hardware and time
    Two CPU cores, shared with other work: 205 s for the checkpoint, 156 s and
    126 s for the continuations.
"""

import argparse
import sys

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import span_corruption
import t5_pretrain
import text_corpus
import two_continuations
from keras import ops

from keras_upcycle.demo.batches import Data
from keras_upcycle.training import progress

UNKNOWN = 2  # of every T5 tokenizer
PREFIX = "sst2 sentence: "
WORDS = ("negative", "positive")
INPUTS = (
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)


class ExactMatch(keras.metrics.Mean):
    """Share of texts of which every token that counts is the likeliest."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        said = ops.argmax(y_pred, axis=-1)
        right = ops.equal(said, ops.cast(y_true, said.dtype))
        if sample_weight is not None:
            right = ops.logical_or(right, ops.equal(sample_weight, 0))
        super().update_state(ops.all(right, axis=-1))


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; see the top of this file."""
    args = parse(arguments)
    try:
        check(args)
        output = two_continuations.open_output(args)
        train, validation = load_sst2(args)
        if args.checkpoint:
            task = load_checkpoint(args.checkpoint)
        else:
            corpus = "\n".join(
                f"{PREFIX}{sentence} {WORDS[label]}"
                for sentence, label in zip(*train, strict=True)
            )
            task = own_model(args, output, corpus)
        data = text_to_text(args, task, train, validation)
        estimate = estimate_of(task, args.experts)
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with progress.Reporter(every_round=True) as reporter:
        reporter.line(
            f"{len(data.train[0]):,} sentences to train on, "
            f"{len(data.test[0]):,} to test on"
        )
        outcome = two_continuations.run(
            args,
            output,
            task,
            data,
            reporter,
            title="A T5 answers SST-2: more dense training or "
            f"{args.experts} experts",
            estimate=estimate,
            clip_norm=1.0,
            accuracy=lambda: ExactMatch(name="accuracy"),
        )
        reporter.line("\n" + t5_pretrain.said(outcome.upcycled, data))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="runs/t5_sst2", help="folder of the results")
    add("--checkpoint", help="a dense T5: a preset or a .keras file")
    add("--train", help="sentences and labels, a .tsv file")
    add("--validation", help="the same, to test on")
    add("--data-dir", help="folder that holds TFDS's glue")
    add("--length", type=int, default=48, help="tokens of a sentence, at most")
    add("--limit", type=int, help="use only so many sentences, to try things")
    add_training(parser)
    return parser.parse_args(arguments)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Options of training, and of a model of one's own."""
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="of the dense checkpoint")
    add("--more-epochs", type=int, default=4, help="of the upcycled model")
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=1e-3)
    add("--seeds", type=int, default=1, help="pairs of continuations")
    add("--experts", type=int, default=8)
    scratch = parser.add_argument_group("from scratch, without --checkpoint")
    add = scratch.add_argument
    add("--vocabulary", type=int, default=2048, help="of the tokenizer")
    add("--width", type=int, default=96, help="of the tokens")
    add("--intermediate", type=int, default=192, help="of a feed-forward")
    add("--blocks", type=int, default=2, help="of either stack")
    add("--heads", type=int, default=4)
    add("--dropout", type=float, default=0.1)


def estimate_of(task, experts: int) -> ku.UpcycleEstimate:
    """What upcycling a task costs, at its own lengths."""
    return ku.estimate_upcycle(
        task,
        experts,
        sequence_length={
            "encoder": task.preprocessor.encoder_sequence_length,
            "decoder": task.preprocessor.decoder_sequence_length,
        },
    )


def check(args) -> None:
    """Raises `ValueError` where options do not go together."""
    if bool(args.train) != bool(args.validation):
        raise ValueError(
            "`--train` and `--validation` must be given together. Received: "
            f"--train={args.train}, --validation={args.validation}. Give the "
            "other file too, or neither to load TFDS's glue/sst2."
        )


def load_sst2(args):
    """`(sentences, labels)` to train on and to test on."""
    if args.train:
        splits = [
            text_corpus.read_labelled(path)
            for path in (args.train, args.validation)
        ]
    else:
        splits = [
            text_corpus.sst2(name, args.data_dir)
            for name in ("train", "validation")
        ]
    return [
        (sentences[: args.limit], labels[: args.limit])
        for sentences, labels in splits
    ]


def load_checkpoint(name: str):
    """A dense T5 with its tokenizer, from a preset or a `.keras` file."""
    if name.endswith(".keras"):
        task = keras.models.load_model(name, compile=False)
    else:
        task = keras_hub.models.T5Seq2SeqLM.from_preset(name)
    if getattr(task, "preprocessor", None) is None:
        raise ValueError(
            "`--checkpoint` must be a T5Seq2SeqLM with its tokenizer. "
            f"Received: --checkpoint={name}, a {type(task).__name__} without "
            "a preprocessor. Give a preset that examples/t5_pretrain.py wrote."
        )
    return task


def own_model(args, output, corpus):
    """A small T5 with random weights, and a tokenizer of the texts alone."""
    tokenizer = t5_pretrain.own_tokenizer(
        output, corpus, args.vocabulary, sentinels=0
    )
    task = t5_pretrain.dense_model(args, tokenizer)
    # KerasHub draws embeddings of size 1, T5's own way, for an optimizer that
    # steps in proportion to a weight. Adam's steps are of one size, and would
    # hardly move what a few sentences touch.
    table = task.backbone.token_embedding.embeddings
    table.assign(table * args.width**-0.5)
    return task


def text_to_text(args, task, train, validation) -> Data:
    """SST-2 as token ids; sets the preprocessor's lengths."""
    check_says(WORDS, task.preprocessor.tokenizer)
    pairs = (
        (
            [PREFIX + sentence for sentence in sentences],
            [WORDS[label] for label in labels],
        )
        for sentences, labels in (train, validation)
    )
    return data_of(args.length, task, *pairs)


def check_says(words, tokenizer) -> None:
    """Raises `ValueError` where a word that is asked for cannot be said."""
    encoded = text_corpus.encode(words, tokenizer)
    lost = [w for w, ids in zip(words, encoded, strict=True) if UNKNOWN in ids]
    if lost:
        raise ValueError(
            f"The tokenizer must be able to say {' and '.join(lost[:5])}. "
            "Received: one whose vocabulary lacks some of their letters. Use a "
            "checkpoint with a tokenizer trained on a larger text."
        )


def data_of(length, task, train, validation) -> Data:
    """Questions and answers as token ids; sets the preprocessor's lengths.

    Args:
        length: Tokens of a question, `</s>` included; longer ones are cut.
        task: A T5 with its tokenizer.
        train: `(questions, answers)`, both as texts.
        validation: The same.
    """
    tokenizer = task.preprocessor.tokenizer
    encoded = [
        [text_corpus.encode(texts, tokenizer) for texts in pair]
        for pair in (train, validation)
    ]
    decoder_length = 1 + max(
        len(answer) for _, answers in encoded for answer in answers
    )
    task.preprocessor.encoder_sequence_length = length
    task.preprocessor.decoder_sequence_length = decoder_length

    def rows(questions, answers):
        x, answer, weights = span_corruption.pack(
            # Cut like KerasHub's preprocessor does, before `</s>`.
            [question[: length - 1] for question in questions],
            answers,
            length,
            decoder_length,
            task.backbone.vocabulary_size,
        )
        return (*(x[name] for name in INPUTS), answer, weights)

    def batch(rows, rng, training):
        *x, answer, weights = rows
        return dict(zip(INPUTS, x, strict=True)), answer, weights

    return Data(rows(*encoded[0]), rows(*encoded[1]), batch)


if __name__ == "__main__":
    sys.exit(main())

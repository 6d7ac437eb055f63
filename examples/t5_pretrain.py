"""A small T5 by span corruption: trained, upcycled, compared.

What it shows
    A dense encoder-decoder of T5 1.1's shape (gated GELU, a head of its own)
    learns to fill the holes of a text. Then it trains on twice from the same
    weights: as it is, and upcycled in every other block of both stacks, with
    Expert Choice (C=2) in the encoder and Top-2 in the decoder, as in the
    paper. Both continuations spend the same floating-point operations.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/t5_pretrain.py --output runs/t5_pretrain

    The text is `tfds.load("tiny_shakespeare", data_dir=...)`, downloaded
    unless `--data-dir` holds it, or a file or a folder of `--text`. The last
    tenth is held out. A SentencePiece tokenizer is trained on the rest.
    `KERAS_BACKEND` chooses the backend. After an interruption the same
    command goes on where it was. `--epochs 2 --more-epochs 2 --limit 100`
    tries everything in minutes.

    With a network, `--preset NAME --learning-rate 1e-4 --batch-size 8` starts
    from a KerasHub T5, with its tokenizer, whose vocabulary must hold
    `<extra_id_0>` and so on; the script says so if it does not.

Writes
    `results.json`, `curves.png`, `dense.keras` (after it trained on),
    `upcycled.keras`, the presets `dense_preset/` and `upcycled_preset/`,
    `tokenizer.spm`, and under `stages/` the weights and figures of every
    stage. "Accuracy" is the share of the tokens of the held-out targets that
    are right, given those before. `examples/t5_sst2.py` fine-tunes the preset.

Expected result
    JAX, one seed, Tiny Shakespeare in 6,790 chunks to train on and 803 held out
    (`examples/figures/t5_pretrain.json`), both continuations at equal compute:
    held-out loss 3.351 for the checkpoint, 3.275 dense, 3.276 upcycled; train
    loss 3.215 and 3.226. So small a model that has seen so little text is far
    from its plateau and still learns as fast dense: what it fills in is the
    right form (sentinels in order, likely words), not yet the right words.

Hardware and time
    Two CPU cores, shared with other work: 897 s for the checkpoint, 369 s and
    261 s for the continuations.
"""

import argparse
import sys

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np
import span_corruption
import text_corpus
import two_continuations

from keras_upcycle.demo.batches import Data
from keras_upcycle.training import progress


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; see the top of this file."""
    args = parse(arguments)
    try:
        encoder_length, decoder_length = packed_lengths(args)
        output = two_continuations.open_output(args)
        text = (
            text_corpus.read_text(args.text)
            if args.text
            else text_corpus.tiny_shakespeare(args.data_dir)
        )
        train_text, test_text = text_corpus.split(text, args.held_out)
        if args.preset:
            task = keras_hub.models.T5Seq2SeqLM.from_preset(args.preset)
            tokenizer = task.preprocessor.tokenizer
        else:
            tokenizer = own_tokenizer(
                output, train_text, args.vocabulary, sentinels_needed(args)
            )
            task = dense_model(args, tokenizer)
        task.preprocessor.encoder_sequence_length = encoder_length
        task.preprocessor.decoder_sequence_length = decoder_length
        data = Data(
            train=(text_corpus.chunks(train_text, tokenizer, args.chunk),),
            test=(text_corpus.chunks(test_text, tokenizer, args.chunk),),
            batch=corruption(args, task, tokenizer),
            test_batch_size=args.batch_size,
        )
        estimate = ku.estimate_upcycle(
            task,
            args.experts,
            sequence_length={
                "encoder": encoder_length,
                "decoder": decoder_length,
            },
        )
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.limit:
        data = Data(
            (data.train[0][: args.limit],),
            (data.test[0][: args.limit],),
            data.batch,
            data.test_batch_size,
        )
    with progress.Reporter(every_round=True) as reporter:
        reporter.line(
            f"{len(data.train[0]):,} chunks of {args.chunk} tokens to train "
            f"on, {len(data.test[0]):,} held out"
        )
        outcome = two_continuations.run(
            args,
            output,
            task,
            data,
            reporter,
            title="A T5 fills holes in a text: more dense training or "
            f"{args.experts} experts",
            estimate=estimate,
            clip_norm=1.0,
        )
        outcome.continued.save_to_preset(str(output / "dense_preset"))
        outcome.upcycled.save_to_preset(str(output / "upcycled_preset"))
        reporter.line("\n" + said(outcome.upcycled, data))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="runs/t5_pretrain", help="folder of the results")
    add("--text", help="a text file, or a folder of *.txt")
    add("--data-dir", help="folder that holds TFDS's tiny_shakespeare")
    add("--held-out", type=float, default=0.1, help="share of the text")
    add("--preset", help="start from this KerasHub T5, a name or a folder")
    add("--epochs", type=int, default=16, help="of the dense checkpoint")
    add("--more-epochs", type=int, default=6, help="of the upcycled model")
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=2e-3)
    add("--seeds", type=int, default=1, help="pairs of continuations")
    add("--vocabulary", type=int, default=512, help="of the tokenizer")
    add("--chunk", type=int, default=64, help="tokens of a text")
    add("--density", type=float, default=span_corruption.DENSITY)
    add("--mean-span", type=float, default=span_corruption.MEAN_SPAN)
    add("--width", type=int, default=96, help="of the tokens")
    add("--intermediate", type=int, default=192, help="of a feed-forward")
    add("--blocks", type=int, default=4, help="of either stack")
    add("--heads", type=int, default=4)
    add("--dropout", type=float, default=0.0)
    add("--experts", type=int, default=8)
    add("--limit", type=int, help="use only so many chunks, to try things")
    return parser.parse_args(arguments)


def packed_lengths(args) -> tuple[int, int]:
    """Places of the encoder and of the decoder, `</s>` included."""
    inputs, targets = span_corruption.lengths(
        args.chunk, args.density, args.mean_span
    )
    return inputs + 1, targets + 1


def own_tokenizer(output, text, vocabulary_size, sentinels):
    """A tokenizer trained on the text; a run that goes on keeps its own."""
    path = output / "tokenizer.spm"
    if path.exists() and two_continuations.has_begun(output):
        return keras_hub.tokenizers.T5Tokenizer(proto=path.read_bytes())
    tokenizer = text_corpus.train_tokenizer(text, vocabulary_size, sentinels)
    part = path.with_name("tokenizer.part")  # whole, or not there
    part.write_bytes(tokenizer.proto)
    part.replace(path)
    return tokenizer


def sentinels_needed(args) -> int:
    """Sentinels of a chunk: one for each span, and the last."""
    return (
        span_corruption.counts(args.chunk, args.density, args.mean_span)[1] + 1
    )


def dense_model(args, tokenizer):
    """A small T5 1.1 with random weights."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.T5Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=args.blocks,
        num_heads=args.heads,
        hidden_dim=args.width,
        intermediate_dim=args.intermediate,
        dropout=args.dropout,
        activation="gelu",
        use_gated_activation=True,
        tie_embedding_weights=False,
    )
    # KerasHub starts the head as wide as the embedding, which makes logits
    # of a size that takes epochs to unlearn.
    head = backbone.token_embedding.reverse_embeddings
    head.assign(head * args.width**-0.5)
    return keras_hub.models.T5Seq2SeqLM(
        backbone, keras_hub.models.T5Seq2SeqLMPreprocessor(tokenizer)
    )


def corruption(args, task, tokenizer):
    """Makes batches of corrupted chunks: new holes in every training step."""
    sentinels = span_corruption.sentinels_of(tokenizer, sentinels_needed(args))
    lengths = packed_lengths(args)

    def batch(rows, rng, training):
        pairs = [
            span_corruption.corrupt(
                chunk, sentinels, rng, args.density, args.mean_span
            )
            for chunk in rows[0]
        ]
        inputs, targets = zip(*pairs, strict=True)
        return span_corruption.pack(
            inputs, targets, *lengths, task.backbone.vocabulary_size
        )

    return batch


def said(task, data, count=3) -> str:
    """What a model says to the first held-out texts, greedily."""
    rows = tuple(part[:count] for part in data.test)
    x, labels, _ = data.batch(rows, np.random.default_rng(0), False)
    tokenizer = task.preprocessor.tokenizer
    asked, wanted = (
        text_corpus.decode(ids, tokenizer)
        for ids in (x["encoder_token_ids"], labels)
    )
    task.compile(sampler="greedy")
    parts = [
        f"held out: {question}\n  wanted: {right}\n  said:   {answer}"
        for question, right, answer in zip(
            asked, wanted, task.generate(asked), strict=True
        )
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

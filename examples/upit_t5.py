"""A T5 on two kinds of text: its own checkpoints become experts.

What it shows
    Upcycling Instruction Tuning (UpIT, arXiv 2410.01610) from one end to the
    other. A small T5 learns to fill holes in Shakespeare and in sentences of
    film reviews. Then its feed-forward blocks are tuned on either kind in turn,
    and at every quarter of the run they are kept: an expert each. Two children
    make them six. A few samples are sorted by which expert finds them
    likeliest, each expert's column of the router is trained on its own, and
    the whole trains on, on both kinds mixed.

    Three others train on from the same tuned model: the dense one as it is,
    the same checkpoints with random routers, and plain copies (Sparse
    Upcycling). All spend the same floating-point operations after tuning. How
    far routers tell the two texts apart is their mutual information with the
    experts chosen: 0 says not at all, 0.693, the log of 2, says fully.

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/upit_t5.py --output runs/upit_t5

    The texts are `tfds.load("tiny_shakespeare", data_dir=...)` and
    `tfds.load("glue/sst2", data_dir=...)`, downloaded unless `--data-dir`
    holds them, or files: `--plays plays.txt`, `--reviews reviews.tsv` with
    lines "sentence, tab, 0 or 1". The last tenth of either is held out.
    `KERAS_BACKEND` chooses the backend. `--pretrain-steps 100 --tune-steps 40
    --more-steps 40` tries everything in a minute or two.

Writes
    `results.json`, `upit.png`, `upit.keras`, and under `experts/` the
    checkpoints.

Expected result
    JAX, one seed, 4,000 chunks of either text to train on and 608 held out
    (`examples/figures/upit_t5.json`). Held-out loss, plays and reviews: 3.318
    and 3.246 dense, 3.329 and 3.255 copies, 3.324 and 3.252 UpIT with random
    routers, 3.326 and 3.252 UpIT: so small a model gains nothing from experts
    at equal compute. Information of text and expert after training: 0.336
    copies, 0.263 random routers, 0.346 UpIT; one seed proves nothing.

Hardware and time
    Two CPU cores, shared with other work: five minutes.
"""

import argparse
import contextlib
import pathlib
import sys
import time

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np
import span_corruption
import t5_pretrain
import text_corpus

from keras_upcycle import tables
from keras_upcycle.analysis import assignments
from keras_upcycle.demo import comparison
from keras_upcycle.demo.batches import Data, TestBatches, TrainBatches
from keras_upcycle.demo.results import Stage
from keras_upcycle.demo.store import write_results
from keras_upcycle.training import progress

DOMAINS = ("plays", "reviews")
QUARTERS = 4
PLACES = ("output", "data_dir", "plays", "reviews")  # of the user's machine
LAYERS = "every_other"  # what all mixtures here convert
DENSE, NAIVE = "dense, tuned further", "naive upcycling"
UPIT, WITHOUT = "UpIT", "UpIT, random routers"
COLOURS = {
    DENSE: "#555555",
    NAIVE: "#0072B2",
    WITHOUT: "#E69F00",
    UPIT: "#D55E00",
}


class InTurn(TrainBatches):
    """Batches of one domain in the odd quarters, of the other in the even."""

    def _order(self, number):
        rng = np.random.default_rng((self.seed, 0, number))
        domain = self.data.train[1]
        parts = [[], []]
        for kind in (0, 1):
            rows = rng.permutation(np.flatnonzero(domain == kind))
            need = self.stage.steps * self.stage.batch_size // QUARTERS
            parts[kind] = np.resize(rows, 2 * need).reshape(2, need)
        return np.concatenate([parts[q % 2][q // 2] for q in range(QUARTERS)])


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; see the top of this file."""
    args = parse(arguments)
    try:
        check(args)
        train_texts, test_texts = zip(*texts(args), strict=True)
        tokenizer = text_corpus.train_tokenizer(
            "\n".join(train_texts),
            args.vocabulary,
            t5_pretrain.sentinels_needed(args),
        )
        task = dense_model(args, tokenizer)
        data = corrupted(args, task, tokenizer, train_texts, test_texts)
        encoder_length, decoder_length = t5_pretrain.packed_lengths(args)
        router = ku.TopKRouter(top_k=min(2, args.experts))
        estimate = ku.estimate_upcycle(
            task,
            args.experts,
            router=router,
            layers=LAYERS,
            sequence_length={
                "encoder": encoder_length,
                "decoder": decoder_length,
            },
        )
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with progress.Reporter() as reporter:
        reporter.line(
            f"{keras.backend.backend()}. {len(data.train[0]):,} chunks of "
            f"{args.chunk} tokens to train on, {len(data.test[0]):,} held out"
        )
        run(args, task, data, router, estimate, reporter)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=pathlib.Path, default="runs/upit_t5")
    add("--plays", help="a text file, or a folder of *.txt")
    add("--reviews", help="sentences and labels, a .tsv file")
    add("--data-dir", help="folder that holds TFDS's data sets")
    add("--held-out", type=float, default=0.1, help="share of either text")
    add("--limit", type=int, default=4000, help="chunks of either text")
    add("--pretrain-steps", type=int, default=600, help="on both, mixed")
    add("--tune-steps", type=int, default=400, help="on either in turn")
    add("--more-steps", type=int, default=300, help="of the sparse models")
    add("--samples", type=int, default=256, help="that routers start from")
    add("--seeds", type=int, default=1, help="of what follows tuning")
    add("--experts", type=int, default=6)
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=2e-3)
    add("--vocabulary", type=int, default=512, help="of the tokenizer")
    add("--chunk", type=int, default=48, help="tokens of a text")
    add("--density", type=float, default=span_corruption.DENSITY)
    add("--mean-span", type=float, default=span_corruption.MEAN_SPAN)
    add("--width", type=int, default=64, help="of the tokens")
    add("--intermediate", type=int, default=128, help="of a feed-forward")
    add("--blocks", type=int, default=2, help="of either stack")
    add("--heads", type=int, default=4)
    add("--dropout", type=float, default=0.0)
    return parser.parse_args(arguments)


def check(args) -> None:
    """Raises `ValueError` where options do not go together."""
    if args.tune_steps < QUARTERS or args.tune_steps % QUARTERS:
        raise ValueError(
            f"`--tune-steps` must be a multiple of {QUARTERS}, one part for "
            f"each checkpoint. Received: --tune-steps={args.tune_steps}."
        )
    if args.experts < QUARTERS:
        raise ValueError(
            f"`--experts` must be at least {QUARTERS}, the number of "
            f"checkpoints. Received: --experts={args.experts}."
        )


def texts(args) -> list[tuple[str, str]]:
    """`(train, held out)` of the plays and of the reviews."""
    plays = (
        text_corpus.read_text(args.plays)
        if args.plays
        else text_corpus.tiny_shakespeare(args.data_dir)
    )
    sentences, _ = (
        text_corpus.read_labelled(args.reviews)
        if args.reviews
        else text_corpus.sst2("train", args.data_dir)
    )
    # One writes capitals and the other none, which would be too easy.
    plays, reviews = plays.lower(), "\n".join(sentences).lower() + "\n"
    return [text_corpus.split(t, args.held_out) for t in (plays, reviews)]


def dense_model(args, tokenizer):
    """A small T5 1.1 with random weights, made for Adam."""
    task = t5_pretrain.dense_model(args, tokenizer)
    table = task.backbone.token_embedding.embeddings
    table.assign(table * args.width**-0.5)
    return task


def corrupted(args, task, tokenizer, train, test) -> Data:
    """Chunks with the numbers of their domains, equally many of each."""

    def rows(pair, limit):
        cut = [text_corpus.chunks(t, tokenizer, args.chunk) for t in pair]
        count = min(limit, *map(len, cut))
        # Whole batches: one shape, compiled once.
        count -= count % args.batch_size if count > args.batch_size else 0
        domain = np.repeat(np.arange(2), count).astype("int32")
        return np.concatenate([part[:count] for part in cut]), domain

    return Data(
        train=rows(train, args.limit),
        test=rows(test, args.limit),
        batch=t5_pretrain.corruption(args, task, tokenizer),
        test_batch_size=args.batch_size,
    )


def run(args, task, data, router, estimate, reporter) -> None:
    """Trains everything, prints the table, writes results and picture."""
    stage = Stage(
        rounds=1,
        steps=args.pretrain_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        clip_norm=1.0,
    )
    model = train(task, data, stage, 0, "both texts", reporter)
    reporter.line(f"before tuning: {said(losses(model, data))}")
    base = ku.ExpertWeights.from_model(task)
    checkpoints = ku.ExpertCheckpoints(
        every=1 / QUARTERS, directory=args.output / "experts", model=task
    )
    tuning = Stage(
        rounds=1,
        steps=args.tune_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        clip_norm=1.0,
    )
    with only_feed_forward(task):
        model = train(
            task, data, tuning, 0, "in turn", reporter, InTurn, [checkpoints]
        )
    reporter.line(f"tuned: {said(losses(model, data))}")
    experts = checkpoints.experts
    more, sparse = comparison.continued_stages(
        Stage(
            rounds=1,
            steps=args.more_steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate / 2,
            clip_norm=1.0,
        ),
        1,
        estimate.flops_ratio,
    )
    figures: dict[str, list[dict]] = {}
    shares = {}
    for seed in range(args.seeds):
        ways = {
            DENSE: lambda: copy_of(task),
            NAIVE: lambda seed=seed: ku.upcycle_model(
                task, args.experts, router=router, layers=LAYERS, seed=seed
            ),
            WITHOUT: lambda seed=seed: upit(
                args, task, experts, data, base, router, seed, "random"
            ),
            UPIT: lambda seed=seed: upit(
                args, task, experts, data, base, router, seed, "perplexity"
            ),
        }
        for name, make in ways.items():
            started = time.perf_counter()
            model = make()
            found = {}
            if name != DENSE:
                found["start_information"] = information(model, data)[0]
            trained = train(
                model,
                data,
                more if name == DENSE else sparse,
                seed + 1,
                name,
                reporter,
            )
            found["loss"] = losses(trained, data)
            if name != DENSE:
                found["end_information"], shares[name] = information(
                    model, data
                )
            found["seconds"] = time.perf_counter() - started
            figures.setdefault(name, []).append(found)
            reporter.line(
                f"{name}: {said(found['loss'])}, {found['seconds']:.0f} s"
            )
    model.save(args.output / "upit.keras")
    write_results(
        args.output / "results.json",
        [],
        settings={k: v for k, v in vars(args).items() if k not in PLACES},
        estimate=estimate,
        figures=figures,
        experts=[expert.description for expert in experts],
    )
    draw(figures, shares, args.output / "upit.png")
    reporter.line("\n" + table(figures) + f"\n\nWritten to {args.output}.")


@contextlib.contextmanager
def only_feed_forward(task):
    """Nothing trains inside but the blocks that are to become mixtures.

    So all that is learnt is in the experts, as in the paper's setting with
    adapters, and none of it in what they share.
    """
    sites = ku.find_feed_forwards(task)
    stacks = [
        [s for s in sites if s.stack == k] for k in ("encoder", "decoder")
    ]
    chosen = {
        id(variable)
        for own in stacks
        for site in own[1::2]  # LAYERS
        for variable in site.kernels.values()
    }
    frozen = [v for v in task.trainable_variables if id(v) not in chosen]
    for variable in frozen:
        variable.trainable = False
    try:
        yield
    finally:
        for variable in frozen:
            variable.trainable = True


def train(task, data, stage, seed, title, reporter, batches=None, more=()):
    """Trains a task's weights; gives the compiled model that did."""
    model = comparison.trainer(task, stage)
    model.fit(
        (batches or TrainBatches)(data, stage, seed),
        epochs=1,
        shuffle=False,
        verbose=0,
        callbacks=[reporter.callback(title), *more],
    )
    return model


def upit(args, task, experts, data, base, router, seed, router_init):
    """Steps 2 to 4 of the method."""
    rng = np.random.default_rng((3, seed))
    rows = rng.permutation(len(data.train[0]))[: args.samples]
    samples = data.batch(tuple(part[rows] for part in data.train), rng, False)
    return ku.upit_upcycle(
        task,
        args.experts,
        experts,
        samples,
        base=base,
        router_init=router_init,
        router=router,
        layers=LAYERS,
        batch_size=args.batch_size,
        seed=seed,
    )


def copy_of(task):
    """Another dense model with the same weights."""
    made = type(task).from_config(task.get_config())
    made.preprocessor = task.preprocessor
    made.set_weights(task.get_weights())
    return made


def of_domain(data, number, count=None) -> Data:
    """The held-out chunks of one domain."""
    rows = np.flatnonzero(data.test[1] == number)[:count]
    test = tuple(part[rows] for part in data.test)
    return Data(data.train, test, data.batch, data.test_batch_size)


def losses(model, data) -> list[float]:
    """Held-out cross-entropy of each domain, of a model that `train` gave."""
    return [
        model.evaluate(
            TestBatches(of_domain(data, number)),
            verbose=0,
            return_dict=True,
        )["cross_entropy"]
        for number in range(2)
    ]


def information(task, data, count=64) -> tuple[float, np.ndarray]:
    """How much routers tell domains apart: mean over blocks, and shares."""
    parts = [of_domain(data, number, count) for number in range(2)]
    test = tuple(
        np.concatenate(both)
        for both in zip(*(part.test for part in parts), strict=True)
    )
    inputs = data.batch(test, np.random.default_rng(0), False)[0]
    blocks = ku.expert_assignments(task, inputs, test[1])
    found = [assignments.mutual_information(s) for s in blocks.values()]
    return float(np.mean(found)), np.mean(list(blocks.values()), axis=0)


def said(pair) -> str:
    """Two losses in words."""
    return ", ".join(
        f"{name} {loss:.3f}" for name, loss in zip(DOMAINS, pair, strict=True)
    )


def table(figures) -> str:
    """Means over seeds, a row for each model."""
    rows = []
    for name, found in figures.items():
        cells = [f"{value:.3f}" for value in mean(found, "loss")]
        for key in ("start_information", "end_information"):
            known = key in found[0]
            cells.append(f"{mean(found, key):.3f}" if known else "")
        rows.append((name, *cells))
    header = (
        "model",
        *(f"loss, {name}" for name in DOMAINS),
        "information at step 0",
        "at the end",
    )
    return tables.markdown(header, rows)


def mean(found, key):
    """Over seeds."""
    return np.mean([each[key] for each in found], axis=0)


def draw(figures, shares, path) -> None:
    """Losses, information, and who takes what."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.0), layout="constrained")
    figure.suptitle("A T5 on two kinds of text: four ways on from one tuning")
    left, middle, right = figure.subplots(1, 3)
    names = list(figures)
    for place, name in enumerate(names):
        values = mean(figures[name], "loss")
        at = np.arange(2) + (place - 1.5) * 0.2
        bars = left.bar(at, values, 0.18, color=COLOURS[name], label=name)
        left.bar_label(bars, fmt="%.2f", fontsize=7)
    every = [v for name in names for v in mean(figures[name], "loss")]
    room = 0.3 * (max(every) - min(every)) + 0.01
    left.set_ylim(min(every) - room, max(every) + room)
    left.set_xticks(range(2), DOMAINS)
    left.set_title("held-out loss (axis cut)", fontsize=11)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    for place, name in enumerate(names[1:]):
        for shift, key, alpha in (
            (-0.2, "start_information", 0.4),
            (0.2, "end_information", 1.0),
        ):
            bars = middle.bar(
                place + shift,
                mean(figures[name], key),
                0.36,
                color=COLOURS[name],
                alpha=alpha,
            )
            middle.bar_label(bars, fmt="%.3f", fontsize=7)
    middle.set_xticks(range(3), ["copies", "random routers", "UpIT"])
    middle.set_title(
        "information of text and expert\n(nats; pale: before training)",
        fontsize=11,
    )
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    image = right.imshow(shares[UPIT], vmin=0, cmap="viridis", aspect="auto")
    right.set_yticks(range(2), DOMAINS)
    right.set_xlabel("expert")
    right.set_title("UpIT: share of a text's tokens", fontsize=11)
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())

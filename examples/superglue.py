"""SuperGLUE, text to text: a dense T5 and its upcycled twin, task by task.

What it shows
    The downstream measure for language of Sparse Upcycling (arXiv 2212.05055,
    appendix A): one T5 learns all tasks of SuperGLUE as one mixture, each in
    proportion to its examples, and is judged by the mean of the tasks' scores.
    A dense T5 learns the mixture; then it trains on twice from the same
    weights, as it is and upcycled in every other block of both stacks. Both
    continuations spend the same floating-point operations. (In the paper a
    pretrained T5 is upcycled and pretrained further before it is fine-tuned:
    `examples/t5_pretrain.py` writes such presets for `--checkpoint`.)

Command
    pip install -e ".[jax,datasets,demo]"    # in a clone
    python examples/superglue.py --output runs/superglue

    That is all eight tasks, by `tfds.load("super_glue/...", data_dir=...)`,
    downloaded unless `--data-dir` holds them; `--tasks boolq,rte` takes some.
    Tasks of your own, alone or beside `--tasks`:
    `--task NAME=TRAIN.tsv,VALIDATION.tsv`, files of lines "text, tab, answer";
    `--words NAME=negative,positive` where the answers are numbers from 0. And
    `--next-sentence FILE` makes one of any text: does the second sentence
    follow the first? The last tenth of the text is held out.

    A small T5 and a tokenizer are trained from scratch on these texts alone,
    unless `--checkpoint` names a dense T5 with its tokenizer: a preset, by name
    or folder, or a `.keras` file. After an interruption the same command goes
    on where it was. `--epochs 1 --more-epochs 1 --limit 200` tries everything
    in minutes.

    Questions are written as T5's released code writes them (t5/data, the tasks
    named v102), after Raffel et al., arXiv 1910.10683, appendix D: boolq, cb,
    copa, multirc, record, rte, wic and wsc ("wsc.fixed" of TFDS). WSC is, as
    there, trained on right referents only and asks what a pronoun stands for;
    unlike there, without the Definite Pronoun Resolution data. Scores are
    SuperGLUE's, on the validation split: accuracy; of cb also the mean F1 of
    its classes, of multirc F1a and the exact match of whole questions, of
    record SQuAD's exact match and F1. A task's two are averaged first. None is
    left out; the diagnostics axb and axg, which have no training set, are.

Writes
    `results.json`, whose "measures" hold every score of every stage,
    `curves.png`, `dense.keras` (after it trained on), `upcycled.keras`, and
    under `stages/` the weights and figures of every stage. Answers are what
    greedy generation says.

Expected result
    Without SuperGLUE's data, JAX, one seed, two tasks of local files from
    scratch (`examples/figures/superglue.json`): SST-2, 6,920 and 872 texts, and
    `next_sentence` of WikiText-2's validation text, 3,266 and 359 pairs:

    python examples/superglue.py --task
        sst2=sst2_train.tsv,sst2_validation.tsv --words sst2=negative,positive
        --next-sentence wikitext2_valid.txt --epochs 4 --more-epochs 2
        --length 96

    Scores of the checkpoint, of the dense model trained on, and upcycled, both
    at equal compute: sst2 63.76, 67.20, 65.60; next_sentence 49.86, 48.47,
    49.86; mean 56.81, 57.83, 57.73. A model of this size, from scratch, answers
    `next_sentence` by chance, and nothing is to be told from a difference of a
    tenth of a point from one seed: this shows that the path works. SuperGLUE
    itself has not been run here.

Hardware and time
    Two CPU cores, shared with other work, for these two tasks: 383 s for the
    checkpoint, 231 s and 250 s for the continuations, seconds for the answers.
    SuperGLUE at 512 tokens wants a GPU.
"""

import argparse
import collections
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import keras_upcycle  # noqa: F401  before keras: chooses the backend

# isort: split
import numpy as np
import t5_sst2
import text_corpus
import tfds_reader
import two_continuations
from superglue_tasks import (
    TASKS,
    TRUTH,
    Question,
    Row,
    Task,
    accuracy,
    fields,
)

from keras_upcycle import tables
from keras_upcycle.demo.store import read_json, write_json
from keras_upcycle.training import progress

SPLITS = ("train", "validation")
BATCH = 128  # texts that are answered at a time
MEAN = "mean"


class Loaded(NamedTuple):
    """A task with its questions."""

    task: Task
    train: list[Question]
    validation: list[Question]


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; see the top of this file."""
    args = parse(arguments)
    try:
        output = two_continuations.open_output(args)
        loaded = load_all(args)
        if args.checkpoint:
            model = t5_sst2.load_checkpoint(args.checkpoint)
        else:
            model = t5_sst2.own_model(args, output, corpus(loaded))
        for each in loaded:
            t5_sst2.check_says(each.task.words, model.preprocessor.tokenizer)
        data = mixture(args, model, loaded)
        estimate = t5_sst2.estimate_of(model, args.experts)
    except (OSError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with progress.Reporter(every_round=True) as reporter:
        for task, train, validation in loaded:
            reporter.line(
                f"{task.name}: {len(train):,} questions to train on, "
                f"{len(validation):,} to test on"
            )
        outcome = two_continuations.run(
            args,
            output,
            model,
            data,
            reporter,
            title=f"A T5 learns {len(loaded)} tasks: more dense training or "
            f"{args.experts} experts",
            estimate=estimate,
            clip_norm=1.0,
            accuracy=lambda: t5_sst2.ExactMatch(name="accuracy"),
            measure=measure(loaded, output / "stages", reporter),
        )
        reporter.line("\n" + table(outcome.measures, loaded))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="runs/superglue", help="folder of the results")
    add("--checkpoint", help="a dense T5: a preset or a .keras file")
    add("--tasks", help="some of SuperGLUE's, with commas; all, if no others")
    add("--data-dir", help="folder that holds TFDS's super_glue")
    add(
        "--task",
        action="append",
        default=[],
        metavar="NAME=TRAIN.tsv,VALIDATION.tsv",
        help="a task of your own, texts and answers; may be repeated",
    )
    add(
        "--words",
        action="append",
        default=[],
        metavar="NAME=WORD,WORD",
        help="what the answers 0, 1, ... of such a task mean",
    )
    add("--next-sentence", metavar="FILE", help="a text, to make a task of")
    add("--length", type=int, default=512, help="tokens of a text, at most")
    add("--limit", type=int, help="use only so many questions of a task")
    t5_sst2.add_training(parser)
    return parser.parse_args(arguments)


# Questions of all tasks.


def load_all(args) -> list[Loaded]:
    """All tasks that the command line asks for, cut to `--limit`."""
    words = dict(named("--words", each) for each in args.words)
    own = [named("--task", each) for each in args.task]
    chosen = chosen_tasks(args.tasks, bool(own or args.next_sentence))
    check_names(chosen, own, words, args.next_sentence)
    loaded = [
        own_task(name, files.split(","), words.get(name)) for name, files in own
    ]
    if args.next_sentence:
        loaded.append(next_sentence(text_corpus.read_text(args.next_sentence)))
    loaded += [from_tfds(task, args.data_dir) for task in chosen]
    return [
        Loaded(task, train[: args.limit], validation[: args.limit])
        for task, train, validation in loaded
    ]


def named(option: str, value: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE."""
    name, equals, rest = value.partition("=")
    if not (name and equals and rest.count(",") >= 1):
        raise ValueError(
            f"`{option}` must be NAME=ONE,OTHER. Received: {option} {value}. "
            "Write the task's name, `=`, and the parts with commas between."
        )
    return name, rest


def chosen_tasks(names: str | None, others: bool) -> list[Task]:
    """SuperGLUE's tasks of a list of names; all where nothing is asked for."""
    if names is None:
        return [] if others else list(TASKS)
    known = {task.name: task for task in TASKS}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"`--tasks` must be some of {', '.join(known)}. Received: "
            f"{', '.join(unknown)}. Give a task of your own by `--task`."
        )
    return [known[name] for name in wanted]


def check_names(chosen, own, words, text) -> None:
    """Raises `ValueError` for a name that two tasks have, or none."""
    names = [task.name for task in chosen] + [name for name, _ in own]
    names += ["next_sentence"] if text else []
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            "Tasks must have names of their own. Received: "
            f"{', '.join(twice)}, more than once. Rename one of them."
        )
    lost = words.keys() - {name for name, _ in own}
    if lost:
        raise ValueError(
            "`--words` must name a task that `--task` gives. Received: "
            f"{', '.join(sorted(lost))}. Give both the same name."
        )


def from_tfds(task: Task, data_dir: str | None) -> Loaded:
    """A task of TFDS's `super_glue`."""
    name = f"super_glue/{task.config or task.name}"
    return Loaded(
        task,
        *(
            [
                task.ask(row)
                for row in rows(tfds_reader.load(name, split, data_dir))
            ]
            for split in SPLITS
        ),
    )


def rows(columns: Row) -> list[Row]:
    """A dictionary of arrays, row by row; bytes become text."""
    parts = {
        key: rows(value) if isinstance(value, dict) else map(text_of, value)
        for key, value in columns.items()
    }
    return [
        dict(zip(parts, row, strict=True))
        for row in zip(*parts.values(), strict=True)
    ]


def text_of(value):
    """Bytes as text, also those of an array; others as they are."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [text_of(each) for each in value]
    return value


def own_task(name: str, files: Sequence[str], words: str | None) -> Loaded:
    """A task of two files of lines "text, tab, answer"."""
    if len(files) != 2:
        raise ValueError(
            "`--task` must have two files, to train on and to test on. "
            f"Received: {len(files)} of {name}. Write "
            "NAME=TRAIN.tsv,VALIDATION.tsv."
        )
    meanings = words.split(",") if words else None
    train, validation = (
        [
            Question(fields(name, {"sentence": text}, ["sentence"]), (answer,))
            for text, answer in read_answers(path, meanings)
        ]
        for path in files
    )
    return Loaded(closed(name, train + validation), train, validation)


def closed(name: str, questions: Sequence[Question]) -> Task:
    """A task whose answers are the words that are found."""
    words = sorted({word for each in questions for word in each.answers})
    return Task(name, {"accuracy": accuracy}, tuple(words))


def read_answers(
    path: str, meanings: Sequence[str] | None
) -> list[tuple[str, str]]:
    """`(text, answer)` of each line; numbers become what they mean."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").rstrip("\n")
    if not lines.strip():
        raise ValueError(
            f"A task's file must not be empty. Received: {path}. Give another."
        )
    known = {str(i): word for i, word in enumerate(meanings or ())}
    found = []
    # Not `splitlines`, which also breaks at rare characters of a text.
    for number, line in enumerate(lines.split("\n"), start=1):
        text, tab, answer = (
            part.strip(" \r") for part in line.rpartition("\t")
        )
        if not (tab and text and answer):
            raise ValueError(
                "A line must be a text, a tab, and its answer. Received: "
                f"{path}, line {number}: {line[:80]!r}. Mend or remove it."
            )
        if known and answer not in known:
            raise ValueError(
                f"Answers must be 0 to {len(known) - 1}, of which `--words` "
                f"says the meaning. Received: {path}, line {number}: "
                f"{answer!r}. Give a word for it, or leave `--words` out."
            )
        found.append((text, known.get(answer, answer)))
    return found


def next_sentence(text: str) -> Loaded:
    """Does the second sentence follow the first? Of the end, to test on."""
    train, validation = (
        follows(part, seed) for seed, part in enumerate(text_corpus.split(text))
    )
    return Loaded(closed("next_sentence", train), train, validation)


def follows(text: str, seed: int = 0) -> list[Question]:
    """Pairs of neighbours of a text, each sentence in one; half are parted.

    Lines are paragraphs, and sentences end at a dot, a question mark or an
    exclamation mark. Of every second pair, in a random order, the second
    sentence is that of the next such pair: each second sentence is used once,
    so that none tells the answer by itself.

    Args:
        text: Any text.
        seed: Of the order.
    """
    pairs = []
    for line in text.split("\n"):
        sentences = re.split(r"(?<=[.?!])\s+", line.strip())
        # A shorter one is a heading, or ended at an abbreviation.
        sentences = [each for each in sentences if len(each.split()) > 4]
        pairs += zip(sentences[::2], sentences[1::2], strict=False)
    if len(pairs) < 4:
        raise ValueError(
            "`--next-sentence` must be a text with 4 pairs of sentences both "
            f"to train on and in its last tenth. Received: {len(pairs)} "
            "pairs. Give a longer text, with several sentences in a line."
        )
    order = np.random.default_rng(seed).permutation(len(pairs))
    apart = order[::2]
    seconds = {int(i): pairs[i][1] for i in order[1::2]}
    for i, other in zip(apart, np.roll(apart, 1), strict=True):
        seconds[int(i)] = pairs[other][1]
    keys = ("first", "second")
    questions = []
    for i, (first, own) in enumerate(pairs):
        row = dict(zip(keys, (first, seconds[i]), strict=True))
        answer = TRUTH[seconds[i] == own]
        questions.append(
            Question(fields("next_sentence", row, keys), (answer,))
        )
    return questions


def corpus(loaded: Sequence[Loaded]) -> str:
    """All that a model has to read and to say, a line each."""
    return "\n".join(
        " ".join([question.text, *question.answers]).replace("\n", " ")
        for each in loaded
        for question in each.train
    )


def mixture(args, model, loaded: Sequence[Loaded]):
    """All tasks as one: what is drawn at random is so in proportion."""
    train = [
        (question.text, answer)
        for each in loaded
        for question in each.train
        for answer in question.answers
    ]
    validation = [
        (question.text, question.answers[0])
        for each in loaded
        for question in each.validation
        if question.answers
    ]
    if not (train and validation):
        raise ValueError(
            "There must be questions both to train on and to test on. "
            f"Received: {len(train)} and {len(validation)}. Raise `--limit`."
        )
    return t5_sst2.data_of(
        args.length,
        model,
        *(tuple(zip(*pairs, strict=True)) for pairs in (train, validation)),
    )


# What the models say.


def measure(loaded, folder: pathlib.Path, reporter):
    """Makes the function that scores a stage's model on every task.

    A finished stage's scores are kept beside its weights.
    """

    def scores(key, model):
        kept = folder / f"{key}.scores.json"
        if not kept.exists():
            found = {}
            model.compile(sampler="greedy")
            total = sum(-(-len(each.validation) // BATCH) for each in loaded)
            with reporter.steps(f"{key} answers", total) as step:
                for each in loaded:
                    said = answers(model, each.validation, step)
                    found[each.task.name] = {
                        name: metric(each.validation, said)
                        for name, metric in each.task.metrics.items()
                    }
            write_json(kept, found)
        return read_json(kept)

    return scores


def answers(model, questions, step=lambda: None) -> list[str]:
    """What a model says to each question, greedily."""
    said = []
    for start in range(0, len(questions), BATCH):
        texts = [each.text for each in questions[start : start + BATCH]]
        # One shape, so that one program is compiled.
        asked = texts + texts[-1:] * (BATCH - len(texts))
        said += model.generate(asked)[: len(texts)]
        step()
    return said


def table(measures, loaded) -> str:
    """A row a task and their mean; over seeds, the spread too."""
    columns = {
        name: [
            found for key, found in measures.items() if key.startswith(start)
        ]
        for name, start in (
            ("checkpoint", "dense"),
            ("dense", "continued-"),
            ("upcycled", "upcycled-"),
        )
    }
    scored = {
        name: [task_scores(found) for found in runs]
        for name, runs in columns.items()
    }
    lines = [
        (
            task,
            " and ".join(metrics),
            *(
                tables.spread([100 * each[task] for each in runs], 2)
                for runs in scored.values()
            ),
        )
        for task, metrics in [
            *((each.task.name, each.task.metrics) for each in loaded),
            (MEAN, [""]),
        ]
    ]
    return tables.markdown(("task", "metric", *columns), lines)


def task_scores(found) -> dict[str, float]:
    """Each task's score, the mean of its metrics; and the mean of all."""
    scores = {
        task: float(np.mean(list(metrics.values())))
        for task, metrics in found.items()
    }
    return {**scores, MEAN: float(np.mean(list(scores.values())))}


if __name__ == "__main__":
    sys.exit(main())

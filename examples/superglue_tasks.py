"""SuperGLUE's tasks: what is asked, what is right, and how it is scored."""

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

TRUTH = ("False", "True")


class Question(NamedTuple):
    """One question as the model reads it.

    Attributes:
        text: What the encoder gets.
        answers: What the decoder is to say; any of them is right. None: there
            is nothing to be learned from.
        about: What more the task's metrics must know.
    """

    text: str
    answers: tuple[str, ...]
    about: Any = None


Metric = Callable[[Sequence[Question], Sequence[str]], float]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how its rows become questions, and how answers are scored.

    Attributes:
        name: Of the task.
        metrics: By name, functions of questions and of what was said, to a
            figure from 0 to 1. The task's score is their mean.
        words: All answers there are; none where they are free.
        ask: Function of a row of TFDS, to a `Question`; `None` where the
            questions come from elsewhere.
        config: Of TFDS's `super_glue`; the name where it is empty.
    """

    name: str
    metrics: dict[str, Metric]
    words: tuple[str, ...] = ()
    ask: Callable[[Row], Question] | None = None
    config: str = ""


# Metrics.


def accuracy(questions, said) -> float:
    """Share of questions whose answer was said, to the letter."""
    return float(np.mean(right(questions, said)))


def right(questions, said) -> list[bool]:
    """Of each question, whether one of its answers was said."""
    return [
        answer in question.answers
        for question, answer in zip(questions, said, strict=True)
    ]


def f1(hits: float, wrong: float, missed: float) -> float:
    """F1 of counts; 0 where there is nothing to be found and nothing was."""
    return 2 * hits / max(2 * hits + wrong + missed, 1)


def mean_f1(words: Sequence[str]) -> Metric:
    """Makes the unweighted mean of the F1 of each word."""

    def measured(questions, said):
        found = []
        for word in words:
            called = np.array([answer == word for answer in said])
            is_so = np.array([word in each.answers for each in questions])
            found.append(
                f1(
                    np.sum(called & is_so),
                    np.sum(called & ~is_so),
                    np.sum(~called & is_so),
                )
            )
        return float(np.mean(found))

    return measured


def f1_of_true(questions, said) -> float:
    """F1 of "True" over all questions (F1a); other words are the wrong one."""
    good = np.array(right(questions, said))
    is_true = np.array(["True" in each.answers for each in questions])
    return float(
        f1(
            np.sum(good & is_true),
            np.sum(~good & ~is_true),
            np.sum(~good & is_true),
        )
    )


def exact_groups(questions, said) -> float:
    """Share of the groups, named by `about`, of which all are right."""
    groups = collections.defaultdict(list)
    for question, good in zip(questions, right(questions, said), strict=True):
        groups[question.about].append(good)
    return float(np.mean([all(group) for group in groups.values()]))


def plain(text: str) -> str:
    """SQuAD's reading: lower case, no punctuation, articles or spare space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_exact(questions, said) -> float:
    """Share of questions of which an answer was said, as SQuAD compares."""
    return float(
        np.mean(
            [
                plain(answer) in map(plain, question.answers)
                for question, answer in zip(questions, said, strict=True)
            ]
        )
    )


def squad_f1(questions, said) -> float:
    """Mean F1 of the words said, with the answer that they are nearest to."""
    return float(
        np.mean(
            [
                max(overlap(plain(one), plain(a)) for one in question.answers)
                for question, a in zip(questions, said, strict=True)
            ]
        )
    )


def overlap(one: str, other: str) -> float:
    """F1 of the words of two texts."""
    wanted = collections.Counter(one.split())
    given = collections.Counter(other.split())
    common = (wanted & given).total()
    return f1(common, given.total() - common, wanted.total() - common)


# As T5 scores WSC: "the fuzzy bunny" names the bunny.
_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these "
    "this those which whose your".split()
)


def referents(questions, said) -> float:
    """Share of questions of which `(referent, label)` was read rightly."""
    return float(
        np.mean(
            [
                names(question.about[0], answer) == bool(question.about[1])
                for question, answer in zip(questions, said, strict=True)
            ]
        )
    )


def names(referent: str, said: str) -> bool | None:
    """Whether words said name a referent; `None` where nothing was said."""
    one, other = (
        [word for word in text.lower().split() if word not in _DETERMINERS]
        for text in (referent, said)
    )
    if not other:
        return None
    if any("'" in word for word in one) != any("'" in word for word in other):
        return False  # "Bob" is not "Bob's hat"
    return set(one) <= set(other) or set(other) <= set(one)


# From a row of TFDS to a question.


def fields(name: str, row: Row, keys: Sequence[str]) -> str:
    """`"name key: value key: value"`."""
    return " ".join([name, *(f"{key}: {row[key]}" for key in keys)])


def choice(name, keys, words, metrics=None) -> Task:
    """A task whose answer is one of a few words, the label's."""

    def ask(row):
        return Question(fields(name, row, keys), (words[row["label"]],))

    return Task(name, metrics or {"accuracy": accuracy}, words, ask)


def ask_multirc(row: Row) -> Question:
    """One answer to a question about a paragraph: is it true?"""
    text = fields("multirc", row, ("question", "answer", "paragraph"))
    text = re.sub("</?b>", "", text.replace("<br>", " "))
    group = (int(row["idx"]["paragraph"]), int(row["idx"]["question"]))
    return Question(text, (TRUTH[row["label"]],), group)


def ask_record(row: Row) -> Question:
    """A sentence with a hole, and the names that may fill it."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    # TFDS fills a batch up with empty names.
    entities, answers = (
        tuple(name for name in row[key] if name)
        for key in ("entities", "answers")
    )
    return Question(
        f"record query: {row['query']} entities: {', '.join(entities)} "
        f"passage: {passage}",
        answers,
    )


def ask_wsc(row: Row) -> Question:
    """A text with a marked pronoun; the right referent is the answer."""
    words, pronoun = row["text"].split(" "), row["span2_text"]
    is_it = re.compile(rf"(?<!\w){re.escape(pronoun)}(?!\w)")
    # Of a few texts the index is that of a word before.
    for place in range(int(row["span2_index"]), len(words)):
        if is_it.search(words[place]):
            words[place] = is_it.sub(f"*{pronoun}*", words[place], count=1)
            break
    referent, label = row["span1_text"], int(row["label"])
    return Question(
        f"wsc: {' '.join(words)}",
        (referent,) if label == 1 else (),
        (referent, label),
    )


CB = ("entailment", "contradiction", "neutral")
TASKS = (
    choice("boolq", ("passage", "question"), TRUTH),
    choice(
        "cb",
        ("hypothesis", "premise"),
        CB,
        {"f1": mean_f1(CB), "accuracy": accuracy},
    ),
    choice(
        "copa",
        ("choice1", "choice2", "premise", "question"),
        ("choice1", "choice2"),
    ),
    Task(
        "multirc",
        {"f1a": f1_of_true, "em": exact_groups},
        TRUTH,
        ask_multirc,
    ),
    Task("record", {"f1": squad_f1, "em": squad_exact}, ask=ask_record),
    choice("rte", ("hypothesis", "premise"), ("entailment", "not_entailment")),
    choice("wic", ("sentence1", "sentence2", "word"), TRUTH),
    Task("wsc", {"accuracy": referents}, ask=ask_wsc, config="wsc.fixed"),
)

"""SuperGLUE's tasks as T5 reads them, their metrics, and the whole script."""

import json

import numpy as np
import pytest
import superglue
import superglue_tasks
import t5_pretrain
import text_corpus

pytestmark = pytest.mark.one_backend

TASKS = {task.name: task for task in superglue_tasks.TASKS}
WORDS = "good bad sweet sour lord lady king queen hither night".split()
FEW = (
    "--width 8 --heads 2 --intermediate 8 --blocks 2 --vocabulary 50 "
    "--batch-size 8 --epochs 1 --more-epochs 1 --experts 2 --length 24"
).split()

# Rows as TFDS has them, and what T5's released preprocessors make of them. The
# examples of multirc, record and wsc are those of its own tests.
FORMATS = {
    "boolq": (
        {"question": "is it so", "passage": "It is.", "label": 1},
        "boolq passage: It is. question: is it so",
        ("True",),
    ),
    "cb": (
        {"premise": "He may come.", "hypothesis": "He comes.", "label": 2},
        "cb hypothesis: He comes. premise: He may come.",
        ("neutral",),
    ),
    "copa": (
        {
            "premise": "Political violence broke out in the nation.",
            "question": "effect",
            "choice1": "Many citizens relocated to the capitol.",
            "choice2": "Many citizens took refuge in other territories.",
            "label": 1,
        },
        "copa choice1: Many citizens relocated to the capitol. choice2: Many "
        "citizens took refuge in other territories. premise: Political "
        "violence broke out in the nation. question: effect",
        ("choice2",),
    ),
    "multirc": (
        {
            "paragraph": "<b>Sent 1: </b>Once upon a time, there was a "
            "squirrel named Joey.<br><b>Sent 2: </b>Joey loved to go outside "
            "and play with his cousin Jimmy.",
            "question": "Why was Joey surprised the morning he woke up for "
            "breakfast?",
            "answer": "There was only pie to eat",
            "label": 1,
            "idx": {"paragraph": 5, "question": 1, "answer": 3},
        },
        "multirc question: Why was Joey surprised the morning he woke up for "
        "breakfast? answer: There was only pie to eat paragraph: Sent 1: Once "
        "upon a time, there was a squirrel named Joey. Sent 2: Joey loved to "
        "go outside and play with his cousin Jimmy.",
        ("True",),
    ),
    "record": (
        {
            "query": "It was @placeholder.",
            "entities": ["A", "B", "C", ""],
            "passage": "This is the passage\n@highlight\nAnother sentence."
            "\n@highlight\nThird sentence.",
            "answers": ["A", "C", "", ""],
        },
        "record query: It was @placeholder. entities: A, B, C passage: This is "
        "the passage. Another sentence. Third sentence.",
        ("A", "C"),
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
        "rte hypothesis: It is wet. premise: It rains.",
        ("not_entailment",),
    ),
    "wic": (
        {
            "word": "bed",
            "sentence1": "A river bed.",
            "sentence2": "The bed is soft.",
            "start1": 8,
            "end1": 11,
            "label": 0,
        },
        "wic sentence1: A river bed. sentence2: The bed is soft. word: bed",
        ("False",),
    ),
    "wsc": (
        {
            "text": "Mitchell asked Tom if he could lend some money.",
            "span1_text": "Tom",
            "span2_text": "he",
            "span2_index": 4,
            "label": 1,
        },
        "wsc: Mitchell asked Tom if *he* could lend some money.",
        ("Tom",),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_written_as_t5_writes_them(name):
    row, text, answers = FORMATS[name]
    question = TASKS[name].ask(row)
    assert question.text == text
    assert question.answers == answers


def test_wrong_referents_are_judged_and_not_learned():
    row = {**FORMATS["wsc"][0], "span1_text": "Mitchell", "label": 0}
    question = TASKS["wsc"].ask(row)
    assert question.answers == ()
    assert question.about == ("Mitchell", 0)


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "marked"),
    [
        # Both kinds of text for which T5 has exceptions.
        ('over. "Good for him," he', "him", 3, 'over. "Good for *him*," he'),
        ("want to use it , but", "it", 2, "want to use *it* , but"),
        ("the hen he saw", "he", 1, "the hen *he* saw"),
    ],
)
def test_pronouns_are_found(text, pronoun, index, marked):
    row = {
        **FORMATS["wsc"][0],
        "text": text,
        "span2_text": pronoun,
        "span2_index": index,
    }
    assert TASKS["wsc"].ask(row).text == f"wsc: {marked}"


# Metrics, by hand.


def asked(*answers, about=None):
    about = about or [None] * len(answers)
    return [
        superglue_tasks.Question("", (answer,), each)
        for answer, each in zip(answers, about, strict=True)
    ]


def scores(name, questions, said):
    metrics = TASKS[name].metrics
    return {key: metric(questions, said) for key, metric in metrics.items()}


def test_accuracy_wants_the_very_word():
    found = scores("boolq", asked(*["True"] * 3), ["True", "False", "true"])
    assert found == {"accuracy": pytest.approx(1 / 3)}


def test_cb_has_the_mean_f1_of_three_classes():
    answers = asked("entailment", "entailment", "contradiction", "neutral")
    said = ["entailment", "neutral", "contradiction", "what"]
    # entailment 2 / (2 + 0 + 1), contradiction 1, neutral 0.
    assert scores("cb", answers, said) == {
        "f1": pytest.approx((2 / 3 + 1 + 0) / 3),
        "accuracy": 0.5,
    }


def test_multirc_counts_answers_and_whole_questions():
    about = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1)]
    answers = asked("True", "False", "True", "True", "False", about=about)
    said = ["True", "False", "False", "True", "what"]
    # Two found, one missed; "what" is not "False", so it counts as "True".
    assert scores("multirc", answers, said) == {
        "f1a": pytest.approx(4 / (4 + 1 + 1)),
        "em": pytest.approx(1 / 3),
    }
    assert superglue_tasks.f1_of_true(asked("False"), ["False"]) == 0


def test_record_takes_the_nearest_answer():
    questions = [
        superglue_tasks.Question("", ("Barack Obama", "Obama")),
        superglue_tasks.Question("", ("The U.S.",)),
        superglue_tasks.Question("", ("New York City",)),
        superglue_tasks.Question("", ("Rome",)),
    ]
    said = ["the Obama", "us", "York", ""]
    assert scores("record", questions, said) == {
        "f1": pytest.approx((1 + 1 + 2 / 4 + 0) / 4),
        "em": 0.5,
    }


@pytest.mark.parametrize(
    ("referent", "said", "expected"),
    [
        ("The fuzzy bunny", "bunny", True),
        ("bunny", "the fuzzy Bunny", True),
        ("Bob", "Bob's hat", False),
        ("Bob", "Tom", False),
        ("Bob", "the", None),
    ],
)
def test_wsc_asks_whether_the_referent_was_named(referent, said, expected):
    assert superglue_tasks.names(referent, said) is expected
    for label in (0, 1):
        question = superglue_tasks.Question("", (), (referent, label))
        right = expected is not None and expected == bool(label)
        assert superglue_tasks.referents([question], [said]) == right


def test_both_metrics_of_a_task_are_averaged_before_the_tasks():
    found = {"cb": {"f1": 0.2, "accuracy": 0.6}, "rte": {"accuracy": 0.8}}
    assert superglue.task_scores(found) == {
        "cb": pytest.approx(0.4),
        "rte": 0.8,
        "mean": pytest.approx(0.6),
    }


# Rows and texts.


def test_rows_of_nested_columns():
    columns = {
        "text": np.array([b"caf\xc3\xa9", b"no"], object),
        "names": np.array([[b"a", b"b"], [b"c", b""]], object),
        "idx": {"paragraph": np.array([3, 4])},
    }
    assert superglue.rows(columns) == [
        {"text": "café", "names": ["a", "b"], "idx": {"paragraph": 3}},
        {"text": "no", "names": ["c", ""], "idx": {"paragraph": 4}},
    ]


def test_tasks_come_from_tfds(monkeypatch):
    asked_for = []

    def load(name, split, data_dir):
        asked_for.append((name, split, data_dir))
        row = FORMATS["wsc"][0]
        return {k: np.array([v], object) for k, v in row.items()}

    monkeypatch.setattr(superglue.tfds_reader, "load", load)
    args = superglue.parse(["--tasks", "wsc", "--data-dir", "here"])
    (loaded,) = superglue.load_all(args)
    assert loaded.train[0].text == FORMATS["wsc"][1]
    assert asked_for == [
        ("super_glue/wsc.fixed", split, "here")
        for split in ("train", "validation")
    ]


def prose(count):
    """Paragraphs of four sentences that say where they stand."""
    return "\n".join(
        " ".join(f"This is sentence {line} {i} of it." for i in range(4))
        for line in range(count)
    )


def test_half_the_neighbours_are_parted():
    questions = superglue.follows(prose(40))
    assert questions == superglue.follows(prose(40))
    assert len(questions) == 80
    seconds = []
    for question in questions:
        first, second = question.text.split(" second: ")
        line, place = first.split()[5:7]
        seconds.append(second)
        follows = second.split()[3:5] == [line, str(int(place) + 1)]
        assert question.answers == (str(follows),)
    assert sum(each.answers == ("True",) for each in questions) == 40
    # No second sentence tells the answer by being there twice.
    assert len(set(seconds)) == 80


def test_record_gives_an_example_for_each_answer():
    question = TASKS["record"].ask(FORMATS["record"][0])
    unseen = superglue_tasks.Question("wsc: x", (), ("x", 0))
    task = superglue.Loaded(TASKS["record"], [question], [unseen, question])
    tokenizer = text_corpus.train_tokenizer(superglue.corpus([task]), 40, 0)
    args = superglue.parse(FEW)
    model = t5_pretrain.dense_model(args, tokenizer)
    data = superglue.mixture(args, model, [task])
    assert len(data.train[0]) == 2
    assert len(data.test[0]) == 1
    said = text_corpus.decode(data.train[4], tokenizer)
    assert said == ["A", "C"]


# The whole script.


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Options for two tasks of texts made up here."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 16)):
        texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(count)]
        lines = [f"{text}\t{int('good' in text)}\n" for text in texts]
        (folder / f"{name}.tsv").write_text("".join(lines))
    (folder / "prose.txt").write_text(prose(80))
    return [
        *("--task", f"mood={folder}/train.tsv,{folder}/validation.tsv"),
        *("--words", "mood=negative,positive"),
        *("--next-sentence", f"{folder}/prose.txt"),
    ]


def said_of(arguments, tmp_path, capsys):
    assert superglue.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--tasks boolq,sst", "Received: sst. Give a task of your own"),
        ("--data-dir .", "no folder `super_glue`"),
        ("--task mood", "Received: --task mood. Write the task's name"),
        ("--task rte=a,b --tasks rte", "Received: rte, more than once"),
        ("--words mood=a,b --tasks rte", "Received: mood. Give both"),
        ("--task mood=a,b,c", "Received: 3 of mood. Write"),
        ("--task mood={bad},{bad}", "line 1: 'no tab'. Mend"),
        ("--task mood={odd},{odd} --words mood=a,b", "line 2: '7'. Give"),
        ("--task mood={none},{none}", "none.tsv. Give another"),
        ("--next-sentence {bad}", "Received: 1 line ends"),
        ("--next-sentence {odd}", "Received: 0 pairs"),
    ],
)
def test_what_is_wrong_is_said(options, expected, tmp_path, capsys):
    odd = "a\t0\nb\t7\n" * 20
    files = {"bad": "no tab\n", "odd": odd, "none": "\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.tsv").write_text(text)
    paths = {name: tmp_path / f"{name}.tsv" for name in files}
    arguments = options.format(**paths).split()
    assert expected in said_of(arguments, tmp_path, capsys)


def test_a_tokenizer_that_lacks_an_answer_is_refused(tasks, tmp_path, capsys):
    args = superglue.parse(FEW)
    tokenizer = text_corpus.train_tokenizer("\n".join(WORDS), 24, 0)
    model = t5_pretrain.dense_model(args, tokenizer)
    model.save_to_preset(str(tmp_path / "foreign"))
    arguments = [*tasks, *FEW, "--checkpoint", str(tmp_path / "foreign")]
    error = said_of(arguments, tmp_path, capsys)
    assert "say negative and positive" in error


@pytest.mark.slow
def test_both_models_are_scored_on_every_task(
    tasks, tmp_path, capsys, monkeypatch
):
    arguments = [*tasks, *FEW, "--limit", "8", "--output", str(tmp_path)]
    heard = []
    monkeypatch.setattr(
        superglue, "answers", lambda *_: heard.append(1) or said
    )
    said = ["positive", "negative"] * 4
    assert superglue.main(arguments) == 0
    printed = capsys.readouterr().out
    measures = json.loads((tmp_path / "results.json").read_text())["measures"]
    assert list(measures) == ["dense", "continued-0", "upcycled-0"]
    loaded = superglue.load_all(superglue.parse(arguments))
    mood = 100 * superglue_tasks.accuracy(loaded[0].validation, said)
    assert f"| mood | accuracy | {mood:.2f} | {mood:.2f} | {mood:.2f} |" in (
        printed
    )
    assert f"| mean |  | {mood / 2:.2f} |" in printed
    assert len(heard) == 6
    # The same command again: what is there is read, nothing asked anew.
    assert superglue.main(arguments) == 0
    assert len(heard) == 6
    assert capsys.readouterr().out.endswith(printed[printed.index("| task") :])


def test_answers_are_greedy_and_whole_batches(tasks):
    """As many as there are questions, each as if it were asked alone."""
    args = superglue.parse([*tasks, *FEW, "--limit", "6"])
    loaded = superglue.load_all(args)
    tokenizer = text_corpus.train_tokenizer(superglue.corpus(loaded), 50, 0)
    model = t5_pretrain.dense_model(args, tokenizer)
    superglue.mixture(args, model, loaded)
    model.compile(sampler="greedy")
    questions = [each for task in loaded for each in task.validation]
    said = superglue.answers(model, questions)
    assert len(said) == len(questions) == 12
    assert said == [model.generate([each.text])[0] for each in questions]

"""The page of a text whose tokens are coloured by expert."""

import html.parser

import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.layers.call_context import record_calls

pytestmark = pytest.mark.one_backend


class Spans(html.parser.HTMLParser):
    """Titles and texts of the coloured words, by block."""

    def __init__(self, text):
        super().__init__()
        self.blocks, self.title, self.heading = {}, None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.heading = tag == "h2"
        self.title = dict(attrs).get("title") if tag == "span" else None

    def handle_endtag(self, tag):
        self.heading, self.title = False, None

    def handle_data(self, data):
        if self.heading:
            self.blocks[data] = []
        elif self.title:
            list(self.blocks.values())[-1].append((data, self.title))


def causal_lm():
    letters = [chr(n) for n in range(ord("a"), ord("x") + 1)]
    words = [*letters, "\u0120", "th", "the", "<|im_end|>", "<|endoftext|>"]
    tokenizer = keras_hub.models.Qwen3Tokenizer(
        {word: number for number, word in enumerate(words)}, ["t h", "th e"]
    )
    dense = keras_hub.models.Qwen3CausalLM(
        hub_models.MODELS["Qwen3Backbone"](),
        keras_hub.models.Qwen3CausalLMPreprocessor(
            tokenizer, sequence_length=12
        ),
    )
    return ku.upcycle_model(dense, 4, router=ku.TopKRouter(2))


def test_a_task_reads_its_text(tmp_path):
    moe = causal_lm()
    ku.plot_expert_tokens(moe, "the < fox", tmp_path / "page.html")
    (spans,) = Spans((tmp_path / "page.html").read_text()).blocks.values()
    assert "".join(word for word, _ in spans).startswith("the ")
    ids = np.asarray(moe.preprocessor.tokenizer("the < fox"))
    assert len(spans) == len(ids)
    batch = moe.preprocessor.generate_preprocess(["the < fox"])
    with record_calls() as calls:
        moe({name: np.asarray(value) for name, value in batch.items()})
    (call,) = calls
    experts = keras.ops.convert_to_numpy(call.routing.experts)[0]
    weights = keras.ops.convert_to_numpy(call.routing.weights)[0]
    for (_, title), own, weight in zip(
        spans, experts[: len(spans)], weights, strict=False
    ):
        said = ", ".join(
            f"expert {e}: {w:.2f}"
            for e, w in sorted(
                zip(own.tolist(), weight.tolist(), strict=True),
                key=lambda each: -each[1],
            )
        )
        assert title == said


def test_experts_that_choose_and_what_nobody_takes(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((6, 8)),
            ku.MoEFeedForward(
                4, 16, ku.ExpertChoiceRouter(capacity_factor=0.5), name="moe"
            ),
        ]
    )
    x = models.tokens(1, 6, 8)
    words = [f"<{n}>" for n in range(6)]
    ku.plot_expert_tokens(
        model, "six", tmp_path / "p.html", inputs=x, tokens=words
    )
    blocks = Spans((tmp_path / "p.html").read_text()).blocks
    (spans,) = blocks.values()
    assert [word for word, _ in spans] == words
    titles = [title for _, title in spans]
    # One slot each: at least two tokens of six are left out.
    assert titles.count("no expert") >= 2
    assert sum(title.count("expert ") for title in titles if ":" in title) == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"text": 3}, TypeError, "`text`"),
        ({"path": "p.txt"}, ValueError, r"must end in \.html"),
        ({"path": 3}, TypeError, "`path`"),
        ({"tokens": ["a"]}, ValueError, "tokens alone"),
        ({}, ku.UpcycleError, "Pass `inputs` and `tokens`"),
        (
            {"inputs": np.ones((1, 3, 8)), "tokens": ["a"] * 5},
            ValueError,
            "5 tokens, where blocks saw",
        ),
    ],
)
def test_nonsense_is_refused(settings, error, message, tmp_path):
    model = keras.Sequential([keras.Input((None, 8)), ku.MoEFeedForward(2, 4)])
    given = {"text": "a", "path": tmp_path / "p.html", **settings}
    with pytest.raises(error, match=message):
        ku.plot_expert_tokens(model, **given)
    assert list(tmp_path.iterdir()) == []

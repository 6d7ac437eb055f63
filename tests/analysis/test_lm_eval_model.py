"""The evaluation harness's three methods, against plain sums over logits."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import hub_models
import keras_hub
import models
import numpy as np
import pytest

import keras_upcycle as ku

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed",
)
CONTEXT, CONTINUATION = "the quick brown", " fox is at the airport"


def decoder(**kwargs):
    preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(
        keras_hub.models.LlamaTokenizer(hub_models.proto()), sequence_length=80
    )
    dense = keras_hub.models.LlamaCausalLM(
        backbone=hub_models.MODELS["LlamaBackbone"](), preprocessor=preprocessor
    )
    kwargs.setdefault("router", ku.TopKRouter(capacity_factor=None))
    moe = ku.upcycle_model(dense, 4, layers="all", **kwargs)
    return models.set_routers(models.randomized(moe, seed=1))


@pytest.fixture(scope="module")
def moe():
    return decoder()


@pytest.fixture(scope="module")
def harness(moe):
    return ku.lm_eval_model(moe, batch_size=3)


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def tokens_of(moe, text, start=True):
    found = np.asarray(moe.preprocessor.tokenizer(text)).tolist()
    return [moe.preprocessor.tokenizer.start_token_id] * start + found


def log_probabilities(moe, ids):
    """Of each next token, `(L, V)` in float64, without padding."""
    x = np.array([ids], "int32")
    logits = models.array(moe({"token_ids": x, "padding_mask": x * 0 + 1}))[0]
    logits = logits.astype("float64")
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def score(moe, ids, count):
    """Log-likelihood of the last `count` tokens, and whether greedy."""
    found = log_probabilities(moe, ids[:-1])[-count:]
    wanted = ids[-count:]
    own = found[np.arange(count), wanted].sum()
    return own, bool((found.argmax(-1) == wanted).all())


@installed
def test_a_continuation_is_scored_as_its_logits_say(moe, harness):
    pairs = [
        (CONTEXT, CONTINUATION),
        (CONTEXT + " fox", " is"),
        ("", "the fox"),
        ("the  ", "fox"),  # spaces at the end belong to what follows
    ]
    found = harness.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), received in zip(pairs, found, strict=True):
        whole = tokens_of(moe, context + continuation)
        before = len(tokens_of(moe, context.rstrip()))
        own, greedy = score(moe, whole, len(whole) - before)
        assert received[0] == pytest.approx(own, rel=1e-4)
        assert received[1] == greedy


@installed
@pytest.mark.one_backend
def test_what_the_model_would_say_is_greedy(moe, harness):
    ids = tokens_of(moe, CONTEXT)
    best = int(log_probabilities(moe, ids)[-1].argmax())
    (found,) = harness._loglikelihood_tokens(
        [(None, ids, [best])], disable_tqdm=True
    )
    assert found[1]
    assert found[0] == pytest.approx(score(moe, [*ids, best], 1)[0], rel=1e-4)
    other = (best + 1) % moe.backbone.vocabulary_size
    (found,) = harness._loglikelihood_tokens(
        [(None, ids, [other])], disable_tqdm=True
    )
    assert not found[1]


@installed
@pytest.mark.one_backend
def test_a_long_text_is_read_in_windows_each_token_once(moe):
    harness = ku.lm_eval_model(moe, batch_size=2, max_length=6)
    text = "the quick brown fox is at the airport"
    ids = tokens_of(moe, text, start=False)
    assert len(ids) > 12
    total, place = 0.0, 0
    prefix = moe.preprocessor.tokenizer.start_token_id
    while place < len(ids):
        new = ids[place : place + 6]
        # As much before as there is room for: one token, then a full window.
        seen = ([prefix] if place == 0 else ids[:place])[-(7 - len(new)) :]
        total += score(moe, seen + new, len(new))[0]
        place += 6
    (found,) = harness.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert found == pytest.approx(total, rel=1e-4)


@installed
@pytest.mark.one_backend
def test_text_is_generated_until_it_is_enough(moe, harness):
    sampler, function = moe.sampler, moe.generate_function
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    texts = [CONTEXT, "the fox"]
    found = harness.generate_until(
        asked(*((text, settings) for text in texts)), disable_tqdm=True
    )
    end = harness.eot_token_id
    for text, received in zip(texts, found, strict=True):
        ids = tokens_of(moe, text)
        new = []
        for _ in range(8):
            new.append(int(log_probabilities(moe, ids + new)[-1].argmax()))
        if end in new:
            new = new[: new.index(end)]
        words = moe.preprocessor.tokenizer.detokenize(new) if new else ""
        assert received == str(words)
    assert any(found)
    assert (moe.sampler, moe.generate_function) == (sampler, function)
    text = max(found, key=len)
    stop = text[len(text) // 2]
    cut = harness.generate_until(
        asked((texts[found.index(text)], {**settings, "until": [stop]})),
        disable_tqdm=True,
    )
    assert cut == [text[: text.index(stop)]]


@installed
@pytest.mark.one_backend
def test_generation_is_sampled_where_a_task_asks(harness):
    settings = {"max_gen_toks": 4, "do_sample": True, "temperature": 2.0}
    for more in ({}, {"top_k": 3}, {"top_p": 0.9}):
        found = harness.generate_until(
            asked((CONTEXT, {**settings, **more})), disable_tqdm=True
        )
        assert len(found) == 1
    with pytest.raises(ValueError, match="num_beams"):
        harness.generate_until(
            asked((CONTEXT, {"max_gen_toks": 4, "num_beams": 2}))
        )
    with pytest.raises(ValueError, match="max_gen_toks=200"):
        harness.generate_until(asked((CONTEXT, {"max_gen_toks": 200})))


@installed
@pytest.mark.one_backend
def test_the_harness_runs_a_task_with_it(harness, moe, tmp_path):
    """A task of its own in a file: the answer that is likelier is right."""
    import lm_eval

    questions = [
        {"q": "the quick brown", "choices": [" fox", " airport"], "gold": 0},
        {"q": "the fox is at", "choices": [" the", " quick"], "gold": 1},
        {"q": "an", "choices": [" airport", " fox"], "gold": 0},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(
        model=harness, tasks=[task], bootstrap_iters=0, verbosity="ERROR"
    )
    right = []
    for question in questions:
        scores = []
        for answer in question["choices"]:
            whole = tokens_of(moe, question["q"] + answer)
            before = len(tokens_of(moe, question["q"]))
            scores.append(score(moe, whole, len(whole) - before)[0])
        right.append(int(np.argmax(scores)) == question["gold"])
    assert results["results"]["toy"]["acc,none"] == pytest.approx(
        np.mean(right)
    )


# What is refused.


@pytest.mark.one_backend
def test_what_cannot_be_evaluated_is_refused(moe, monkeypatch):
    with pytest.raises(TypeError, match="CausalLM"):
        ku.lm_eval_model(models.sequence_dense_pairs())
    with pytest.raises(ValueError, match="`max_length` must be at least 2"):
        ku.lm_eval_model(moe, max_length=1)
    for name in ("batch_size", "max_length"):
        for value in (0, 2.5, "8", True):
            with pytest.raises((TypeError, ValueError), match=name):
                ku.lm_eval_model(moe, **{name: value})
    bare = keras_hub.models.LlamaCausalLM(
        backbone=hub_models.MODELS["LlamaBackbone"]()
    )
    with pytest.raises(ku.UpcycleError, match="with a tokenizer"):
        ku.lm_eval_model(bare)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"\[lm-eval\]"):
        ku.lm_eval_model(moe)


@installed
@pytest.mark.one_backend
def test_routers_that_look_at_neighbours_are_told_of():
    moe = decoder(router=ku.TopKRouter(eval_capacity_factor=1.0))
    with pytest.warns(UserWarning, match="depend on the batch"):
        ku.lm_eval_model(moe)


@installed
@pytest.mark.one_backend
def test_a_continuation_that_does_not_fit_is_refused(moe):
    harness = ku.lm_eval_model(moe, max_length=4)
    with pytest.raises(ValueError, match="max_length=4"):
        harness.loglikelihood(asked((CONTEXT, CONTINUATION)))

"""Liew et al.'s law, worked out anew, and what it says of budgets."""

import numpy as np
import pytest

import keras_upcycle as ku

pytestmark = pytest.mark.one_backend

# arXiv 2502.03009, table 2: A, B, alpha, beta; E is 0.165.
TABLE = {
    "dense": (8.83, 12.3, 0.088, 0.116),
    "scratch": (32.0, 7.05, 0.161, 0.080),
}
BUDGETS = [(1e9, 7.4e10, 3.7e10), (2e8, 1e10, 1e10), (5e8, 2e11, 4e11)]


@pytest.mark.parametrize(("n", "spent", "left"), BUDGETS)
@pytest.mark.parametrize("ratio", [1.0, 5 / 3])
def test_losses_are_the_laws(n, spent, left, ratio):
    found = ku.predict_upcycling(n, spent, left, flops_ratio=ratio)
    tokens = {"dense": spent + left, "scratch": left / ratio}
    for name, (a, b, alpha, beta) in TABLE.items():
        expected = a / tokens[name] ** alpha + b / n**beta + 0.165
        assert found.losses[name] == pytest.approx(expected)
    log = np.log(np.float64(spent))
    expected = (
        16.3
        * np.exp(-0.043 * log)
        * np.exp((-0.085 + 7.98e-4 * log) * np.log(left / ratio))
        + 8.53 / n**0.112
        + 0.165
    )
    assert found.losses["upcycled"] == pytest.approx(expected)
    assert found.tokens == {
        "dense": left,
        "upcycled": left / ratio,
        "scratch": left / ratio,
    }
    assert found.best == min(found.losses, key=found.losses.get)
    assert found.outside == ()


def test_what_is_left_decides():
    """Little: train on. Some: upcycle. Much: a mixture from scratch."""
    best = [
        ku.predict_upcycling(1e9, 7.4e10, left).best
        for left in (1e10, 4e10, 2e11)
    ]
    assert best == ["dense", "upcycled", "scratch"]
    found = ku.predict_upcycling(1e9, 7.4e10, 4e10)
    later = found.scratch_wins_from
    assert 4e10 < later < 2e11
    assert ku.predict_upcycling(1e9, 7.4e10, 0.9 * later).best == "upcycled"
    assert ku.predict_upcycling(1e9, 7.4e10, 1.1 * later).best == "scratch"
    # The more was spent, the later, measured in tokens.
    longer = ku.predict_upcycling(1e9, 3e11, 4e10).scratch_wins_from
    assert longer > later


def test_what_the_law_was_not_fitted_on_is_said():
    found = ku.predict_upcycling(
        7e9, 2e12, 1e8, num_experts=64, top_k=8, flops_ratio=3.0
    )
    text = " ".join(found.outside)
    for said in (
        *("parameters of 7B", "tokens spent of 2T", "tokens left of 100M"),
        *("num_experts=64", "top_k=8", "dense model it starts as"),
    ):
        assert said in text
        assert said in str(found)
    plain = str(ku.predict_upcycling(1e9, 7.4e10, 4e10))
    assert "Outside" not in plain
    assert "upcycled is predicted to win" in plain
    assert "2502.03009" in plain


@pytest.mark.parametrize("name", ["tokens_spent", "tokens_left"])
@pytest.mark.parametrize("value", [0, -1e9, "1e9", True, np.nan, None])
def test_tokens_are_numbers(name, value):
    given = {"parameters": 1e9, "tokens_spent": 1e10, "tokens_left": 1e10}
    with pytest.raises((TypeError, ValueError), match=name):
        ku.predict_upcycling(**{**given, name: value})

"""Of a matrix that is thinned, each value that was asked for is left."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import covering

pytestmark = pytest.mark.one_backend


def matrix(**counts):
    """A case for each combination, as pytest numbers their values."""
    return [
        SimpleNamespace(
            callspec=SimpleNamespace(
                indices=dict(zip(counts, case, strict=True))
            )
        )
        for case in itertools.product(*map(range, counts.values()))
    ]


def kept(names, **counts):
    return [c.callspec.indices for c in covering(matrix(**counts), names)]


def test_without_a_name_it_is_the_first_case():
    assert kept([], a=3, b=2) == [{"a": 0, "b": 0}]


def test_each_value_is_left_once():
    found = kept(["a", "b"], a=3, b=2, c=4)
    assert len(found) == 3
    assert {case["a"] for case in found} == {0, 1, 2}
    assert {case["b"] for case in found} == {0, 1}


def test_each_pair_is_left():
    found = kept(["a * b", "c"], a=3, b=2, c=4)
    assert {(x["a"], x["b"]) for x in found} == set(
        itertools.product(range(3), range(2))
    )
    assert {case["c"] for case in found} == set(range(4))
    assert len(found) == 6


def test_a_name_that_is_no_argument_is_an_error():
    with pytest.raises(KeyError, match="router"):
        kept(["router"], a=2)

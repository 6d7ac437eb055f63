"""Of a matrix that is thinned, each value that was asked for is left."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import covering

pytestmark = pytest.mark.one_backend


def kept(names, **values):
    """Arguments of the cases that are left of all combinations."""
    cases = [
        SimpleNamespace(
            callspec=SimpleNamespace(
                params=dict(zip(values, case, strict=True))
            )
        )
        for case in itertools.product(*values.values())
    ]
    return [case.callspec.params for case in covering(cases, names)]


A, B, C = ["x", "y", "z"], [False, True], [None, 1, len, "last"]


def test_without_a_name_it_is_the_first_case():
    assert kept([], a=A, b=B) == [{"a": "x", "b": False}]


def test_each_value_is_left_once():
    found = kept(["a", "b"], a=A, b=B, c=C)
    assert len(found) == 3
    assert {case["a"] for case in found} == set(A)
    assert {case["b"] for case in found} == set(B)


def test_each_pair_is_left():
    found = kept(["a * b", "c"], a=A, b=B, c=C)
    assert {(x["a"], x["b"]) for x in found} == set(itertools.product(A, B))
    assert {case["c"] for case in found} == set(C)
    assert len(found) == 6


def test_a_name_that_is_no_argument_is_an_error():
    with pytest.raises(KeyError, match="router"):
        kept(["router"], a=A)


@pytest.mark.parametrize("b", B)
@pytest.mark.parametrize("a", A)
def test_pytests_own_cases_are_told_apart(a, b, request):
    cases = [
        item
        for item in request.session.items
        if item.originalname == request.node.originalname
    ]
    left = [case.callspec.params for case in covering(cases, ["a"])]
    assert len(left) == len({case["a"] for case in left}) <= len(A)

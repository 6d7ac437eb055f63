import numpy as np
import pytest

from keras_upcycle import checks, tables

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("value", "shown"), [("mid", "'mid'"), (None, "None"), (3, "3")]
)
def test_check_choice_lists_the_known(value, shown):
    message = rf"`side` must be one of \['left', 'right'\].*side={shown}"
    with pytest.raises(ValueError, match=message):
        checks.check_choice("side", value, ("left", "right"))


def test_check_choice_takes_the_known():
    checks.check_choice("side", "left", ("left", "right"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.0, "2.0 of type float"),
        (True, "True of type bool"),
        ("3", "'3' of type str"),
        (None, "None of type NoneType"),
    ],
)
def test_check_count_wants_an_integer(value, shown):
    with pytest.raises(TypeError, match=f"must be an integer.*top_k={shown}"):
        checks.check_count("top_k", value)


@pytest.mark.parametrize("value", [0, -3])
def test_check_count_wants_at_least_one(value):
    with pytest.raises(ValueError, match=f"at least 1.*top_k={value}"):
        checks.check_count("top_k", value)


@pytest.mark.parametrize("value", [1, np.int64(5)])
def test_check_count_takes_any_integer_from_one(value):
    checks.check_count("top_k", value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("1", "'1' of type str"), (None, "None"), (False, "False of type bool")],
)
def test_check_number_wants_a_number(value, shown):
    with pytest.raises(TypeError, match=f"must be a number.*z_loss={shown}"):
        checks.check_number("z_loss", value, at_least=0.0)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_check_number_wants_it_finite_and_in_range(value):
    message = f"finite and at least 0.0.*z_loss={value}"
    with pytest.raises(ValueError, match=message):
        checks.check_number("z_loss", value, at_least=0.0)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(1.0), np.int32(2)])
def test_check_number_takes_any_number_in_range(value):
    checks.check_number("z_loss", value, at_least=0.0)


@pytest.mark.parametrize("value", [0, 0.0, -1.25])
def test_check_factor_wants_it_positive(value):
    with pytest.raises(ValueError, match=f"must be positive.*factor={value}"):
        checks.check_factor("factor", value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_check_factor_wants_it_finite(value):
    with pytest.raises(ValueError, match=f"must be finite.*factor={value}"):
        checks.check_factor("factor", value)


def test_check_factor_tells_of_none_where_none_is_allowed():
    checks.check_factor("factor", None, optional=True)
    with pytest.raises(ValueError, match="Pass `None` for dropless"):
        checks.check_factor("factor", 0, optional=True)
    with pytest.raises(TypeError, match=r"must be a number.*factor=None"):
        checks.check_factor("factor", None)
    with pytest.raises(ValueError, match="factor=0") as error:
        checks.check_factor("factor", 0)
    assert "None" not in str(error.value)


def test_text_table_is_aligned():
    lines = tables.text(
        ("block", "share"), [("a", "10%"), ("longer", "5%")]
    ).split("\n")
    assert lines == ["block   share", "a         10%", "longer     5%"]


def test_text_table_of_no_rows_is_its_header():
    assert tables.text(("a", "b"), []) == "a  b"


def test_markdown_table_has_a_rule_of_as_many_cells():
    lines = tables.markdown(("a", "b", "c"), [("1", "2 x", "3")]).split("\n")
    assert lines == ["| a | b | c |", "|---|---|---|", "| 1 | 2 x | 3 |"]


@pytest.mark.parametrize(
    ("number", "short"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (960_041_728, "960M"),
        (2.5e9, "2.5B"),
        (3e12, "3T"),
        (-1500, "-1.5k"),
    ],
)
def test_count_is_short(number, short):
    assert tables.count(number) == short


@pytest.mark.parametrize(
    ("number", "short"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 * 2**20, "3 MiB"),
        (3 * 2**29, "1.5 GiB"),
    ],
)
def test_size_is_in_binary_units(number, short):
    assert tables.size(number) == short

"""Named things: added, found, listed, and refused where they are unknown."""

import pytest

from keras_upcycle.named import Named

pytestmark = pytest.mark.one_backend


@pytest.fixture
def shapes():
    table = Named("shape", " or a `Shape`")
    table.add("square", 4)
    table.add("circle", 0)
    return table


def test_what_is_added_is_found(shapes):
    assert shapes.find("square") == 4
    assert shapes["circle"] == 0
    assert list(shapes) == ["square", "circle"]
    assert len(shapes) == 2


def test_a_class_says_its_own_name(shapes):
    @shapes.named("triangle")
    class Triangle:
        pass

    assert shapes.find("triangle") is Triangle


def test_the_latest_of_a_name_is_meant(shapes):
    shapes.add("square", 5)
    assert shapes.find("square") == 5
    assert len(shapes) == 2


@pytest.mark.parametrize("name", ["cube", "", "Square"])
def test_an_unknown_name_is_refused_with_the_known(shapes, name):
    message = (
        r"`shape` must be one of \['circle', 'square'\] or a `Shape`\. "
        rf"Received: shape='{name}'\."
    )
    with pytest.raises(ValueError, match=message):
        shapes.find(name)


def test_what_is_no_name_is_refused_with_its_type(shapes):
    with pytest.raises(TypeError, match=r"'square'\].*shape=3 of type int\."):
        raise shapes.refusal(3)

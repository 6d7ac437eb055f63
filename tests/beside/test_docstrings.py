"""What the docstrings of the public names say of their arguments."""

import inspect
import re

import pytest

import keras_upcycle

pytestmark = pytest.mark.one_backend

# What an argument's description may start with. A type can be followed by
# what it may be else: "Integer or `None`, ...", "String, `Router` or ...".
KINDS = (
    "Array",
    "Boolean",
    "Callable",
    "Class",
    "Float",
    "Integer",
    "Keyword arguments",
    "List",
    "Mapping",
    "Path",
    "Scalar",
    "String",
    "Tensor",
    "Tuple",
)
TYPE = re.compile(
    rf"(?:{'|'.join(KINDS)})\b"
    # "A Keras model, ..." and "An `ExpertInit`, ..."
    r"|A Keras (?:initializer|layer|model|optimizer)\b"
    r"|An? `[\w.]+`"
)
# What says nothing by itself: a type perhaps, and where else to look.
ELSEWHERE = re.compile(
    rf"(?:(?:{TYPE.pattern})[^,.:]*[,.:] )?(?:as|see)\b[^,;:]*", re.IGNORECASE
)


def public():
    """Every public class, function and method that has a docstring."""
    names = {
        **vars(keras_upcycle),
        **{
            f"distribution.{name}": value
            for name, value in vars(keras_upcycle.distribution).items()
        },
    }
    for name, value in names.items():
        if name.split(".")[-1].startswith("_") or not callable(value):
            continue
        yield name, value
        if not inspect.isclass(value):
            continue
        for attribute in sorted(set(dir(value))):
            found = inspect.getattr_static(value, attribute)
            found = getattr(found, "__func__", found)
            ours = getattr(found, "__module__", None) or ""
            if (
                not attribute.startswith("_")
                and inspect.isfunction(found)
                and ours.startswith("keras_upcycle")
                and found.__doc__
            ):
                yield f"{name}.{attribute}", found


PUBLIC = dict(public())


def section(text, title):
    """From an entry's name to its description, in one line."""
    match = re.search(
        rf"^{title}:\n((?:[ ]{{4}}.*\n|\n)*)", f"{text}\n", re.MULTILINE
    )
    if match is None:
        return None
    body = inspect.cleandoc(f"\n{match[1]}")
    entries = re.findall(r"^(\S+): (.*(?:\n .*)*)", body, re.MULTILINE)
    return {name: " ".join(told.split()) for name, told in entries}


def arguments(function):
    """What a caller may pass, as docstrings name it: with its stars."""
    stars = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return [
        stars.get(parameter.kind, "") + name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]


def faults(function):
    """What is wrong with the description of a function's arguments."""
    told = section(inspect.getdoc(function) or "", "Args")
    if told is None:
        return []
    taken = arguments(function)
    found = [f"{name} is no argument" for name in told if name not in taken]
    found += [f"{name} is not described" for name in taken if name not in told]
    for name, text in told.items():
        if not TYPE.match(text):
            found.append(f"{name} does not start with its type: {text}")
        if ELSEWHERE.fullmatch(text):
            found.append(f"{name} is described elsewhere: {text}")
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_described(name):
    assert faults(PUBLIC[name]) == []


def test_the_public_names_are_looked_at():
    assert "upcycle_model" in PUBLIC
    assert "ExpertWeights.load" in PUBLIC
    assert "ExpertInit.values" in PUBLIC
    described = [
        name
        for name, value in PUBLIC.items()
        if section(inspect.getdoc(value) or "", "Args")
    ]
    assert len(described) > 60


def test_what_is_wrong_is_found():
    def function(first, second, third, fourth=None, *args, **kwargs):
        """Does nothing.

        Args:
            first: Integer, one of
                two lines.
            second: How much: of what.
            third: See `other`.
            fifth: Boolean, whether there is one.
            *args: List of what is left.
            **kwargs: Keyword arguments.

        Returns:
            nothing: At all.
        """

    assert faults(function) == [
        "fifth is no argument",
        "fourth is not described",
        "second does not start with its type: How much: of what.",
        "third does not start with its type: See `other`.",
        "third is described elsewhere: See `other`.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "As for `upcycle_model`.",
        "See `Router`.",
        "Integer, as for `upcycle_model`.",
        "A Keras model. See `upcycle_model`.",
    ],
)
def test_a_reference_is_no_description(text):
    assert ELSEWHERE.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        "Integer, at least 1.",
        "Float in `[0, 1)` or `None`, a rate.",
        "String, `Router` or mapping: how tokens meet experts.",
        "A Keras model, built.",
        "An `ExpertInit` or callable.",
        "Keyword arguments of `Router`.",
    ],
)
def test_a_description_with_its_type_will_do(text):
    assert TYPE.match(text)
    assert not ELSEWHERE.fullmatch(text)

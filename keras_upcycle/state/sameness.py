"""Whether two layers hold the same, in files and beside them."""

import pathlib
import tempfile
from typing import Any, NamedTuple

import keras

from keras_upcycle import keras_internals
from keras_upcycle.state.attributes import attributes
from keras_upcycle.state.values import (
    as_numpy,
    same,
)


class Saved(NamedTuple):
    """What a layer would write into a file by methods of its own.

    Attributes:
        variables: Arrays by key, of `save_own_variables`.
        assets: Contents of files by path, of `save_assets`.
        vocabulary: Of a lookup; its file says nothing of line breaks in it.
    """

    variables: dict[str, Any]
    assets: dict[str, bytes]
    vocabulary: list | None

    def equals(self, other: "Saved") -> bool:
        """Whether two layers would write the same."""
        return (
            self.variables.keys() == other.variables.keys()
            and all(
                same(value, other.variables[key])
                for key, value in self.variables.items()
            )
            and self.assets == other.assets
            and self.vocabulary == other.vocabulary
        )


def saved(layer: keras.Layer) -> Saved:
    """What the layer would write into a file by methods of its own.

    Nothing where it has none but Keras's, which write its variables.
    """
    if not keras_internals.saves_more_than_variables(layer):
        return Saved({}, {}, None)
    assets = {}
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            root = pathlib.Path(folder)
            assets = {
                str(path.relative_to(root)): path.read_bytes()
                for path in sorted(root.rglob("*"))
                if path.is_file()
            }
    vocabulary = None
    if hasattr(layer, "get_vocabulary"):
        vocabulary = [str(word) for word in layer.get_vocabulary()]
    return Saved(variables_saved(layer), assets, vocabulary)


def same_files(a: keras.Layer, b: keras.Layer) -> bool:
    """Whether two layers' assets are the same, vocabularies among them.

    True where one of them cannot be saved.
    """
    try:
        one, other = saved(a), saved(b)
    except Exception:  # a user's methods may fail in their own way
        return True
    return one.assets == other.assets and one.vocabulary == other.vocabulary


def unequal(old: keras.Layer, new: keras.Layer) -> list[str]:
    """Names of what two layers hold that is no variable, and not the same.

    As far as it can be told; sub-layers are not looked at.
    """
    found = []
    if not save_the_same(old, new):
        found.append("what it saves")
    if type(old) is type(new):
        for name, value in attributes(old):
            # What first values were drawn by: each copy has its own seed, and
            # a built layer asks no more.
            if isinstance(
                value, (keras.Variable, keras.initializers.Initializer)
            ):
                continue
            if same(value, vars(new).get(name)) is False:
                found.append(name)
    return found


# What the layer's own methods write and read.


def variables_saved(layer):
    """What a layer's own `save_own_variables` writes, as NumPy arrays."""
    store = {}
    layer.save_own_variables(store)
    return {key: as_numpy(value) for key, value in store.items()}


def save_the_same(old, new):
    """Whether two layers write the same."""
    try:
        expected = saved(old)
    except Exception:  # a user's methods may fail in their own way
        return False
    return saves(new, expected)


def saves(layer, expected):
    """Whether a layer writes this."""
    try:
        return saved(layer).equals(expected)
    except Exception:  # there may be nothing yet that could be saved
        return False

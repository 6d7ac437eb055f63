"""All that a layer holds and its config does not tell, for another like it.

Variables are the smaller part of it: a vocabulary, an adapted mean, an array
that a user put into an attribute are state as well. It has three places. What
Keras would write into a file, by a layer's own `save_own_variables` and
`save_assets`; what the layer tracks, variables, random states and metrics;
and plain attributes, which no file of Keras holds at all.
"""

import copy
import io
import pathlib
import pickle
import tempfile
import types
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.state import first_values

# Their place in a model, and what they count, is their own layer's.
_KERAS = (
    keras.Variable,
    keras.KerasTensor,
    keras.Layer,
    keras.Operation,
    keras.Metric,
    keras.random.SeedGenerator,
)
_LIBRARIES = ("keras", "keras_hub", "tensorflow", "torch", "jax", "jaxlib")
_SCALARS = (bool, int, float, complex, str, bytes, np.generic, type(None))
_REMEDY = (
    "Give it a `get_config` that makes an equal layer, or the methods "
    "`save_own_variables` and `load_own_variables`, or `save_assets` and "
    "`load_assets`, that bring its state across, as a saved model needs too."
)


def carry(old: keras.Layer, new: keras.Layer) -> None:
    """Brings everything that `old` itself holds to `new`.

    Sub-layers are not looked at. Nothing is shared afterwards: on JAX two
    variables with one buffer would take it from each other in training.

    Args:
        old: A built layer.
        new: A built one of the same class and config, or of a subclass, of
            which attributes are its own affair.

    Raises:
        UpcycleError: If `new` does not hold the same afterwards; names `old`.
    """
    problem = None
    if keras_internals.saves_more_than_variables(old):
        if _shapes(old) == _shapes(new):
            _copy_variables(old, new)
        problem = _load(old, new)
    if type(old) is type(new):
        _copy_attributes(old, new, _attributes(old))
    if _shapes(old) != _shapes(new):
        why = _differing_weights(old, new)
        raise _lost(old, f"{why}, and {problem}" if problem else why)
    _copy_variables(old, new)
    # What could not be loaded may have been copied with the attributes.
    if problem and not _save_the_same(old, new):
        raise _lost(old, problem)


def carry_variables(old: keras.Layer, new: keras.Layer) -> None:
    """`carry` for the variables alone; what else `new` holds stays.

    Raises:
        UpcycleError: As `carry`.
    """
    if _shapes(old) != _shapes(new):
        raise _lost(old, _differing_weights(old, new))
    _copy_variables(old, new)
    refresh(new)


def carry_unsaved(old: keras.Layer, new: keras.Layer) -> None:
    """`carry` for all but the variables, which `new` has already.

    Raises:
        UpcycleError: As `carry`.
    """
    problem = None
    if keras_internals.saves_more_than_variables(old):
        problem = _load(old, new)
    if type(old) is type(new):
        _copy_attributes(old, new, _attributes(old))
    if problem and not _save_the_same(old, new):
        raise _lost(old, problem)
    pairs = zip(
        keras_internals.metric_variables(old),
        keras_internals.metric_variables(new),
        strict=False,
    )
    for source, target in pairs:
        target.assign(ops.copy(source.value))


def carry_added(old: keras.Model, new: keras.Model) -> None:
    """Brings what a user put on a model's object, of which no config tells.

    Public attributes that `new` has not; the two may be of two classes.

    Raises:
        UpcycleError: For one that cannot be copied; names `old`.
    """
    added = [
        (name, value)
        for name, value in vars(old).items()
        if not name.startswith("_")
        and name not in vars(new)
        and name not in keras_internals.TRAINING
    ]
    _copy_attributes(old, new, added)


def refresh(layer: keras.Layer) -> None:
    """Lets a layer see that its variables were written to.

    A `Normalization`, for one, computes with tensors that it made of its
    variables when it last loaded them.
    """
    if keras_internals.own_variables(
        layer
    ) and keras_internals.saves_more_than_variables(layer):
        layer.load_own_variables(_variables_saved(layer))


def check_values(model: keras.Layer) -> None:
    """Raises `UpcycleError` for a model that Keras left without its weights.

    On JAX the values are out of the model while `predict` or `evaluate` runs,
    and are not put back where it fails.
    """
    lost = keras_internals.lost_variables(model)
    if lost:
        raise UpcycleError(
            f"The weights of {model.name!r} must have values. Received: "
            f"{len(lost)} of {len(model.variables)} without, such as "
            f"{lost[0].path!r}. On JAX, Keras takes the values out of a model "
            "while `predict`, `evaluate` or `fit` runs, and does not put them "
            "back when `predict` or `evaluate` fails, as for an input of the "
            "wrong width; they are gone, and the model itself predicts no "
            "more. Load it again: `keras.saving.load_model(path)`, or "
            "`model.load_weights(path)`; or make it anew."
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
    return Saved(_variables_saved(layer), assets, vocabulary)


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
    if not _save_the_same(old, new):
        found.append("what it saves")
    if type(old) is type(new):
        for name, value in _attributes(old):
            # What first values were drawn by: each copy has its own seed, and
            # a built layer asks no more.
            if isinstance(
                value, (keras.Variable, keras.initializers.Initializer)
            ):
                continue
            if same(value, vars(new).get(name)) is False:
                found.append(name)
    return found


def same(a: Any, b: Any) -> bool | None:
    """Whether two values are the same data; `None` where nobody can tell."""
    if a is b:
        return True
    if isinstance(a, _SCALARS) and isinstance(b, _SCALARS):
        both_nan = a != a and b != b
        return bool(type(a) is type(b) and (a == b or both_nan))
    if _is_array(a):
        return _same_arrays(a, b)
    if isinstance(a, types.FunctionType) and isinstance(b, type(a)):
        return _same_functions(a, b)
    try:
        dumped = _dumped(a)
    except Exception:  # whatever is inside may refuse in its own way
        return None
    try:
        return dumped == _dumped(b)
    except Exception:
        return False


# What the layer's own methods write and read.


def _variables_saved(layer):
    store = {}
    layer.save_own_variables(store)
    return {key: _as_numpy(value) for key, value in store.items()}


def _load(old, new):
    """Lets `new` read what `old` writes; why it could not, or `None`."""
    try:
        wanted = saved(old)
    except Exception as error:
        return f"saving it failed with {type(error).__name__}: {error}"
    if _saves(new, wanted):
        return None
    try:
        new.load_own_variables(dict(wanted.variables))
        if hasattr(new, "load_assets"):
            with tempfile.TemporaryDirectory() as folder:
                for name, content in wanted.assets.items():
                    path = pathlib.Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                new.load_assets(folder)
    except Exception as error:
        return (
            f"loading what it saves failed with {type(error).__name__}: {error}"
        )
    if not _saves(new, wanted):
        return "what it saves is not what its copy saves after loading it"
    return None


def _save_the_same(old, new):
    try:
        wanted = saved(old)
    except Exception:  # a user's methods may fail in their own way
        return False
    return _saves(new, wanted)


def _saves(layer, wanted):
    try:
        return saved(layer).equals(wanted)
    except Exception:  # there may be nothing yet that could be saved
        return False


# Variables.


def _shapes(layer):
    return [tuple(v.shape) for v in _variables(layer)]


def _differing_weights(old, new):
    return (
        f"its copy, {new.name!r}, made from its config, has weights that "
        f"differ in number or shape, {_described(new)} where it has "
        f"{_described(old)}"
    )


def _described(layer):
    return [f"{v.name} {tuple(v.shape)}" for v in _variables(layer)]


def _variables(layer):
    return [
        *keras_internals.own_variables(layer),
        *keras_internals.metric_variables(layer),
    ]


def _copy_variables(old, new):
    for source, target in zip(_variables(old), _variables(new), strict=True):
        # A copy: on JAX the two would share a buffer, and the first training
        # step of either would donate it and leave the other without.
        if keras_internals.has_value(target):
            target.assign(ops.copy(source.value))
        else:
            keras_internals.set_first_value(
                target, first_values.laid_out(_copier(source))
            )
        copy_flag(source, target)
        # Where they were put on the variable, and no config has them.
        target.regularizer = source.regularizer
        target.constraint = source.constraint


def copy_flag(source: keras.Variable, target: keras.Variable) -> None:
    """Freezes one variable as another is, which its layer may not be."""
    if target.trainable != source.trainable:
        target.trainable = source.trainable


def _copier(source):
    def copy(shape, dtype=None):
        return ops.copy(ops.cast(source.value, dtype))

    return copy


# Plain attributes.


def _attributes(layer):
    """`(name, value)` of what a class put into its instance."""
    skipped = keras_internals.base_attributes(layer)
    for name, value in list(vars(layer).items()):
        # TensorFlow's and Python's own bookkeeping.
        if name in skipped or name.startswith(("_self_", "_obj_", "__")):
            continue
        yield name, value
    yield from keras_internals.torch_tensors(layer).items()


def _copy_attributes(old, new, attributes):
    theirs = {**vars(new), **keras_internals.torch_tensors(new)}
    for name, value in attributes:
        missing = theirs.get(name) is None
        if isinstance(value, keras.Variable):
            if missing:
                _add_variable(new, name, value)
            continue
        if isinstance(value, types.MethodType) and value.__self__ is old:
            if missing:
                setattr(new, name, types.MethodType(value.__func__, new))
            continue
        if same(value, theirs.get(name)):
            continue
        if _belongs_elsewhere(value, old):
            if missing and isinstance(value, types.FunctionType):
                raise _lost(
                    old, f"its attribute {name!r} is a function of the layer"
                )
            continue
        try:
            copied = _copied(value)
        except Exception as error:
            # Made by the constructor, it is what the config asks for.
            if not missing:
                continue
            raise _lost(
                old,
                f"its attribute {name!r} of type {type(value).__name__} came "
                "after construction and cannot be copied "
                f"({type(error).__name__}: {error})",
            ) from error
        keras_internals.set_attribute(new, name, copied)


def _add_variable(new, name, variable):
    """A variable that the layer made after it was built, in the copy too."""
    made = keras.Variable(
        ops.copy(variable.value),
        shape=variable.shape,
        dtype=variable.dtype,
        trainable=variable.trainable,
        name=variable.name,
    )
    keras_internals.set_attribute(new, name, made)


def _belongs_elsewhere(value, old):
    """Whether a value is a part of a model, or of a library: not data."""
    if _is_array(value):
        return False
    if isinstance(value, types.FunctionType):
        return any(
            inside is old or isinstance(inside, _KERAS)
            for inside in _captured(value)
        )
    if isinstance(value, _KERAS):
        return True
    return type(value).__module__.partition(".")[0] in _LIBRARIES and not (
        isinstance(value, list | dict | tuple | set)
    )


def _copied(value):
    if _is_array(value):
        if isinstance(value, np.ndarray):
            return np.array(value)
        return ops.copy(value) if ops.is_tensor(value) else value
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return value
    _dumped(value)  # raises for what holds parts of a model
    return copy.deepcopy(_plain(value))


def _is_array(value):
    return (
        hasattr(value, "shape")
        and hasattr(value, "dtype")
        and not isinstance(value, (*_KERAS, np.generic))
        and not isinstance(value, type)
    )


def _same_arrays(a, b):
    try:
        a = _as_numpy(a)
    except Exception:  # a symbol, of a trace that is over
        return None
    if not _is_array(b):
        return False
    try:
        b = _as_numpy(b)
    except Exception:
        return False
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and (a.tobytes() == b.tobytes() or bool(np.all(a == b)))
    )


def _same_functions(a, b):
    if a.__code__ is not b.__code__:
        return False
    pairs = zip(_captured(a), _captured(b), strict=False)
    return all(same(x, y) is not False for x, y in pairs)


def _captured(function):
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = list(function.__defaults__ or ())
    return [*cells, *defaults, *(function.__kwdefaults__ or {}).values()]


class _DataPickler(pickle.Pickler):
    """Writes data, and refuses what is a part of a model."""

    def persistent_id(self, obj):
        if isinstance(obj, _KERAS):
            raise TypeError(f"a {type(obj).__name__} is inside")


def _dumped(value):
    written = io.BytesIO()
    _DataPickler(written).dump(_plain(value))
    return written.getvalue()


def _plain(value):
    """Containers without Keras's and TensorFlow's watch over them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    return value


def _as_numpy(value):
    if isinstance(value, keras.Variable):
        value = value.value
    if ops.is_tensor(value):
        return np.array(ops.convert_to_numpy(value))
    return np.array(value)


def _lost(layer, why):
    return UpcycleError(
        f"Layer {layer.name!r} ({type(layer).__name__}) cannot be carried over "
        f"with all that it holds: {why}. {_REMEDY}"
    )

"""A layer's parts and attributes, what was assigned to it, what it trains."""

import contextlib
import functools
import inspect
from typing import Any

import keras

from keras_upcycle.keras_internals.graphs import Functional
from keras_upcycle.keras_internals.quantization import has_lora


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Direct sub-layers in the order in which they were tracked.

    `Layer._layers`; the public `Model.layers` exists for models only, and
    hides nothing we can go without. Keras 3.15.
    """
    return list(layer._layers)


def named_sublayers(layer: keras.Layer) -> dict[str, keras.Layer]:
    """Direct sub-layers that are attributes, by their names.

    On torch a Keras layer is a module, which keeps them apart. Keras 3.15.
    """
    ids = {id(below) for below in sublayers(layer)}
    everything = {**vars(layer), **(vars(layer).get("_modules") or {})}
    return {name: v for name, v in everything.items() if id(v) in ids}


def all_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and everything below it, each once, in tracked order.

    Keras's own `Layer._flatten_layers` lists siblings last to first.
    """
    found: dict[int, keras.Layer] = {}

    def walk(layer):
        if id(layer) not in found:
            found[id(layer)] = layer
            for below in sublayers(layer):
                walk(below)

    walk(layer)
    return list(found.values())


def base_attributes(layer: keras.Layer) -> frozenset[str]:
    """Attributes that every layer has, for Keras's own bookkeeping.

    Of a functional model all private ones are the graph's. Keras 3.15.
    """
    if not isinstance(layer, keras.Model):
        return _attributes_of(keras.Layer)
    known = _attributes_of(keras.Model)
    if isinstance(layer, Functional | keras.Sequential):
        known |= {name for name in vars(layer) if name.startswith("_")}
    return known


@functools.cache
def _attributes_of(base):
    # With a name: automatic ones would be numbered on by it.
    return frozenset(vars(base(name="reference")))


def torch_tensors(layer: keras.Layer) -> dict:
    """Tensors that a user registered on a layer with torch's own methods.

    On torch a Keras layer is a module; its variables live in a module inside,
    so what `_buffers` and `_parameters` hold is the user's. Keras 3.15.
    """
    found: dict[str, Any] = {}
    for kind in ("_buffers", "_parameters"):
        held = vars(layer).get(kind) or {}
        found |= {k: v for k, v in held.items() if v is not None}
    return found


def set_attribute(layer: keras.Layer, name: str, value) -> None:
    """Sets a layer's attribute, also where the layer is built.

    A parameter of torch's gets its values, and stays the one that it is.
    """
    own = (vars(layer).get("_parameters") or {}).get(name)
    if own is not None:
        own.data = value.detach()
        return
    with unlocked(layer):
        setattr(layer, name, value)


def lambda_like(layer: keras.layers.Lambda) -> keras.layers.Lambda:
    """A new `Lambda` of the same function, which it shares.

    From its config Keras makes a function again of its code alone, without
    the names that it uses, or refuses to. `Lambda._output_shape`, 3.15.
    """
    base = keras.Layer.get_config(layer)
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=dict(layer.arguments),
        **base,
    )


# What `Layer.__new__` wraps on every object. Keras 3.15.
_WRAPPED = ("build", "quantize")
# What `compile` and `fit` put on a model, of Keras and KerasHub. 3.15.
TRAINING = (
    *("optimizer", "loss", "sampler", "history", "jit_compile"),
    *("run_eagerly", "steps_per_execution", "compiled", "stop_training"),
    *("stop_evaluating", "stop_predicting", "train_function"),
    *("test_function", "predict_function", "generate_function"),
)
# Where torch keeps what a user hangs on one module; Keras hangs nothing there.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def own_methods(layer: keras.Layer) -> list[str]:
    """Methods that this very object has in place of its class's.

    Such as a `call` or `train_step` that was assigned to it, and torch's
    hooks: no config tells of them. Keras 3.15.
    """
    kind = type(layer)
    found = [
        name
        for name, value in vars(layer).items()
        # TensorFlow's trainer has a method of the name `loss`.
        if name not in (*_WRAPPED, *TRAINING)
        and inspect.isroutine(getattr(kind, name, None))
        and callable(value)
    ]
    return found + [name for name in _HOOKS if vars(layer).get(name)]


def replace_sublayer(
    owner: keras.Layer, attribute: str, new: keras.Layer | None
) -> None:
    """Puts `new` where `owner.attribute` stands, and forgets the old layer.

    A built layer's tracker is locked, and plain `setattr` would leave the old
    sub-layer's weights in `owner.weights`. Keras's own LoRA unlocks it the
    same way. Keras 3.15.

    Args:
        owner: A layer, built or not.
        attribute: Name of the sub-layer's attribute.
        new: What takes its place; `None` for nothing.
    """
    with unlocked(owner) as tracker:
        tracker.untrack(getattr(owner, attribute))
        setattr(owner, attribute, new)


def wrap_sublayer(owner: keras.Layer, attribute: str, new: keras.Layer) -> None:
    """Puts `new`, which holds the old layer, where `owner.attribute` stands.

    Among the owner's sub-layers too, so that weights keep their order. The
    plain list `Layer._layers`, Keras 3.15.
    """
    at = [id(one) for one in owner._layers].index(id(getattr(owner, attribute)))
    replace_sublayer(owner, attribute, new)
    with unlocked(owner):
        owner._layers.insert(at, owner._layers.pop())


@contextlib.contextmanager
def unlocked(layer):
    """A layer's tracker, which is locked once the layer is built. 3.15."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield tracker
    finally:
        if locked:
            tracker.lock()


def build_inside(
    owner_path: str, layer: keras.Layer, input_shape: tuple
) -> None:
    """Builds `layer` as if `build` ran inside the layer with that path.

    Paths are made from the name scopes open at build time. Without them every
    expert layer would have the path `moe/...`, and saving an int8 model, which
    keys its dtype policies by path, would say that the path exists already.
    `keras.name_scope` takes no "/". Keras 3.15.
    """
    if layer.built:
        return
    scopes = [part for part in owner_path.split("/") if part]
    with _scopes(scopes):
        layer.build(input_shape)


class _scopes:
    """Opens name scopes one inside the other."""

    def __init__(self, names):
        self.scopes = [keras.name_scope(name) for name in names]

    def __enter__(self):
        for scope in self.scopes:
            scope.__enter__()

    def __exit__(self, *error):
        for scope in reversed(self.scopes):
            scope.__exit__(*error)


def plain_settings(layer: keras.Layer) -> dict:
    """What decides how a layer computes, as far as it is plain values.

    Public attributes that are numbers, strings, functions or `None`, and what
    `Layer` keeps itself; of a layer that a model's config makes anew, equal
    to the first one's unless somebody changed one. Keras 3.15.
    """

    def is_plain(value):
        if isinstance(value, (tuple, list)):
            return all(map(is_plain, value))
        return (
            value is None
            or isinstance(value, (bool, int, float, str))
            or inspect.isroutine(value)
        )

    found = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(layer).items()
        if not name.startswith("_")
        and name not in ("name", "built", "training", *_WRAPPED)
        # Names of a model's ends, numbered by what was made before.
        and name not in ("input_names", "output_names")
        and is_plain(value)
    }
    found["compute_dtype"] = layer.compute_dtype
    found["variable_dtype"] = layer.variable_dtype
    found["supports_masking"] = layer.supports_masking
    found["activity_regularizer"] = layer.activity_regularizer is not None
    return found


def remat_is_asked_for(layer: keras.Layer) -> bool:
    """Whether the layer was made under a `keras.RematScope` that means it.

    `Layer._remat_mode`, the scope at the time. Keras 3.15.
    """
    scope = layer._remat_mode
    if scope is None or scope.mode is None:
        return False
    return scope.mode != "list_of_layers" or layer.name in scope.layer_names


def policy_of_tree(layer: keras.Layer):
    """The dtype policy that rebuilds the layer as it is, quantization too.

    A layer's own policy says nothing of sub-layers that `quantize` changed.
    KerasHub's `Backbone.get_config` maps them by path; this does the same for
    a layer that stands in no backbone. Keras 3.15.
    """
    own = layer.dtype_policy
    if isinstance(own, keras.dtype_policies.DTypePolicyMap):
        return own
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=own)
    for sublayer in layer._flatten_layers():
        if sublayer.quantization_mode is not None:
            policies[sublayer.path] = sublayer.dtype_policy
    return policies if len(policies) else own


def made_to_train(layer: keras.Layer) -> list[keras.Variable]:
    """Variables of the layer itself that train unless they are frozen.

    Without a low-rank adapter's base kernel, which Keras freezes by its own
    flag and would thaw with the layer. `Layer._trainable_variables`, 3.15.
    """
    bases = ("kernel", "embeddings") if has_lora(layer) else ()
    return [v for v in layer._trainable_variables if v.name not in bases]


def set_trainable_alone(layer: keras.Layer, value: bool) -> None:
    """Sets the layer's flag and leaves its variables and sub-layers alone.

    `Layer._trainable`; the public setter hands the flag down. Keras 3.15.
    """
    layer._trainable = value


def freeze_tree(layer: keras.Layer) -> None:
    """Sets all flags of a layer and of what is below it to `False`.

    On TensorFlow `layer.trainable = False` does nothing where the layer's own
    flag is `False` already, as that of a layer made frozen is, whatever the
    flags below. `Layer._trainable_variables`, Keras 3.15.
    """
    for each in all_layers(layer):
        set_trainable_alone(each, False)
        for variable in each._trainable_variables:
            variable.trainable = False

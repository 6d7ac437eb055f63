"""The only place that touches private attributes of Keras and KerasHub.

Each function wraps one of them and says why and with which versions it was
checked; `tests/test_keras_internals.py` fails loudly when Keras changes.
"""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator

import keras
from keras import ops

# Where Keras lists variables that wait for a value; see `without_values`.
from keras.src.backend.common import global_state

# What `keras.Model(inputs, outputs)` makes; Keras does not export the class,
# and making a model to ask for its type would advance the automatic names of
# the user's own models. Keras 3.15.
from keras.src.models.functional import Functional as Functional

# How Keras reads the `filters` of `quantize`. Keras 3.15.
from keras.src.quantizers.utils import should_quantize_layer

# How KerasHub finds a preset's files; see `preset_class`.
from keras_hub.src.utils import preset_utils

# What has an axis of experts before those of a dense block's weights.
_STACK = re.compile(
    r"(?:^|/)expert_(?:up|gate|down)/(?:kernel|bias|lora_kernel_a)$"
)


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Direct sub-layers in the order in which they were tracked.

    `Layer._layers`; the public `Model.layers` exists for models only, and
    hides nothing we can go without. Keras 3.15.
    """
    return list(layer._layers)


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


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Variables that the layer itself made, seeds' state included.

    The public `variables` adds the sub-layers' to them. What `UnsavedState`
    holds is no part of a model and is left out. Keras 3.15.
    """
    seeds = [seed.state for seed in _seeds(layer)]
    return [
        *layer._trainable_variables,
        *layer._non_trainable_variables,
        *seeds,
    ]


def _seeds(layer):
    """The layer's own seed generators; an `UnsavedState` holds no seed. 3.15"""
    return [
        seed
        for seed in layer._seed_generators
        if not isinstance(seed, UnsavedState)
    ]


def metric_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Variables of metrics that the layer itself holds.

    Those of a model are what `compile` made. `Layer._metrics`, Keras 3.15.
    """
    if isinstance(layer, keras.Model):
        return []
    return [v for metric in layer._metrics for v in metric.variables]


# Write variables that `own_variables` lists, and nothing else. `BaseConv` is
# not exported; Keras 3.15.
_WRITE_VARIABLES_ONLY = (
    keras.Layer,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.Conv1D.__mro__[1],
)
_SAVING = (
    "save_own_variables",
    "load_own_variables",
    "save_assets",
    "load_assets",
)


def saves_more_than_variables(layer: keras.Layer) -> bool:
    """Whether a class of the layer's has methods of its own for its files.

    A class that sets `writes_variables_only` has them, and says that they
    write nothing but what `own_variables` lists.
    """
    return any(
        name in vars(each)
        for each in type(layer).__mro__
        if each not in _WRITE_VARIABLES_ONLY
        and not vars(each).get("writes_variables_only")
        for name in _SAVING
    )


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
    found = {}
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
    with _unlocked(layer):
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


def output_shapes(operation) -> list[list[tuple]]:
    """The shapes that each call of an operation gave, over all graphs.

    `Operation._inbound_nodes`, Keras 3.15.
    """
    return [
        [tuple(tensor.shape) for tensor in node.outputs]
        for node in operation._inbound_nodes
    ]


def lost_variables(model: keras.Layer) -> list[keras.Variable]:
    """Variables that had a value and have none any more.

    On JAX Keras takes the values out of a model while `fit`, `evaluate` or
    `predict` runs; where `predict` or `evaluate` fails they are not put back.
    One made under `without_values` still knows how to draw its first. Keras
    3.15.
    """
    return [
        variable
        for variable in model.variables
        if not has_value(variable) and variable._initializer is None
    ]


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


def seed_of(layer: keras.layers.Dropout) -> keras.Variable | None:
    """The state of a `Dropout`'s random numbers; none at rate 0. 3.15."""
    generator = getattr(layer, "seed_generator", None)
    return None if generator is None else generator.state


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
    with _unlocked(owner) as tracker:
        tracker.untrack(getattr(owner, attribute))
        setattr(owner, attribute, new)


@contextlib.contextmanager
def _unlocked(layer):
    """A layer's tracker, which is locked once the layer is built. 3.15."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield tracker
    finally:
        if locked:
            tracker.lock()


@contextlib.contextmanager
def without_values():
    """Layers made inside have variables of a shape but without a value.

    Spares drawing random values that nobody reads, and the memory of a model
    of which only the shapes are wanted. `set_first_value` and
    `draw_first_values` give them one. It is what the public `StatelessScope`
    does when told not to initialise on exit; but then the next scope that is
    not told so initialises what is on Keras's list, so the list is put back
    as it was. Keras 3.15.
    """
    waiting = "uninitialized_variables"
    before = list(global_state.get_global_attribute(waiting, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(waiting, before)


def has_value(variable: keras.Variable) -> bool:
    """Whether the variable has been initialised. `Variable._value`, 3.15."""
    return variable._value is not None


def set_first_value(variable: keras.Variable, make: Callable) -> None:
    """Gives a variable made under `without_values` its value.

    `Variable._initializer` and `_deferred_initialize`, Keras 3.15.

    Args:
        variable: Without a value.
        make: As an initializer, `(shape, dtype) -> tensor`; whatever holds
            the tensor must not be written to afterwards.
    """
    variable._initializer = make
    variable._deferred_initialize()


def draw_first_values(layer: keras.Layer) -> None:
    """Lets every variable that has no value yet take its initializer's."""
    for variable in layer.variables:
        if not has_value(variable):
            variable._deferred_initialize()


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


def file_holds(store, name: str) -> bool:
    """Whether a file of weights has something of a layer's sub-layer.

    Args:
        store: What `load_own_variables` of the layer is given.
        name: The attribute that holds the sub-layer.

    `H5IOStore.h5_file` and `._h5_entry_path`, Keras 3.15; `False` for stores
    of another kind, which do not tell.
    """
    file = getattr(store, "h5_file", None)
    path = getattr(store, "_h5_entry_path", None)
    return bool(file and path) and f"{path}/{name}" in file


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
        and is_plain(value)
    }
    found["compute_dtype"] = layer.compute_dtype
    found["variable_dtype"] = layer.variable_dtype
    found["supports_masking"] = layer.supports_masking
    found["activity_regularizer"] = layer.activity_regularizer is not None
    return found


def tracked_nodes(model: keras.Model) -> Iterator[tuple]:
    """The graph of a functional model, a call at a time.

    `Functional._nodes_by_depth` and `Node` hold what `clone_model` uses too;
    nothing public tells which layer consumes which. Keras 3.15.

    Yields:
        `(operation, inputs, outputs, kwargs)`: the operation called, the
        `KerasTensor`s it got and gave, and the keyword arguments of the call,
        in order from the model's inputs to its outputs.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                yield (
                    node.operation,
                    list(node.arguments.keras_tensors),
                    list(node.outputs),
                    dict(node.arguments.kwargs),
                )


def sequential_as_functional(model: keras.Sequential) -> keras.Model:
    """The functional model that a built `Sequential` keeps inside.

    `Sequential._functional`, 3.15. It shares the layers, so its graph says
    what the `Sequential` computes.
    """
    return model._functional


class DrawnSeed(keras.random.SeedGenerator):
    """A seed drawn once: every use of it gives the same numbers.

    `keras.random` takes whole numbers and generators only, and asks these for
    a `next` seed. A generator's `__init__` would make a variable. torch's
    dropout asks by `_initial_seed` whether the numbers may come from torch's
    own generator, whose state is kept for a second run. Keras 3.15.

    Args:
        generator: What draws the seed.
    """

    def __init__(self, generator):
        self._drawn = generator.next()
        self._initial_seed = generator._initial_seed

    def next(self, ordered=True):
        del ordered
        return self._drawn


class UnsavedState(keras.random.SeedGenerator):
    """State of a layer that compiled steps may change and no file holds.

    Keras carries `Layer.variables` through a compiled step, and saves and
    counts `Layer.weights`; the states of seed generators are in the first and
    not in the second, which is just what counters need. A generator's
    `__init__` would make a seed. Keras 3.15.

    Args:
        shape: Of the state, float32, zeros at first.
        name: Of the variable.
        aggregation: How `tf.distribute` joins what its replicas assign.
    """

    def __init__(self, shape, name, aggregation="mean"):
        self.name = name
        self._initial_seed = None
        self.state = keras.Variable(
            "zeros",
            shape=shape,
            dtype="float32",
            trainable=False,
            aggregation=aggregation,
            name=name,
        )

    def next(self, ordered=True):
        raise TypeError("This holds counters, and draws no numbers.")


class StepState(UnsavedState):
    """Such a state that training resumed from a file needs.

    Keras saves it no more than any `UnsavedState`; `random_state` does, where
    it saves seeds.
    """


def step_states(layer: keras.Layer) -> list[StepState]:
    """All `StepState`s in a layer and below it, each once. Keras 3.15."""
    found = [
        state
        for each in all_layers(layer)
        for state in each._seed_generators
        if isinstance(state, StepState)
    ]
    return list({id(state): state for state in found}.values())


def attach_state(layer: keras.Layer, attribute: str, state: UnsavedState):
    """Gives a layer an `UnsavedState`, also where it is built. Keras 3.15."""
    with _unlocked(layer):
        setattr(layer, attribute, state)


def sync_state(model: keras.Model) -> None:
    """Brings the variables up to date in the middle of a `fit` on JAX.

    `Model.jax_state_sync` is public, and missing on other backends, whose
    variables are always up to date. Keras 3.15.
    """
    sync = getattr(model, "jax_state_sync", None)
    if sync is not None:
        sync()


def drop_compiled_inference(layer: keras.Layer) -> None:
    """Lets models compile anew what they run at inference when next asked to.

    Keras makes `test_function` and `predict_function` once, KerasHub
    `generate_function`; all are public attributes that no document names, and
    `None` stands for not made yet. Keras 3.15, KerasHub 0.32.

    Args:
        layer: A model or layer; models inside it forget theirs too.
    """
    for each in all_layers(layer):
        for name in ("test_function", "predict_function", "generate_function"):
            if getattr(each, name, None) is not None:
                setattr(each, name, None)


def drop_compiled_training(layer: keras.Layer) -> None:
    """As `drop_compiled_inference`, of `train_function`; the optimizer stays.

    `fit` and `train_on_batch` make it anew. Keras 3.15.
    """
    for each in all_layers(layer):
        if getattr(each, "train_function", None) is not None:
            each.train_function = None


def set_rate(dropout: keras.layers.Dropout, rate: float) -> None:
    """Another rate for a built `Dropout`, from 0 too.

    A `Dropout` that was made with the rate 0 has no seed to draw from
    (`Dropout.__init__`), and a built layer takes none. Keras 3.15.
    """
    dropout.rate = rate
    if rate and getattr(dropout, "seed_generator", None) is None:
        with _unlocked(dropout):
            dropout.seed_generator = keras.random.SeedGenerator(dropout.seed)


def add_dropout(
    layer: keras.Layer, attribute: str, dropout: keras.layers.Dropout
) -> None:
    """Gives a built layer a `Dropout` that it was made without."""
    with _unlocked(layer):
        setattr(layer, attribute, dropout)


def attention_rate(layer: keras.Layer) -> float | None:
    """The rate of dropout on a Keras attention layer's weights.

    `None` for any other layer. Keras 3.15: `MultiHeadAttention._dropout`,
    `GroupedQueryAttention.dropout`, beside a `Dropout` layer of the same rate,
    and `Attention.dropout`, which draws by a seed of its own.
    """
    if type(layer) is keras.layers.MultiHeadAttention:
        return layer._dropout
    if type(layer) in (
        keras.layers.GroupQueryAttention,
        keras.layers.Attention,
        keras.layers.AdditiveAttention,
    ):
        return layer.dropout
    return None


def set_attention_rate(layer: keras.Layer, rate: float) -> None:
    """Sets what `attention_rate` reads.

    Where a `Dropout` layer draws, it is one in the attention layer, with a
    rate of its own to set.
    """
    if type(layer) is keras.layers.MultiHeadAttention:
        layer._dropout = rate
        return
    layer.dropout = rate
    simple = isinstance(layer, keras.layers.Attention)
    if simple and rate and getattr(layer, "seed_generator", None) is None:
        with _unlocked(layer):
            layer.seed_generator = keras.random.SeedGenerator(layer.seed)


def uses_flash_attention(layer: keras.Layer) -> bool:
    """Whether a Keras attention layer was asked for what has no dropout."""
    return bool(getattr(layer, "_flash_attention", None))


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


def preset_class(preset: str, file: str) -> type | None:
    """The class that a file of a preset describes.

    The public `from_preset` asks for a class first, and nothing public tells
    which task, or whether any, a preset holds. `preset_utils` reads folders
    and names alike. KerasHub 0.32.

    Args:
        preset: A folder, or a name as KerasHub takes it.
        file: Of the preset, such as `"task.json"`.

    Returns:
        The registered class; `None` if there is no such file, or if it is
        another library's, for a preset may be in another format.

    Raises:
        ValueError: If no class is registered under the name in the file.
    """
    if not preset_utils.check_file_exists(preset, file):
        return None
    config = preset_utils.load_json(preset, file)
    if "registered_name" not in config:
        return None
    return preset_utils.check_config_class(config)


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


def seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """The states of all random seeds in a layer and below it, each once.

    The public `variables` has them among all others.
    """
    seeds = [seed for each in all_layers(layer) for seed in _seeds(each)]
    return list({id(seed): seed.state for seed in seeds}.values())


def has_lora(layer: keras.Layer) -> bool:
    """Whether adapters are enabled on the layer itself.

    `lora_enabled` is set by Dense, EinsumDense, Embedding and the
    convolutions, 3.15.
    """
    return bool(getattr(layer, "lora_enabled", False))


def rows_of_quantized(layer: keras.layers.EinsumDense, index):
    """Float kernels of some rows of a stacked int8 `EinsumDense`.

    Under int8 the public `kernel` is the integers; `kernel_scale`, shaped for
    the einsum's output, turns them back. Row by row, so that only the rows
    asked for become floats. Keras 3.15.

    Args:
        layer: `EinsumDense("end,edf->enf")`, built and quantized.
        index: int32 `(N,)`, rows of the first kernel axis; one past the last
            stands for any.

    Returns:
        `(N, D, F)` in the layer's compute dtype, adapters merged.

    Raises:
        NotImplementedError: Under a quantization mode other than int8.
    """
    if layer.quantization_mode != "int8":
        raise NotImplementedError(
            "The dropless engine reads expert kernels one by one, which works "
            "for float and int8 kernels. Received: layer "
            f"{layer.path!r} with quantization mode "
            f"{layer.quantization_mode!r}. Build the layer with "
            'dispatch="capacity" or dispatch="dense".'
        )
    dtype = layer.compute_dtype
    index = ops.minimum(index, layer._kernel.shape[0] - 1)
    kernel = ops.cast(ops.take(layer._kernel, index, axis=0), dtype)
    scale = ops.take(layer.kernel_scale, index, axis=0)
    # The scale comes as the einsum's output would need it: (E, 1, F).
    scale = ops.reshape(scale, (-1, 1, kernel.shape[-1]))
    kernel = kernel / ops.cast(scale, dtype)
    if layer.lora_enabled:
        a = ops.take(layer.lora_kernel_a, index, axis=0)
        update = ops.matmul(a, layer.lora_kernel_b)
        update = update * (layer.lora_alpha / layer.lora_rank)
        kernel = kernel + ops.cast(update, dtype)
    return kernel


def look_before_quantizing(look: Callable) -> None:
    """Calls `look` with a whole model before Keras quantizes any of it.

    `Model.quantize` changes one layer after the other and asks none of them
    before; what a layer then refuses leaves a model half changed. There is no
    hook in front of that walk, and what a plain functional model calls is the
    class's own method: so the method is put behind one that looks first. It
    gets its mode and config resolved by `Layer.__new__`. Keras 3.15.

    Args:
        look: `(model, mode, config, chosen) -> None`, which raises to refuse;
            `chosen(layer)` says whether the `filters` let a layer through.
    """
    original = keras.Model.quantize

    @functools.wraps(original)
    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        def chosen(layer):
            return should_quantize_layer(layer, filters)

        look(self, mode, config, chosen)
        return original(
            self, mode=mode, config=config, filters=filters, **kwargs
        )

    keras.Model.quantize = quantize


def optimizer_slots(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, list[keras.Variable | None]]:
    """An optimizer's variables that belong to model variables.

    Attribute by attribute, in the order of the model variables that it was
    built with: Keras's optimizers hold them in lists. Keras 3.15.
    """
    count = len(optimizer._trainable_variables)
    return {
        name: list(value)
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and name not in ("_variables", "_trainable_variables")
        and len(value) == count
        and all(isinstance(v, keras.Variable | None) for v in value)
    }


def optimizer_scalars(
    optimizer: keras.optimizers.Optimizer,
) -> dict[str, keras.Variable]:
    """An optimizer's variables that belong to no model variable.

    Such as `iterations`, a learning rate, the scale of a loss. Keras 3.15.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, keras.Variable)
    }


def optimizer_of_step() -> keras.optimizers.Optimizer | None:
    """The optimizer of the model whose `train_step` is running, if one is.

    Nothing tells a layer. Keras's call context knows the outermost layer that
    was called, but on JAX `Model.stateless_call` starts below the model. So
    the model is looked for among the callers, as the first argument of a
    `train_step`: the outermost, which holds the others. Where a step is
    compiled this runs when it is traced. Keras 3.15.
    """
    found = None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # AutoGraph calls its version of a function `tf__train_step`.
        if code.co_name.endswith("train_step") and code.co_argcount:
            model = frame.f_locals.get(code.co_varnames[0])
            if isinstance(model, keras.Model):
                found = getattr(model, "optimizer", None) or found
        frame = frame.f_back
    return found


def whole(counter: keras.Variable) -> int:
    """The value of a counter such as `optimizer.iterations`.

    `int` does not read what `tf.distribute` mirrors over devices. Keras 3.15.
    """
    return int(ops.convert_to_numpy(counter))


def optimizer_targets(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """The model variables that an optimizer was built with. Keras 3.15."""
    return list(optimizer._trainable_variables)


def decays(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> bool:
    """Whether the optimizer's weight decay, if any, is for this variable.

    `exclude_from_weight_decay` is in no optimizer's config. Keras 3.15.
    """
    return optimizer._use_weight_decay(variable)


class FreshSlots:
    """For an optimizer some of whose slots start late.

    Bias correction and decay in Keras's optimizers count `iterations`, for all
    variables alike. A mixin that counts from the start of the slots instead
    for the variables that came later; learning rates go on as they were. All
    updates of a step pass `_backend_update_step`, which torch and TensorFlow
    override. Keras 3.15.

    Args:
        fresh: Numbers of the late variables among those it is built with.
        fresh_since: `iterations` when their slots started, integer.
    """

    def __init__(self, *args, fresh=(), fresh_since=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fresh = tuple(fresh)
        self.fresh_since = int(fresh_since)
        self._counts_fresh = False

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        if hasattr(self, "_u_product"):  # Nadam's own bias correction
            self._fresh_u_product = keras.Variable(
                1.0, dtype=self._u_product.dtype, trainable=False
            )

    @property
    def iterations(self):
        count = super().iterations
        if not self._counts_fresh:
            return count
        own = count - self.fresh_since
        # Whoever sets the count back starts all slots anew, at once. Fewer
        # than no steps would make bias correction NaN.
        return ops.where(own < 0, ops.convert_to_tensor(count), own)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        parts = ([], [])
        for pair in zip(grads, trainable_variables, strict=True):
            late = self._get_variable_index(pair[1]) in self.fresh
            parts[late].append(pair)
        for late, part in enumerate(parts):
            if part:
                self._count_fresh(bool(late))
                super()._backend_update_step(
                    [pair[0] for pair in part],
                    [pair[1] for pair in part],
                    learning_rate,
                )
                self._count_fresh(False)

    def _count_fresh(self, late):
        if late == self._counts_fresh:
            return
        # Past Keras's `__setattr__`, which would track the variables again.
        object.__setattr__(self, "_counts_fresh", late)
        if hasattr(self, "_u_product"):
            both = self._u_product, self._fresh_u_product
            object.__setattr__(self, "_u_product", both[1])
            object.__setattr__(self, "_fresh_u_product", both[0])

    def get_config(self):
        return {
            **super().get_config(),
            "fresh": list(self.fresh),
            "fresh_since": self.fresh_since,
        }


class FactorsByVariable:
    """For an optimizer that treats some variables' gradients or rates apart.

    A mixin, to stand before the optimizer's class. Gradients pass
    `_backend_apply_gradients` unscaled and in front of accumulation and
    clipping; updates pass `update_step` one by one or, on torch, all at once
    `_parallel_update_step`; weight decay asks for the learning rate itself.
    Keras 3.15.

    Attributes:
        gradient_scales: Floats in the order of the variables that the
            optimizer is built with.
        rate_scales: The same for the learning rate.
        proportional: Whether an update is the learning rate times something.
            Where it is not, what it did to the variable is scaled.
    """

    gradient_scales = ()
    rate_scales = ()
    proportional = True
    _rate_scale = 1.0

    def _backend_apply_gradients(self, grads, trainable_variables):
        factors = [
            self.gradient_scales[self._get_variable_index(variable)]
            for variable in trainable_variables
        ]
        scaled = [
            gradient if factor == 1 else ops.multiply(gradient, factor)
            for gradient, factor in zip(grads, factors, strict=True)
        ]
        super()._backend_apply_gradients(scaled, trainable_variables)

    def _get_current_learning_rate(self):
        rate = super()._get_current_learning_rate()
        return rate if self._rate_scale == 1 else rate * self._rate_scale

    def _apply_weight_decay(self, variables):
        decaying = [v for v in variables if self._use_weight_decay(v)]
        for factor, part in self._by_rate(decaying):
            self._rate_scale = factor
            super()._apply_weight_decay([decaying[n] for n in part])
        self._rate_scale = 1.0

    def update_step(self, gradient, variable, learning_rate):
        factor = self._rate_scale_of(variable)
        if factor == 1:
            super().update_step(gradient, variable, learning_rate)
        elif factor and self.proportional:
            super().update_step(gradient, variable, learning_rate * factor)
        else:
            # With a rate of 0 Ftrl would divide by it, and the memory of
            # momentum, which is of rates times gradients, would be lost.
            before = ops.copy(ops.convert_to_tensor(variable))
            super().update_step(gradient, variable, learning_rate)
            after = ops.convert_to_tensor(variable)
            self.assign(variable, before + factor * (after - before))

    def _parallel_update_step(self, grads, variables, learning_rate):
        # Nadam's own step counts itself, and must not count every part.
        scalars = optimizer_scalars(self).values()
        before = [(v, ops.copy(v.value)) for v in scalars]
        for factor, part in self._by_rate(variables):
            for variable, value in before:
                variable.assign(value)
            own = [variables[n] for n in part]
            still = [] if factor else [(v, ops.copy(v.value)) for v in own]
            super()._parallel_update_step(
                [grads[n] for n in part], own, learning_rate * (factor or 1.0)
            )
            for variable, value in still:
                variable.assign(value)

    def _rate_scale_of(self, variable):
        return self.rate_scales[self._get_variable_index(variable)]

    def _by_rate(self, variables):
        """The positions of the variables, factor by factor."""
        parts = {}
        for position, variable in enumerate(variables):
            factor = self._rate_scale_of(variable)
            parts.setdefault(factor, []).append(position)
        return list(parts.items())


def copy_decay_exclusions(
    old: keras.optimizers.Optimizer, new: keras.optimizers.Optimizer
) -> None:
    """Lets `new` spare from weight decay what `old`, its like, spares.

    `exclude_from_weight_decay` is in no optimizer's config. Keras 3.15.
    """
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def compiled_with(model: keras.Model) -> dict:
    """What `compile` was given, as live objects, and what was set since.

    Keras's own record, `get_compile_config`, holds serialised copies: a plain
    function does not come back from one. A later `compile` without a loss or
    without metrics keeps the earlier ones, which the record does not know.
    `Trainer._compile_loss` and `_compile_metrics`, 3.15.

    Returns:
        Arguments of `compile`; the optimizer is the one that trains, with a
        loss scale where Keras added it.
    """
    loss, metrics = model._compile_loss, model._compile_metrics
    given = {
        "optimizer": getattr(model, "optimizer", None),
        "loss": None,
        "loss_weights": None,
        "metrics": None,
        "weighted_metrics": None,
        "run_eagerly": model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "jit_compile": model.jit_compile and not model.run_eagerly,
    }
    if loss is not None:
        given["loss"] = loss._user_loss
        given["loss_weights"] = loss._user_loss_weights
    if metrics is not None:
        given["metrics"] = metrics._user_metrics
        given["weighted_metrics"] = metrics._user_weighted_metrics
    return given


def spared_from_decay(
    optimizer: keras.optimizers.Optimizer,
    variable: keras.Variable,
    by_name_only: bool = False,
) -> bool:
    """Whether `exclude_from_weight_decay` names the variable.

    As `decays`, but leaves nothing in the optimizer's cache, which goes by
    `id` and must not hold variables of another model. Keras 3.15.

    Args:
        optimizer: Built or not.
        variable: Of any model.
        by_name_only: Whether `var_names` alone count; for a variable that the
            optimizer cannot have been given.
    """
    spared = getattr(optimizer, "_exclude_from_weight_decay", ())
    if not by_name_only and optimizer._var_key(variable) in spared:
        return True
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return pattern is not None and bool(re.search(pattern, variable.name))


def learning_rate_of(optimizer: keras.optimizers.Optimizer):
    """A schedule or function as it was given; a constant one as a float.

    The public `learning_rate` gives its present value. Keras 3.15.
    """
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable) or ops.is_tensor(rate):
        return float(ops.convert_to_numpy(rate))
    return rate


def without_rate(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """A view of an optimizer whose `get_config` does not ask for the rate.

    A schedule of the user's may have no config. Only for reading: it has the
    optimizer's own variables. Past Keras's `__setattr__`, which would track.
    Keras 3.15.
    """
    view = object.__new__(type(optimizer))
    view.__dict__.update(vars(optimizer), _learning_rate=None)
    return view


def wrapped_function(metric: keras.metrics.Metric):
    """`(function, its arguments)` of a `MeanMetricWrapper`. Keras 3.15."""
    return metric._fn, dict(metric._fn_kwargs)


def optimizers_by_path(optimizer: keras.optimizers.MultiOptimizer):
    """A `MultiOptimizer`'s `(map, default, {path: optimizer})`.

    `None` where a function chooses, of which nothing is known. 3.15.
    """
    chosen = optimizer._optimizer_map
    if not hasattr(chosen, "default_optimizer"):
        return None
    return chosen, chosen.default_optimizer, dict(chosen._optimizer_map)


class MuonOfExperts:
    """For a Muon that also serves stacks of experts' kernels.

    Keras's Muon leaves all but matrices to AdamW, and its scale reads a
    matrix's shape from the front. Its Newton-Schulz iteration takes stacks as
    they are. Keras 3.15.
    """

    def _should_use_adamw(self, variable):
        stacked = len(variable.shape) == 3 and min(variable.shape[1:]) > 1
        if not (stacked and variable.name == "kernel"):
            return super()._should_use_adamw(variable)
        return any(re.search(key, variable.path) for key in self.exclude_layers)

    def lr_adjust(self, x):
        if self.rms_rate is None:
            return x
        return x * float(max(x.shape[-2:])) ** 0.5 * self.rms_rate


def _is_stack_of_experts(optimizer, variable):
    """Whether the variable has a leading axis of experts.

    TensorFlow passes its own variable, which has no path: the optimizer knows
    the Keras variable at the same place. Keras 3.15.
    """
    known = optimizer._trainable_variables
    variable = known[optimizer._get_variable_index(variable)]
    return len(variable.shape) == 3 and bool(_STACK.search(variable.path))


class AdafactorOfExperts:
    """For an Adafactor that takes every expert for itself.

    Keras's factors the last two axes, which leaves experts apart, but takes
    the size of the parameters and that of the update, by which it scales and
    clips, over the whole stack. Both go through `_rms`. Keras 3.15.
    """

    _rms_axes = None

    def update_step(self, gradient, variable, learning_rate):
        stacked = _is_stack_of_experts(self, variable)
        self._rms_axes = (1, 2) if stacked else None
        super().update_step(gradient, variable, learning_rate)

    def _rms(self, x):
        if self._rms_axes is None:
            return super()._rms(x)
        squares = ops.mean(ops.square(x), axis=self._rms_axes, keepdims=True)
        return ops.sqrt(squares)


class LambOfExperts:
    """For a Lamb that takes every expert for itself.

    Keras's scales the update by the norm of the whole stack. What it made of
    its slots is kept, and the update done again from them. Keras 3.15.
    """

    def update_step(self, gradient, variable, learning_rate):
        before = ops.copy(ops.convert_to_tensor(variable))
        super().update_step(gradient, variable, learning_rate)
        if not _is_stack_of_experts(self, variable):
            return
        number = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, before.dtype)
        first = ops.convert_to_tensor(self._momentums[number])
        second = ops.convert_to_tensor(self._velocities[number])
        first = first / (1.0 - ops.power(self.beta_1, step))
        second = second / (1.0 - ops.power(self.beta_2, step))
        update = first / (ops.sqrt(second) + self.epsilon)

        def norm(x):
            squares = ops.sum(ops.square(x), axis=(1, 2), keepdims=True)
            return ops.sqrt(squares)

        size, length = norm(before), norm(update)
        both = ops.logical_and(size > 0, length > 0)
        ones = ops.ones_like(length)
        ratio = ops.where(both, size / ops.where(both, length, ones), ones)
        rate = ops.cast(learning_rate, before.dtype)
        self.assign(variable, before - ratio * rate * update)

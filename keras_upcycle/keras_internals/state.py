"""Seeds and counters in files, and programs that must be compiled anew."""

import keras

from keras_upcycle.keras_internals.layers import all_layers, unlocked


def seed_generators(layer):
    """The layer's own seed generators; an `UnsavedState` holds no seed. 3.15"""
    return [
        seed
        for seed in layer._seed_generators
        if not isinstance(seed, UnsavedState)
    ]


def seed_of(layer: keras.layers.Dropout) -> keras.Variable | None:
    """The state of a `Dropout`'s random numbers; none at rate 0. 3.15."""
    generator = getattr(layer, "seed_generator", None)
    return None if generator is None else generator.state


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

    def other(self, number):
        """A seed of other numbers, one for each `number`, a scalar tensor."""
        made = object.__new__(DrawnSeed)
        made._initial_seed = None
        more = keras.ops.stack([keras.ops.zeros_like(number), number])
        made._drawn = self._drawn + keras.ops.cast(more, self._drawn.dtype)
        return made


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
        raise TypeError(
            "A seed must draw random numbers. Received: the state "
            f"{self.name!r}, which holds counters. Use a "
            "`keras.random.SeedGenerator`."
        )


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
    with unlocked(layer):
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


def seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """The states of all random seeds in a layer and below it, each once.

    The public `variables` has them among all others.
    """
    seeds = [
        seed for each in all_layers(layer) for seed in seed_generators(each)
    ]
    return list({id(seed): seed.state for seed in seeds}.values())

"""Noise and dropout go on where a file left off."""

import numpy as np
from keras import ops

from keras_upcycle import keras_internals

_KEY = "seeds"


class KeepsRandomState:
    """Mixed into a layer: its files hold the states of all seeds in it.

    Keras writes no random state into any file, so noise and dropout would
    start again when training is resumed from one. Here they go on. A file
    without states, or with those of another number of seeds, loads as ever
    and leaves the seeds alone. States are int64 in the file, whatever a
    backend's are.
    """

    def save_own_variables(self, store):
        super().save_own_variables(store)
        states = keras_internals.seed_states(self)
        if states:
            values = [ops.convert_to_numpy(state.value) for state in states]
            store[_KEY] = np.stack(values).astype("int64")

    def load_own_variables(self, store):
        keys = list(store.keys())
        super().load_own_variables({k: store[k] for k in keys if k != _KEY})
        states = keras_internals.seed_states(self)
        values = store[_KEY] if _KEY in keys else ()
        if len(values) == len(states):
            for state, value in zip(states, values, strict=True):
                state.assign(value.astype(state.dtype))

"""Noise and dropout go on where a file left off.

A training run that was killed ends as if it had not been, to the last bit, if
the script is started again as it was and `fit` gets, for a built model,

    keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)

and data whose batches depend on nothing but their number in the epoch (a
`keras.utils.PyDataset` with `shuffle=False`, or arrays with `shuffle=False`).
The state is saved at the end of an epoch, the default: restored from within
one, by `save_freq=n`, Keras trains that epoch from its start once more. To
lose less, let an epoch be short (`steps_per_epoch`, or a shorter data set).

What comes back: weights, the optimizer's memory with what `upcycle_optimizer`
and `scale_learning_rate` made of it, and the seeds of routers, of experts and
of all of a KerasHub model from `upcycle_model`. Dropout and augmentation in
layers of your own model start again, since Keras saves no seeds, and so does
all dropout without a `seed` on torch, which draws from torch's own generator.

`keras.callbacks.OrbaxCheckpoint` only saves. `model.load_weights(folder)`
after `model.optimizer.build(model.trainable_variables)` restores the same,
seeds in all layers too, in a process that made its layers in the same order;
pass `fit` an `initial_epoch`. It refuses models with equal paths, as T5's are.
"""

import numpy as np
from keras import ops

from keras_upcycle import keras_internals

_KEY = "seeds"
_STEPS = "step_state_"


class KeepsRandomState:
    """Mixed into a layer: its files hold the states of all seeds in it.

    Keras writes no random state into any file, so noise and dropout would
    start again when training is resumed from one. Here they go on. A file
    without states, or with those of another number of seeds, loads as ever
    and leaves the seeds alone. States are int64 in the file, whatever a
    backend's are. What routers gather over the batches of one
    optimizer step, the `StepState`s, goes with them.
    """

    # Seeds are variables of layers, for who copies a layer by its variables.
    writes_variables_only = True

    def save_own_variables(self, store):
        super().save_own_variables(store)
        states = keras_internals.seed_states(self)
        if states:
            values = [ops.convert_to_numpy(state.value) for state in states]
            store[_KEY] = np.stack(values).astype("int64")
        for number, state in enumerate(keras_internals.step_states(self)):
            value = ops.convert_to_numpy(state.state.value)
            store[f"{_STEPS}{number}"] = value

    def load_own_variables(self, store):
        keys = list(store.keys())
        super().load_own_variables(
            {
                key: store[key]
                for key in keys
                if key != _KEY and not key.startswith(_STEPS)
            }
        )
        states = keras_internals.seed_states(self)
        values = store[_KEY] if _KEY in keys else ()
        if len(values) == len(states):
            for state, value in zip(states, values, strict=True):
                state.assign(value.astype(state.dtype))
        for number, state in enumerate(keras_internals.step_states(self)):
            key = f"{_STEPS}{number}"
            if key in keys and store[key].shape == tuple(state.state.shape):
                state.state.assign(np.array(store[key]))

"""Experts over two processes with four devices each; run as a script, on JAX.

`two_processes.py PROCESS PORT FOLDER`, once for each of two processes that
start together, or with a PORT of 0 in one process with all eight devices. The
first prints what it found, a line of JSON each.
"""

import json
import os
import sys
from pathlib import Path

PROCESS, PORT = int(sys.argv[1]), int(sys.argv[2])
FOLDER = Path(sys.argv[3])
PROCESSES = 2 if PORT else 1
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={8 // PROCESSES}"
)

import jax

if PORT:  # before Keras is imported
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import keras
import numpy as np
from keras import layers

import keras_upcycle as ku

EXPERTS, BATCH, STEPS, EPOCHS = 8, 16, 2, 2
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def say(name, value):
    if not PROCESS:
        print(json.dumps({"name": name, "value": value}), flush=True)


class OwnPart(keras.utils.PyDataset):
    """Of each batch the examples of this process, made by their number."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        x = rng.normal(size=(BATCH, 6, 16)).astype("float32")
        y = rng.integers(0, 3, BATCH)
        own = BATCH // PROCESSES
        part = slice(PROCESS * own, (PROCESS + 1) * own)
        return x[part], y[part]


def sparse_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 16))
    hidden = layers.Dense(24, activation="gelu", name="up")(inputs)
    x = inputs + layers.Dense(16, name="down")(hidden)
    x = layers.GlobalAveragePooling1D()(x)
    dense = keras.Model(inputs, layers.Dense(3, name="head")(x))
    router = ku.TopKRouter(2, group="example", noise_stddev=0.1, seed=1)
    moe = ku.upcycle_model(dense, EXPERTS, router=router, layers="all", seed=0)
    moe.compile(keras.optimizers.Adam(1e-2), LOSS)
    return moe


def fit(moe, first, last, *callbacks):
    history = moe.fit(
        OwnPart(),
        initial_epoch=first,
        epochs=last,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return history.history["loss"]


def spread(shape):
    # Names are counted, and Orbax finds variables by name; the distribution
    # goes as well.
    keras.utils.clear_session(free_memory=False)
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, ["data", "expert"], devices)
    distribution = ku.distribution.ExpertParallel(
        mesh, auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)


def restored():
    spread((1, 8))
    moe = sparse_model()
    fit(moe, 0, 1)  # builds what is restored
    assert ku.distribution.load_checkpoint(moe, FOLDER) == EPOCHS
    return moe


def main():
    spread((1, 8))
    if PORT:
        moe = sparse_model()
        callback = keras.callbacks.OrbaxCheckpoint(
            FOLDER, save_on_background=False
        )
        say("losses", fit(moe, 0, EPOCHS, callback))
        say("next", fit(moe, EPOCHS, EPOCHS + 1))
        try:
            moe.save_weights(FOLDER.with_name(f"of{PROCESS}.weights.h5"))
        except ValueError as error:
            say("refused", str(error))
        else:
            say("refused", "nothing was refused")
    else:
        say("losses", fit(sparse_model(), 0, EPOCHS))
    say("restored", fit(restored(), EPOCHS, EPOCHS + 1))
    if not PORT:
        return
    # Each process has all experts, and may write them.
    spread((2, 4))
    moe = sparse_model()
    path = FOLDER.with_name(f"whole{PROCESS}.weights.h5")
    moe.save_weights(path)
    say("wrote", path.exists())


if __name__ == "__main__":
    main()

"""A training run that is killed and started again, and one that is not.

`python tests/resumable_training.py FOLDER CALLBACK`: what a user's script
does, anew in every process: build, upcycle, compile, restore, `fit`. All state
at the end is in `FOLDER/whole.npz` and `FOLDER/resumed.npz`.
"""

import os
import signal
import sys
from pathlib import Path

import conftest  # noqa: F401  the backend's settings, as in other tests
import keras
import models
import numpy as np

import keras_upcycle as ku

EPOCHS, STEPS, BATCH = 2, 3, 4
# Before anything is saved, and in the second epoch; then to the end.
KILLS = (2, 5, None)
# Unseeded dropout is torch's own there, and torch keeps its state to itself.
DROPOUT = 0.0 if keras.backend.backend() == "torch" else 0.2


class ByStep(keras.utils.PyDataset):
    """Batches that depend on nothing but their number."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        x = models.images(BATCH, seed=index)
        y = np.random.default_rng(index).integers(models.CLASSES, size=BATCH)
        return x, y


class KilledAt(keras.callbacks.Callback):
    """SIGKILL at the end of a step, counted over all epochs from 1."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch * STEPS + batch + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def sparse_model():
    """Upcycled, with the optimizer's memory, noise and dropout everywhere."""
    keras.utils.set_random_seed(1)
    backbone = models.vit_backbone(dropout_rate=DROPOUT)
    dense = models.vit_classifier(backbone, dropout=DROPOUT, preprocessor=None)
    models.fixed(dense)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.9)
    adam = keras.optimizers.Adam(schedule)
    adam.build(dense.trainable_variables)
    rng = np.random.default_rng(2)
    for slot in adam.variables[1:]:
        slot.assign(np.abs(rng.normal(scale=0.1, size=slot.shape)))
    adam.iterations.assign(5)
    router = ku.TopKRouter(
        top_k=1,
        noise_stddev=keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.9),
        temperature=keras.optimizers.schedules.PolynomialDecay(2.0, 6, 0.5),
        normalize=False,
    )
    moe = ku.upcycle_model(dense, 3, router=router, seed=3)
    optimizer = ku.upcycle_optimizer(adam, dense, moe)
    optimizer = ku.scale_learning_rate(optimizer, {"/router/": 2.0})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    moe.compile(optimizer, loss, jit_compile="auto")
    return moe


def backup_and_restore(moe, folder):
    callback = keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)
    return callback, 0


def orbax(moe, folder):
    """What `fit` needs, and where it begins: Orbax's callback only saves."""
    saved = [int(f.name) for f in folder.glob("*") if f.name.isdigit()]
    if saved:
        moe.optimizer.build(moe.trainable_variables)
        moe.load_weights(folder)
    callback = keras.callbacks.OrbaxCheckpoint(folder, save_on_background=False)
    return callback, max(saved, default=-1) + 1


def run(make_callback, folder, kill_at):
    moe = sparse_model()
    callback, initial_epoch = make_callback(moe, folder)
    moe.fit(
        ByStep(),
        epochs=EPOCHS,
        initial_epoch=initial_epoch,
        shuffle=False,
        callbacks=[callback, KilledAt(kill_at)],
        verbose=0,
    )
    variables = [*moe.variables, *moe.optimizer.variables]
    state = [keras.ops.convert_to_numpy(v.value) for v in variables]
    np.savez(folder.with_suffix(".npz"), *state)


def in_a_process(*arguments):
    """The exit status of a run in a process of its own.

    Forked before anything was computed, which spares importing it all again.
    """
    child = os.fork()
    if not child:
        run(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    chosen = {"backup": backup_and_restore, "orbax": orbax}[sys.argv[2]]
    for name, kills in (("whole", [None]), ("resumed", KILLS)):
        for kill_at in kills:
            status = in_a_process(chosen, Path(sys.argv[1], name), kill_at)
            expected = -signal.SIGKILL if kill_at else 0
            if status != expected:
                sys.exit(f"{name}, killed at {kill_at}: exit status {status}")

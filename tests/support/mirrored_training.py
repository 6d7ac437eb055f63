"""Two replicas of `tf.distribute` train as one device does; run as a script.

Each line has a name and the largest difference between the two, relative to
what training changed. Losses, capacity and dropout are of a replica's own
tokens, so nothing of these is on here.
"""

import contextlib
import os
import warnings

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import models
import numpy as np
import tensorflow as tf

import keras_upcycle as ku

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

WIDTH = models.WIDTH
X = models.tokens(32, WIDTH)
Y = np.tanh(X[:, ::-1])


def router(make=ku.TopKRouter, **settings):
    settings.setdefault("load_balance_loss", 0.0)
    return make(2, capacity_factor=None, **settings)


def upcycled(optimizer, **settings):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    dense = keras.Model(inputs, keras.layers.Dense(WIDTH)(hidden))
    dense.compile(optimizer, "mse")
    dense.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    # Experts that differ: of copies a router's gradient is rounding alone.
    moe = ku.upcycle_model(
        dense,
        4,
        layers="all",
        seed=0,
        router=router(**settings),
        expert_init=ku.RandomNoise(stddev=0.1),
    )
    kernel = moe.layers[-1].router.kernel
    kernel.assign(np.random.default_rng(0).normal(size=kernel.shape))
    return dense, moe


def trained(optimizer, scale=None, frozen=None, **settings):
    """A sparse model that goes on where the dense one was, and its monitor."""
    dense, moe = upcycled(optimizer(), **settings)
    if frozen:
        ku.freeze(moe, frozen)
    before = models.weights(moe)
    carried = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    if scale:
        carried = ku.scale_learning_rate(carried, scale)
    moe.compile(carried, "mse")
    monitor = ku.RouterMonitor(every=1)
    moe.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[monitor])
    return moe, before, monitor


CASES = {
    "adam": {"optimizer": lambda: keras.optimizers.Adam(1e-2)},
    "nadam": {"optimizer": lambda: keras.optimizers.Nadam(1e-2)},
    "adafactor": {"optimizer": lambda: keras.optimizers.Adafactor(1e-2)},
    "schedule": {
        "optimizer": lambda: keras.optimizers.SGD(
            ku.InverseSquareRoot(0.1, 6), momentum=0.9
        )
    },
    "scaled": {
        "optimizer": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        "scale": {"/router/": 0.1, "/experts/": 2.0},
    },
    "frozen": {
        "optimizer": lambda: keras.optimizers.Adam(1e-2),
        "frozen": "router",
    },
    "bias": {
        "optimizer": lambda: keras.optimizers.SGD(1e-3),
        "bias_update_rate": 0.01,
    },
    # Shares of all choices, and the mean of each replica's probabilities.
    "balance of a step": {
        "optimizer": lambda: keras.optimizers.SGD(1e-2),
        "load_balance_loss": 1.0,
        "balance_over": "step",
    },
    "temperature": {
        "optimizer": lambda: keras.optimizers.SGD(1e-2),
        "temperature": keras.optimizers.schedules.ExponentialDecay(2.0, 1, 0.7),
    },
    "vectors": {
        "optimizer": lambda: keras.optimizers.SGD(1e-3),
        "make": ku.DefaultMoERouter,
    },
    "vectors of the paper": {
        "optimizer": lambda: keras.optimizers.SGD(1e-3),
        "make": ku.DefaultMoERouter,
        "default_forward": "paper",
        "score_weighting": "none",
    },
}


def losses_of_replicas(strategy):
    """Each replica's own are in its loss, though each waits for the other."""

    def model():
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((WIDTH,))
        layers = []
        for weight in (1.0, 2.0):
            settings = {"load_balance_loss": weight, "bias_update_rate": 1e-9}
            layers.append(ku.MoEFeedForward(4, 8, router(**settings)))
            x = layers[-1](x)
        made = keras.Model(inputs, x)
        made.compile(keras.optimizers.SGD(0.0), "mse")
        for layer in layers:
            kernel = np.random.default_rng(0).normal(size=(WIDTH, 4))
            layer.router.kernel.assign(kernel)
        return made

    with strategy.scope():
        both = model()
    monitor = ku.RouterMonitor(every=1)
    found = both.fit(
        X, Y, batch_size=32, shuffle=False, verbose=0, callbacks=[monitor]
    )
    alone, expected, balance = model(), [], []
    for part in (slice(0, 16), slice(16, 32)):
        outputs = alone(X[part], training=True)
        own = [float(loss) for loss in alone.losses]
        gap = np.mean(np.square(outputs - Y[part]))
        expected.append(float(gap) + sum(own))
        balance.append(own[0])
    received = found.history["loss"][0], monitor.readings[0].losses
    for name, one, other in (
        ("losses of replicas", received[0], expected),
        ("losses read", received[1]["load_balance"], balance),
    ):
        print(name, abs(one - np.mean(other)) / np.mean(other), flush=True)


def main():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    losses_of_replicas(strategy)
    for name, case in CASES.items():
        found = []
        for scope in (contextlib.nullcontext(), strategy.scope()):
            with warnings.catch_warnings(), scope:
                warnings.simplefilter("ignore")
                found.append(trained(**case))
        (alone, before, one), (both, _, two) = found
        for old, a, b in zip(
            before, models.weights(alone), models.weights(both), strict=True
        ):
            moved = max(np.abs(a - old).max(), 1e-3)
            print(name, np.abs(a - b).max() / moved, flush=True)
        assert len(one.readings) == len(two.readings) == 4
        for a, b in zip(one.readings, two.readings, strict=True):
            assert (a.step, a.steps, a.tokens) == (b.step, b.steps, b.tokens)
            assert a.tokens == 8
            np.testing.assert_allclose(a.load, b.load, atol=1e-6)
            assert a.scheduled == b.scheduled
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)


if __name__ == "__main__":
    main()

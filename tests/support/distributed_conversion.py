"""Conversions under a distribution of 8 devices; run as a script, on JAX.

Keras compiles the initializers of variables above a size. It is lowered here,
so that small models meet what large ones do. Prints differences, name by name,
all of which should be next to nothing.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import keras
import models
import numpy as np
from keras.src.backend.jax import core

import keras_upcycle as ku
from keras_upcycle.state import first_values

INITS = {
    "copy": {"router": "top_k"},
    "drop_upcycling": {"router": "top_k"},
    "random_noise": {"router": "top_k"},
    "random": {"router": "top_k"},
    "feed_forward_slices": {"router": "ds_moe"},
    "shared_experts": {"router": "top_k"},
}


def pairs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((models.WIDTH,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(models.WIDTH)(hidden))


def converted(dense):
    return {
        name: ku.upcycle_model(
            dense, 4, layers="all", expert_init=name, seed=3, **settings
        )
        for name, settings in INITS.items()
    }


def spread(alone):
    """Each initialisation where experts are spread: nobody makes them all."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ["data", "expert"], devices)
    keras.distribution.set_distribution(ku.distribution.ExpertParallel(mesh))
    made_at_once = []
    whole = first_values.ByExpert.some

    def some(self, experts, shape, dtype=None):
        made_at_once.append(len(experts))
        return whole(self, experts, shape, dtype)

    first_values.ByExpert.some = some
    for name, moe in converted(pairs()).items():
        for found, expected in zip(
            models.weights(moe), alone[name], strict=True
        ):
            report(f"{name} spread as on one device", found, expected)
        (layer,) = models.mixtures(moe)
        for variable in layer.experts.weights:
            own = variable.value.addressable_shards[0].data.shape[0]
            assert own == 1, (name, variable.path, own)
    assert set(made_at_once) == {1}, made_at_once
    first_values.ByExpert.some = whole


def report(name, found, expected):
    gap = np.max(np.abs(np.asarray(found) - np.asarray(expected)))
    print(name, float(gap), flush=True)


def main():
    alone = {n: models.weights(m) for n, m in converted(pairs()).items()}
    distribution = keras.distribution.DataParallel()
    keras.distribution.set_distribution(distribution)
    assert core.should_shard_at_init  # what is replaced
    core.should_shard_at_init = lambda layout, shape: True

    spread(alone)
    keras.distribution.set_distribution(distribution)

    dense, x = pairs(), models.tokens(8, models.WIDTH)
    made = converted(dense)
    for name, moe in made.items():
        for found, expected in zip(
            models.weights(moe), alone[name], strict=True
        ):
            report(f"{name} as on one device", found, expected)
    one = ku.upcycle_model(dense, 1, layers="all", seed=0)
    one.compile("sgd", "mse")
    one.fit(x, x, verbose=0)  # in buffers of its own, not the dense model's
    moe = made["copy"]
    report("copy", models.output(moe, x), models.output(dense, x))
    back = ku.densify_model(moe, dense=dense)
    report("densify", models.output(back, x), models.output(dense, x))
    few, _ = ku.prune_experts(moe, x, num_experts=2)
    report("prune", models.output(few, x), models.output(dense, x))

    vit, x = models.vit_backbone(), models.images(8)
    moe = ku.upcycle_model(vit, 2, router="top_k", seed=0)
    report("vit", models.output(moe, x), models.output(vit, x))
    back = ku.densify_model(moe)
    report("vit back", models.output(back, x), models.output(vit, x))
    moe.compile("sgd", "mse")
    y = np.zeros(moe.output_shape[1:])[None].repeat(8, 0)
    moe.fit(x, y, verbose=0)
    assert moe.predict(x, verbose=0).shape == y.shape


if __name__ == "__main__":
    main()

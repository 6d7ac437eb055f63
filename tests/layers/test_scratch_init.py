"""A layer built new: every expert is drawn as a `Dense` of its own would be."""

import keras
import models
import numpy as np
import pytest
from keras import initializers, ops

import keras_upcycle as ku
from keras_upcycle.state import first_values

D, F, E = 24, 40, 6


def layer(kernel_initializer="glorot_uniform", **kwargs):
    settings = {"gated": True, "shared_intermediate_dim": 16, **kwargs}
    built = ku.MoEFeedForward(
        settings.pop("num_experts", E),
        F,
        kernel_initializer=kernel_initializer,
        **settings,
    )
    built.build((None, D))
    return built


def kernels(built):
    """By name, `(E, in, out)`."""
    return {
        f"{networks.name}_{role}": models.array(projection.kernel)
        for networks in built.networks
        for role, projection in networks.projections.items()
    }


def apart(arrays):
    """Whether no two have a number in common at the same place."""
    flat = [np.ravel(array)[:64] for array in arrays]
    return all(not np.any(a == b) for n, a in enumerate(flat) for b in flat[:n])


def variance_scaling(mode, **kwargs):
    return lambda: initializers.VarianceScaling(2.0, mode=mode, **kwargs)


RANDOM = {
    "name": lambda: "glorot_uniform",
    "config": lambda: initializers.serialize(initializers.HeUniform()),
    "class": lambda: initializers.GlorotNormal,
    "he": initializers.HeNormal,
    "lecun": initializers.LecunNormal,
    "fan_in": variance_scaling("fan_in"),
    "fan_out": variance_scaling("fan_out", distribution="uniform"),
    "fan_avg": variance_scaling("fan_avg", distribution="untruncated_normal"),
    "orthogonal": lambda: initializers.Orthogonal(gain=2.0),
    "truncated": lambda: initializers.TruncatedNormal(0.1, 0.5),
    "normal": initializers.RandomNormal,
    "uniform": lambda: initializers.RandomUniform(1.0, 2.0),
    "seeded": lambda: initializers.GlorotUniform(seed=3),
    "large_seed": lambda: initializers.GlorotUniform(seed=2**32 - 1),
    "generator": lambda: initializers.HeNormal(
        seed=keras.random.SeedGenerator(5)
    ),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_experts_are_as_large_as_a_dense_and_all_different(kind):
    found = kernels(layer(RANDOM[kind](), num_experts=16))
    for stack in found.values():
        own = keras.layers.Dense(
            stack.shape[2], kernel_initializer=RANDOM[kind]()
        )
        own.build((None, stack.shape[1]))
        dense = models.array(own.kernel)
        for statistic in (np.std, np.mean):
            expected = statistic(dense)
            assert statistic(stack) == pytest.approx(
                expected, abs=float(0.3 * np.std(dense))
            )
        assert np.abs(stack).max() <= 1.6 * np.abs(dense).max()
    assert apart([expert for stack in found.values() for expert in stack])


def test_every_kernel_is_what_the_initializer_gives_for_its_seed():
    given = initializers.HeNormal(seed=7)
    before = given.get_config()
    built = layer(given)
    for networks, prefix in zip(built.networks, ("", "shared_"), strict=True):
        for role, projection in networks.projections.items():
            stack = models.array(projection.kernel)
            for expert, kernel in enumerate(stack):
                own = first_values.of_expert(
                    given, f"{prefix}{role}_kernel", expert
                )
                again = initializers.HeNormal(seed=own.seed)
                np.testing.assert_array_equal(
                    kernel, models.array(again(kernel.shape, "float32"))
                )
    assert given.get_config() == before
    assert given.seed == 7
    for first, second in zip(
        kernels(built).values(),
        kernels(layer(initializers.HeNormal(seed=7))).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_orthogonal_experts_are_orthogonal():
    for stack in kernels(layer(initializers.Orthogonal(seed=1))).values():
        for kernel in stack:
            short = kernel if kernel.shape[0] < kernel.shape[1] else kernel.T
            np.testing.assert_allclose(
                short @ short.T, np.eye(len(short)), atol=1e-5
            )


def test_what_is_not_random_is_each_expert():
    def arange(shape, dtype=None):
        return ops.reshape(ops.arange(int(np.prod(shape)), dtype=dtype), shape)

    for initializer, expected in (
        ("identity", lambda shape: np.eye(*shape)),
        (initializers.Constant(0.5), lambda shape: np.full(shape, 0.5)),
        (arange, lambda shape: np.arange(np.prod(shape)).reshape(shape)),
    ):
        for stack in kernels(layer(initializer)).values():
            for kernel in stack:
                np.testing.assert_array_equal(kernel, expected(kernel.shape))


def test_biases_are_drawn_in_the_same_way():
    built = layer(bias_initializer=initializers.RandomNormal(1.0, 0.5, seed=2))
    biases = {
        f"{networks.stream}{role}_bias": models.array(projection.bias)
        for networks in built.networks
        for role, projection in networks.projections.items()
    }
    assert apart([row for bias in biases.values() for row in bias[:, 0, :16]])
    for name, bias in biases.items():
        for expert, row in enumerate(bias[:, 0]):
            own = first_values.of_expert(
                initializers.RandomNormal(1.0, 0.5, seed=2), name, expert
            )
            np.testing.assert_array_equal(
                row, models.array(own(row.shape, "float32"))
            )


def test_one_expert_is_a_dense_block():
    built = layer("lecun_normal", num_experts=1, shared_intermediate_dim=None)
    (up,) = kernels(built)["experts_up"]
    assert up.std() == pytest.approx(D**-0.5, rel=0.1)


class OwnSeed(initializers.Initializer):
    """Not one of Keras's, and its config holds no seed."""

    def __init__(self, seed=1):
        self.seed = seed

    def __call__(self, shape, dtype=None):
        value = np.random.default_rng(self.seed).normal(size=shape)
        return ops.cast(value, dtype)

    def get_config(self):
        return {}


def test_an_initializer_of_ones_own_gives_every_expert_its_numbers():
    found = kernels(layer(OwnSeed()))
    assert apart([expert for stack in found.values() for expert in stack])
    rng = np.random.default_rng(0)

    def function(shape, dtype=None):
        return ops.cast(rng.normal(size=shape), dtype)

    found = kernels(layer(function))
    assert apart([expert for stack in found.values() for expert in stack])


def test_a_function_of_the_wrong_shape_is_refused():
    def stacked(shape, dtype=None):
        return ops.ones((E, *shape), dtype)

    with pytest.raises(
        ValueError, match=rf"one expert[\s\S]*\({D}, {F}\)[\s\S]*\({E}, {D}, "
    ):
        layer(stacked)


@pytest.mark.parametrize("seed", [None, 4])
def test_a_config_and_a_file_keep_the_initializer(seed, tmp_path):
    given = initializers.VarianceScaling(0.5, "fan_out", seed=seed)
    built = layer(given)
    for part in (built, built.experts, built.experts.expert_up):
        assert part.kernel_initializer.get_config() == given.get_config()
    inputs = keras.Input((3, D))
    model = keras.Model(inputs, built(inputs))
    again = ku.MoEFeedForward.from_config(built.get_config())
    again.build((None, D))
    assert again.kernel_initializer.get_config() == given.get_config()
    if seed is not None:
        for a, b in zip(
            kernels(built).values(), kernels(again).values(), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    (read,) = models.mixtures(loaded)
    assert read.kernel_initializer.get_config() == given.get_config()
    models.assert_same_weights(loaded, model)


def test_set_random_seed_decides_what_is_drawn():
    drawn = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        drawn.append(kernels(layer())["experts_gate"])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.any(drawn[0] == drawn[2])


def test_a_conversion_draws_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an initializer was called")

    monkeypatch.setattr(initializers.GlorotUniform, "__call__", refuse)
    monkeypatch.setattr(first_values, "of_expert", refuse)
    built = ku.MoEFeedForward(2, 8)
    built.start_from(
        dict.fromkeys(
            ("up_kernel", "up_bias", "down_kernel", "down_bias"),
            lambda shape, dtype=None: ops.ones(shape, dtype),
        )
    )
    built.build((None, 4))
    assert all(np.all(k == 1.0) for k in kernels(built).values())

import keras
import numpy as np
import pytest

import keras_upcycle as ku


def rates(schedule, steps):
    return np.array([float(schedule(step)) for step in steps])


def reference(step, peak, warmup, linear):
    rate = peak * (warmup / max(step, warmup)) ** 0.5
    return rate * min(step / warmup, 1.0) if linear else rate


@pytest.mark.parametrize("warmup", ["linear", "constant"])
def test_rates_are_the_formula(warmup):
    schedule = ku.InverseSquareRoot(0.3, 20, warmup=warmup)
    steps = [0, 1, 19, 20, 21, 80, 100_000]
    expected = [reference(s, 0.3, 20, warmup == "linear") for s in steps]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)


def test_t5s_own_rate():
    schedule = ku.InverseSquareRoot(0.01, warmup="constant")
    steps = [0, 5000, 10_000, 1_000_000]
    expected = [max(step, 10_000) ** -0.5 for step in steps]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)


def test_a_cool_down_starts_without_a_step_and_ends_at_nothing():
    plain = ku.InverseSquareRoot(0.1, 10)
    cooling = plain.with_cooldown(start=40, steps=20)
    before = [0, 5, 10, 39, 40]
    np.testing.assert_array_equal(rates(cooling, before), rates(plain, before))
    falling = rates(cooling, range(40, 61))
    assert (np.diff(falling) < 0).all()
    np.testing.assert_allclose(falling[10], 0.5 * float(plain(50)), rtol=1e-6)
    assert rates(cooling, [60, 61, 1000]).tolist() == [0.0, 0.0, 0.0]


def test_config_round_trip():
    schedule = ku.InverseSquareRoot(
        0.2, 30, warmup="constant", cooldown_start=5, cooldown_steps=7
    )
    config = keras.saving.serialize_keras_object(schedule)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == schedule.get_config()


def test_it_goes_on_across_a_conversion():
    schedule = ku.InverseSquareRoot(0.05, 3)
    dense = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    dense.compile(keras.optimizers.Adam(schedule), "mse")
    x = np.ones((5, 4), "float32")
    dense.fit(x, x, batch_size=1, verbose=0)
    moe = ku.upcycle_model(dense, 2)
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    rate = float(optimizer.learning_rate)
    assert rate == pytest.approx(reference(5, 0.05, 3, True))
    assert rate == float(dense.optimizer.learning_rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"warmup": "cosine"}, "one of"),
        ({"cooldown_start": 5}, "needs `cooldown_start` and `cooldown_steps`"),
        ({"cooldown_start": -1, "cooldown_steps": 2}, "cooldown_start"),
        ({"cooldown_start": 1, "cooldown_steps": 0}, "cooldown_steps"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ku.InverseSquareRoot(**{"learning_rate": 0.1, **settings})


def test_keras_counts_batches_where_gradients_are_accumulated():
    """A reminder: what `InverseSquareRoot` says of it, once this fails."""
    schedule = ku.InverseSquareRoot(0.1, warmup_steps=8)
    sgd = keras.optimizers.SGD(schedule, gradient_accumulation_steps=4)
    variable = keras.Variable([1.0])
    sgd.build([variable])
    for _ in range(8):
        sgd.apply([keras.ops.ones((1,))], [variable])
    assert int(sgd.iterations) == 2
    assert float(sgd.learning_rate) == pytest.approx(0.1)

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


def big_vision(step, peak, warmup, timescale, total, cooldown):
    """`rsqrt` of google-research/big_vision, in float64."""
    rate = peak / np.sqrt(1 + max(step - warmup, 0) / timescale)
    rate *= min(1.0, step / warmup)
    return rate * min(1.0, (total - step) / cooldown) if cooldown else rate


@pytest.mark.parametrize("timescale", [3, 20, 700])
def test_a_timescale_of_its_own_is_that_of_big_vision(timescale):
    schedule = ku.InverseSquareRoot(0.3, 20, timescale=timescale)
    steps = [0, 1, 19, 20, 21, 80, 100_000]
    expected = [big_vision(s, 0.3, 20, timescale, None, 0) for s in steps]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)


def test_the_vision_schedule_of_sparse_upcycling():
    """Appendix A: peak 4e-4, 10,000 up, timescale 100,000, 50,000 down."""
    total = 1_000_000
    schedule = ku.InverseSquareRoot(4e-4, 10_000, timescale=100_000)
    schedule = schedule.with_cooldown(start=total - 50_000, steps=50_000)
    steps = [0, 5000, 10_000, 110_000, 310_000, 950_000, 975_000, total]
    expected = [
        big_vision(s, 4e-4, 10_000, 100_000, total, 50_000) for s in steps
    ]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)
    assert expected[2] == 4e-4  # the peak, where the warm-up ends
    assert expected[4] == pytest.approx(2e-4)  # three timescales later: half


def test_a_timescale_does_not_change_a_warm_up():
    for warmup in ("linear", "constant"):
        steps = range(21)
        plain = ku.InverseSquareRoot(0.3, 20, warmup=warmup)
        slow = ku.InverseSquareRoot(0.3, 20, warmup=warmup, timescale=500)
        np.testing.assert_allclose(
            rates(slow, steps), rates(plain, steps), rtol=1e-6
        )


def test_the_default_timescale_is_the_warm_up_to_the_bit():
    steps = [0, 7, 20, 21, 333, 10**8 + 1]
    np.testing.assert_array_equal(
        rates(ku.InverseSquareRoot(0.3, 20, timescale=20), steps),
        rates(ku.InverseSquareRoot(0.3, 20), steps),
    )


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


@pytest.mark.one_backend
def test_config_round_trip():
    schedule = ku.InverseSquareRoot(
        0.2,
        30,
        warmup="constant",
        timescale=90,
        cooldown_start=5,
        cooldown_steps=7,
    )
    config = keras.saving.serialize_keras_object(schedule)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == schedule.get_config()
    assert again.timescale == 90
    assert schedule.with_cooldown(50, 2).timescale == 90
    # A config written before there was a timescale.
    config = ku.InverseSquareRoot(0.2, 30).get_config()
    del config["timescale"]
    older = ku.InverseSquareRoot.from_config(config)
    assert float(older(60)) == float(ku.InverseSquareRoot(0.2, 30)(60))


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


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"warmup": "cosine"}, "one of"),
        ({"timescale": 0}, "`timescale` must be at least 1"),
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


@pytest.mark.one_backend
@pytest.mark.parametrize("timescale", [True, 2.5, "10"])
def test_a_timescale_is_an_integer(timescale):
    with pytest.raises(TypeError, match="`timescale` must be an integer"):
        ku.InverseSquareRoot(0.1, timescale=timescale)

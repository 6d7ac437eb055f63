"""The load-balancing loss of all batches of a step, by hand."""

import keras
import models
import numpy as np
import pytest
import reference

import keras_upcycle as ku

EXPERTS = 4


def layer_of(**settings):
    router = ku.TopKRouter(2, load_balance_loss=1.0, **settings)
    layer = ku.MoEFeedForward(EXPERTS, 8, router)
    layer.build((None, models.WIDTH))
    return models.set_routers(layer, 2)


def counted(layer, x):
    """How often each expert is chosen, and its mean probability."""
    logits = x.astype("float64") @ models.array(layer.router.kernel)
    decision = reference.top_k(logits, 2)
    p = np.stack([reference.softmax(row) for row in logits])
    return decision.requested.sum(0), p.mean(0)


def test_choices_are_counted_over_the_step_so_far():
    layer = layer_of(balance_over="step", batches_per_step=2)
    total = np.zeros(EXPERTS)
    for number in range(4):
        if number % 2 == 0:  # a new step
            total[:] = 0
        x = models.tokens(6, models.WIDTH, seed=number)
        layer(x, training=True)
        count, mean = counted(layer, x)
        total += count
        expected = EXPERTS * np.sum(total / total.sum() * mean)
        assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


def test_of_one_batch_it_is_the_loss_that_it_was():
    x = models.tokens(6, models.WIDTH)
    found = []
    for over in ("batch", "step"):
        layer = layer_of(balance_over=over)
        layer(x, training=True)
        found.append(float(sum(layer.losses)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    count, mean = counted(layer, x)
    assert found[0] == pytest.approx(
        EXPERTS * np.sum(count / count.sum() * mean), rel=1e-5
    )


@pytest.mark.one_backend("jax")
def test_fit_counts_the_batches_of_a_step_that_accumulates():
    """Compiled, with the number of batches that the optimizer says."""
    x = models.tokens(12, models.WIDTH)
    inputs = keras.Input((models.WIDTH,))
    layer = layer_of(balance_over="step", capacity_factor=None)
    model = keras.Model(inputs, layer(inputs))
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    monitor = ku.RouterMonitor(every=1)
    model.fit(
        x,
        x,
        batch_size=6,
        shuffle=False,
        verbose=0,
        callbacks=[monitor],
    )
    (first, p), (second, q) = (counted(layer, x[i : i + 6]) for i in (0, 6))
    both = first + second
    expected = [
        EXPERTS * np.sum(first / first.sum() * p),
        EXPERTS * np.sum(both / both.sum() * q),
    ]
    received = [reading.losses["load_balance"] for reading in monitor.readings]
    np.testing.assert_allclose(received, expected, rtol=1e-4)

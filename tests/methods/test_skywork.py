"""Skywork-MoE's router: its logits and the weight of its loss, by hand."""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku

EXPERTS, HIDDEN = 5, 6


def normalized(logits, stddev=1.0):
    logits = np.asarray(logits, "float64")
    centred = logits - logits.mean(-1, keepdims=True)
    return stddev * centred / logits.std(-1, keepdims=True)


def layer_of(**settings):
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN, ku.SkyworkRouter(**settings))
    layer.build((None, 5, models.WIDTH))
    models.randomized(layer, seed=1)
    layer.router.balance_share.assign(1.0)
    return models.set_routers(layer, 2)


@pytest.mark.parametrize("stddev", [1.0, 2.5])
@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_are_those_of_normalised_logits(normalize, stddev):
    layer = layer_of(normalize=normalize, logits_stddev=stddev)
    x = models.tokens(3, 5, models.WIDTH)
    expected = reference.moe(
        x,
        gradients.weights_of(layer),
        lambda logits, mask: reference.top_k(
            normalized(logits, stddev), 2, normalize=normalize
        ),
        layer.router.group,
    )
    np.testing.assert_allclose(
        models.output(layer, x), expected, rtol=1e-4, atol=1e-4
    )


def test_gradients_are_those_of_normalised_logits():
    """Differences of the oracle's own weights, in float64."""
    layer = layer_of(
        capacity_factor=5.0, load_balance_loss=0.0, normalize=False
    )
    x, cotangent = (models.tokens(2, 5, models.WIDTH, seed=s) for s in (0, 3))
    _, found = gradients.of_layer(layer, x, cotangent, training=True)
    weights = gradients.weights_of(layer)

    def total(kernel):
        outputs = reference.moe(
            x,
            {**weights, "router": kernel},
            lambda logits, mask: reference.top_k(
                normalized(logits), 2, normalize=False
            ),
            layer.router.group,
        )
        return np.sum(outputs * cotangent)

    kernel, step = weights["router"], 1e-5
    rng = np.random.default_rng(0)
    for _ in range(6):
        place = tuple(rng.integers(0, n) for n in kernel.shape)
        moved = np.zeros(kernel.shape)
        moved[place] = step
        slope = (total(kernel + moved) - total(kernel - moved)) / (2 * step)
        assert found["router/kernel"][place] == pytest.approx(
            slope, rel=1e-2, abs=1e-3
        )


def test_probabilities_are_as_sharp_whatever_the_kernels_size():
    layer = layer_of()
    x = models.tokens(3, 5, models.WIDTH)
    first = models.output(layer, x)
    layer.router.kernel.assign(
        50.0 * ops.convert_to_tensor(layer.router.kernel)
    )
    np.testing.assert_allclose(models.output(layer, x), first, atol=1e-4)
    layer.router.kernel.assign(ops.zeros(layer.router.kernel.shape))
    assert np.all(np.isfinite(models.output(layer, x)))


@pytest.mark.parametrize("mask", [False, True])
def test_the_weight_of_the_loss_follows_what_is_dropped(mask):
    settings = {"load_balance_loss": 0.3, "capacity_factor": 0.6}
    layer = layer_of(smoothing=0.9, drop_scale=0.5, **settings)
    router, share = layer.router, 1.0
    kernel = gradients.weights_of(layer)["router"]
    given = {}
    for step in range(3):
        x = models.tokens(3, 5, models.WIDTH, seed=step)
        real = np.ones((3, 5), bool)
        if mask:
            real = np.arange(5) < np.array([[5], [3], [2]])
            given = {"mask": ops.convert_to_tensor(real)}
        layer(x, training=True, **given)
        flat = normalized(x.reshape(-1, models.WIDTH) @ kernel)
        decision = reference.top_k(
            flat, 2, capacity_factor=0.6, mask=real.reshape(-1)
        )
        # The loss of a step has the weight from before it.
        p = np.stack([reference.softmax(row) for row in flat])[real.ravel()]
        f = decision.requested[real.ravel()].mean(0) / 2
        loss = EXPERTS * np.sum(f * p.mean(0))
        assert float(sum(layer.losses)) == pytest.approx(
            0.3 * share * loss, rel=1e-4
        )
        dropped = 1 - decision.processed.sum() / decision.requested.sum()
        assert dropped > 0
        share = 0.9 * share + 0.1 * min(0.5 * dropped / 0.3, 1.0)
        assert float(router.balance_share) == pytest.approx(share, rel=1e-5)
    before = float(router.balance_share)
    layer(x)
    assert float(router.balance_share) == before


@pytest.mark.one_backend
def test_the_weight_is_never_more_than_the_most():
    layer = layer_of(load_balance_loss=1e-4, capacity_factor=0.2)
    for _ in range(3):
        layer(models.tokens(3, 5, models.WIDTH), training=True)
    assert float(layer.router.balance_share) == pytest.approx(1.0)
    layer.router.trainable = False
    layer.router.balance_share.assign(0.5)
    layer(models.tokens(3, 5, models.WIDTH), training=True)
    assert float(layer.router.balance_share) == 0.5


@pytest.mark.one_backend
def test_a_weight_moves_once_a_step_of_several_batches():
    layer = layer_of(
        capacity_factor=0.6, batches_per_step=2, load_balance_loss=1.0
    )
    x = models.tokens(3, 5, models.WIDTH)
    layer(x, training=True)
    assert float(layer.router.balance_share) == 1.0
    layer(x, training=True)
    assert float(layer.router.balance_share) < 1.0


@pytest.mark.one_backend
def test_a_recipe_trains_and_files_keep_the_weight(tmp_path):
    dense = models.sequence_dense_pairs()
    moe = ku.upcycle_model(dense, 4, recipe="skywork")
    assert all(
        isinstance(layer.router, ku.SkyworkRouter)
        for layer in models.mixtures(moe)
    )
    x = models.tokens(8, 6, models.WIDTH)
    y = models.output(dense, x)
    assert models.relative_gap(models.output(moe, x), y) < 1e-5
    moe.compile("adam", "mse")
    moe.fit(x, y + 1.0, verbose=0, callbacks=[ku.RouterMonitor()])
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    for old, new in zip(
        models.mixtures(moe), models.mixtures(again), strict=True
    ):
        assert float(new.router.balance_share) == float(
            old.router.balance_share
        )
        assert new.router.get_config() == old.router.get_config()


@pytest.mark.one_backend
def test_what_it_cannot_follow_is_refused():
    with pytest.raises(ValueError, match="capacity_factor=None"):
        ku.SkyworkRouter(capacity_factor=None)
    with pytest.raises(ValueError, match="expert_groups"):
        ku.SkyworkRouter(expert_groups=[0, 0, 1, 1])
    inputs = keras.Input((5, models.WIDTH))
    layer = ku.MoEFeedForward(4, 8, ku.SkyworkRouter())
    moe = keras.Model(inputs, layer(inputs))
    with pytest.raises(ku.UpcycleError, match='router="copy"'):
        ku.grow_experts(moe, 8)

"""DenseMixer's gradient against its closed form, token by token in float64."""

import warnings

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers import dispatch

EXPERTS, HIDDEN = 5, 6
FORMS = {
    "normalized": {},
    "raw": {"normalize": False},
    "after_top_k": {"softmax": "after_top_k"},
    "top_1": {"top_k": 1},
}


def layer_of(engine="auto", **settings):
    settings = {
        "capacity_factor": None,
        "load_balance_loss": 0.0,
        "router_gradient": "dense_mixer",
        **settings,
    }
    layer = ku.MoEFeedForward(
        EXPERTS, HIDDEN, ku.TopKRouter(**settings), dispatch=engine
    )
    layer.build((None, 5, models.WIDTH))
    models.randomized(layer, seed=1)
    return models.set_routers(layer, 2, scale=0.5)


def expected_gradient(layer, x, cotangent, mask=None):
    """Of the router's kernel: `<c, f_i>`, or `<c, f_i - y> / P`."""
    weights = gradients.weights_of(layer)
    router = layer.router
    kernel = weights["router"]
    normalized = router.normalize or router.softmax == "after_top_k"
    total = np.zeros(kernel.shape)
    for place in np.ndindex(*x.shape[:2]):
        if mask is not None and not mask[place]:
            continue
        token = x[place].astype("float64")
        p = reference.softmax(token @ kernel)
        best = np.argsort(-p, kind="stable")[: router.top_k]
        f = np.stack(
            [reference.expert(token, weights, e) for e in range(EXPERTS)]
        )
        c = cotangent[place].astype("float64")
        by_p = f @ c
        if normalized:
            share = p[best].sum()
            y = (p[best] / share) @ f[best]
            by_p = (by_p - y @ c) / share
        by_logit = p * (by_p - p @ by_p)
        total += np.outer(token, by_logit)
    return total


@pytest.mark.thinned("form", "engine")
@pytest.mark.parametrize("engine", ["auto", *dispatch.ENGINES])
@pytest.mark.parametrize("form", FORMS)
def test_the_router_learns_from_every_expert(form, engine):
    layer = layer_of(engine, **FORMS[form])
    x, cotangent = (models.tokens(3, 5, models.WIDTH, seed=s) for s in (0, 3))
    _, found = gradients.of_layer(layer, x, cotangent, training=True)
    expected = expected_gradient(layer, x, cotangent)
    np.testing.assert_allclose(
        found["router/kernel"], expected, rtol=1e-3, atol=1e-4
    )
    assert np.abs(expected).max() > 0.1


def test_padding_teaches_nothing():
    layer = layer_of()
    x, cotangent = (models.tokens(3, 5, models.WIDTH, seed=s) for s in (0, 3))
    mask = np.arange(5) < np.array([[5], [3], [1]])
    cotangent = cotangent * mask[..., None]
    _, found = gradients.of_layer(
        layer, x, cotangent, mask=ops.convert_to_tensor(mask), training=True
    )
    np.testing.assert_allclose(
        found["router/kernel"],
        expected_gradient(layer, x, cotangent, mask),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.thinned("form")
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_all_other_gradients_are_top_ks(form):
    settings = {"capacity_factor": 0.7, **FORMS[form]}
    layer, plain = (
        layer_of(router_gradient=kind, **settings)
        for kind in ("dense_mixer", "top_k")
    )
    plain.set_weights(layer.get_weights())
    x, cotangent = (models.tokens(3, 5, models.WIDTH, seed=s) for s in (0, 3))
    received, found = gradients.of_layer(layer, x, cotangent, training=True)
    outputs, expected = gradients.of_layer(plain, x, cotangent, training=True)
    np.testing.assert_allclose(received, outputs, atol=1e-6)
    for name, gradient in found.items():
        if name == "inputs":
            continue  # the router's reach them too
        same = np.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5)
        assert same == (name != "router/kernel"), name
    received, found = gradients.of_layer(layer, x, cotangent)
    outputs, expected = gradients.of_layer(plain, x, cotangent)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5)


@pytest.mark.one_backend
def test_a_router_of_one_expert_learns_by_it():
    with pytest.warns(UserWarning, match="no gradient from the task"):
        ku.TopKRouter(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = ku.TopKRouter(1, router_gradient="dense_mixer")
    assert router.learns_from_task
    assert router.average_slots_per_token(6) > 1.25 + 1.9
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(router)
    )
    assert again.router_gradient == "dense_mixer"


@pytest.mark.one_backend
def test_low_rank_experts_and_a_frozen_router_take_it():
    dense = models.sequence_dense_pairs()
    router = ku.TopKRouter(2, router_gradient="dense_mixer")
    moe = ku.upcycle_model(
        dense, 4, router=router, experts=ku.LowRankExperts(rank=2)
    )
    x = models.tokens(4, 6, models.WIDTH)
    y = models.output(dense, x)
    before = models.array(models.mixtures(moe)[0].router.kernel)
    ku.freeze(moe, "router")
    moe.compile(keras.optimizers.SGD(0.1), "mse")
    moe.fit(x, y + 1, verbose=0)
    kernel = models.mixtures(moe)[0].router.kernel
    np.testing.assert_array_equal(models.array(kernel), before)
    ku.unfreeze(moe, "router")
    moe.compile(keras.optimizers.SGD(0.1), "mse")
    moe.fit(x, y + 1, verbose=0)
    assert np.any(models.array(kernel) != before)


@pytest.mark.one_backend
def test_what_has_another_gradient_refuses_it():
    for make in (
        lambda: ku.DefaultMoERouter(router_gradient="dense_mixer"),
        lambda: ku.TopKRouter(
            router_gradient="dense_mixer", expert_groups=[0, 0, 1]
        ),
        lambda: ku.TopKRouter(router_gradient="dense"),
    ):
        with pytest.raises(ValueError, match="router_gradient"):
            make()

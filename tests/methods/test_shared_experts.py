"""Shared experts: in the layer, and cut from the dense block."""

import gradients
import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.methods.drop_upcycling import DropUpcycling
from keras_upcycle.methods.virtual_groups import VirtualGroups

DIM, HIDDEN, EXPERTS, SHARED = 4, 6, 3, 5


def layer_of(gated=False, **settings):
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router=ku.TopKRouter(2, capacity_factor=None, load_balance_loss=0.0),
        activation="relu",
        gated=gated,
        shared_intermediate_dim=SHARED,
        kernel_initializer=gradients.normal(0.7),
        bias_initializer=gradients.normal(0.5, seed=1),
        **settings,
    )
    layer.build((None, None, DIM))
    return layer


@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "dense"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_shared_network_is_added_at_real_tokens(gated, dispatch):
    layer = layer_of(gated, dispatch=dispatch)
    without = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router=ku.TopKRouter(2, capacity_factor=None, load_balance_loss=0.0),
        activation="relu",
        gated=gated,
    )
    without.build((None, None, DIM))
    without.router.kernel.assign(layer.router.kernel)
    for a, b in zip(
        without.experts.weights, layer.experts.weights, strict=True
    ):
        a.assign(b)
    x = models.tokens(2, 7, DIM)
    mask = np.arange(7) < np.array([[4], [6]])
    own = {
        role: (models.array(p.kernel)[0], models.array(p.bias)[0, 0])
        for role, p in layer.shared.projections.items()
    }
    flat = models.array(x).astype("float64")

    def project(rows, role):
        kernel, bias = own[role]
        return rows @ kernel + bias

    if gated:
        hidden = np.maximum(project(flat, "gate"), 0) * project(flat, "up")
    else:
        hidden = np.maximum(project(flat, "up"), 0)
    expected = project(hidden, "down") * mask[..., None]
    given = ops.convert_to_tensor(mask)
    added = models.array(layer(x, mask=given)) - models.array(
        without(x, mask=given)
    )
    np.testing.assert_allclose(added, expected, atol=1e-5)
    assert not models.array(layer(x, mask=given))[~mask].any()


def test_no_shared_network_is_no_weight():
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN)
    layer.build((None, None, DIM))
    assert layer.shared is None
    assert len(layer.weights) == 5


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["plain", "gated", "vit"])
def test_it_starts_as_the_dense_model(kind):
    dense, inputs = {
        "plain": lambda: (models.dense_pairs(), models.tokens(8, models.WIDTH)),
        "gated": lambda: (models.t5_backbone(), models.t5_inputs()),
        "vit": lambda: (models.vit_backbone(), models.images()),
    }[kind]()
    moe = ku.upcycle_model(
        dense,
        EXPERTS,
        router=ku.TopKRouter(2, capacity_factor=None),
        expert_init=ku.SharedExperts(SHARED),
        layers="all",
        seed=0,
    )
    for layer in models.mixtures(moe):
        assert layer.shared_intermediate_dim == SHARED
        assert layer.intermediate_dim == models.HIDDEN - SHARED
    report = ku.verify_upcycle(dense, moe, inputs)
    assert report.relative_difference < 1e-5
    estimate = ku.estimate_upcycle(
        dense,
        EXPERTS,
        router=ku.TopKRouter(2),
        expert_init=ku.SharedExperts(SHARED),
        layers="all",
    )
    assert estimate.total_params == moe.count_params()


def test_every_neuron_is_shared_or_routed_once():
    dense = models.dense_pairs()
    moe = ku.upcycle_model(
        dense, EXPERTS, expert_init=ku.SharedExperts(SHARED), layers="all"
    )
    for site, layer in zip(
        ku.find_feed_forwards(dense), models.mixtures(moe), strict=True
    ):
        for e in range(EXPERTS):
            for role, axis in (("up", 1), ("down", 0)):
                joined = np.concatenate(
                    [
                        models.array(layer.shared.projections[role].kernel)[0],
                        models.array(layer.experts.projections[role].kernel)[e],
                    ],
                    axis=axis,
                )
                np.testing.assert_array_equal(
                    joined, models.array(site.kernels[f"{role}_kernel"])
                )
            bias = models.array(layer.experts.expert_down.bias)[e]
            assert not bias.any()
        np.testing.assert_array_equal(
            models.array(layer.shared.expert_down.bias)[0, 0],
            models.array(site.kernels["down_bias"]),
        )


def test_the_others_may_start_in_any_way():
    dense = models.dense_pairs()
    fine = ku.upcycle_model(
        dense,
        EXPERTS,
        router=ku.TopKRouter(4, capacity_factor=None),
        expert_init=ku.SharedExperts(
            models.HIDDEN // 2, routed=VirtualGroups(2)
        ),
        layers="all",
    )
    layer = models.mixtures(fine)[0]
    assert (layer.num_experts, layer.intermediate_dim) == (
        2 * EXPERTS,
        models.HIDDEN // 4,
    )
    x = models.tokens(8, models.WIDTH)
    assert ku.verify_upcycle(dense, fine, x).relative_difference < 1e-5
    dropped = ku.upcycle_model(
        dense,
        EXPERTS,
        expert_init=ku.SharedExperts(SHARED, routed=DropUpcycling(0.5)),
        layers="all",
        seed=0,
    )
    site = ku.find_feed_forwards(dense)[0]
    left = models.array(site.kernels["up_kernel"])[:, SHARED:]
    up = models.array(models.mixtures(dropped)[0].experts.expert_up.kernel)
    for expert in up:
        kept = [
            any(np.array_equal(column, old) for old in left.T)
            for column in expert.T
        ]
        assert sum(kept) == left.shape[1] - left.shape[1] // 2


def test_saved_frozen_pruned_and_trained(tmp_path):
    layer = ku.MoEFeedForward(
        EXPERTS, HIDDEN, shared_intermediate_dim=SHARED, name="moe"
    )
    model = keras.Sequential([keras.Input((7, DIM)), layer])
    x = models.tokens(2, 7, DIM)
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    np.testing.assert_array_equal(
        models.array(again(x)), models.array(model(x))
    )
    smaller, _ = ku.prune_experts(model, keep={model.name: [0, 2]})
    np.testing.assert_array_equal(
        models.array(smaller.layers[0].shared.expert_up.kernel),
        models.array(layer.shared.expert_up.kernel),
    )
    ku.freeze(model, "experts")
    assert [v.path.split("/")[-2] for v in model.trainable_variables] == [
        "router"
    ]
    ku.unfreeze(model, "experts")
    before = models.array(layer.shared.expert_down.kernel).copy()
    model.compile("sgd", "mse")
    model.fit(models.array(x), np.ones((2, 7, DIM), "float32"), verbose=0)
    assert (models.array(layer.shared.expert_down.kernel) != before).any()


@pytest.mark.one_backend
def test_bad_settings():
    with pytest.raises(ValueError, match="shared_intermediate_dim=0"):
        ku.MoEFeedForward(EXPERTS, HIDDEN, shared_intermediate_dim=0)
    with pytest.raises(ValueError, match="intermediate_dim=0"):
        ku.SharedExperts(0)
    with pytest.raises(TypeError, match="routed=3 of type int"):
        ku.SharedExperts(2, routed=3)
    dense = models.dense_pairs()
    with pytest.raises(ValueError, match="leave some for the others"):
        ku.upcycle_model(
            dense, EXPERTS, expert_init=ku.SharedExperts(models.HIDDEN)
        )

"""Slices of the dense block that together are the block."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.methods.clusters import balanced_clusters
from keras_upcycle.methods.feed_forward_slices import ORDERS

BUILDS = {
    "vit": (models.vit_classifier, models.images),
    "t5, gated": (models.t5_backbone, models.t5_inputs),
    "t5, plain": (models.t5_lm, models.t5_inputs),
    "pairs": (models.dense_pairs, lambda: models.tokens(5, models.WIDTH)),
}


def upcycled(dense, num_experts=4, order="contiguous", seed=0, **settings):
    settings = {"router": "ds_moe", "layers": "all", **settings}
    exact = settings.pop("exact", True)
    return ku.upcycle_model(
        dense,
        num_experts,
        expert_init=ku.FeedForwardSlices(order, exact=exact),
        seed=seed,
        **settings,
    )


@pytest.mark.thinned
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", BUILDS)
def test_it_starts_as_the_dense_model(kind, order):
    build, inputs = BUILDS[kind]
    dense = build()
    moe = upcycled(dense, order=order)
    report = ku.verify_upcycle(dense, moe, inputs())
    assert report.relative_difference < 1e-5
    routers = sum(m.router.count_params() for m in models.mixtures(moe))
    assert moe.count_params() == dense.count_params() + routers


@pytest.mark.one_backend
@pytest.mark.parametrize("num_experts", [1, 2, 32])
@pytest.mark.parametrize("training", [False, True])
def test_dense_mode_is_the_block_for_any_number_of_experts(
    num_experts, training
):
    dense, x = models.dense_pairs(), models.tokens(5, models.WIDTH)
    moe = upcycled(dense, num_experts)
    np.testing.assert_allclose(
        models.array(moe(x, training=training)),
        models.array(dense(x, training=training)),
        atol=1e-5,
    )


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("order", ORDERS)
def test_every_neuron_is_in_one_expert(order):
    dense = models.t5_backbone()
    moe = upcycled(dense, order=order)
    (site, *_) = ku.find_feed_forwards(dense)
    (layer, *_) = models.mixtures(moe)
    assert layer.intermediate_dim == models.HIDDEN // 4
    kernels = {
        role: models.array(p.kernel)
        for role, p in layer.experts.projections.items()
    }
    up, gate = (
        np.concatenate(list(kernels[role]), axis=1) for role in ("up", "gate")
    )
    down = np.concatenate(list(kernels["down"]), axis=0) / 4
    whole = np.concatenate([up, gate, down.T])
    dense_kernels = [
        models.array(site.kernels[f"{role}_kernel"])
        for role in ("up", "gate", "down")
    ]
    expected = np.concatenate(
        [dense_kernels[0], dense_kernels[1], dense_kernels[2].T]
    )
    if order != "contiguous":
        assert np.abs(whole - expected).max() > 1e-2
        whole = whole[:, np.lexsort(whole)]
        expected = expected[:, np.lexsort(expected)]
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    assert not models.array(layer.router.kernel).any()


def test_biases_are_cut_and_the_last_one_is_outside():
    dense = models.dense_pairs()
    moe = upcycled(dense)
    (site, *_) = [s for s in ku.find_feed_forwards(dense) if s.index == 1]
    layer = models.mixtures(moe)[-1]
    np.testing.assert_array_equal(
        models.array(layer.experts.expert_up.bias).ravel(),
        models.array(site.kernels["up_bias"]),
    )
    assert layer.experts.expert_down.bias is None
    np.testing.assert_array_equal(
        models.array(layer.output_bias.bias),
        models.array(site.kernels["down_bias"]),
    )


@pytest.mark.thinned
@pytest.mark.parametrize("order", ["random", "cluster"])
def test_a_seed_decides_and_layers_differ(order):
    dense = models.dense_pairs(blocks=3)

    def ups(seed):
        moe = upcycled(dense, order=order, seed=seed)
        return [
            models.array(m.experts.expert_up.kernel)
            for m in models.mixtures(moe)
        ]

    first, again, other = ups(0), ups(0), ups(7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.one_backend
def test_a_random_order_is_numpys_own():
    """And so the same on every backend."""
    dense = models.dense_pairs()
    moe = upcycled(dense, order="random", seed=5)
    (site, *_) = [s for s in ku.find_feed_forwards(dense) if s.index == 1]
    mixtures = models.mixtures(moe)
    layer, seed = mixtures[-1], 5 + len(mixtures) - 1  # blocks count up
    order = np.random.default_rng(seed).permutation(models.HIDDEN)
    up = np.concatenate(list(models.array(layer.experts.expert_up.kernel)), 1)
    np.testing.assert_array_equal(
        up, models.array(site.kernels["up_kernel"])[:, order]
    )


# Clusters.


@pytest.mark.one_backend
def test_clusters_are_even_and_find_what_belongs_together():
    rng = np.random.default_rng(0)
    centres = 5.0 * rng.normal(size=(4, 6))
    truth = rng.permutation(np.repeat(np.arange(4), 8))
    points = centres[truth] + 0.2 * rng.normal(size=(32, 6))
    labels = balanced_clusters(points, 4, np.random.default_rng(1))
    assert np.bincount(labels).tolist() == [8] * 4
    for cluster in range(4):
        assert len(set(truth[labels == cluster])) == 1


@pytest.mark.one_backend
def test_clusters_stay_even_where_points_do_not():
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [rng.normal(size=(28, 3)), 50 + rng.normal(size=(4, 3))]
    )
    labels = balanced_clusters(points, 4, rng)
    assert np.bincount(labels).tolist() == [8] * 4
    assert len(set(labels[28:])) == 1
    same = balanced_clusters(np.ones((6, 2)), 3, rng)
    assert np.bincount(same).tolist() == [2] * 3


@pytest.mark.one_backend
def test_clusters_are_tighter_than_chance():
    dense = models.dense_pairs()
    (site, *_) = ku.find_feed_forwards(dense)
    points = models.array(site.kernels["up_kernel"]).T

    def spread(labels):
        return sum(
            ((points[labels == n] - points[labels == n].mean(0)) ** 2).sum()
            for n in range(4)
        )

    found = spread(balanced_clusters(points, 4, np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    chance = [
        spread(rng.permutation(np.repeat(np.arange(4), len(points) // 4)))
        for _ in range(20)
    ]
    assert found < min(chance)


# What does not suit.


@pytest.mark.one_backend
def test_experts_must_divide_the_width():
    with pytest.raises(
        ValueError, match=r"num_experts=5 for a width of 32\. Pass a divisor"
    ):
        upcycled(models.dense_pairs(), 5)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("router", "received"),
    [
        (ku.TopKRouter(2), "TopKRouter with top_k=2"),
        (ku.ExpertChoiceRouter(2.0), "ExpertChoiceRouter with capacity_f"),
        (ku.DSMoERouter("top_k", top_k=2), "selection='top_k', top_k=2"),
        (ku.DSMoERouter("threshold", threshold=1.2), "threshold=1.2"),
    ],
)
def test_a_router_that_cannot_be_exact_is_refused(router, received):
    dense = models.vit_backbone()
    with pytest.raises(ValueError, match=f"{received}.*set_active_experts"):
        upcycled(dense, router=router)
    config = router.get_config()
    moe = upcycled(dense, router=type(router).from_config(config), exact=False)
    report = ku.verify_upcycle(dense, moe, models.images())
    assert report.relative_difference > 1e-4
    for layer in models.mixtures(moe):  # it starts as its initializer says
        assert models.array(layer.router.kernel).any()


@pytest.mark.thinned
@pytest.mark.parametrize(
    "router",
    [
        lambda: ku.TopKRouter(4, capacity_factor=None),
        lambda: ku.ExpertChoiceRouter(4.0),
        lambda: ku.DSMoERouter("top_k", top_k=4),
        lambda: ku.DSMoERouter("threshold", threshold=0.48),
        lambda: ku.DSMoERouter("batch_threshold", threshold=0.48),
    ],
)
def test_a_router_that_meets_all_slices_is_exact(router):
    dense = models.vit_backbone()
    moe = upcycled(dense, router=router())
    report = ku.verify_upcycle(dense, moe, models.images())
    assert report.relative_difference < 1e-5


@pytest.mark.one_backend
def test_an_unknown_order():
    with pytest.raises(ValueError, match=r"one of.*order='sorted'"):
        ku.FeedForwardSlices("sorted")


@pytest.mark.one_backend
def test_it_has_a_name():
    dense = models.dense_pairs()
    moe = ku.upcycle_model(
        dense, 4, router="ds_moe", expert_init="feed_forward_slices"
    )
    assert isinstance(models.mixtures(moe)[0], ku.MoEFeedForward)
    assert isinstance(moe, keras.Model)


@pytest.mark.one_backend
def test_virtual_groups_take_it_too():
    dense = models.dense_pairs()
    moe = ku.upcycle_model(
        dense,
        2,
        router="ds_moe",
        expert_init=ku.VirtualGroups(4),
        seed=0,
    )
    x = models.tokens(5, models.WIDTH)
    assert ku.verify_upcycle(dense, moe, x).relative_difference < 1e-5


@pytest.mark.thinned
@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_expert_may_stand_beside_the_slices(order):
    dense = models.dense_pairs()
    moe = ku.upcycle_model(
        dense,
        4,
        router="ds_moe",
        expert_init=ku.SharedExperts(8, routed=ku.FeedForwardSlices(order)),
        seed=0,
    )
    for layer in models.mixtures(moe):
        assert layer.intermediate_dim == (models.HIDDEN - 8) // 4
    x = models.tokens(5, models.WIDTH)
    assert ku.verify_upcycle(dense, moe, x).relative_difference < 1e-5

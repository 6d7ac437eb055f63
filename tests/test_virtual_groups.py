"""Slices of the dense block, whose groups are the dense block."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.virtual_groups import RepeatedColumns, VirtualGroups


def upcycled(dense, granularity, top_k, **settings):
    router = settings.pop("router", None)
    return ku.upcycle_model(
        dense,
        3,
        router=router or ku.TopKRouter(top_k, capacity_factor=None),
        expert_init=VirtualGroups(granularity, **settings),
        layers="all",
        seed=0,
    )


@pytest.mark.parametrize("kind", ["plain with biases", "gated"])
@pytest.mark.parametrize(
    ("granularity", "top_k"), [(1, 2), (2, 2), (2, 4), (4, 4), (8, 16)]
)
def test_it_starts_as_the_dense_model(kind, granularity, top_k):
    if kind == "gated":
        dense, inputs = models.t5_backbone(), models.t5_inputs()
    else:
        dense, inputs = models.dense_pairs(), models.tokens(8, models.WIDTH)
    moe = upcycled(dense, granularity, top_k)
    for layer in models.mixtures(moe):
        assert layer.num_experts == 3 * granularity
        assert layer.intermediate_dim == models.HIDDEN // granularity
    report = ku.verify_upcycle(dense, moe, inputs)
    assert report.relative_difference < 1e-5


def test_expert_choice_takes_whole_groups_too():
    dense = models.vit_backbone()
    router = ku.ExpertChoiceRouter(6.0)  # all experts take all tokens
    moe = upcycled(dense, 2, None, router=router)
    report = ku.verify_upcycle(dense, moe, models.images())
    assert report.relative_difference < 1e-5


def test_the_slices_make_up_the_dense_block_and_share_a_router_column():
    dense = models.dense_pairs()
    moe = upcycled(dense, 4, 4)
    (layer, *_) = models.mixtures(moe)
    (site, *_) = ku.find_feed_forwards(dense)
    up = models.array(layer.experts.expert_up.kernel)
    down = models.array(layer.experts.expert_down.kernel)
    router = models.array(layer.router.kernel)
    for group in range(3):
        own = slice(4 * group, 4 * group + 4)
        np.testing.assert_array_equal(
            np.concatenate(list(up[own]), axis=1),
            models.array(site.kernels["up_kernel"]),
        )
        np.testing.assert_allclose(
            np.concatenate(list(down[own]), axis=0),
            4 * models.array(site.kernels["down_kernel"]),
            rtol=1e-6,
        )
        assert (router[:, own] == router[:, own][:, :1]).all()
    assert len(np.unique(router, axis=1).T) == 3


def test_an_estimate_counts_what_is_built():
    dense = models.vit_classifier()
    settings = {
        "router": ku.TopKRouter(4),
        "expert_init": VirtualGroups(2),
    }
    estimate = ku.estimate_upcycle(dense, 3, **settings)
    moe = ku.upcycle_model(dense, 3, **settings)
    assert estimate.total_params == moe.count_params()
    plain = ku.estimate_upcycle(dense, 3, router=ku.TopKRouter(2))
    (a,), (b,) = estimate.layers, plain.layers
    router = 2 * models.WIDTH * 3  # twice as many columns
    assert a.flops_per_token == b.flops_per_token + router


def test_the_published_scaling_is_exact_for_relu_alone():
    def pair(activation):
        model = keras.Sequential(
            [
                keras.Input((models.WIDTH,)),
                keras.layers.Dense(models.HIDDEN, activation=activation),
                keras.layers.Dense(models.WIDTH),
            ]
        )
        return models.randomized(model)

    x = models.tokens(8, models.WIDTH)
    gaps = {}
    for activation in ("relu", "gelu"):
        dense = pair(activation)
        moe = upcycled(dense, 2, 2, scaling="published")
        report = ku.verify_upcycle(dense, moe, x)
        gaps[activation] = report.relative_difference
    assert gaps["relu"] < 1e-5
    assert gaps["gelu"] > 1e-3


def test_the_published_factor_without_renormalisation():
    """`E G^2 / K`, shared by the kernels: 4 for 8 groups of 8, Top-8."""
    dense = models.dense_pairs()
    router = ku.TopKRouter(8, normalize=False, capacity_factor=None)
    moe = ku.upcycle_model(
        dense,
        8,
        router=router,
        expert_init=VirtualGroups(8, "published"),
        layers=[1],
    )
    (layer,) = models.mixtures(moe)
    site = ku.find_feed_forwards(dense)[1]
    up = models.array(layer.experts.expert_up.kernel)[:8]
    factor = (8 * 8**2 / 8) ** 0.5
    np.testing.assert_allclose(
        np.concatenate(list(up), axis=1),
        factor * models.array(site.kernels["up_kernel"]),
        rtol=1e-5,
    )


def test_it_trains_and_is_saved(tmp_path):
    moe = upcycled(models.dense_pairs(), 2, 2)
    moe.compile("sgd", "mse")
    x = models.tokens(8, models.WIDTH)
    y = np.ones((8, models.CLASSES), "float32")
    moe.fit(x, y, verbose=0)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, models.weights(moe))
    (layer, *_) = models.mixtures(loaded)
    kernel = RepeatedColumns.from_config(
        layer.router.kernel_initializer.get_config()
    )((4, 6))
    assert tuple(kernel.shape) == (4, 6)


def test_no_way_back_from_slices_and_no_memory():
    dense = models.dense_pairs()
    moe = upcycled(dense, 2, 2)
    with pytest.raises(ku.UpcycleError, match=r"width 16.*of width 32"):
        ku.densify_model(moe, dense=dense)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"granularity": 3, "top_k": 3}, "granularity=3 for a width of 32"),
        ({"granularity": 2, "top_k": 3}, "top_k=3 and granularity=2"),
        (
            {
                "granularity": 2,
                "top_k": 2,
                "router": ku.TopKRouter(2, normalize=False),
            },
            "normalize=False",
        ),
        ({"granularity": 0, "top_k": 2}, "granularity=0"),
        ({"granularity": 2, "top_k": 2, "scaling": "half"}, "scaling='half'"),
    ],
)
def test_what_cannot_be_exact_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        upcycled(models.dense_pairs(), **settings)


def test_asked_for_it_is_done_all_the_same():
    moe = upcycled(models.dense_pairs(), 2, 3, exact=False)
    assert models.mixtures(moe)[0].num_experts == 6

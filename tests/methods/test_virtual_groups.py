"""Slices of the dense block, whose groups are the dense block."""

import warnings

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.methods.virtual_groups import RepeatedColumns, VirtualGroups


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


@pytest.mark.thinned
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


@pytest.mark.one_backend
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


def squared_relu(x):
    return keras.ops.square(keras.ops.relu(x))


ACTIVATIONS = {
    "relu": (keras.activations.relu, lambda x: np.maximum(x, 0)),
    # Found by what it does: under any name, written in any way.
    "squared relu": (
        lambda x: keras.ops.relu(x) ** 2,
        lambda x: np.maximum(x, 0) ** 2,
    ),
    "silu": (keras.activations.silu, lambda x: x / (1 + np.exp(-x))),
}


def pair(activation, use_bias=False):
    model = keras.Sequential(
        [
            keras.Input((models.WIDTH,)),
            keras.layers.Dense(
                models.HIDDEN, activation=activation, use_bias=use_bias
            ),
            keras.layers.Dense(models.WIDTH, use_bias=use_bias),
        ]
    )
    return models.randomized(model)


def softmax(logits):
    values = np.exp(logits - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def megatron(dense, router, x, activation, root, groups, parts, top_k):
    """The authors' form of a plain block, token by token.

    Kernels cut into slices and scaled; softmax over all, then the likeliest.
    """
    up, down = (models.array(w) for w in dense.weights)
    scale = (groups * parts**2 / top_k) ** (1 / root)
    ups = np.split(scale * up, parts, axis=1) * groups
    downs = np.split(scale * down, parts, axis=0) * groups
    outputs = []
    for token, weights in zip(x, softmax(x @ router), strict=True):
        # Equal ones stand in whole groups, lowest index first.
        best = np.argsort(-weights, kind="stable")[:top_k]
        outputs.append(
            sum(
                weights[e] * activation(token @ ups[e]) @ downs[e] for e in best
            )
        )
    return np.stack(outputs)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "root"), [("relu", 2), ("squared relu", 3), ("silu", 2)]
)
def test_the_recipe_is_the_authors_form(name, root):
    activation, by_hand = ACTIVATIONS[name]
    dense = pair(activation)
    moe = ku.upcycle_model(dense, 4, recipe="virtual_group", seed=0)
    (layer,) = models.mixtures(moe)
    assert (layer.num_experts, layer.router.top_k) == (32, 8)
    assert not layer.router.normalize
    assert layer.router.softmax == "before_top_k"
    # Far enough from ties between groups that all backends choose alike.
    router = 20.0 * models.array(layer.router.kernel)
    layer.router.kernel.assign(router)
    x = models.tokens(12, models.WIDTH)
    expected = megatron(dense, router, x, by_hand, root, 4, 8, 8)
    np.testing.assert_allclose(
        models.output(moe, x), expected, rtol=2e-4, atol=1e-5
    )
    if name == "silu":
        return
    # Homogeneous: a token's output is the dense one times `E G` of a weight.
    ratio = 32 * softmax(x @ router).max(-1, keepdims=True)
    np.testing.assert_allclose(
        models.output(moe, x),
        ratio * models.output(dense, x),
        rtol=2e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "exact"), [("relu", True), ("squared relu", True), ("silu", False)]
)
def test_the_recipe_is_exact_where_experts_are_equally_likely(name, exact):
    dense = pair(ACTIVATIONS[name][0])
    moe = ku.upcycle_model(dense, 4, recipe="virtual_group", seed=0)
    (layer,) = models.mixtures(moe)
    layer.router.kernel.assign(0.0 * layer.router.kernel)
    report = ku.verify_upcycle(dense, moe, models.tokens(8, models.WIDTH))
    assert (report.relative_difference < 1e-5) == exact


@pytest.mark.one_backend
def test_a_gated_block_is_scaled_by_the_third_root():
    dense = models.t5_backbone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*first block")
        moe = ku.upcycle_model(dense, 4, recipe="virtual_group", seed=0)
    mixtures = models.mixtures(moe)
    sites = ku.find_feed_forwards(dense)
    assert len(mixtures) == len(sites) == 4
    for layer, site in zip(mixtures, sites, strict=True):
        for role, projection in layer.experts.projections.items():
            slices = list(models.array(projection.kernel)[:8])
            axis = 0 if role == "down" else 1
            np.testing.assert_allclose(
                np.concatenate(slices, axis=axis),
                (4 * 8**2 / 8) ** (1 / 3)
                * models.array(site.kernels[f"{role}_kernel"]),
                rtol=1e-5,
            )


def test_biases_of_a_squared_block_are_scaled_with_their_layer():
    dense = pair(squared_relu, use_bias=True)
    moe = ku.upcycle_model(dense, 4, recipe="virtual_group", seed=0)
    (layer,) = models.mixtures(moe)
    up_bias = models.array(layer.experts.expert_up.bias)[:8].reshape(-1)
    np.testing.assert_allclose(
        up_bias, 32 ** (1 / 3) * models.array(dense.layers[0].bias), rtol=1e-5
    )


@pytest.mark.one_backend
def test_the_exact_start_is_still_to_be_had():
    dense = models.vit_backbone()
    moe = ku.upcycle_model(
        dense,
        4,
        recipe="virtual_group",
        expert_init=VirtualGroups(8),
        router=ku.TopKRouter(8, capacity_factor=None),
        seed=0,
    )
    report = ku.verify_upcycle(dense, moe, models.images())
    assert report.relative_difference < 1e-5
    text = str(ku.get_recipe("virtual_group"))
    assert "VirtualGroups(8)" in text
    assert "router=TopKRouter(8, capacity_factor=None)" in text


@pytest.mark.one_backend
def test_a_smaller_granularity_beside_the_recipe_says_what_to_do():
    with pytest.raises(ValueError, match=r'`scaling="published"`'):
        ku.upcycle_model(
            models.vit_backbone(),
            4,
            recipe="virtual_group",
            expert_init=VirtualGroups(4),
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


@pytest.mark.one_backend
def test_no_way_back_from_slices_and_no_memory():
    dense = models.dense_pairs()
    moe = upcycled(dense, 2, 2)
    with pytest.raises(ku.UpcycleError, match=r"width 16.*of width 32"):
        ku.densify_model(moe, dense=dense)


@pytest.mark.one_backend
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


@pytest.mark.one_backend
def test_asked_for_it_is_done_all_the_same():
    moe = upcycled(models.dense_pairs(), 2, 3, exact=False)
    assert models.mixtures(moe)[0].num_experts == 6

"""Experts from random values: how each is drawn, and which are."""

import itertools
import math

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import RandomExperts

EXPERTS = 4
WIDE = 64


def wide():
    """One block wide enough for statistics, then a head."""
    model = keras.Sequential(
        [
            keras.Input((WIDE,)),
            keras.layers.Dense(4 * WIDE, "relu"),
            keras.layers.Dense(WIDE),
        ]
    )
    return models.randomized(model)


def upcycled(dense, num_experts=EXPERTS, layers="all", seed=0, **settings):
    init = RandomExperts(**settings)
    return ku.upcycle_model(
        dense,
        num_experts,
        router=ku.TopKRouter(2, capacity_factor=None),
        expert_init=init,
        layers=layers,
        seed=seed,
    )


def weights(moe):
    """`(block, name)` to the stacked values."""
    return {
        (number, f"{role}_{part}"): models.array(getattr(projection, part))
        for number, layer in enumerate(models.mixtures(moe))
        for role, projection in layer.experts.projections.items()
        for part in ("kernel", "bias")
        if getattr(projection, part) is not None
    }


def test_an_expert_is_drawn_as_a_dense_layer_of_its_own():
    dense = wide()
    found = weights(upcycled(dense))
    shapes = {"up_kernel": (WIDE, 4 * WIDE), "down_kernel": (4 * WIDE, WIDE)}
    limit = math.sqrt(6 / (5 * WIDE))
    for name, shape in shapes.items():
        layer = keras.layers.Dense(shape[1])
        layer.build((None, shape[0]))
        theirs = models.array(layer.kernel)
        assert np.abs(theirs).max() <= limit  # what we say of Keras
        for own in found[0, name]:
            assert own.shape == shape
            assert 0.99 * limit < np.abs(own).max() <= limit
            assert own.std() == pytest.approx(theirs.std(), rel=0.03)
            assert own.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
            assert abs(own.mean()) < 0.02 * limit
            # Uniform, not merely of that spread.
            share, _ = np.histogram(own, 8, (-limit, limit))
            np.testing.assert_allclose(share / own.size, 1 / 8, atol=0.01)
    assert not found[0, "up_bias"].any()
    assert not found[0, "down_bias"].any()


def test_matched_statistics_are_those_of_each_weight():
    dense = wide()
    (site,) = ku.find_feed_forwards(dense)
    for number, variable in enumerate(site.kernels.values()):
        value = models.array(variable)
        variable.assign((0.5 + number) * value + 0.1 * number)
    found = weights(upcycled(dense, distribution="matched"))
    for (_, name), stacked in found.items():
        value = models.array(site.kernels[name])
        for own in stacked.reshape(EXPERTS, *value.shape):
            rel = 0.03 if value.ndim == 2 else 0.3
            assert own.std() == pytest.approx(value.std(ddof=1), rel=rel)
            error = 5 * value.std() / math.sqrt(value.size)
            assert abs(own.mean() - value.mean()) < error


@pytest.mark.thinned
@pytest.mark.parametrize("distribution", ["glorot_uniform", "matched"])
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_nothing_is_drawn_twice(kind, distribution):
    """Experts, blocks and kernels, those of equal shape above all."""
    dense = models.t5_backbone() if kind == "gated" else models.dense_pairs()
    found = weights(upcycled(dense, distribution=distribution))
    flat = []
    for (_, name), stacked in found.items():
        if name.endswith("kernel"):
            across = stacked.transpose(0, 2, 1) if "down" in name else stacked
            flat += [own.reshape(-1) for own in across]
    flat = [f - f.mean() for f in flat]
    for a, b in itertools.combinations(flat, 2):
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert abs(cosine) < 5 / math.sqrt(len(a))


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("count", [1, 3, 4, None])
def test_only_the_last_are_random(count):
    dense = models.t5_backbone()
    moe = upcycled(dense, count=count)
    sites = ku.find_feed_forwards(dense)
    random = EXPERTS if count is None else count
    for (number, name), stacked in weights(moe).items():
        value = models.array(sites[number].kernels[name])
        for expert, own in enumerate(stacked):
            copied = np.array_equal(own.reshape(value.shape), value)
            assert copied == (expert < EXPERTS - random)
    report = ku.verify_upcycle(dense, moe, models.t5_inputs())
    for layer in report.layers:
        assert layer.intact_neurons == pytest.approx(1 - random / EXPERTS)


def test_where_a_token_meets_copies_alone_the_function_is_kept():
    dense = models.dense_pairs()
    moe = upcycled(dense, count=2)
    for layer in models.mixtures(moe):
        kernel = np.zeros(layer.router.kernel.shape, "float32")
        layer.router.kernel.assign(kernel)  # ties go to the lowest index
    x = models.tokens(8, models.WIDTH)
    assert ku.verify_upcycle(dense, moe, x).relative_difference < 1e-5


@pytest.mark.one_backend
def test_the_rest_of_the_model_is_the_dense_one():
    dense = models.vit_backbone()
    before = models.weights(dense)
    moe = upcycled(dense, layers=[1])
    kept = {w.path.split("/", 1)[-1]: models.array(w) for w in dense.weights}
    for weight in moe.weights:
        name = weight.path.split("/", 1)[-1]
        if name in kept:
            np.testing.assert_array_equal(models.array(weight), kept[name])
    models.assert_same_weights(dense, before)


def test_a_seed_gives_the_same_and_another_does_not():
    dense = models.dense_pairs()
    one, same, other = (weights(upcycled(dense, seed=s)) for s in (3, 3, 4))
    for key, value in one.items():
        np.testing.assert_array_equal(value, same[key])
        if key[1].endswith("kernel"):
            assert not np.array_equal(value, other[key])


def test_the_values_are_numpys_on_every_backend():
    """By hand: a generator for each expert, then for each weight."""
    dense = models.dense_pairs(blocks=1)
    (site,) = ku.find_feed_forwards(dense)
    found = weights(upcycled(dense, count=2, seed=7))
    names = list(site.kernels)
    limit = math.sqrt(6 / (models.WIDTH + models.HIDDEN))
    for expert, rng in enumerate(np.random.default_rng(7).spawn(2)):
        own = dict(zip(names, rng.spawn(len(names)), strict=True))
        for name in ("up_kernel", "down_kernel"):
            expected = own[name].uniform(
                -limit, limit, site.kernels[name].shape
            )
            np.testing.assert_array_equal(
                found[0, name][2 + expert], expected.astype("float32")
            )


def test_without_a_seed_keras_decides():
    dense, made = models.dense_pairs(), []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        made.append(weights(upcycled(dense, seed=None)))
    for key, value in made[0].items():
        np.testing.assert_array_equal(value, made[1][key])


def test_by_name_estimated_shared_trained_and_saved(tmp_path):
    dense = models.dense_pairs()
    moe = ku.upcycle_model(dense, EXPERTS, expert_init="random", seed=0)
    estimate = ku.estimate_upcycle(dense, EXPERTS, expert_init="random")
    assert estimate.total_params == moe.count_params()
    beside = ku.upcycle_model(
        dense,
        EXPERTS,
        expert_init=ku.SharedExperts(8, routed=RandomExperts()),
        seed=0,
    )
    (layer,) = models.mixtures(beside)
    assert np.ptp(models.array(layer.experts.expert_up.kernel), axis=0).all()
    moe.compile("sgd", "mse")
    x = models.tokens(8, models.WIDTH)
    moe.fit(x, np.ones((8, models.CLASSES), "float32"), verbose=0)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, models.weights(moe))


def test_half_precision_and_frozen_kernels():
    dense = models.dense_pairs()
    dense.get_layer("up_1").trainable = False
    moe = upcycled(dense, layers=[1])
    (layer,) = models.mixtures(moe)
    assert not layer.experts.expert_up.trainable
    assert layer.experts.expert_down.trainable
    keras.config.set_dtype_policy("bfloat16")
    try:
        half = models.dense_pairs()
        moe = upcycled(half, layers=[1])
    finally:
        keras.config.set_dtype_policy("float32")
    (layer,) = models.mixtures(moe)
    assert layer.experts.expert_up.kernel.dtype == "bfloat16"
    assert models.array(layer.experts.expert_up.kernel).std() > 0.05


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"count": 5}, ValueError, r"count=5 for num_experts=4\. Lower it"),
        ({"count": 0}, ValueError, "count=0"),
        ({"count": 1.5}, TypeError, "count=1.5 of type float"),
        ({"count": True}, TypeError, "count=True of type bool"),
        ({"distribution": "normal"}, ValueError, "distribution='normal'"),
    ],
)
def test_bad_settings(settings, error, message):
    dense = models.dense_pairs()
    before = models.weights(dense)
    with pytest.raises(error, match=message):
        upcycled(dense, **settings)
    models.assert_same_weights(dense, before)

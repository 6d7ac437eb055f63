"""Drop-Upcycling against its definition, entry by entry."""

import types

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.methods.drop_upcycling import (
    CentredUniform,
    DropUpcycling,
    RandomNoise,
)

WIDTH, HIDDEN, EXPERTS = 6, 40, 5  # not square
AXES = {"up_kernel": 1, "gate_kernel": 1, "down_kernel": 0, "up_bias": 0}


def block(gated=True, bias=True, hidden=HIDDEN, seed=0):
    """A dense block whose neurons have very different means and spreads."""
    rng = np.random.default_rng(seed)
    shapes = {"up_kernel": (WIDTH, hidden), "down_kernel": (hidden, WIDTH)}
    if gated:
        shapes["gate_kernel"] = (WIDTH, hidden)
    if bias:
        shapes |= {"up_bias": (hidden,), "down_bias": (WIDTH,)}
    kernels = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape)
        if name in AXES:
            size = [1] * len(shape)
            size[AXES[name]] = hidden
            level = np.linspace(-9, 9, hidden).reshape(size)
            value = level + value * np.linspace(0.1, 2, hidden).reshape(size)
        kernels[name] = keras.Variable(value.astype("float32"), name=name)
    return types.SimpleNamespace(kernels=kernels, intermediate_dim=hidden)


def built(init, made, experts=EXPERTS, seed=1):
    """Name to `(E, ...)` weights, and the draws they came from."""
    values = init.values(made, None, experts, seed)
    weights = {
        name: models.array(
            value((experts, *made.kernels[name].shape), "float32")
        )
        for name, value in values.items()
    }
    return weights, init.draws(made, experts, seed)


def dense_of(made):
    return {name: models.array(v) for name, v in made.kernels.items()}


def neurons(name, weight):
    """Neurons first; `(F, ...)`."""
    return np.moveaxis(weight, AXES[name], 0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_what_is_not_chosen_is_the_dense_neuron_to_the_bit(gated, sharing):
    made = block(gated)
    init = DropUpcycling(0.3, sharing)
    weights, draws = built(init, made)
    dense = dense_of(made)
    for e, draw in enumerate(draws):
        np.testing.assert_array_equal(
            weights["down_bias"][e], dense["down_bias"]
        )
        for name in AXES.keys() & weights.keys():
            chosen = draw["chosen"][name.split("_")[0]]
            assert len(set(chosen)) == int(0.3 * HIDDEN)
            old = neurons(name, dense[name])[draw["order"]]
            new = neurons(name, weights[name][e])
            kept = np.setdiff1d(np.arange(HIDDEN), chosen)
            np.testing.assert_array_equal(new[kept], old[kept])
            assert np.all(new[chosen] != old[chosen])


def test_new_entries_have_the_moments_of_those_they_replace():
    """Not of the whole kernel, nor column by column, nor around zero."""
    made = block(hidden=2000)
    weights, draws = built(DropUpcycling(0.5), made, experts=2)
    dense = dense_of(made)
    for e, draw in enumerate(draws):
        for name in ("up_kernel", "gate_kernel", "down_kernel"):
            chosen = draw["chosen"][name.split("_")[0]]
            old = neurons(name, dense[name])[draw["order"]][chosen]
            new = neurons(name, weights[name][e])[chosen]
            spread = old.std(ddof=1)
            assert abs(new.mean() - old.mean()) < 4 * spread / new.size**0.5
            assert new.std(ddof=1) == pytest.approx(spread, rel=0.05)
            # The dense columns' own means are gone.
            assert np.abs(new.mean(1) - old.mean()).max() < 3.5 * spread / 2


@pytest.mark.one_backend
def test_the_spread_is_that_of_a_sample():
    """Given the noise, the result is arithmetic: mean + std(ddof=1) * z."""
    made = block(gated=False, bias=False, hidden=4)
    init = DropUpcycling(0.5, permute=False)
    (draw,) = init.draws(made, 1, seed=3)
    dense = dense_of(made)["up_kernel"]
    received = init.expert("up_kernel", dense, draw)
    (again,) = init.draws(made, 1, seed=3)
    part = dense[:, again["chosen"]["up"]]
    z = again["rng"]["up_kernel"].normal(size=part.shape)
    expected = part.mean() + z * part.std(ddof=1)
    np.testing.assert_allclose(
        received[:, draw["chosen"]["up"]], expected, rtol=1e-5
    )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("sharing", "power"), [("shared", 1), ("independent", 3)]
)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_so_many_neurons_stay_whole(sharing, power, ratio):
    made = block(hidden=4000)
    draws = DropUpcycling(ratio, sharing).draws(made, 3, seed=0)
    for draw in draws:
        touched = np.zeros(4000, bool)
        for chosen in draw["chosen"].values():
            touched[chosen] = True
        assert 1 - touched.mean() == pytest.approx(
            (1 - ratio) ** power, abs=0.03
        )
        sets = {frozenset(chosen) for chosen in draw["chosen"].values()}
        assert len(sets) == (1 if sharing == "shared" else 3)


def test_experts_and_blocks_are_drawn_apart():
    made = block(hidden=4000)
    one, two = (DropUpcycling(0.5).draws(made, 3, seed) for seed in (0, 1))
    sets = [set(draw["chosen"]["up"]) for draw in (*one, *two)]
    for i, a in enumerate(sets):
        for b in sets[:i]:
            assert len(a & b) / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_seed_says_it_all():
    made = block()
    first, _ = built(DropUpcycling(), made, seed=7)
    again, _ = built(DropUpcycling(), made, seed=7)
    other, _ = built(DropUpcycling(), made, seed=8)
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, again[name])
    assert np.any(first["up_kernel"] != other["up_kernel"])


def test_the_same_draws_on_every_backend():
    """NumPy's, whose streams are stable; their first entries, written out."""
    expected = np.random.default_rng(5).permutation(HIDDEN)
    (draw,) = DropUpcycling().draws(block(), 1, seed=5)
    np.testing.assert_array_equal(draw["order"], expected)


@pytest.mark.one_backend
def test_nothing_dropped_is_sparse_upcycling():
    dense = models.vit_classifier()
    moe = ku.upcycle_model(
        dense, 4, expert_init=DropUpcycling(0.0), router="top_k", seed=0
    )
    report = ku.verify_upcycle(dense, moe, models.images())
    assert report.relative_difference < 1e-5
    plain = ku.upcycle_model(
        dense, 4, expert_init=DropUpcycling(0.0, permute=False)
    )
    for (_, a), copy in zip(
        _kernels(plain), _kernels(ku.upcycle_model(dense, 4)), strict=True
    ):
        np.testing.assert_array_equal(a, copy[1])


def test_all_dropped_keeps_no_neuron_and_all_else():
    dense = models.vit_classifier()
    moe = ku.upcycle_model(dense, 4, expert_init=DropUpcycling(1.0), seed=0)
    old = {models.array(v).tobytes() for v in dense.weights}
    (layer,) = models.mixtures(moe)
    inside = {id(v) for v in layer.weights}
    for variable in moe.weights:
        if id(variable) not in inside:
            assert models.array(variable).tobytes() in old
    every = np.concatenate([models.array(v).ravel() for v in dense.weights])
    for name, kernel in _kernels(moe):
        # Of thousands of floats a few meet by chance.
        assert np.isin(kernel, every).mean() < 0.01, name


def test_noise_is_added_where_it_is_chosen():
    made = block(hidden=2000)
    weights, draws = built(RandomNoise(0.5, stddev=0.02), made, experts=2)
    dense = dense_of(made)
    for e, draw in enumerate(draws):
        for name in ("up_kernel", "gate_kernel", "down_kernel"):
            chosen = draw["chosen"][name.split("_")[0]]
            gap = (
                neurons(name, weights[name][e])
                - (neurons(name, dense[name])[draw["order"]])
            )
            kept = np.setdiff1d(np.arange(2000), chosen)
            assert not gap[kept].any()
            assert gap[chosen].std() == pytest.approx(0.02, rel=0.05)
            assert abs(gap[chosen].mean()) < 1e-3


def test_the_router_is_uniform_around_zero():
    kernel = models.array(CentredUniform(seed=0)((64, 32)))
    assert abs(kernel.mean()) < 1e-8
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert np.abs(kernel).max() <= 0.02 * 3**0.5 * 1.02
    dense = models.dense_pairs()
    moe = ku.upcycle_model(dense, 4, expert_init=DropUpcycling(), seed=3)
    (layer,) = models.mixtures(moe)
    assert abs(models.array(layer.router.kernel).mean()) < 1e-8
    moe = ku.upcycle_model(
        dense, 4, expert_init=DropUpcycling(router_initializer=None), seed=3
    )
    (layer,) = models.mixtures(moe)
    assert abs(models.array(layer.router.kernel).mean()) > 1e-5


def test_it_is_saved_and_trains(tmp_path):
    moe = ku.upcycle_model(
        models.dense_pairs(), 4, expert_init="drop_upcycling", seed=0
    )
    path = tmp_path / "moe.keras"
    moe.save(path)
    loaded = keras.models.load_model(path)
    models.assert_same_weights(loaded, models.weights(moe))
    loaded.compile("sgd", "mse")
    x = models.tokens(8, models.WIDTH)
    y = np.zeros((8, models.CLASSES), "float32")
    assert np.isfinite(loaded.fit(x, y, verbose=0).history["loss"][0])


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"ratio": 1.5}, ValueError, r"share in \[0, 1\].*ratio=1.5"),
        ({"ratio": -0.1}, ValueError, "ratio=-0.1"),
        ({"ratio": "half"}, TypeError, "ratio='half'"),
        ({"index_sharing": "both"}, ValueError, "'shared', 'independent'"),
        ({"router_initializer": "zeros"}, ValueError, "'uniform', None"),
    ],
)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text):
        DropUpcycling(**settings)


def _kernels(model):
    return [
        (v.path, models.array(v))
        for layer in models.mixtures(model)
        for v in layer.experts.weights
        if v.name == "kernel"
    ]

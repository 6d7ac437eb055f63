"""A bias that balances: in `fit`, in files, in upcycled models.

What a single call does to it is in `test_routers.py`.
"""

import functools

import keras
import models
import numpy as np
import pytest
import reference

import keras_upcycle as ku

WIDTH, EXPERTS, RATE = 8, 4, 0.05


def top_2(**settings):
    return ku.TopKRouter(
        2, **{"load_balance_loss": 0.0, "bias_update_rate": RATE, **settings}
    )


def skewed_kernel(seed=0):
    """Most tokens of `biased_tokens` like expert 0 best, and few expert 3."""
    kernel = 0.5 * np.random.default_rng(seed).normal(size=(WIDTH, EXPERTS))
    kernel[0] = [1.5, 0.5, -0.5, -1.5]
    return kernel.astype("float32")


def biased_tokens(batch, seed=0):
    x = models.tokens(batch, 6, WIDTH, seed=seed)
    x[..., 0] = 1.0
    return x


def model(router=None, scope=None, **settings):
    """One mixture whose router is skewed."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, WIDTH))
    with keras.RematScope(scope):
        layer = ku.MoEFeedForward(
            EXPERTS, 16, router=router or top_2(), **settings
        )
    made = keras.Model(inputs, layer(inputs))
    layer.router.kernel.assign(skewed_kernel())
    return made


def router_of(made):
    return models.mixtures(made)[0].router


def bias_of(made):
    return models.array(router_of(made).bias)


def fitted(made, x, **settings):
    """Batches of 4, in order, at a learning rate of 0."""
    made.compile(keras.optimizers.SGD(0.0), "mse", **settings)
    made.fit(x, np.zeros_like(x), batch_size=4, shuffle=False, verbose=0)
    return made


def decisions(x, bias):
    """The oracle's, of a batch as one group; no rounding can change them."""
    logits = x.reshape(-1, WIDTH).astype("float64") @ skewed_kernel()
    scores = np.stack([reference.softmax(row) for row in logits]) + bias
    ordered = np.sort(scores, axis=-1)
    assert (ordered[:, -2] - ordered[:, -3]).min() > 1e-5
    return [reference.top_k(logits, 2, bias=bias)]


@pytest.mark.thinned
@pytest.mark.parametrize(
    "settings",
    [
        {"dispatch": "capacity"},
        {"dispatch": "dropless", "remat": True},
        {"scope": "full"},
        {"router": lambda: top_2(capacity_factor=None)},
    ],
    ids=["capacity", "remat", "remat scope", "no drops"],
)
def test_fit_moves_the_bias_once_a_step(settings):
    router = settings.get("router", top_2)()
    made = model(**{**settings, "router": router})
    x = biased_tokens(20)
    fitted(made, x)
    expected = np.zeros(EXPERTS)
    for start in range(0, 20, 4):
        found = decisions(x[start : start + 4], expected)
        expected = reference.moved_bias(expected, found, RATE)
    np.testing.assert_allclose(bias_of(made), expected, atol=1e-6)
    assert expected[0] <= -3 * RATE
    made.evaluate(x, x, verbose=0)
    made.predict(x, verbose=0)
    np.testing.assert_allclose(bias_of(made), expected, atol=1e-6)


def test_an_eager_step_and_a_compiled_one_move_it_alike():
    x = biased_tokens(12)
    eager = fitted(model(), x, run_eagerly=True)
    np.testing.assert_array_equal(bias_of(eager), bias_of(fitted(model(), x)))


def worst_load(made, x):
    """The largest load as a multiple of the mean one."""
    router = router_of(made)
    chosen = router(x.reshape(1, -1, WIDTH), training=False)
    counts = np.bincount(
        keras.ops.convert_to_numpy(chosen.requested).ravel(), minlength=EXPERTS
    )
    return counts.max() / counts.mean()


def test_it_balances_a_skewed_router_without_a_loss():
    x, unseen = biased_tokens(64), biased_tokens(64, seed=1)
    made, plain = (model(top_2(bias_update_rate=u)) for u in (0.01, 0.0))
    assert worst_load(made, unseen) == worst_load(plain, unseen) > 1.7
    made.layers[-1](x[:4], training=True)
    assert made.losses == []
    for one in (made, plain):
        one.compile(keras.optimizers.SGD(1e-3), "mse")
        fit = functools.partial(one.fit, x, np.zeros_like(x), verbose=0)
        fit(batch_size=16, epochs=15, shuffle=False)
    assert worst_load(made, unseen) < 1.3
    assert worst_load(plain, unseen) > 1.7


def test_the_bias_survives_a_file_and_trains_on(tmp_path):
    x = biased_tokens(12)
    made = fitted(model(), x)
    made.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert bias_of(again).any()
    models.assert_same_weights(again, made)
    np.testing.assert_array_equal(again.predict(x), made.predict(x))
    for one in (made, again):
        one.fit(x, x, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_array_equal(bias_of(again), bias_of(made))
    made.save_weights(tmp_path / "moe.weights.h5")
    fresh = model()
    fresh.load_weights(tmp_path / "moe.weights.h5")
    models.assert_same_weights(fresh, made)


# Upcycled models.

BUILDERS = {
    "pairs": (models.dense_pairs, lambda: models.tokens(5, models.WIDTH)),
    "vit": (models.vit_backbone, models.images),
    "t5": (models.t5_backbone, models.t5_inputs),
}
every = pytest.mark.parametrize("name", BUILDERS)


@functools.cache
def pair(name):
    """Dense and upcycled; shared by tests that change neither."""
    dense = BUILDERS[name][0]()
    return dense, ku.upcycle_model(dense, EXPERTS, router=top_2())


@pytest.mark.one_backend
@every
def test_upcycling_is_exact_at_first_and_back(name):
    dense, moe = pair(name)
    x = BUILDERS[name][1]()
    for received, expected in zip(
        np.atleast_1d(models.output(moe, x)),
        np.atleast_1d(models.output(dense, x)),
        strict=True,
    ):
        np.testing.assert_allclose(received, expected, atol=2e-5)
    for layer in models.mixtures(moe):
        assert not models.array(layer.router.bias).any()
    back = ku.densify_model(moe, dense=dense)
    models.assert_same_weights(back, dense)


@pytest.mark.one_backend
@every
def test_the_estimate_counts_the_bias(name):
    dense, moe = pair(name)
    estimate = ku.estimate_upcycle(dense, EXPERTS, router=top_2())
    without = ku.estimate_upcycle(dense, EXPERTS, router=ku.TopKRouter(2))
    assert estimate.total_params == moe.count_params()
    added = EXPERTS * len(estimate.layers)
    assert estimate.total_params - without.total_params == added
    assert estimate.active_params - without.active_params == added
    assert estimate.weight_bytes - without.weight_bytes == 4 * added
    # No slots and no products of its own.
    assert estimate.adam_bytes == without.adam_bytes
    assert estimate.flops_per_token == without.flops_per_token


def test_the_optimizer_goes_on_without_it(tmp_path):
    dense = models.dense_pairs()
    x, y = models.tokens(8, models.WIDTH), models.labels(8)
    dense.compile("adam", "sparse_categorical_crossentropy")
    dense.fit(x, y, verbose=0)
    moe = ku.upcycle_model(dense, EXPERTS, router=top_2())
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    slots = [v for v in optimizer.variables if len(v.shape)]
    assert len(slots) == 2 * len(moe.trainable_variables)
    moe.compile(optimizer, "sparse_categorical_crossentropy")
    moe.fit(x, y, verbose=0)
    moved = np.abs(bias_of(moe))
    assert set(np.round(moved / RATE, 4)) <= {0.0, 1.0}
    assert moved.any()
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(again, moe)


@pytest.mark.one_backend
def test_a_frozen_block_keeps_its_bias():
    dense = models.dense_pairs()
    for layer in dense.layers:
        layer.trainable = "head" in layer.name
    moe = ku.upcycle_model(dense, EXPERTS, router=top_2())
    moe.compile("sgd", "sparse_categorical_crossentropy")
    moe.fit(models.tokens(8, models.WIDTH), models.labels(8), verbose=0)
    assert not bias_of(moe).any()


@pytest.mark.one_backend
def test_a_preset_keeps_the_bias(tmp_path):
    moe = ku.upcycle_model(models.vit_backbone(), EXPERTS, router=top_2())
    bias = np.arange(EXPERTS, dtype="float32")
    router_of(moe).bias.assign(bias)
    moe.save_to_preset(str(tmp_path / "preset"))
    again = type(moe).from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(bias_of(again), bias)
    assert router_of(again).bias_update_rate == RATE

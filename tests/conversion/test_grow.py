"""More experts from fewer: what stays equal, who is copied, what goes on."""

import functools
import itertools

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import keras_upcycle as ku
from keras_upcycle.conversion.grow import copied_from
from keras_upcycle.layers.moe_layers import named_mixtures

EVERY = models.EVERY_KIND


def dropless(**kwargs):
    return ku.TopKRouter(capacity_factor=None, **kwargs)


def upcycled(dense, num_experts=4, **kwargs):
    """Experts all different, tokens shared out by routers with large rows."""
    kwargs.setdefault("router", dropless())
    moe = ku.upcycle_model(dense, num_experts, **kwargs)
    return models.set_routers(models.randomized(moe, seed=5), 2)


@functools.cache
def moe_of(name):
    """Shared by tests that change nothing."""
    return upcycled(EVERY[name][0](), layers="all")


def one_layer(router=None, num_experts=4, seed=0, **kwargs):
    inputs = keras.Input((5, models.WIDTH))
    layer = ku.MoEFeedForward(
        num_experts, 8, router or dropless(), name="moe", **kwargs
    )
    model = keras.Model(inputs, layer(inputs), name="one")
    return models.set_routers(models.randomized(model, seed), seed)


def inputs_of_one(seed=0, batch=3):
    return models.tokens(batch, 5, models.WIDTH, seed=seed)


# Nothing is lost.


@pytest.mark.thinned
@pytest.mark.parametrize("name", EVERY)
def test_a_grown_mixture_computes_what_it_did(name):
    moe, inputs = moe_of(name), EVERY[name][1]
    before = models.weights(moe)
    larger, report = ku.grow_experts(moe, 7, seed=1)
    assert type(larger) is type(moe)
    assert larger.name == moe.name
    received, expected = (
        np.concatenate([np.ravel(x) for x in models.output(m, inputs())])
        for m in (larger, moe)
    )
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    models.assert_same_weights(moe, before)
    added = 0
    for told, old, new in zip(
        report.layers,
        models.mixtures(moe),
        models.mixtures(larger),
        strict=True,
    ):
        index = list(told.copied_from)
        assert new.num_experts == len(index) == 7
        assert told.copies == (2, 2, 2, 1)
        assert new.router.expert_groups == told.copied_from
        for role, projection in old.experts.projections.items():
            own = new.experts.projections[role]
            for a, b in zip(projection.weights, own.weights, strict=True):
                np.testing.assert_array_equal(
                    models.array(b), models.array(a)[index]
                )
                added += 3 * a.shape[1] * a.shape[2]
        rows, grown = (models.array(x.router.kernel) for x in (old, new))
        added += 3 * len(rows)
        for expert in range(old.num_experts):
            here = np.array(index) == expert
            np.testing.assert_allclose(
                grown[:, here].mean(1), rows[:, expert], atol=1e-6
            )
            assert here.sum() == 1 or np.ptp(grown[:, here], axis=1).any()
    assert report.parameters_after == larger.count_params()
    assert report.parameters_after - report.parameters_before == added
    assert "7 of 4" in str(report)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "router",
    [
        dropless(normalize=False),
        dropless(normalize=False, softmax="after_top_k"),
        dropless(use_bias=True),
        dropless(top_k=1, normalize=False),
        dropless(bias_update_rate=0.01),
    ],
    ids=["raw", "after_top_k", "bias", "top_1", "loss_free"],
)
def test_whatever_the_router_weighs_by(router):
    moe = one_layer(router)
    x = inputs_of_one(batch=20)
    larger, _ = ku.grow_experts(moe, 7, seed=1)
    gap = models.relative_gap(models.output(larger, x), models.output(moe, x))
    assert gap < 1e-5


def test_copies_share_out_what_their_expert_learns():
    """Gradients of an expert's copies add up to its own."""
    moe = one_layer()
    larger, report = ku.grow_experts(moe, 6, seed=1)
    index = np.array(report.layers[0].copied_from)
    x, cotangent = (models.tokens(20, 5, models.WIDTH, seed=s) for s in (0, 2))
    _, expected = gradients.of_layer(moe.get_layer("moe"), x, cotangent)
    _, found = gradients.of_layer(larger.get_layer("moe"), x, cotangent)
    for name, gradient in found.items():
        if name == "router/kernel":
            # The mean of rows is what chooses: with theirs it goes on.
            gradient, wanted = gradient.T, expected[name].T
        elif name == "inputs":
            continue
        else:
            wanted = expected[name]
        sums = np.stack([gradient[index == e].sum(0) for e in range(4)])
        np.testing.assert_allclose(sums, wanted, rtol=1e-3, atol=1e-4)
        shared_out = [
            np.any(gradient[n]) for n in np.flatnonzero(np.isin(index, (0, 1)))
        ]
        assert all(shared_out), name  # no copy is left without tokens


def test_the_papers_router_is_plain_top_k_of_copied_rows():
    moe = one_layer()
    x = inputs_of_one()
    with pytest.warns(UserWarning, match="two copies of one expert"):
        larger, report = ku.grow_experts(moe, 6, router="copy", seed=1)
    layer = larger.get_layer("moe")
    assert layer.router.expert_groups is None
    assert layer.router.top_k == 2
    index = list(report.layers[0].copied_from)
    old = moe.get_layer("moe")
    grown = gradients.weights_of(layer)
    np.testing.assert_array_equal(
        grown["up"], gradients.weights_of(old)["up"][index]
    )
    expected = reference.moe(
        x, grown, lambda row, mask: reference.top_k(row, 2), old.router.group
    )
    received = models.output(larger, x)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    assert models.relative_gap(received, models.output(moe, x)) > 1e-3


@pytest.mark.one_backend
def test_the_noise_is_the_seeds_and_none_where_none_is_asked_for():
    moe = one_layer()

    def kernel(**kwargs):
        larger, _ = ku.grow_experts(moe, 8, **kwargs)
        return models.array(larger.get_layer("moe").router.kernel)

    np.testing.assert_array_equal(kernel(seed=3), kernel(seed=3))
    assert np.any(kernel(seed=3) != kernel(seed=4))
    assert np.any(kernel() != kernel())
    rows = models.array(moe.get_layer("moe").router.kernel)
    np.testing.assert_array_equal(kernel(split=0), rows.repeat(2, axis=1))
    spread = kernel(split=0.5, seed=3) - rows.repeat(2, axis=1)
    # Two numbers less their mean have half the variance of one.
    assert np.std(spread) == pytest.approx(0.5 * 0.5**0.5, rel=0.2)


# Who is copied.


@pytest.mark.one_backend
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 4))
def test_the_largest_share_is_as_small_as_can_be(usefulness, more):
    count = len(usefulness) + more
    index = copied_from(usefulness, count)
    assert index == sorted(index)
    copies = np.bincount(index, minlength=len(usefulness))
    assert copies.min() >= 1
    assert copies.sum() == count
    usefulness = np.array(usefulness)
    best = min(
        max(usefulness / np.array(each))
        for each in itertools.product(
            range(1, more + 2), repeat=len(usefulness)
        )
        if sum(each) == count
    )
    assert max(usefulness / copies) == best


@pytest.mark.one_backend
def test_blocks_may_copy_unlike_experts_and_stay_exact():
    moe, x = moe_of("pairs"), EVERY["pairs"][1]()
    first, second = named_mixtures(moe)
    larger, report = ku.grow_experts(
        moe, 6, usefulness={second: np.array([0.1, 3.0, 0.1, 0.5])}, seed=1
    )
    assert report.layers[0].copies == (2, 2, 1, 1)
    assert report.layers[1].copies == (1, 3, 1, 1)
    assert "1, 3, 1, 1" in str(report)
    gap = models.relative_gap(models.output(larger, x), models.output(moe, x))
    assert gap < 1e-5
    assert first != second


MEASURES = {
    "gradient": lambda gradient, weight: np.sum(gradient**2, axis=(1, 2)),
    "saliency": lambda gradient, weight: np.sum(
        np.abs(gradient * weight), axis=(1, 2)
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_usefulness_is_that_of_the_gradients(measure):
    moe = one_layer()
    layer = moe.get_layer("moe")
    before = models.weights(moe)
    x, y = (models.tokens(8, 5, models.WIDTH, seed=s) for s in (0, 2))
    expected = np.zeros(4)
    for part in (slice(0, 4), slice(4, 8)):
        batch = ops.convert_to_tensor(x[part])
        gap = models.output(moe, x[part]) - y[part]
        _, found = gradients.of_layer(layer, batch, 2 * gap / gap.size)
        for name, gradient in found.items():
            if name.endswith("kernel") and "router" not in name:
                variable = {v.path.split("/", 1)[1]: v for v in layer.weights}[
                    name
                ]
                expected += MEASURES[measure](gradient, models.array(variable))
    found = ku.expert_usefulness(
        moe, x, y, loss="mse", measure=measure, batch_size=4, verbose=0
    )
    assert list(found) == ["moe"]
    # `fit` shuffles, which mixes the two batches: so one at a time here.
    each = [
        ku.expert_usefulness(
            moe, x[p], y[p], loss="mse", measure=measure, verbose=0
        )["moe"]
        for p in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_allclose(sum(each), expected, rtol=1e-3)
    models.assert_same_weights(moe, before)
    assert not moe.compiled
    larger, report = ku.grow_experts(moe, 6, usefulness=found)
    assert report.layers[0].copies[np.argmax(found["moe"])] > 1
    assert larger.count_params() > moe.count_params()


@pytest.mark.one_backend
def test_a_task_is_measured_by_the_loss_it_is_compiled_with():
    moe = upcycled(models.vit_classifier())
    moe.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(True),
    )
    before = models.weights(moe)
    optimizer = moe.optimizer
    found = ku.expert_usefulness(
        moe, models.images(scale=255.0), models.labels(), verbose=0
    )
    assert set(found) == set(named_mixtures(moe))
    assert all(np.sum(each) > 0 for each in found.values())
    models.assert_same_weights(moe, before)
    assert moe.optimizer is optimizer
    moe = upcycled(models.sequence_dense_pairs())
    with pytest.raises(ValueError, match="not compiled with one"):
        ku.expert_usefulness(moe, models.tokens(3, 6, models.WIDTH))
    with pytest.raises(ValueError, match="`measure` must be"):
        ku.expert_usefulness(moe, [1], loss="mse", measure="norm")


# What goes on.


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(1e-3),
        lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
        lambda: keras.optimizers.Adafactor(1e-3),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    ],
    ids=["adam", "momentum", "adafactor", "loss_scale"],
)
def test_the_optimizer_goes_on(make):
    moe = one_layer()
    moe.compile(make(), "mse", auto_scale_loss=False)
    x = inputs_of_one(batch=8)
    moe.fit(x, x, epochs=2, batch_size=4, verbose=0)
    larger, report = ku.grow_experts(moe, 6, seed=1)
    assert type(larger.optimizer) is type(moe.optimizer)
    assert larger.optimizer is not moe.optimizer
    old, new = (
        getattr(m.optimizer, "inner_optimizer", m.optimizer)
        for m in (moe, larger)
    )
    assert int(new.iterations) == int(old.iterations) == 4
    index = np.array(report.layers[0].copied_from)
    checked = 0
    for before, after in zip(old.variables, new.variables, strict=True):
        a, b = (
            ops.convert_to_numpy(v).astype("float64") for v in (before, after)
        )
        if a.shape == b.shape:
            np.testing.assert_array_equal(b, a)
            continue
        (axis,) = np.flatnonzero(np.array(a.shape) != b.shape)
        a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        sums = np.stack([b[index == e].sum(0) for e in range(4)])
        np.testing.assert_allclose(sums, a, rtol=1e-5, atol=1e-12)
        checked += 1
    assert checked
    larger.fit(x, x, epochs=1, batch_size=4, verbose=0)
    assert int(new.iterations) == 6


@pytest.mark.one_backend
def test_an_optimizer_whose_memory_cannot_be_told_starts_anew_and_says_so():
    moe = one_layer()
    moe.compile(OwnSlots(0.1), "mse")
    x = inputs_of_one(batch=8)
    moe.fit(x, x, verbose=0)
    with pytest.warns(UserWarning, match="starts anew"):
        larger, _ = ku.grow_experts(moe, 6)
    larger.fit(x, x, verbose=0)


@keras.saving.register_keras_serializable("tests")
class OwnSlots(keras.optimizers.SGD):
    """Whose slots are nowhere that one could tell whose they are."""

    def build(self, variables):
        super().build(variables)
        self.by_name = {
            v.path: self.add_variable_from_reference(v, "memory")
            for v in variables
        }


@pytest.mark.one_backend
def test_it_trains_and_the_mixture_does_not_notice(tmp_path):
    moe = upcycled(models.vit_classifier())
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    moe.compile(keras.optimizers.Adam(1e-2), loss)
    images, labels = models.images(scale=255.0), models.labels()
    moe.fit(images, labels, verbose=0)
    before = models.weights(moe)
    larger, _ = ku.grow_experts(moe, 8)
    monitor = ku.RouterMonitor()
    larger.fit(images, labels, verbose=0, callbacks=[monitor])
    models.assert_same_weights(moe, before)
    kernels = [
        models.array(layer.experts.expert_up.kernel)
        for layer in models.mixtures(larger)
    ]  # copies have met unlike tokens
    assert any(np.any(each[0::2] != each[1::2]) for each in kernels)
    larger.save(tmp_path / "larger.keras")
    again = keras.saving.load_model(tmp_path / "larger.keras")
    np.testing.assert_allclose(
        models.output(again, images), models.output(larger, images), atol=1e-6
    )


@pytest.mark.one_backend
def test_what_is_pruned_of_a_grown_mixture_is_chosen_as_before():
    moe = one_layer(num_experts=4)
    larger, _ = ku.grow_experts(moe, 8, seed=1)
    x = inputs_of_one(batch=2)
    smaller, report = ku.prune_experts(larger, x)
    assert report.layers[0].removed
    np.testing.assert_allclose(
        models.output(smaller, x), models.output(larger, x), atol=1e-5
    )
    once, _ = ku.prune_experts(larger, keep={"moe": [0, 2, 4, 6]})
    assert once.get_layer("moe").router.expert_groups == (0, 1, 2, 3)
    np.testing.assert_allclose(
        models.output(once, x), models.output(moe, x), atol=1e-5
    )


# What is refused.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((4,), ValueError, "larger than what the MoE layers have"),
        ((3,), ValueError, "larger than what the MoE layers have"),
        ((6.5,), TypeError, "`num_experts`"),
        ((8, {"moe": [1, 2]}), ValueError, "each of 4 experts"),
        ((8, {"moe": [1, 2, 3, -1]}), ValueError, "at least 0"),
        ((8, {"moe": [1, 2, 3, np.nan]}), ValueError, "finite"),
        ((8, {"no": [1, 2, 3, 4]}), ValueError, "must name blocks"),
        ((8, [1, 2, 3, 4]), TypeError, "a mapping"),
        ((8, None, "paper"), ValueError, "`router` must be one of"),
        ((8, None, "copy", -1), ValueError, "`split`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(arguments, error, said):
    moe = one_layer()
    before = models.weights(moe)
    names = ("num_experts", "usefulness", "router", "split")
    given = dict(zip(names, arguments, strict=False))
    with pytest.raises(error, match=said):
        ku.grow_experts(moe, **given)
    models.assert_same_weights(moe, before)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("router", "said"),
    [
        (ku.ExpertChoiceRouter(), "ExpertChoiceRouter"),
        (ku.DefaultMoERouter(capacity_factor=None), "Default MoE"),
        (dropless(noise_stddev=0.1, load_loss=0.1), "load_loss"),
        (dropless(expert_groups=[0, 0, 1, 1]), "in groups already"),
    ],
    ids=["expert_choice", "default_moe", "load_loss", "groups"],
)
def test_a_router_that_knows_no_groups_is_refused_by_name(router, said):
    moe = one_layer(router)
    with pytest.raises(ku.UpcycleError, match=said):
        ku.grow_experts(moe, 8)
    if router.get_config().get("expert_groups") is None:
        with pytest.warns(UserWarning, match="two copies"):
            larger, _ = ku.grow_experts(moe, 8, router="copy")
        assert np.all(np.isfinite(models.output(larger, inputs_of_one())))


@pytest.mark.one_backend
def test_what_holds_no_floats_or_no_experts_is_refused():
    inputs = keras.Input((5, models.WIDTH))
    with pytest.raises(ku.UpcycleError, match="holds none"):
        ku.grow_experts(keras.Model(inputs, layers.Dense(2)(inputs)), 4)
    moe = upcycled(models.sequence_dense_pairs())
    moe.quantize("int8")
    with pytest.raises(ku.UpcycleError, match="Grow the model before"):
        ku.grow_experts(moe, 8)

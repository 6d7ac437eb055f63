"""Fewer experts: what stays equal, what is measured, and what is refused."""

import functools

import gradients
import keras
import keras_hub
import models
import numpy as np
import pytest
import reference
from keras import layers, ops

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import named_mixtures
from keras_upcycle.routing import functional

EXPERTS = 6
# A token's logits are these, times one number of its own: the two largest are
# chosen or the two smallest, and experts 1 and 4 never.
SPREAD = np.float32([-3.0, 1.0, 3.0, -1.5, 0.0, 2.0])
NEVER = {1, 4}
EVERY = models.EVERY_KIND


def dropless(**kwargs):
    return ku.TopKRouter(capacity_factor=None, **kwargs)


def upcycled(dense, **kwargs):
    """Experts all different, and two of them chosen by nobody."""
    kwargs.setdefault("router", dropless())
    moe = models.randomized(ku.upcycle_model(dense, EXPERTS, **kwargs), seed=5)
    for layer in models.mixtures(moe):
        kernel = layer.router.kernel
        direction = models.tokens(kernel.shape[0], 1, seed=1)
        kernel.assign(direction * SPREAD)
    return moe


@functools.cache
def moe_of(name):
    """Shared by tests that change nothing."""
    return upcycled(EVERY[name][0](), layers="all")


def one_layer(router=None, seed=0, **kwargs):
    """A functional model of one mixture, for what no family has a part in."""
    inputs = keras.Input((5, models.WIDTH))
    layer = ku.MoEFeedForward(
        EXPERTS, 8, router or dropless(), name="moe", **kwargs
    )
    model = keras.Model(inputs, layer(inputs), name="one")
    models.randomized(model, seed)
    return models.set_routers(model, seed, scale=1.0)


def inputs_of_one(seed=0):
    return models.tokens(3, 5, models.WIDTH, seed=seed)


def rows(variable, kept):
    return models.array(variable)[list(kept)]


# What stays equal.


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("name", EVERY)
def test_without_experts_that_nobody_chose_predictions_stay(name):
    moe, inputs = moe_of(name), EVERY[name][1]
    before = models.weights(moe)
    smaller, report = ku.prune_experts(moe, inputs())
    assert type(smaller) is type(moe)
    assert smaller.name == moe.name
    assert [v.path for v in smaller.weights if "norm" not in v.path] == [
        v.path for v in moe.weights if "norm" not in v.path
    ]
    received, expected = (
        np.concatenate([np.ravel(x) for x in models.output(m, inputs())])
        for m in (smaller, moe)
    )
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)
    models.assert_same_weights(moe, before)
    pairs = list(
        zip(
            report.layers,
            models.mixtures(moe),
            models.mixtures(smaller),
            strict=True,
        )
    )
    assert pairs
    # Inputs first, under the names that reports use.
    assert list(named_mixtures(moe).values()) == models.mixtures(moe)
    assert list(named_mixtures(moe)) == [told.name for told in report.layers]
    removed = 0
    for told, old, new in pairs:
        assert NEVER <= set(told.removed)
        assert told.removed_share == 0.0
        assert new.num_experts == new.experts.num_experts == len(told.kept)
        for role, projection in old.experts.projections.items():
            own = new.experts.projections[role]
            for a, b in zip(projection.weights, own.weights, strict=True):
                np.testing.assert_array_equal(
                    models.array(b), rows(a, told.kept)
                )
                removed += len(told.removed) * a.shape[1] * a.shape[2]
        kernel = models.array(old.router.kernel)
        np.testing.assert_array_equal(
            models.array(new.router.kernel), kernel[:, list(told.kept)]
        )
        removed += len(told.removed) * kernel.shape[0]
    assert report.parameters_before == moe.count_params()
    assert report.parameters_after == smaller.count_params()
    assert report.parameters_before - report.parameters_after == removed


@pytest.mark.one_backend
def test_gradients_of_what_is_left_stay_too():
    moe = one_layer()
    layer = moe.get_layer("moe")
    layer.router.kernel.assign(models.tokens(models.WIDTH, 1) * SPREAD)
    smaller, report = ku.prune_experts(moe, inputs_of_one())
    kept = list(report.layers[0].kept)
    cotangent = models.tokens(3, 5, models.WIDTH, seed=2)
    _, expected = gradients.of_layer(layer, inputs_of_one(), cotangent)
    _, found = gradients.of_layer(
        smaller.get_layer("moe"), inputs_of_one(), cotangent
    )
    for name, gradient in found.items():
        wanted = expected[name]
        if name == "router/kernel":
            wanted = wanted[:, kept]
        elif name != "inputs":
            wanted = wanted[kept]
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "route", "equal"),
    [
        (
            dropless(normalize=False),
            lambda x, m: reference.top_k(x, 2, normalize=False),
            False,
        ),
        (
            dropless(normalize=False, softmax="after_top_k"),
            lambda x, m: reference.top_k(x, 2, False, "after_top_k"),
            True,
        ),
        (
            ku.TopKRouter(eval_capacity_factor=1.0, group="example"),
            lambda x, m: reference.top_k(x, 2, capacity_factor=1.0),
            False,
        ),
        (
            ku.ExpertChoiceRouter(),
            lambda x, m: reference.expert_choice(x, 2.0),
            False,
        ),
    ],
    ids=["raw", "after_top_k", "capacity", "expert_choice"],
)
def test_what_is_left_computes_what_its_weights_say(router, route, equal):
    """And the docstring is right about who may change."""
    moe = one_layer(router)
    layer, x = moe.get_layer("moe"), inputs_of_one()
    layer.router.kernel.assign(models.tokens(models.WIDTH, 1) * SPREAD)
    kept = [0, 2, 3, 5]
    smaller, _ = ku.prune_experts(moe, keep={"moe": kept})
    weights = {
        name: value[:, kept] if name == "router" else value[kept]
        for name, value in gradients.weights_of(layer).items()
    }
    received = models.output(smaller, x)
    expected = reference.moe(x, weights, route, layer.router.group)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    gap = models.relative_gap(received, models.output(moe, x))
    assert (gap < 1e-5) == equal


# What is measured, and what is kept.


def test_a_share_is_that_of_all_assignments():
    moe, x = one_layer(), inputs_of_one()
    kernel = models.array(moe.get_layer("moe").router.kernel)
    counts = np.sum(
        [reference.top_k(row @ kernel, 2).processed.sum(0) for row in x], 0
    )
    _, report = ku.prune_experts(moe, x, num_experts=3)
    (told,) = report.layers
    np.testing.assert_allclose(told.shares, counts / counts.sum())
    assert set(told.kept) == set(np.argsort(-counts, kind="stable")[:3])
    assert told.removed_share == pytest.approx(
        counts[list(told.removed)].sum() / counts.sum()
    )


def test_in_expert_choice_a_share_is_that_of_the_combine_weights():
    moe, x = one_layer(ku.ExpertChoiceRouter()), inputs_of_one()
    kernel = models.array(moe.get_layer("moe").router.kernel)
    weights = np.sum(
        [
            reference.expert_choice(row @ kernel, 2.0).weights.sum(0)
            for row in x
        ],
        0,
    )
    smaller, report = ku.prune_experts(moe, x, num_experts=2)
    np.testing.assert_allclose(
        report.layers[0].shares, weights / weights.sum(), rtol=1e-4
    )
    assert set(report.layers[0].kept) == set(np.argsort(-weights)[:2])
    assert smaller.get_layer("moe").num_experts == 2


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
def test_batches_are_added_up(kind):
    moe = one_layer()
    x, y = inputs_of_one(), inputs_of_one(seed=1)
    both = ku.prune_experts(moe, np.concatenate([x, y]), min_share=0.0)
    each = ku.prune_experts(moe, kind([x, y]), min_share=0.0)
    assert each[1] == both[1]
    assert each[1].layers[0].removed == ()


def test_padding_has_no_share():
    inputs = keras.Input((5, models.WIDTH))
    layer = ku.MoEFeedForward(EXPERTS, 8, dropless(), name="moe")
    moe = keras.Model(inputs, layer(layers.Masking()(inputs)))
    models.set_routers(moe)
    x = inputs_of_one()
    x[:, 3:] = 0.0  # ties: padding would choose experts 0 and 1
    kernel = models.array(layer.router.kernel)
    counts = np.sum(
        [reference.top_k(row[:3] @ kernel, 2).processed.sum(0) for row in x], 0
    )
    _, report = ku.prune_experts(moe, x)
    np.testing.assert_allclose(report.layers[0].shares, counts / counts.sum())


@pytest.mark.one_backend
def test_a_bound_on_the_share_removes_what_is_below_it():
    moe, x = one_layer(), inputs_of_one()
    (_, report) = ku.prune_experts(moe, x, min_share=0.0)
    shares = np.array(report.layers[0].shares)
    bound = np.sort(shares)[-3]
    (_, report) = ku.prune_experts(moe, x, min_share=bound)
    assert report.layers[0].kept == tuple(np.flatnonzero(shares >= bound))


@pytest.mark.one_backend
def test_a_layer_keeps_as_many_as_its_router_needs():
    for router, left in ((dropless(top_k=3), 3), (ku.ExpertChoiceRouter(), 1)):
        smaller, report = ku.prune_experts(
            one_layer(router), inputs_of_one(), min_share=1.0
        )
        (told,) = report.layers
        assert len(told.kept) == smaller.get_layer("moe").num_experts == left
        best = np.argsort(-np.array(told.shares), kind="stable")[:left]
        assert set(told.kept) == set(best)


@pytest.mark.one_backend
def test_a_mapping_keeps_what_it_lists_and_leaves_the_others_whole():
    moe = upcycled(models.sequence_dense_pairs(), layers="all")
    smaller, report = ku.prune_experts(
        moe, keep={"up_1_moe": np.array([5, 0, 2])}
    )
    assert smaller.get_layer("up_0_moe").num_experts == EXPERTS
    assert smaller.get_layer("up_1_moe").num_experts == 3
    first, second = report.layers
    assert first.removed == ()
    assert second.kept == (0, 2, 5)
    assert second.shares is second.removed_share is None
    assert "not measured" in str(report)


@pytest.mark.one_backend
def test_the_report_says_it_all():
    moe = upcycled(models.sequence_dense_pairs(), layers="all")
    x = models.tokens(3, 6, models.WIDTH)
    _, report = ku.prune_experts(moe, x, num_experts=4)
    text = str(report)
    assert f"{report.parameters_before:,}" in text
    assert f"{report.parameters_after:,}" in text
    for told in report.layers:
        (line,) = [row for row in text.splitlines() if told.name in row]
        assert f"4 of {EXPERTS}" in line
        assert ", ".join(map(str, told.removed)) in line


# The result lives by itself.


def test_it_trains_and_the_original_does_not_notice():
    moe = upcycled(models.vit_classifier())
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    moe.compile(keras.optimizers.SGD(0.5), loss)
    before = models.weights(moe)
    smaller, _ = ku.prune_experts(moe, models.images())
    assert isinstance(smaller.optimizer, keras.optimizers.SGD)
    assert smaller.optimizer is not moe.optimizer
    layer = models.mixtures(smaller)[0]
    kernels = (layer.router.kernel, layer.experts.expert_up.kernel)
    start = [models.array(v) for v in kernels]
    smaller.fit(models.images(scale=255.0), models.labels(), verbose=0)
    for variable, value in zip(kernels, start, strict=True):
        assert np.any(models.array(variable) != value)
    models.assert_same_weights(moe, before)


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("name", ["vit_classifier", "t5_lm", "pairs"])
def test_layers_of_different_sizes_are_saved_and_loaded(name, tmp_path):
    moe, inputs = moe_of(name), EVERY[name][1]
    first, *others = named_mixtures(moe)
    keep = {block: [1, 2, 5] for block in others}
    smaller, _ = ku.prune_experts(moe, keep={first: [0, 4], **keep})
    counts = [layer.num_experts for layer in models.mixtures(smaller)]
    assert counts == [2] + [3] * len(others)
    smaller.save(tmp_path / "smaller.keras")
    loaded = [keras.saving.load_model(tmp_path / "smaller.keras")]
    if hasattr(smaller, "save_to_preset"):
        smaller.save_to_preset(str(tmp_path / "preset"))
        kind = {
            "vit_classifier": keras_hub.models.ImageClassifier,
            "t5_lm": keras_hub.models.Seq2SeqLM,
        }[name]
        loaded.append(kind.from_preset(str(tmp_path / "preset")))
    for again in loaded:
        assert type(again) is type(smaller)
        models.assert_same_weights(again, smaller)
        np.testing.assert_array_equal(
            models.output(again, inputs()), models.output(smaller, inputs())
        )
    # And once more, from a loaded model.
    last = list(named_mixtures(loaded[0]))[-1]
    again, _ = ku.prune_experts(loaded[0], keep={last: [0, 2]})
    assert models.mixtures(again)[-1].num_experts == 2


@pytest.mark.one_backend
def test_frozen_parts_stay_frozen_and_random_states_go_on():
    moe = one_layer(dropless(noise_stddev=0.5, seed=3), dropout=0.5)
    layer = moe.get_layer("moe")
    layer.experts.expert_up.trainable = False
    layer.experts.expert_down.bias.trainable = False
    layer.router.trainable = False
    moe(inputs_of_one(), training=True)  # moves the seeds on
    new = ku.prune_experts(moe, keep={"moe": [0, 1, 2]})[0].get_layer("moe")
    assert [v.path for v in new.trainable_weights] == [
        v.path for v in layer.trainable_weights
    ]
    for a, b in (
        (layer.router.noise_seed, new.router.noise_seed),
        (
            layer.experts.hidden_dropout.seed_generator,
            new.experts.hidden_dropout.seed_generator,
        ),
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(a.state), ops.convert_to_numpy(b.state)
        )


class RouterOfMyOwn(ku.Router):
    """Not registered; with weights of every shape, one in a sub-layer."""

    def __init__(self, **kwargs):
        super().__init__(**{"group": "batch", **kwargs})

    def build(self, input_shape):
        super().build(input_shape)
        count = self.num_experts
        self.bias = self.add_weight(
            shape=(count,), initializer="uniform", trainable=False
        )
        self.pairs = self.add_weight(
            shape=(count, 2, count), initializer="uniform"
        )
        self.scale = self.add_weight(shape=(), initializer="uniform")
        # As wide as there are experts, and none of their business.
        self.wide = self.add_weight(shape=(EXPERTS,), initializer="uniform")
        self.below = layers.Dense(count)
        self.below.build(input_shape)

    def choose(self, logits, mask, training):
        return functional.top_k(logits + self.bias, 1, mask=mask)


@pytest.mark.one_backend
def test_every_weight_of_a_router_loses_its_part():
    moe = one_layer(RouterOfMyOwn())
    old = moe.get_layer("moe").router
    old.watch()  # counters are the old model's own
    kept = [1, 3, 4]
    new = ku.prune_experts(moe, keep={"moe": kept})[0].get_layer("moe").router
    for name, part in {
        "kernel": np.s_[:, kept],
        "bias": np.s_[kept],
        "scale": np.s_[()],
        "wide": np.s_[:],
    }.items():
        np.testing.assert_array_equal(
            models.array(getattr(new, name)),
            models.array(getattr(old, name))[part],
        )
    np.testing.assert_array_equal(
        models.array(new.pairs), models.array(old.pairs)[kept][..., kept]
    )
    np.testing.assert_array_equal(
        models.array(new.below.kernel), models.array(old.below.kernel)[:, kept]
    )
    assert not new.bias.trainable


# What is refused.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"inputs=None and keep=None.*Pass a batch"),
        (
            {"keep": {"moe": [0, 1]}, "min_share": 0.1},
            ValueError,
            r"At most one.*min_share=0\.1, keep=",
        ),
        ({"num_experts": 0}, ValueError, "at least 1.*num_experts=0"),
        ({"num_experts": 2.0}, TypeError, r"an integer.*num_experts=2\.0"),
        ({"min_share": 1.5}, ValueError, r"from 0 to 1.*min_share=1\.5"),
        ({"min_share": "a"}, TypeError, "a number.*min_share='a'"),
        (
            {"num_experts": 1},
            ValueError,
            r"router of 'moe'.*1 of 6.*top_k=2.*Keep more",
        ),
        ({"keep": {"moe": [0]}}, ValueError, r"1 of 6.*top_k=2.*Keep more"),
        ({"keep": [0, 1]}, TypeError, r"keep=\[0, 1\].*blocks are \['moe'\]"),
        ({"keep": {"mo": [0, 1]}}, ValueError, r"\['moe'\].*for \['mo'\]"),
        ({"keep": {"moe": []}}, ValueError, "at least one.*Leave"),
        ({"keep": {"moe": 2}}, ValueError, "list at least one.*'moe': 2"),
        ({"keep": {"moe": [0, 6]}}, ValueError, r"0 to 5.*\[0, 6\]"),
        ({"keep": {"moe": [-1, 2]}}, ValueError, r"0 to 5.*\[-1, 2\]"),
        ({"keep": {"moe": [2, 2]}}, ValueError, r"each once.*\[2, 2\]"),
        ({"keep": {"moe": [0.0, 1.0]}}, ValueError, r"\[0\.0, 1\.0\]"),
        ({"inputs": []}, ValueError, r"every MoE layer.*\['moe'\]"),
    ],
)
def test_what_cannot_be_is_said(arguments, error, message):
    if not {"keep", "inputs"} & set(arguments) and arguments:
        arguments = {"inputs": inputs_of_one(), **arguments}
    with pytest.raises(error, match=f"(?s){message}"):
        ku.prune_experts(one_layer(), **arguments)


@pytest.mark.one_backend
def test_a_model_without_mixtures_is_refused():
    with pytest.raises(ku.UpcycleError, match=r"hold an MoE layer.*'pairs'"):
        ku.prune_experts(models.dense_pairs(), models.tokens(3, models.WIDTH))
    with pytest.raises(TypeError, match="must be a Keras model"):
        ku.prune_experts("moe", models.tokens(3, models.WIDTH))


@pytest.mark.one_backend
def test_adapters_and_int8_are_refused():
    keep = {"moe": [0, 1]}
    moe = one_layer()
    moe.get_layer("moe").experts.expert_up.enable_lora(2)
    with pytest.raises(ku.UpcycleError, match=r"expert_up.*Merge them first"):
        ku.prune_experts(moe, keep=keep)
    moe = one_layer()
    moe.quantize("int8")
    with pytest.raises(ku.UpcycleError, match="Prune the model before it is"):
        ku.prune_experts(moe, keep=keep)


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """Makes its mixture anew, with the number of experts it knows."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moe = ku.MoEFeedForward(3, 8, dropless(), name="moe")

    def call(self, x):
        return x + self.moe(x)


@pytest.mark.one_backend
def test_a_mixture_inside_a_layer_of_ones_own_is_refused_or_left_whole():
    inputs = keras.Input((5, models.WIDTH))
    x = Block(name="block")(inputs)
    x = ku.MoEFeedForward(3, 8, dropless(), name="outer")(x)
    moe = models.randomized(keras.Model(inputs, x))
    assert list(named_mixtures(moe)) == ["block/moe", "outer"]
    with pytest.raises(ku.UpcycleError, match="'block/moe' stands inside"):
        ku.prune_experts(moe, inputs_of_one(), num_experts=2)
    smaller, _ = ku.prune_experts(moe, keep={"outer": [0, 2]})
    counts = [layer.num_experts for layer in models.mixtures(smaller)]
    assert counts == [3, 2]
    models.assert_same_weights(
        models.mixtures(smaller)[0], models.weights(models.mixtures(moe)[0])
    )


@pytest.mark.one_backend
def test_a_family_that_cannot_go_back_is_told_what_it_lacks(monkeypatch):
    from keras_upcycle import families

    moe = upcycled(models.vit_backbone())
    kind = type(families.family_of(moe))
    monkeypatch.setattr(kind, "build_dense", families.Family.build_dense)
    with pytest.raises(ku.UpcycleError, match="must define `build_dense`"):
        ku.prune_experts(moe, models.images())


@pytest.mark.one_backend
def test_two_mixtures_of_one_path_have_two_names():
    class Pair(layers.Layer):
        def build(self, shape):
            self.both = [ku.MoEFeedForward(2, 8, name="moe") for _ in "ab"]
            for layer in self.both:
                layer.build(shape)
            # The same layer once more is no second one.
            self.again = self.both[0]

    pair = Pair(name="pair")
    pair.build((None, 3, models.WIDTH))
    assert list(named_mixtures(pair)) == ["pair", "pair#2"]

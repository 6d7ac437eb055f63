"""`upcycle_model`: what the sparse model computes, keeps and leaves alone."""

import dataclasses
import functools
import warnings

import gradients
import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle
from keras_upcycle import families, keras_internals
from keras_upcycle.conversion import plan, selection
from keras_upcycle.layers.call_context import record_calls

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")

EXPERTS = 4


def converted(dense, moe):
    """Numbers of the converted blocks, counted inputs first."""
    sites = keras_upcycle.find_feed_forwards(dense)
    places = families.family_of(moe).current_layers(moe, sites)
    return [
        site.index
        for site, layer in zip(sites, places, strict=True)
        if isinstance(layer, keras_upcycle.MoEFeedForward)
    ]


def dropless(top_k=2, **kwargs):
    return keras_upcycle.TopKRouter(top_k=top_k, capacity_factor=None, **kwargs)


# Step 0: the sparse model computes what the dense one does.


@pytest.mark.thinned
@pytest.mark.parametrize("top_k", [1, 2, 4], ids="K={}".format)
def test_top_k_computes_what_the_dense_vit_does(top_k):
    dense, images = models.vit_backbone(4), models.images()
    moe = keras_upcycle.upcycle_model(
        dense, EXPERTS, router=dropless(top_k), layers="all_but_first"
    )
    models.set_routers(moe)
    report = keras_upcycle.verify_upcycle(dense, moe, images)
    assert len(report.layers) == 3
    assert report.relative_difference <= 1e-4
    for layer in report.layers:
        assert layer.relative_difference <= 1e-5
        assert layer.unrouted_fraction == 0.0
        assert layer.mean_combine_weight == pytest.approx(1.0, abs=1e-6)
    # And without the help of `verify_upcycle`.
    gap = models.relative_gap(
        models.output(moe, images), models.output(dense, images)
    )
    assert gap <= 1e-4
    mlps = [s.layers[0] for s in keras_upcycle.find_feed_forwards(dense)][1:]
    x = models.tokens(2, 17, models.WIDTH)
    for mlp, layer in zip(mlps, models.mixtures(moe), strict=True):
        assert (
            models.relative_gap(models.array(layer(x)), models.array(mlp(x)))
            <= 1e-5
        )


@pytest.mark.thinned
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0], ids="C={}".format)
def test_expert_choice_equals_dense_on_routed_tokens(factor):
    dense, images = models.vit_backbone(4), models.images()
    moe = keras_upcycle.upcycle_model(
        dense,
        EXPERTS,
        router=keras_upcycle.ExpertChoiceRouter(capacity_factor=factor),
        layers="all_but_first",
    )
    models.set_routers(moe)
    report = keras_upcycle.verify_upcycle(dense, moe, images)
    with record_calls() as calls:
        moe(images, training=False)
    mlps = [s.layers[0] for s in keras_upcycle.find_feed_forwards(dense)][1:]
    assert len(calls) == len(report.layers) == 3
    for call, mlp, layer in zip(calls, mlps, report.layers, strict=True):
        routed = np.zeros(call.inputs.shape[:2], bool)
        chosen = ops.convert_to_numpy(call.routing.tokens)
        active = ops.convert_to_numpy(call.routing.active)
        for group, expert, slot in np.argwhere(active):
            routed[group, chosen[group, expert, slot]] = True
        expected = models.array(mlp(call.inputs))
        received = models.array(call.outputs)
        gap = np.max(np.abs(expected - received)[routed])
        assert gap <= 1e-5 * np.max(np.abs(expected))
        assert np.all(received[~routed] == 0.0)
        assert layer.unrouted_fraction == pytest.approx(np.mean(~routed))
        assert layer.relative_difference <= 1e-5
    if factor == 1.0:
        assert report.layers[0].unrouted_fraction > 0.0


@pytest.mark.one_backend
def test_expert_choice_with_every_token_in_every_expert_is_exact():
    dense, images = models.vit_backbone(), models.images()
    moe = keras_upcycle.upcycle_model(
        dense,
        EXPERTS,
        router=keras_upcycle.ExpertChoiceRouter(capacity_factor=EXPERTS),
    )
    report = keras_upcycle.verify_upcycle(dense, moe, images)
    assert report.relative_difference <= 1e-5


@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "dense"])
def test_every_engine_computes_what_the_dense_model_does(dispatch):
    dense, x = models.sequence_dense_pairs(), models.tokens(3, 6, models.WIDTH)
    moe = keras_upcycle.upcycle_model(
        dense, EXPERTS, router=dropless(), dispatch=dispatch
    )
    assert models.mixtures(moe)[0].dispatch == dispatch
    gap = models.relative_gap(models.output(moe, x), models.output(dense, x))
    assert gap <= 1e-5


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [(1, 1), (4, 4), (16, 2)],
    ids=["one expert", "all of them", "more experts than tokens"],
)
def test_extreme_numbers_of_experts_work(num_experts, top_k):
    dense, x = models.dense_pairs(), models.tokens(1, models.WIDTH)
    moe = keras_upcycle.upcycle_model(
        dense, num_experts, router=dropless(top_k)
    )
    gap = models.relative_gap(models.output(moe, x), models.output(dense, x))
    assert gap <= 1e-5


@pytest.mark.one_backend
def test_mixed_bfloat16_vit_upcycles_and_runs():
    dense, images = models.vit_backbone(dtype="mixed_bfloat16"), models.images()
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router="top_k")
    (layer,) = models.mixtures(moe)
    assert layer.dtype_policy.name == "mixed_bfloat16"
    assert layer.router.kernel.dtype == "float32"
    assert layer.experts.expert_up.kernel.dtype == "float32"
    report = keras_upcycle.verify_upcycle(dense, moe, images)
    # bfloat16 keeps 8 bits: 2 ** -8 a rounding, a few roundings deep.
    assert report.relative_difference <= 4 * 2**-8
    assert layer(ops.cast(models.tokens(1, 5, models.WIDTH), "bfloat16")).dtype


# Gradients at step 0 (`sparse_upcycling.md`, 4.5).


def gradients_of(model, x):
    """By `id` of the variable: of `sum(outputs * cotangent)`."""
    variables = model.trainable_variables
    frozen = [v.value for v in model.non_trainable_variables]
    shape = models.output(model, x).shape
    cotangent = ops.convert_to_tensor(models.tokens(*shape, seed=7))

    def scalar(*values):
        outputs, _ = model.stateless_call(
            list(values), frozen, x, training=False
        )
        return ops.sum(outputs * cotangent)

    _, _, found = gradients.pull_back(scalar, *[v.value for v in variables])
    return {id(v): g for v, g in zip(variables, found, strict=True)}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (models.dense_pairs, lambda: models.tokens(5, models.WIDTH)),
        (models.vit_backbone, models.images),
    ],
    ids=["dense_pairs", "vit"],
)
def test_expert_gradients_sum_to_the_dense_gradient(build, inputs):
    dense, x = build(), inputs()
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=dropless())
    models.set_routers(moe)
    expected, received = gradients_of(dense, x), gradients_of(moe, x)
    (layer,) = models.mixtures(moe)
    site = keras_upcycle.find_feed_forwards(dense)[1]
    of_experts = set()
    for name, kernel in (
        ("up_kernel", layer.experts.expert_up.kernel),
        ("up_bias", layer.experts.expert_up.bias),
        ("down_kernel", layer.experts.expert_down.kernel),
        ("down_bias", layer.experts.expert_down.bias),
    ):
        of_experts.add(id(kernel))
        dense_gradient = expected[id(site.kernels[name])]
        total = np.sum(received[id(kernel)], axis=0)
        np.testing.assert_allclose(
            total.reshape(dense_gradient.shape),
            dense_gradient,
            atol=1e-5 * np.max(np.abs(dense_gradient)),
            rtol=1e-4,
        )
        # Or one expert did it all, and the sum says nothing.
        assert np.count_nonzero(np.any(received[id(kernel)], (1, 2))) > 1
    scale = max(np.max(np.abs(g)) for g in expected.values())
    router = received[id(layer.router.kernel)]
    assert np.max(np.abs(router)) <= 1e-5 * scale
    blocks = {id(v) for v in site.kernels.values()}
    others = [g for key, g in expected.items() if key not in blocks]
    ours = of_experts | {id(layer.router.kernel)}
    rest = [g for key, g in received.items() if key not in ours]
    for a, b in zip(others, rest, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4)


def test_raw_weights_give_the_router_a_gradient():
    """The check above can fail: without renormalising it does."""
    dense, x = models.dense_pairs(), models.tokens(5, models.WIDTH)
    moe = keras_upcycle.upcycle_model(
        dense, EXPERTS, router=dropless(normalize=False)
    )
    (layer,) = models.mixtures(moe)
    gradient = gradients_of(moe, x)[id(layer.router.kernel)]
    assert np.max(np.abs(gradient)) > 1e-3


# The donor.


def compiled(model, **kwargs):
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("build", "inputs", "num_experts"),
    [
        (models.dense_pairs, lambda: models.tokens(4, models.WIDTH), 1),
        (models.dense_pairs, lambda: models.tokens(4, models.WIDTH), EXPERTS),
        # Pooled: from the class token alone few experts get a gradient.
        (lambda: models.vit_classifier(pooling="gap"), models.images, EXPERTS),
    ],
    ids=["dense_pairs, 1 expert", "dense_pairs", "vit_classifier"],
)
def test_training_the_result_leaves_the_donor_alive(build, inputs, num_experts):
    """On JAX a shared buffer would be donated, and the donor be dead."""
    x, y = inputs(), models.labels()
    dense = compiled(build())
    dense.fit(x, y, epochs=1, verbose=0)
    before = models.weights(dense)
    slots = [models.array(v) for v in dense.optimizer.variables]
    moe = keras_upcycle.upcycle_model(dense, num_experts)
    start = models.weights(moe)
    (layer,) = models.mixtures(moe)
    router = models.array(layer.router.kernel)
    moe.fit(x, y, epochs=2, verbose=0)
    trained = models.weights(moe)
    assert any(np.any(a != b) for a, b in zip(start, trained, strict=True))
    if num_experts > 1:
        experts = models.array(layer.experts.expert_up.kernel)
        assert np.any(experts[0] != experts[1])
        assert np.any(router != models.array(layer.router.kernel))
    models.assert_same_weights(dense, before)
    for slot, value in zip(dense.optimizer.variables, slots, strict=True):
        np.testing.assert_array_equal(models.array(slot), value)
    assert np.all(np.isfinite(models.output(dense, x)))
    dense.fit(x, y, epochs=1, verbose=0)
    after = models.weights(dense)
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
    models.assert_same_weights(moe, trained)


# What is carried of `compile`.


@pytest.mark.one_backend
def test_compile_settings_are_carried_without_slots_and_step():
    x, y = models.tokens(4, models.WIDTH), models.labels()
    dense = models.dense_pairs()
    dense.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.03, 10),
            beta_1=0.8,
            weight_decay=0.02,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["sparse_categorical_accuracy"],
    )
    dense.fit(x, y, verbose=0)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert moe.compiled
    assert isinstance(moe.optimizer, keras.optimizers.AdamW)
    assert moe.optimizer is not dense.optimizer
    assert moe.optimizer.get_config() == dense.optimizer.get_config()
    assert int(moe.optimizer.iterations) == 0
    assert int(dense.optimizer.iterations) == 1
    slots = [v for v in moe.optimizer.variables if len(v.shape)]
    assert all(np.all(models.array(slot) == 0.0) for slot in slots)
    assert moe.loss.from_logits
    logs = moe.evaluate(x, y, verbose=0, return_dict=True)
    assert set(logs) == {"loss", "sparse_categorical_accuracy"}


@pytest.mark.one_backend
def test_a_task_keeps_the_users_loss_not_keras_hubs_default():
    dense = models.vit_classifier()
    dense.compile(
        optimizer=keras.optimizers.SGD(0.25),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["categorical_accuracy"],
    )
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert isinstance(moe.optimizer, keras.optimizers.SGD)
    assert float(moe.optimizer.learning_rate) == 0.25
    assert type(moe.loss) is keras.losses.CategoricalCrossentropy
    y = np.eye(models.CLASSES, dtype="float32")[models.labels()]
    logs = moe.evaluate(models.images(), y, verbose=0, return_dict=True)
    assert "categorical_accuracy" in logs


@pytest.mark.one_backend
def test_a_learning_rate_set_later_is_carried():
    dense = compiled(models.dense_pairs())
    dense.optimizer.learning_rate = 0.125
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert float(moe.optimizer.learning_rate) == 0.125


@pytest.mark.one_backend
def test_run_settings_are_carried():
    dense = models.dense_pairs()
    dense.compile("sgd", "mse", run_eagerly=True, jit_compile=False)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert moe.run_eagerly
    assert not moe.jit_compile


@pytest.mark.one_backend
def test_an_uncompiled_model_stays_uncompiled():
    assert not keras_upcycle.upcycle_model(models.dense_pairs(), 2).compiled


# What else is kept.


@pytest.mark.one_backend
def test_frozen_layers_stay_frozen_block_by_block():
    dense = models.vit_backbone(4)
    blocks = dense.get_layer("vit_encoder").encoder_layers
    dense.get_layer("vit_patching_and_embedding").trainable = False
    blocks[0].trainable = False
    blocks[2].trainable = False
    blocks[3].mlp.dense_1.trainable = False
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    new = moe.get_layer("vit_encoder").encoder_layers
    assert not moe.get_layer("vit_patching_and_embedding").trainable_weights
    assert not new[0].trainable_weights
    assert new[1].trainable_weights
    # A frozen block freezes its router too.
    assert not new[2].trainable_weights
    # Half of a block: its other half, and its router, train.
    trainable = {
        v.path.split("/moe/")[-1] for v in new[3].mlp.trainable_weights
    }
    assert trainable == {
        "router/kernel",
        "experts/expert_down/kernel",
        "experts/expert_down/bias",
    }
    assert new[3].mha.trainable_weights


@pytest.mark.one_backend
def test_a_frozen_backbone_stays_frozen_in_a_task():
    dense = models.vit_classifier()
    dense.backbone.trainable = False
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert not moe.backbone.trainable_weights
    assert len(moe.trainable_weights) == len(dense.trainable_weights) == 2


@pytest.mark.one_backend
def test_frozen_dense_pairs_stay_frozen():
    dense = models.dense_pairs()
    for name in ("up_1", "down_1", "head"):
        dense.get_layer(name).trainable = False
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    paths = {v.path for v in moe.trainable_weights}
    assert paths == {v.path for v in dense.trainable_weights}


def channels_first_conv_runs():
    try:
        conv = layers.Conv2D(1, 2, data_format="channels_first")
        conv(np.zeros((1, 1, 4, 4), "float32"))
    except Exception:
        return False
    return True


def test_channels_first_is_kept():
    dense = models.vit_backbone(
        image_shape=(3, 16, 16), data_format="channels_first"
    )
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=dropless())
    assert moe.data_format == "channels_first"
    again = type(moe).from_config(moe.get_config())
    assert again.data_format == "channels_first"
    embedding = again.get_layer("vit_patching_and_embedding")
    assert embedding.data_format == "channels_first"
    if not channels_first_conv_runs():
        pytest.skip("this backend cannot convolve channels_first on a CPU")
    images = np.moveaxis(models.images(), -1, 1)
    report = keras_upcycle.verify_upcycle(dense, moe, images)
    assert report.relative_difference <= 1e-5


@pytest.mark.one_backend
def test_a_task_keeps_its_preprocessor_and_head():
    dense = models.vit_classifier_with_intermediate()
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=dropless())
    assert moe.preprocessor.image_converter.scale == 1 / 255
    assert moe.preprocessor.image_converter.image_size == models.IMAGE[:2]
    for name in ("num_classes", "pooling", "intermediate_dim", "activation"):
        assert getattr(moe, name) == getattr(dense, name)
    assert moe.get_config()["dropout"] == dense.get_config()["dropout"]
    # Through `predict`, which preprocesses.
    images = models.images(scale=255.0)
    np.testing.assert_allclose(
        moe.predict(images, verbose=0),
        dense.predict(images, verbose=0),
        atol=1e-5,
    )


@pytest.mark.one_backend
def test_a_task_without_preprocessor_stays_without():
    dense = models.vit_classifier(preprocessor=None)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert moe.preprocessor is None


@pytest.mark.one_backend
def test_a_preprocessor_of_the_users_own_is_kept():
    own = layers.Rescaling(1 / 127)
    dense = models.vit_classifier(preprocessor=own)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    assert moe.preprocessor is own


# Models around a backbone.


def siamese():
    """One backbone called twice, a shared head, a dict of outputs."""
    trunk = models.vit_backbone(name="trunk")
    head = layers.Dense(models.CLASSES, name="head")
    a, b = (keras.Input(models.IMAGE, name=n) for n in ("a", "b"))
    x, y = trunk(a), trunk(b)
    x = ops.mean(x, axis=1)
    y = ops.reshape(y[:, 1:], (-1, 4, 4, models.WIDTH))
    y = layers.GlobalMaxPooling2D()(y)
    outputs = {"a": head(x), "b": head(y), "both": layers.subtract([x, y])}
    return models.randomized(keras.Model({"a": a, "b": b}, outputs))


def two_trunks():
    inputs = keras.Input(models.IMAGE)
    left = models.vit_backbone(name="left")(inputs)
    right = models.vit_backbone(name="right")(inputs)
    x = layers.concatenate([left[:, 0], ops.mean(right, axis=1)])
    return models.randomized(
        keras.Model(inputs, layers.Dense(models.CLASSES)(x))
    )


def nested_model():
    """A backbone in a model that is itself a layer."""
    inner = models.transfer_model()
    inputs = keras.Input(models.IMAGE)
    outputs = layers.Dense(2, name="outer_head")(inner(inputs))
    return models.randomized(keras.Model(inputs, outputs))


@pytest.mark.one_backend
def test_a_backbone_called_twice_is_converted_once():
    dense = siamese()
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=dropless())
    assert len(models.mixtures(moe)) == 1
    assert len(moe.weights) - len(dense.weights) == 1
    x = {"a": models.images(), "b": models.images(seed=1)}
    received, expected = moe(x, training=False), dense(x, training=False)
    assert set(received) == {"a", "b", "both"}
    for name, value in expected.items():
        gap = models.relative_gap(
            models.array(received[name]), models.array(value)
        )
        assert gap <= 1e-5
    report = keras_upcycle.verify_upcycle(dense, moe, x)
    assert report.relative_difference <= 1e-5


@pytest.mark.one_backend
def test_a_model_nested_in_a_model_is_entered():
    dense, images = nested_model(), models.images(scale=255.0)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS, router=dropless())
    assert len(models.mixtures(moe)) == 1
    gap = models.relative_gap(
        models.output(moe, images), models.output(dense, images)
    )
    assert gap <= 1e-5


def test_augmentation_trains_and_is_off_at_inference():
    dense = compiled(models.transfer_model())
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    names = [layer.name for layer in moe.get_layer("augmentation").layers]
    assert names == [
        layer.name for layer in dense.get_layer("augmentation").layers
    ]
    images = models.images(scale=255.0)
    np.testing.assert_array_equal(
        models.output(moe, images), models.output(moe, images)
    )
    flipped = moe.get_layer("augmentation")(images, training=True)
    assert np.any(models.array(flipped) != images / 255)


# `layers`.


def four_pairs():
    return models.dense_pairs(blocks=4)


def four_blocks():
    return models.vit_backbone(4)


@functools.cache
def shared(build):
    """For tests that change nothing."""
    return build()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("chosen", "pairs", "vit"),
    [
        (None, [2, 3], [2, 3]),
        ("last_half", [2, 3], [2, 3]),
        ("every_other", [1, 3], [1, 3]),
        ("all", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("all_but_first", [1, 2, 3], [1, 2, 3]),
        ([1], [1], [1]),
        ((3, 1, 3), [1, 3], [1, 3]),
        ([-1, 1], [1, 3], [1, 3]),
        (range(1, 3), [1, 2], [1, 2]),
        ({2}, [2], [2]),
        (2, [2], [2]),
        (-1, [3], [3]),
        (slice(1, None, 2), [1, 3], [1, 3]),
        (lambda site: site.index % 2 == 0, [0, 2], [0, 2]),
    ],
    ids=[
        "default",
        "last_half",
        "every_other",
        "all",
        "all_but_first",
        "list",
        "tuple with a double",
        "negative",
        "range",
        "set",
        "number",
        "number from the end",
        "slice",
        "function",
    ],
)
def test_layers_chooses_blocks(chosen, pairs, vit):
    for build, expected in ((four_pairs, pairs), (four_blocks, vit)):
        dense = shared(build)
        decided = plan.make(dense, EXPERTS, layers=chosen)
        assert [site.index for site in decided.chosen] == expected
        # A Dense pair is no Transformer's block; of a ViT's first one a user
        # who asks for it is told.
        warned = build is four_blocks and 0 in expected
        assert len(decided.first_blocks) == warned


@pytest.mark.one_backend
@pytest.mark.parametrize("build", [four_pairs, four_blocks])
def test_layers_chooses_blocks_by_name(build):
    dense = shared(build)
    sites = keras_upcycle.find_feed_forwards(dense)

    def chosen(layers):
        decided = plan.make(dense, EXPERTS, layers=layers)
        return [site.index for site in decided.chosen]

    assert chosen(sites[2].path) == [2]
    assert chosen([sites[3].path, 1]) == [1, 3]
    assert chosen("*") == [0, 1, 2, 3]
    own = (
        sites[1].path.split("/")[-2]
        if build is four_blocks
        else (sites[1].layers[0].name)
    )
    assert chosen([own]) == [1]
    assert chosen({sites[0].stack: own}) == [1]
    for wrong in ("lasthalf", ["no_such_block"], {sites[0].stack: "none?"}):
        with pytest.raises(ValueError, match="no block is called so") as error:
            chosen(wrong)
        assert sites[1].path in str(error.value)


@pytest.mark.one_backend
@pytest.mark.parametrize("chosen", ["all_but_first", [1, 3]], ids=str)
def test_chosen_blocks_are_the_ones_converted(chosen):
    dense = shared(four_blocks)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*first block")
        moe = keras_upcycle.upcycle_model(dense, EXPERTS, layers=chosen)
    expected = [1, 2, 3] if isinstance(chosen, str) else chosen
    assert converted(dense, moe) == expected


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([0], [0]),
        ([-4], [0]),
        ("all", [0, 1, 2, 3]),
        (lambda site: site.index < 2, [0, 1]),
    ],
    ids=["first", "fourth from the end", "all", "function"],
)
def test_the_first_block_is_converted_when_asked_for(chosen, expected):
    dense = four_blocks()
    with pytest.warns(UserWarning, match=r"2212\.05055"):
        moe = keras_upcycle.upcycle_model(dense, EXPERTS, layers=chosen)
    assert converted(dense, moe) == expected


@pytest.mark.one_backend
def test_a_family_does_not_choose_the_block_it_protects():
    dense = models.vit_backbone(4)
    family = families.family_of(dense)
    sites = family.find(dense).sites
    for default in ("all", "all_but_first"):
        own = [dataclasses.replace(s, default_layers=default) for s in sites]
        by_default = {"encoder": selection.Asked.DEFAULT}
        chosen = selection.choose(own, by_default, by_default, None)
        assert [site.index for site in chosen] == [1, 2, 3]


@pytest.mark.one_backend
def test_the_only_block_needs_its_index_and_no_warning():
    dense = models.vit_backbone(1)
    with pytest.raises(keras_upcycle.UpcycleError, match=r"layers=\[0\]"):
        keras_upcycle.upcycle_model(dense, EXPERTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moe = keras_upcycle.upcycle_model(dense, EXPERTS, layers=[0])
    assert converted(dense, moe) == [0]


@pytest.mark.one_backend
def test_layers_by_stack():
    dense = two_trunks()
    moe = keras_upcycle.upcycle_model(
        dense,
        EXPERTS,
        router=dropless(),
        layers={"left/encoder": [1], "right/encoder": lambda site: False},
    )
    assert len(models.mixtures(moe.get_layer("left"))) == 1
    assert models.mixtures(moe.get_layer("right")) == []
    images = models.images()
    gap = models.relative_gap(
        models.output(moe, images), models.output(dense, images)
    )
    assert gap <= 1e-5


# `router`.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("router", "kind"),
    [
        ("top_k", keras_upcycle.TopKRouter),
        ("expert_choice", keras_upcycle.ExpertChoiceRouter),
    ],
)
def test_a_router_by_name(router, kind):
    for build in (models.vit_backbone, models.sequence_dense_pairs):
        moe = keras_upcycle.upcycle_model(build(), EXPERTS, router=router)
        assert type(models.mixtures(moe)[0].router) is kind


@pytest.mark.one_backend
def test_the_default_vit_router_is_expert_choice_at_2():
    moe = keras_upcycle.upcycle_model(models.vit_backbone(), EXPERTS)
    (layer,) = models.mixtures(moe)
    assert layer.router.capacity_factor == 2.0
    assert layer.router.group == "example"


@pytest.mark.one_backend
def test_a_routers_settings_reach_every_block_and_it_stays_free():
    router = keras_upcycle.TopKRouter(
        top_k=3, normalize=False, load_balance_loss=0.5, z_loss=0.25
    )
    moe = keras_upcycle.upcycle_model(
        four_pairs(), EXPERTS, router=router, layers="all"
    )
    routers = [layer.router for layer in models.mixtures(moe)]
    assert len({id(r) for r in routers} | {id(router)}) == 5
    for own in routers:
        assert (own.top_k, own.normalize) == (3, False)
        assert (own.load_balance_loss, own.z_loss) == (0.5, 0.25)
    assert not router.built
    assert router.num_experts is None
    keras_upcycle.upcycle_model(four_pairs(), 8, router=router)


@pytest.mark.one_backend
def test_a_router_for_each_stack():
    moe = keras_upcycle.upcycle_model(
        two_trunks(),
        EXPERTS,
        router={"left/encoder": keras_upcycle.TopKRouter(top_k=1)},
    )
    (left,) = models.mixtures(moe.get_layer("left"))
    (right,) = models.mixtures(moe.get_layer("right"))
    assert left.router.top_k == 1
    assert type(right.router) is keras_upcycle.ExpertChoiceRouter


@pytest.mark.one_backend
def test_a_router_by_name_suits_one_expert():
    moe = keras_upcycle.upcycle_model(models.dense_pairs(), 1, router="top_k")
    assert models.mixtures(moe)[0].router.top_k == 1


# `seed`.


def kernels(moe):
    return [models.array(layer.router.kernel) for layer in models.mixtures(moe)]


def test_the_same_seed_gives_the_same_model():
    dense = four_pairs()
    first, second, other = (
        keras_upcycle.upcycle_model(dense, EXPERTS, layers="all", seed=seed)
        for seed in (3, 3, 4)
    )
    models.assert_same_weights(first, second)
    assert np.any(kernels(first)[0] != kernels(other)[0])


@pytest.mark.thinned
@pytest.mark.parametrize("seed", [None, 3], ids="seed={}".format)
def test_routers_of_different_blocks_differ(seed):
    moe = keras_upcycle.upcycle_model(
        four_pairs(), EXPERTS, layers="all", seed=seed
    )
    found = kernels(moe)
    assert all(np.any(a != b) for i, a in enumerate(found) for b in found[:i])


def test_router_kernels_are_small_and_random():
    moe = keras_upcycle.upcycle_model(four_pairs(), 64, layers="all", seed=0)
    values = np.concatenate([k.ravel() for k in kernels(moe)])
    assert np.std(values) == pytest.approx(0.02, rel=0.1)
    assert abs(np.mean(values)) < 0.002


# The result.


@pytest.mark.one_backend
def test_the_result_holds_no_trace_of_the_dense_block():
    moe = keras_upcycle.upcycle_model(models.vit_backbone(), EXPERTS)
    kinds = [type(layer).__name__ for layer in keras_internals.all_layers(moe)]
    assert kinds.count("MLP") == 1
    assert kinds.count("MoEFeedForward") == 1
    assert len({id(v) for v in moe.weights}) == len(moe.weights)


@pytest.mark.one_backend
def test_no_arrays_of_the_donor_are_kept():
    """Its values are handed over when the experts are built, and let go."""
    moe = keras_upcycle.upcycle_model(models.dense_pairs(), EXPERTS)
    (layer,) = models.mixtures(moe)
    for kernel in (layer.experts.expert_up, layer.experts.expert_down):
        assert isinstance(kernel.kernel_initializer, keras.Initializer)
        assert isinstance(kernel.bias_initializer, keras.Initializer)


def test_fit_adds_auxiliary_losses_in_training_only():
    x, y = models.tokens(8, models.WIDTH), models.labels(8)
    router = keras_upcycle.TopKRouter(
        load_balance_loss=100.0, capacity_factor=None
    )
    moe = compiled(
        keras_upcycle.upcycle_model(
            models.dense_pairs(), EXPERTS, router=router
        )
    )
    evaluated = moe.evaluate(x, y, verbose=0)
    fitted = moe.fit(x, y, batch_size=8, verbose=0).history["loss"][0]
    # The loss is at least 1, and 1 only when perfectly balanced. With equal
    # experts and no drops the rest is what `evaluate` saw.
    assert fitted - evaluated >= 99.9


# Data.


@pytest.mark.one_backend
def test_a_sparse_vit_task_takes_a_py_dataset_and_the_dense_one_does_not():
    """The second half is stock, and why ours does."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return models.images(scale=255.0, seed=index), models.labels()

    dense = models.vit_classifier()
    with pytest.raises((ValueError, TypeError, AttributeError)):
        dense.fit(Batches(), verbose=0)
    moe = keras_upcycle.upcycle_model(dense, EXPERTS)
    moe.compile(optimizer="sgd")
    raw = np.concatenate([Batches()[index][0] for index in range(2)])
    expected = moe.predict(raw, batch_size=4, verbose=0)
    np.testing.assert_allclose(
        moe.predict(Batches(), verbose=0), expected, atol=1e-5
    )
    # Arrays to validate on are preprocessed as the batches are.
    history = moe.fit(
        Batches(),
        validation_data=(models.images(scale=255.0), models.labels()),
        verbose=0,
    )
    scores = moe.evaluate(
        models.images(scale=255.0), models.labels(), verbose=0, return_dict=True
    )
    assert history.history["val_loss"][-1] == pytest.approx(
        scores["loss"], rel=1e-4
    )


@pytest.mark.one_backend
def test_a_serialized_router_is_one_for_all_stacks():
    config = keras.saving.serialize_keras_object(
        keras_upcycle.TopKRouter(1, False)
    )
    moe = keras_upcycle.upcycle_model(shared(four_pairs), 2, router=config)
    assert {layer.router.top_k for layer in models.mixtures(moe)} == {1}

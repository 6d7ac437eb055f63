import functools
import math
import re

import gradients
import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_upcycle import ExpertChoiceRouter, MoEFeedForward, TopKRouter
from keras_upcycle.layers import call_context, dispatch
from keras_upcycle.routing import functional as routing

BATCH, LENGTH, DIM, HIDDEN, EXPERTS = 2, 8, 4, 6, 4
ENGINES = tuple(dispatch.ENGINES)
ROUTERS = {"top_k": TopKRouter, "expert_choice": ExpertChoiceRouter}

engines = pytest.mark.parametrize("engine", ENGINES)
both_routers = pytest.mark.parametrize("router", ROUTERS)


def random_inputs(seed=0, shape=(BATCH, LENGTH, DIM)):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def build(
    router="top_k",
    num_experts=EXPERTS,
    *,
    settings=None,
    dim=DIM,
    **kwargs,
):
    """A built layer whose router is decided and whose biases are not 0."""
    settings = dict(settings or {})
    settings.setdefault("kernel_initializer", gradients.normal(1.0))
    if router == "top_k":
        settings.setdefault("load_balance_loss", 0.0)
    layer = MoEFeedForward(
        num_experts,
        HIDDEN,
        ROUTERS[router](**settings),
        kernel_initializer=gradients.normal(0.5, seed=1),
        bias_initializer=gradients.normal(0.5, seed=2),
        **{"name": "moe", **kwargs},
    )
    layer.build((None, None, dim))
    return layer


def expected_outputs(layer, inputs, mask=None, weights=None, training=False):
    """What the oracle gives for the layer's settings and weights."""
    router = layer.router
    settings = {"normalize": router.normalize}
    if isinstance(router, TopKRouter):
        rule = reference.top_k
        settings.update(
            top_k=router.top_k,
            softmax_order=router.softmax,
            drop_policy=router.drop_policy,
            capacity_factor=router.capacity_factor
            if training
            else router.eval_capacity_factor,
        )
    else:
        rule = reference.expert_choice
        settings["capacity_factor"] = router.capacity_factor
    return reference.moe(
        inputs,
        gradients.weights_of(layer) if weights is None else weights,
        lambda logits, real: rule(logits, mask=real, **settings),
        router.group,
        mask,
        layer.activation.__name__,
    )


def numpy_of(layer, inputs, mask=None, training=False):
    def call(x, real):
        return layer(x, mask=real, training=training)

    if training and layer.dropout + layer.output_dropout:
        run = call  # a compiled one would leave traced seeds behind
    else:
        run = gradients.compiled(call)
    mask = None if mask is None else ops.convert_to_tensor(mask)
    return gradients.as_float(run(ops.convert_to_tensor(inputs), mask))


# Values and gradients, every routing and every engine.

MASKS = {
    "full": np.ones((BATCH, LENGTH), bool),
    "padded": np.arange(LENGTH) < np.array([[5], [8]]),
    "empty_example": np.arange(LENGTH) < np.array([[6], [0]]),
}
DROPPING = {"top_k": 2, "capacity_factor": 0.5}
CASES = {
    "top_1": ("top_k", {"top_k": 1, "capacity_factor": None}),
    "top_2": ("top_k", {"capacity_factor": None}),
    "top_2_raw": ("top_k", {"capacity_factor": None, "normalize": False}),
    "top_2_after_softmax_raw": (
        "top_k",
        {
            "capacity_factor": None,
            "normalize": False,
            "softmax": "after_top_k",
        },
    ),
    "top_all_raw": (
        "top_k",
        {"top_k": EXPERTS, "capacity_factor": None, "normalize": False},
    ),
    "drops_position": ("top_k", DROPPING),
    "drops_position_raw": (
        "top_k",
        {**DROPPING, "normalize": False, "group": "example"},
    ),
    "drops_batch_priority": (
        "top_k",
        {**DROPPING, "drop_policy": "batch_priority"},
    ),
    "drops_probability": (
        "top_k",
        {
            **DROPPING,
            "drop_policy": "probability",
            "softmax": "after_top_k",
        },
    ),
    "expert_choice": ("expert_choice", {"capacity_factor": 1.0}),
    "expert_choice_raw": (
        "expert_choice",
        {"capacity_factor": 2.0, "normalize": False},
    ),
    "expert_choice_batch": (
        "expert_choice",
        {"capacity_factor": 1.0, "group": "batch"},
    ),
    "expert_choice_all": ("expert_choice", {"capacity_factor": 4.0}),
}
COTANGENT = random_inputs(seed=11)


def engines_of(case):
    """Expert Choice has no `dropless` engine; it runs `capacity` there."""
    if CASES[case][0] == "expert_choice":
        return tuple(name for name in ENGINES if name != "dropless")
    return ENGINES


@functools.cache
def run_case(case, engine):
    """A layer, and a compiled call to outputs and gradients, by oracle name."""
    router, settings = CASES[case]
    layer = build(router, settings=settings, dispatch=engine)
    names = [gradients.oracle_name(v.path) for v in layer.trainable_variables]
    own = gradients.weights_of(layer)
    cotangent = ops.convert_to_tensor(COTANGENT)

    def scalar(x, real, *weights):
        outputs, _ = layer.stateless_call(
            list(weights), [], x, mask=real > 0, training=True
        )
        return ops.sum(outputs * cotangent), outputs

    pull_back = gradients.compiled_pull_back(scalar)

    def call(inputs, mask, weights=own):
        values = [weights[name].astype("float32") for name in names]
        found = pull_back(inputs, mask.astype("float32"), *values)
        _, outputs, (by_inputs, _, *others) = found
        return ops.convert_to_numpy(outputs), {
            "inputs": by_inputs,
            **dict(zip(names, others, strict=True)),
        }

    return layer, call


@pytest.mark.thinned("case", "mask")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_engines_equal_the_oracle_and_each_other(case, mask):
    inputs, mask = random_inputs(), MASKS[mask]
    layer, _ = run_case(case, "dense")
    expected = expected_outputs(layer, inputs, mask, training=True)
    found = {
        engine: run_case(case, engine)[1](inputs, mask)
        for engine in engines_of(case)
    }
    for engine, (outputs, _) in found.items():
        np.testing.assert_allclose(outputs, expected, atol=2e-5, err_msg=engine)
        assert not outputs[~mask].any()
    for engine, (_, own) in found.items():
        for name, gradient in found["dense"][1].items():
            np.testing.assert_allclose(
                own[name],
                gradient,
                rtol=1e-4,
                atol=1e-4,
                err_msg=f"{engine} {name}",
            )


@pytest.mark.parametrize("case", ["expert_choice", "expert_choice_batch"])
def test_expert_choice_runs_on_the_dropless_engine_too(case):
    router, settings = CASES[case]
    layer = build(router, settings=settings, dispatch="dropless")
    inputs, mask = random_inputs(), MASKS["padded"]
    np.testing.assert_allclose(
        numpy_of(layer, inputs, mask),
        expected_outputs(layer, inputs, mask),
        atol=2e-5,
    )


@pytest.mark.thinned("case", "mask")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_slopes_of_the_oracle(case, mask):
    inputs, mask = random_inputs(), MASKS[mask]
    layer, call = run_case(case, "dense")
    _, found = call(inputs, mask)
    rng = np.random.default_rng(12)
    point = {
        "inputs": inputs.astype("float64"),
        **gradients.weights_of(layer),
    }
    assert set(found) == set(point)

    def scalar(at):
        weights = {k: v for k, v in at.items() if k != "inputs"}
        outputs = expected_outputs(
            layer, at["inputs"], mask, weights, training=True
        )
        return np.sum(outputs * COTANGENT)

    for name, value in point.items():
        direction = rng.normal(size=value.shape)
        slope = reference.slope(scalar, point, {name: direction})
        np.testing.assert_allclose(
            np.sum(found[name] * direction),
            slope,
            rtol=1e-3,
            atol=1e-3,
            err_msg=name,
        )
        assert np.isfinite(found[name]).all()


@pytest.mark.parametrize(
    ("activation", "gated", "use_bias"),
    [
        ("relu", False, False),
        ("gelu", False, True),
        ("gelu", True, False),
        ("relu", True, True),
    ],
    ids=["plain", "plain_biased", "gated", "gated_biased"],
)
def test_expert_shapes_equal_the_oracle(activation, gated, use_bias):
    inputs = random_inputs()
    layer = build(activation=activation, gated=gated, use_bias=use_bias)
    expected = expected_outputs(layer, inputs)
    for engine, outputs in by_every_engine(layer, inputs).items():
        np.testing.assert_allclose(outputs, expected, atol=2e-5, err_msg=engine)


def by_every_engine(layer, inputs):
    """Outputs at inference, one an engine."""

    def call(x):
        outputs = {}
        for engine in ENGINES:
            layer.dispatch = engine
            outputs[engine] = layer(x)
        return outputs

    found = gradients.compiled(call)(ops.convert_to_tensor(inputs))
    return {engine: gradients.as_float(x) for engine, x in found.items()}


@both_routers
@pytest.mark.parametrize(
    ("shape", "num_experts", "settings"),
    [
        ((2, 5, DIM), 1, {}),
        ((2, 5, DIM), 2, {"top_k": 2}),
        ((1, 1, DIM), EXPERTS, {}),
        ((1, LENGTH, DIM), EXPERTS, {}),
        ((1, 3, DIM), 5, {}),
        ((3, DIM), EXPERTS, {}),
        ((2, 2, 3, DIM), EXPERTS, {}),
    ],
    ids=[
        "one_expert",
        "every_expert",
        "one_token",
        "one_example",
        "fewer_tokens_than_experts",
        "rank_2",
        "rank_4",
    ],
)
@pytest.mark.filterwarnings("ignore:top_k=1")  # of one expert
@pytest.mark.filterwarnings("error::UserWarning")
def test_odd_shapes_equal_the_oracle(router, shape, num_experts, settings):
    if router == "top_k":
        settings = {"top_k": min(2, num_experts), **settings}
    else:
        settings = {}
    layer = build(router, num_experts, settings=settings)
    inputs = random_inputs(shape=shape)
    flat = inputs.reshape(shape[0], -1, DIM)
    expected = expected_outputs(layer, flat).reshape(shape)
    for engine, outputs in by_every_engine(layer, inputs).items():
        np.testing.assert_allclose(outputs, expected, atol=2e-5, err_msg=engine)


@both_routers
@engines
def test_a_batch_of_size_zero_gives_one_of_size_zero(router, engine):
    layer = build(router, dispatch=engine)
    for shape in ((0, LENGTH, DIM), (2, 0, DIM), (0, DIM)):
        for training in (True, False):
            found = layer(np.zeros(shape, "float32"), training=training)
            assert tuple(found.shape) == shape


# Independence: of padding, and of the other examples.


@pytest.mark.parametrize("case", CASES)
def test_values_under_the_padding_change_nothing_at_real_tokens(case):
    mask = MASKS["padded"]
    inputs = random_inputs()
    other = np.where(mask[..., None], inputs, 100 * random_inputs(seed=5))
    _, call = run_case(case, "capacity")
    outputs, found = call(inputs, mask)
    other_outputs, other_found = call(other, mask)
    np.testing.assert_allclose(outputs, other_outputs, atol=1e-6)
    for name, gradient in found.items():
        np.testing.assert_allclose(
            gradient, other_found[name], atol=2e-5, err_msg=name
        )
    assert not found["inputs"][~mask].any()


@pytest.mark.parametrize(
    "case", ["top_2", "drops_position", "drops_probability", "expert_choice"]
)
def test_more_padding_changes_nothing_at_real_tokens(case):
    router, settings = CASES[case]
    settings = {**settings, "z_loss": 0.5}
    if router == "top_k":
        settings["load_balance_loss"] = 0.5
    layer = build(router, settings=settings, dispatch="capacity")

    def call(x, real):
        with call_context.record_calls() as calls:
            outputs = layer(x, mask=real, training=True)
        losses = sum(layer.losses)
        return outputs, losses, routing.expert_load(calls[0].routing, EXPERTS)

    mask, inputs = MASKS["padded"], random_inputs()
    wider = np.concatenate([inputs, random_inputs(seed=6)], axis=1)
    wider_mask = np.concatenate([mask, np.zeros_like(mask)], axis=1)
    call = gradients.compiled(call)
    found, loss, load = [
        gradients.as_float(part)
        for part in call(*map(ops.convert_to_tensor, (inputs, mask)))
    ]
    padded, padded_loss, padded_load = [
        gradients.as_float(part)
        for part in call(*map(ops.convert_to_tensor, (wider, wider_mask)))
    ]
    np.testing.assert_allclose(found, padded[:, :LENGTH], atol=1e-6)
    assert not padded[:, LENGTH:].any()
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert loss > 0.1
    np.testing.assert_array_equal(load, padded_load)


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("top_k", {}),
        ("top_k", {"top_k": 1, "normalize": False}),
        ("expert_choice", {"capacity_factor": 1.0}),
    ],
    ids=["top_2", "top_1_raw", "expert_choice"],
)
def test_a_prediction_does_not_depend_on_the_other_examples(router, settings):
    layer = build(router, settings=settings)
    inputs = random_inputs()
    other = np.concatenate([inputs[:1], 9 * random_inputs(seed=7)[1:]])
    np.testing.assert_allclose(
        numpy_of(layer, inputs)[0], numpy_of(layer, other)[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("router", "settings", "training"),
    [
        ("top_k", {"capacity_factor": 0.5}, True),
        ("top_k", {"eval_capacity_factor": 0.5}, False),
        ("expert_choice", {"group": "batch", "capacity_factor": 1.0}, False),
    ],
    ids=["top_k_trains", "top_k_capacity", "expert_choice_batch"],
)
def test_examples_that_share_slots_do_depend_on_each_other(
    router, settings, training
):
    layer = build(router, settings=settings)
    inputs = random_inputs()
    # The last example, since earlier positions have the first claim.
    other = np.concatenate([9 * random_inputs(seed=7)[:1], inputs[1:]])
    found = [numpy_of(layer, x, training=training)[1] for x in (inputs, other)]
    assert np.abs(found[0] - found[1]).max() > 1e-3


# The dense block: identical experts.


def copied(layer):
    """The layer's weights with every expert a copy of the first."""
    return {
        name: value
        if name == "router"
        else np.repeat(value[:1], EXPERTS, axis=0)
        for name, value in gradients.weights_of(layer).items()
    }


def dense_block(x, up, up_bias, down, down_bias):
    hidden = ops.gelu(ops.matmul(x, up) + up_bias, approximate=False)
    return ops.matmul(hidden, down) + down_bias


IDENTITY_CASES = ["top_1", "top_2", "drops_position", "expert_choice"]


@pytest.mark.parametrize("case", IDENTITY_CASES)
def test_copied_experts_are_the_dense_block_and_share_its_gradient(case):
    inputs, mask = random_inputs(), MASKS["padded"]
    layer, _ = run_case(case, "dense")
    weights = copied(layer)
    # Which tokens some expert processes: the others' outputs are 0.
    oracle = expected_outputs(layer, inputs, mask, weights, training=True)
    routed = (np.abs(oracle) > 0).any(-1, keepdims=True).astype("float32")
    assert (routed.sum() == mask.sum()) == (case in ("top_1", "top_2"))

    names = ["up", "up_bias", "down", "down_bias"]

    def scalar(x, *values):
        outputs = dense_block(x, *values)
        read = ops.convert_to_tensor(COTANGENT * routed)
        return ops.sum(outputs * read), outputs

    _, expected, (by_inputs, *by_weights) = gradients.pull_back(
        scalar,
        inputs,
        *(weights[name][0].astype("float32") for name in names),
    )
    expected = ops.convert_to_numpy(expected) * routed
    for engine in engines_of(case):
        outputs, found = run_case(case, engine)[1](inputs, mask, weights)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
        np.testing.assert_allclose(found["inputs"], by_inputs, atol=2e-5)
        for name, gradient in zip(names, by_weights, strict=True):
            np.testing.assert_allclose(
                found[name].sum(axis=0),
                gradient,
                rtol=1e-4,
                atol=2e-5,
                err_msg=f"{engine} {name}",
            )


@pytest.mark.parametrize("case", IDENTITY_CASES)
def test_copied_experts_give_the_router_no_gradient(case):
    inputs, mask = random_inputs(), MASKS["full"]
    layer, raw = run_case("top_2_raw", "dense")
    _, found = raw(inputs, mask, copied(layer))
    scale = np.abs(found["router"]).max()  # where weights are not rescaled
    assert scale > 0.1
    for engine in engines_of(case):
        layer, call = run_case(case, engine)
        _, found = call(inputs, mask, copied(layer))
        assert np.abs(found["router"]).max() <= 1e-6 * scale, engine


@pytest.mark.parametrize("engine", ["capacity", "dense"])
def test_a_router_of_zeros_gives_every_expert_the_same_tokens(engine):
    layer, call = run_case("expert_choice", engine)
    inputs, mask = random_inputs(), MASKS["full"]
    weights = copied(layer)
    _, apart = call(inputs, mask, weights)
    weights["router"] = np.zeros_like(weights["router"])
    _, found = call(inputs, mask, weights)
    for name in ("up", "up_bias", "down", "down_bias"):
        assert np.abs(found[name]).max() > 1e-4
        for e in range(1, EXPERTS):
            np.testing.assert_allclose(
                found[name][0], found[name][e], atol=1e-6
            )
        # So they never part, as experts of a router drawn at random do.
        assert np.abs(apart[name][0] - apart[name][1]).max() > 1e-3


# Losses.


def test_losses_reach_fit_and_are_absent_from_evaluate():
    settings = {"load_balance_loss": 0.5, "z_loss": 0.25}
    layer = build(settings=settings, dispatch="capacity")
    model = functional(layer)
    model.compile("sgd", loss=lambda y, outputs: 0.0 * ops.mean(outputs))
    inputs = random_inputs()
    logits = inputs.reshape(1, -1, DIM) @ gradients.as_float(
        layer.router.kernel.value
    )
    before = gradients.as_float(layer.router.kernel.value)
    expected = 0.5 * reference.load_balance(logits, 2)
    expected += 0.25 * reference.z_loss(logits)
    history = model.fit(inputs, inputs, batch_size=BATCH, verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-4)
    after = gradients.as_float(layer.router.kernel.value)
    assert np.abs(after - before).max() > 1e-5  # the losses alone moved it
    assert model.evaluate(inputs, inputs, verbose=0) == 0.0


def test_losses_are_added_in_training_only():
    layer = build(settings={"load_balance_loss": 1.0, "z_loss": 1.0})
    for training, count in ((True, 2), (False, 0), (None, 0)):
        numpy_of(layer, random_inputs(), training=training)
        assert len(layer.losses) == count


# Types.


@pytest.mark.parametrize(
    ("policy", "compute", "variable", "tolerance"),
    [
        ("float32", "float32", "float32", 2e-5),
        ("bfloat16", "bfloat16", "bfloat16", 0.1),
        ("mixed_bfloat16", "bfloat16", "float32", 0.1),
        ("mixed_float16", "float16", "float32", 0.01),
    ],
)
@both_routers
def test_dtype_policies(router, policy, compute, variable, tolerance):
    inputs = random_inputs()
    layer = build(router, dtype=policy)
    assert layer.router.kernel.dtype == "float32"
    assert {v.dtype for v in layer.experts.weights} == {variable}
    # The router decides in float32 on what the compute dtype left of the
    # inputs; so does the oracle, and the decisions are then the same.
    rounded = gradients.as_float(ops.cast(inputs, compute))
    expected = expected_outputs(layer, rounded)
    spec = layer.compute_output_spec(keras.KerasTensor(inputs.shape))
    assert spec.dtype == compute

    def call(x):
        with call_context.record_calls() as calls:
            for engine in ENGINES:
                layer.dispatch = engine
                layer(x)
        return [(call.outputs, call.routing.weights) for call in calls]

    found = gradients.compiled(call)(ops.convert_to_tensor(inputs))
    for engine, (outputs, weights) in zip(ENGINES, found, strict=True):
        assert keras.backend.standardize_dtype(outputs.dtype) == compute
        assert keras.backend.standardize_dtype(weights.dtype) == "float32"
        np.testing.assert_allclose(
            gradients.as_float(outputs),
            expected,
            atol=tolerance,
            err_msg=engine,
        )


# Symbolic shapes, masks, fit.


def functional(layer, length=None, masked=False, batch=None):
    inputs = keras.Input((length, DIM), batch_size=batch, name="inputs")
    hidden = inputs
    if masked:
        hidden = keras.layers.Masking()(inputs)
    return keras.Model(inputs, layer(hidden), name="model")


@both_routers
def test_unknown_lengths_build_train_and_predict(router):
    layer = build(router)
    model = functional(layer)
    assert model.output_shape == (None, None, DIM)
    model.compile("sgd", loss="mse")
    before = [gradients.as_float(v.value) for v in layer.trainable_variables]
    inputs = random_inputs()
    model.fit(inputs, inputs, batch_size=BATCH, verbose=0)
    after = [gradients.as_float(v.value) for v in layer.trainable_variables]
    assert all(
        np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True)
    )
    for length in (LENGTH, 3):
        shorter = inputs[:, :length]
        np.testing.assert_allclose(
            numpy_of(layer, shorter),
            expected_outputs(layer, shorter),
            atol=2e-5,
        )


@both_routers
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_keras_mask_is_used_and_passed_on(router):
    layer = build(router, settings={"capacity_factor": 1.0})
    model = functional(layer, masked=True)
    inputs = random_inputs()
    inputs[0, 5:] = 0.0
    mask = MASKS["padded"]
    found = model(inputs)
    np.testing.assert_allclose(
        gradients.as_float(found),
        expected_outputs(layer, inputs, mask),
        atol=2e-5,
    )
    passed_on = ops.convert_to_numpy(
        layer.compute_mask(inputs, ops.convert_to_tensor(mask))
    )
    np.testing.assert_array_equal(passed_on, mask)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(keras.src.backend.get_keras_mask(found)), mask
    )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="only TensorFlow traces with sizes unknown until run time",
)
@both_routers
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_batch_and_length_may_be_unknown_until_run_time(
    router, engine, training
):
    import tensorflow as tf

    layer = build(router, dispatch=engine)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, DIM]),
            tf.TensorSpec([None, None], tf.bool),
        ]
    )
    def run(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mask=mask, training=training)
        return outputs, tape.gradient(outputs, x)

    for batch, length in ((BATCH, LENGTH), (1, 1), (3, 5)):
        inputs = random_inputs(shape=(batch, length, DIM))
        mask = np.arange(length) < np.arange(batch, 0, -1)[:, None] * 2
        outputs, gradient = run(inputs, mask)
        np.testing.assert_allclose(
            outputs.numpy(),
            expected_outputs(layer, inputs, mask, training=training),
            atol=2e-5,
        )
        assert np.isfinite(gradient.numpy()).all()
        assert not gradient.numpy()[~mask].any()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="only TensorFlow traces with sizes unknown until run time",
)
@both_routers
@engines
def test_a_batch_may_turn_out_empty_at_run_time(router, engine):
    import tensorflow as tf

    layer = build(router, dispatch=engine)
    run = tf.function(layer, input_signature=[tf.TensorSpec([None, None, DIM])])
    found = run(np.zeros((0, LENGTH, DIM), "float32"))
    assert found.shape == (0, LENGTH, DIM)


@pytest.mark.one_backend
def test_output_shape_is_the_input_shape():
    layer = build()
    for shape in ((None, DIM), (2, None, DIM), (2, 3, 4, DIM)):
        assert layer.compute_output_shape(shape) == shape


# Dropout.


@pytest.mark.parametrize("which", ["dropout", "output_dropout"])
def test_dropout_acts_in_training_only(which):
    settings = {"capacity_factor": None}
    layer = build(settings=settings, dispatch="dense", **{which: 0.5})
    inputs = random_inputs()
    expected = expected_outputs(layer, inputs)
    np.testing.assert_allclose(numpy_of(layer, inputs), expected, atol=2e-5)
    assert np.abs(numpy_of(layer, inputs, training=True) - expected).max() > 0.1


# Saving.

FULL = {
    "num_experts": 3,
    "intermediate_dim": 5,
    "router": TopKRouter,
    "activation": "relu",
    "gated": True,
    "use_bias": True,
    "output_bias": True,
    "dropout": 0.25,
    "output_dropout": 0.125,
    "shared_intermediate_dim": 7,
    "shared_gate": True,
    "low_rank": 2,
    "low_rank_alpha": 3.0,
    "dispatch": "dense",
    "trainable_experts": False,
    "frozen_projections": ["down"],
    "remat": True,
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "name": "mixture",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


@pytest.mark.one_backend
def test_config_round_trip_is_complete():
    router = TopKRouter(1, False, z_loss=0.5, name="scout")
    layer = MoEFeedForward(**{**FULL, "router": router})
    config = layer.get_config()
    assert set(config) == {*FULL, "format"}
    defaults = MoEFeedForward(4, 8).get_config()
    same = [name for name in config if config[name] == defaults[name]]
    assert sorted(same) == ["format", "use_bias"]
    again = MoEFeedForward.from_config(config)
    assert again.get_config() == config
    assert again.router.get_config() == router.get_config()
    assert again.router is not router


@pytest.mark.one_backend
def test_config_of_a_built_layer_is_that_of_an_unbuilt_one():
    layer = MoEFeedForward(EXPERTS, HIDDEN, name="moe")
    config = layer.get_config()
    layer.build((None, DIM))
    assert layer.get_config() == config


@pytest.mark.parametrize(
    "router",
    [
        lambda: TopKRouter(
            1, False, eval_capacity_factor=0.5, drop_policy="batch_priority"
        ),
        lambda: ExpertChoiceRouter(1.0, group="batch", normalize=False),
    ],
    ids=["top_k", "expert_choice"],
)
def test_keras_file_round_trip_is_bit_exact(router, tmp_path):
    layer = MoEFeedForward(EXPERTS, HIDDEN, router(), gated=True, name="moe")
    model = functional(layer)
    inputs = random_inputs()
    expected = gradients.as_float(model(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in again.weights] == [v.path for v in model.weights]
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(
            gradients.as_float(a.value), gradients.as_float(b.value)
        )
    np.testing.assert_array_equal(gradients.as_float(again(inputs)), expected)
    restored = again.get_layer("moe")
    assert restored.get_config() == layer.get_config()


@engines
@both_routers
def test_padding_may_hold_anything(router, engine):
    layer = build(router, dispatch=engine, shared_intermediate_dim=HIDDEN)
    mask = np.arange(LENGTH) < np.array([[5], [8]])
    clean = np.where(mask[..., None], random_inputs(), 0.0)
    dirty = np.where(mask[..., None], clean, np.nan).astype("float32")
    results = [
        gradients.of_layer(layer, x.astype("float32"), clean, mask=mask)
        for x in (clean, dirty)
    ]
    (expected, by_clean), (found, by_dirty) = results
    np.testing.assert_array_equal(found, expected)
    assert not found[~mask].any()
    for name, gradient in by_clean.items():
        np.testing.assert_array_equal(by_dirty[name], gradient, err_msg=name)


# Adapters and int8.

KERNELS = ["expert_up", "expert_gate", "expert_down"]


def test_adapters_are_all_that_trains():
    layer = build(gated=True, use_bias=False, dispatch="dropless")
    model = functional(layer)
    inputs = random_inputs()
    before = numpy_of(layer, inputs)
    # As `Backbone.enable_lora` of KerasHub does it, by name.
    below = list(model._flatten_layers(include_self=False))
    for sublayer in below:
        sublayer.trainable = False
    for sublayer in below:
        if sublayer.name in KERNELS:
            sublayer.trainable = True
            sublayer.enable_lora(2)
    assert {v.path for v in model.trainable_weights} == {
        f"moe/experts/{name}/lora_kernel_{part}"
        for name in KERNELS
        for part in "ab"
    }
    frozen = [gradients.as_float(v.value) for v in model.non_trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    model.fit(inputs, inputs, batch_size=BATCH, epochs=2, verbose=0)
    for v, value in zip(model.non_trainable_weights, frozen, strict=True):
        np.testing.assert_array_equal(gradients.as_float(v.value), value)
    # B starts at 0; it moves first, and the outputs with it.
    for v in model.trainable_weights:
        if v.path.endswith("lora_kernel_b"):
            assert np.abs(gradients.as_float(v.value)).max() > 1e-6, v.path
    assert np.abs(numpy_of(layer, inputs) - before).max() > 1e-5


def test_adapters_start_as_nothing_and_their_gradients_agree():
    layer = build(gated=True)
    before = by_every_engine(layer, random_inputs())
    adapted = [
        sublayer
        for sublayer in layer._flatten_layers()
        if sublayer.name in KERNELS
    ]
    for sublayer in adapted:
        sublayer.enable_lora(2)
    for engine, outputs in by_every_engine(layer, random_inputs()).items():
        np.testing.assert_allclose(outputs, before[engine], atol=1e-6)
    for sublayer in adapted:
        shape = sublayer.lora_kernel_b.shape
        sublayer.lora_kernel_b.assign(random_inputs(shape=shape))
    found = {}
    for engine in ENGINES:
        layer.dispatch = engine
        found[engine] = gradients.of_layer(layer, random_inputs(), COTANGENT)
    _, expected = found.pop("dense")
    assert np.abs(expected["experts/expert_up/lora_kernel_a"]).max() > 1e-3
    for engine, (_, own) in found.items():
        assert set(own) == set(expected)
        for name, gradient in expected.items():
            np.testing.assert_allclose(
                own[name],
                gradient,
                rtol=1e-3,
                atol=1e-4,
                err_msg=f"{engine} {name}",
            )


@engines
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_adapters_train_in_bfloat16(engine, dtype):
    """As in float32, but for rounding; many tokens, so that blocks are used."""
    inputs = random_inputs(shape=(BATCH, 48, DIM))
    found = []
    for policy in ("float32", dtype):
        layer = build(gated=True, dispatch=engine, dtype=policy)
        for sublayer in layer._flatten_layers():
            if sublayer.name in KERNELS:
                sublayer.enable_lora(2)
                for part in (sublayer.lora_kernel_a, sublayer.lora_kernel_b):
                    part.assign(random_inputs(shape=part.shape))
        found.append(
            gradients.of_layer(layer, inputs, inputs, training=True)[1]
        )
    expected, own = found
    assert set(own) == set(expected)
    for name, gradient in expected.items():
        error = np.abs(gradients.as_float(own[name]) - gradient).max()
        assert error <= 0.1 * np.abs(gradient).max(), name


@pytest.mark.parametrize(
    ("router", "engine", "dim"),
    [
        ("top_k", "dropless", 4),
        ("top_k", "dense", 4),
        ("top_k", "dense", 16),  # narrow experts, as one network
        ("expert_choice", "capacity", 4),
    ],
)
def test_weights_are_not_rounded_to_bfloat16(router, engine, dim):
    """A third is 0.33398 there; three copies would add up to 1.002."""
    settings = {"kernel_initializer": "zeros"}
    settings |= {
        "top_k": {"top_k": 3},
        "expert_choice": {"capacity_factor": 3},
    }[router]
    layer = build(
        router, 3, settings=settings, dim=dim, dispatch=engine, dtype="bfloat16"
    )
    for weight in layer.experts.weights:
        value = gradients.as_float(weight.value)
        weight.assign(np.broadcast_to(value[:1], value.shape))
    inputs = random_inputs(shape=(1, 512, dim))
    found = numpy_of(layer, inputs)
    one = ops.cast(ops.convert_to_tensor(inputs), "bfloat16")
    one = layer.experts(ops.repeat(one, 3, axis=0))
    expected = gradients.as_float(one)[:1]
    ratio = (found * expected).sum() / (expected**2).sum()
    assert abs(ratio - 1.0) < 5e-4


@engines
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_int8_gives_the_same_alone_and_in_a_crowd(engine):
    """Whether a row finds a slot depends on the others, its result does not."""
    layer = build(num_experts=2, settings={"top_k": 1}, dispatch=engine)
    functional(layer).quantize("int8")
    inputs = random_inputs(shape=(4, 100, DIM))
    inputs[1:] = inputs[1:2, :1]  # all of these want the same expert
    alone = numpy_of(layer, inputs[:1])
    np.testing.assert_allclose(
        numpy_of(layer, inputs)[:1], alone, rtol=1e-4, atol=1e-4
    )
    last = numpy_of(layer, inputs[::-1].copy())[-1:]
    np.testing.assert_allclose(last, alone, rtol=1e-4, atol=1e-4)
    one = numpy_of(layer, inputs[:1, :1])  # fewer blocks than experts
    np.testing.assert_allclose(one, alone[:, :1], rtol=1e-4, atol=1e-4)


@engines
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_int8_experts_give_nearly_the_same_and_the_router_stays(engine):
    layer = build(dispatch=engine)
    model = functional(layer)
    inputs = random_inputs()

    def run():
        def call(x):
            with call_context.record_calls() as calls:
                outputs = layer(x)
            return outputs, calls[0].routing.experts, calls[0].routing.weights

        found = gradients.compiled(call)(ops.convert_to_tensor(inputs))
        return [gradients.as_float(part) for part in found]

    before, *routed_before = run()
    model.quantize("int8")
    after, *routed_after = run()
    for kernel in (layer.experts.expert_up, layer.experts.expert_down):
        assert kernel._kernel.dtype == "int8"
    assert layer.router.kernel.dtype == "float32"
    for a, b in zip(routed_before, routed_after, strict=True):
        np.testing.assert_array_equal(a, b)
    error = np.abs(after - before).max()
    assert 0 < error <= 0.05 * np.abs(before).max()


@both_routers
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_int8_experts_survive_a_keras_file(router, tmp_path):
    layer = MoEFeedForward(EXPERTS, HIDDEN, router, name="moe")
    model = functional(layer)
    model.quantize("int8")
    inputs = random_inputs()
    expected = gradients.as_float(model(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    restored = again.get_layer("moe")
    assert restored.experts.expert_up._kernel.dtype == "int8"
    assert restored.router.kernel.dtype == "float32"
    for a, b in zip(model.weights, again.weights, strict=True):
        assert (a.path, a.dtype) == (b.path, b.dtype)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(a.value), ops.convert_to_numpy(b.value)
        )
    np.testing.assert_array_equal(gradients.as_float(again(inputs)), expected)


# Settings.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "at least 1.*num_experts=0"),
        (
            {"num_experts": 2.0},
            TypeError,
            r"must be an integer.*num_experts=2\.0",
        ),
        (
            {"intermediate_dim": -8},
            ValueError,
            "at least 1.*intermediate_dim=-8",
        ),
        ({"dropout": 1.0}, ValueError, r"rate in \[0, 1\).*dropout=1\.0"),
        ({"dropout": -0.5}, ValueError, r"rate in \[0, 1\).*dropout=-0\.5"),
        (
            {"output_dropout": 2},
            ValueError,
            r"rate in \[0, 1\).*output_dropout=2",
        ),
        (
            {"dispatch": "sorted"},
            ValueError,
            rf"one of {re.escape(str(['auto', *ENGINES]))}.*'sorted'",
        ),
        (
            {"router": "switch"},
            ValueError,
            r"one of \[.*'top_k'\].*router='switch'",
        ),
        ({"router": 2}, TypeError, "router=2 of type int"),
        ({"activation": "no_such"}, ValueError, "no_such"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named_with_their_value(settings, error, message):
    with pytest.raises(error, match=message):
        MoEFeedForward(**{"num_experts": 4, "intermediate_dim": 8, **settings})


@pytest.mark.one_backend
def test_top_k_above_num_experts_is_refused_unless_the_router_is_a_name():
    message = "top_k=5, num_experts=4. Lower `top_k` or add experts"
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(4, 8, TopKRouter(5))
    assert MoEFeedForward(1, 8, "top_k").router.top_k == 1


@pytest.mark.one_backend
def test_a_router_belongs_to_one_layer():
    router = TopKRouter(name="scout")
    MoEFeedForward(4, 8, router)
    message = "router 'scout'.*num_experts=4 holds. Make a new router"
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(4, 8, router)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("shape", "shown"),
    [((DIM,), r"\(4,\)"), ((None, 3, None), r"\(None, 3, None\)")],
)
def test_unknown_width_and_missing_batch_are_refused(shape, shown):
    message = f"known hidden_dim. Received: input_shape={shown}. Flatten"
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(4, 8).build(shape)


def test_auto_runs_the_engine_that_the_shape_asks_for(monkeypatch):
    ran = []
    for name, engine in dispatch.ENGINES.items():

        def spy(*args, name=name, engine=engine):
            ran.append(name)
            return engine(*args)

        monkeypatch.setitem(dispatch.ENGINES, name, spy)
    monkeypatch.setattr(dispatch, "DENSE_UP_TO_ROWS", 8 * EXPERTS)
    monkeypatch.setattr(dispatch, "FEW_PER_EXPERT", 1)
    layer = build()
    for count, training, engine in (
        (1, False, "dropless"),
        (2, True, "dense"),
        (8, False, "dense"),
        (16, False, "dropless"),
        (16, True, "capacity"),
    ):
        numpy_of(layer, random_inputs(shape=(1, count, DIM)), None, training)
        assert ran.pop() == engine


@pytest.mark.one_backend
def test_record_calls_keeps_calls_in_order_and_stops():
    first, second = build(), build("expert_choice")
    inputs = random_inputs()
    with call_context.record_calls() as calls:
        outputs = second(first(inputs))
    first(inputs)
    assert [call.layer for call in calls] == [first, second]
    assert calls[1].outputs is outputs
    assert calls[0].mask is None


@pytest.mark.one_backend
def test_weights_have_their_public_names():
    layer = build(gated=True)
    kernels = {f"moe/experts/{name}/kernel" for name in KERNELS}
    biases = {f"moe/experts/{name}/bias" for name in KERNELS}
    paths = {v.path for v in layer.weights}
    assert paths == {"moe/router/kernel", *kernels, *biases}
    assert sum(math.prod(v.shape) for v in layer.weights) == (
        DIM * EXPERTS + EXPERTS * (3 * DIM * HIDDEN + 2 * HIDDEN + DIM)
    )

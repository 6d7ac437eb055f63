"""Whole attentions as experts, in NumPy: values, gradients, files."""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.families import copied_attention
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.call_context import (
    expert_of_attention,
    padding_mask,
)
from keras_upcycle.layers.expert_projection import ExpertProjection

EXPERTS, HEADS, HEAD_DIM, WIDTH = 3, 2, 4, 8
ROLES = ("query", "key", "value", "output")


def attention(router="soft", shared=True, seed=1):
    """Experts that differ in all that they may."""
    layer = keras.layers.MultiHeadAttention(HEADS, HEAD_DIM, name="mha")
    layer.build((None, 5, WIDTH), (None, 5, WIDTH))
    copied_attention.copy(
        layer,
        {
            "num_experts": EXPERTS,
            "router": router,
            "shared_key_values": shared,
        },
    )
    return models.randomized(layer, seed=seed)


def top_k(k=2):
    return ku.TopKRouter(k, capacity_factor=None, load_balance_loss=0.0)


def of_expert(layer, role, part, expert):
    """A weight as a matrix, whether or not it is the expert's own."""
    projection = getattr(layer, f"_{role}_dense")
    value = models.array(getattr(projection, part)).astype("float64")
    if isinstance(projection, ExpertProjection):
        value = value[expert]
    if part == "bias":
        return value.reshape(-1)
    return value.reshape(
        (-1, WIDTH) if role == "output" else (WIDTH, HEADS * HEAD_DIM)
    )


def plain_attention(x, weights):
    """`(B, S, D)`, head by head."""

    def heads(role):
        flat = x @ weights[role, "kernel"] + weights[role, "bias"]
        return flat.reshape(*x.shape[:2], HEADS, HEAD_DIM)

    q, k, v = heads("query"), heads("key"), heads("value")
    found = np.zeros_like(q)
    for b in range(len(x)):
        for h in range(HEADS):
            scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(HEAD_DIM)
            share = np.apply_along_axis(reference.softmax, -1, scores)
            found[b, :, h] = share @ v[b, :, h]
    found = found.reshape(*x.shape[:2], -1)
    return found @ weights["output", "kernel"] + weights["output", "bias"]


def expected(layer, x, k=EXPERTS):
    x = np.asarray(x, "float64")
    logits = x @ models.array(layer.attention_mixture.router.kernel)
    scores = np.apply_along_axis(reference.softmax, -1, logits)
    least = np.sort(scores, axis=-1)[..., -k : -k + 1 or None]
    scores = np.where(scores >= least, scores, 0.0)
    scores /= scores.sum(-1, keepdims=True)
    total = 0.0
    for expert in range(EXPERTS):
        weights = {
            (role, part): of_expert(layer, role, part, expert)
            for role in ROLES
            for part in ("kernel", "bias")
        }
        own = plain_attention(x, weights)
        total = total + scores[..., expert, None] * own
    return total


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [EXPERTS, 2])
def test_outputs_are_a_sum_over_attentions(k, shared):
    layer = attention("soft" if k == EXPERTS else top_k(k), shared)
    own = {
        role
        for role in ROLES
        if isinstance(getattr(layer, f"_{role}_dense"), ExpertProjection)
    }
    assert own == ({"query", "output"} if shared else set(ROLES))
    x = models.tokens(2, 5, WIDTH, seed=2)
    np.testing.assert_allclose(
        models.array(layer(x, x)), expected(layer, x, k), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_the_sum(shared):
    """By differences of the oracle, of every weight."""
    layer = attention(shared=shared)
    x = models.tokens(2, 5, WIDTH, seed=2)
    cotangent = models.tokens(2, 5, WIDTH, seed=4)
    frozen = [v.value for v in layer.non_trainable_variables]
    given = ops.convert_to_tensor(x)

    def scalar(*values):
        outputs, _ = layer.stateless_call(list(values), frozen, given, given)
        return ops.sum(ops.multiply(outputs, cotangent))

    weights = layer.trainable_variables
    _, _, found = gradients.pull_back(scalar, *[v.value for v in weights])
    rng = np.random.default_rng(0)
    for variable, gradient in zip(weights, found, strict=True):
        value = models.array(variable).copy()
        for _ in range(3):
            place = tuple(rng.integers(0, n) for n in value.shape)
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * 1e-2
                variable.assign(moved)
                ends.append(float(np.sum(expected(layer, x) * cotangent)))
            variable.assign(value)
            slope = (ends[0] - ends[1]) / 2e-2
            assert gradient[place] == pytest.approx(
                slope, rel=2e-2, abs=2e-3
            ), variable.path


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_copies_are_the_dense_attention_whatever_the_router(dtype):
    dense = keras.layers.MultiHeadAttention(HEADS, HEAD_DIM, dtype=dtype)
    x = ops.cast(models.tokens(2, 5, WIDTH, seed=2), dense.compute_dtype)
    before = models.array(ops.cast(dense(x, x), "float32"))
    copied_attention.copy(dense, {"num_experts": EXPERTS})
    kernel = dense.attention_mixture.router.kernel
    kernel.assign(models.tokens(*kernel.shape, seed=5))
    after, scores = dense(x, x, return_attention_scores=True)
    assert keras.backend.standardize_dtype(after.dtype) == dense.compute_dtype
    assert tuple(scores.shape) == (2, HEADS, 5, 5)
    # Added up in float32: of bfloat16 the last bit may round otherwise.
    near = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        models.array(ops.cast(after, "float32")), before, rtol=near, atol=near
    )


def test_losses_are_added_once():
    layer = attention(ku.DSMoERouter(mutual_information_loss=0.5))
    x = models.tokens(2, 5, WIDTH, seed=2)
    layer(x, x, training=True)
    logits = x @ models.array(layer.attention_mixture.router.kernel)
    scores = np.apply_along_axis(reference.softmax, -1, logits)
    once = 0.5 * reference.mutual_information(scores)
    assert float(sum(layer.losses)) == pytest.approx(once, rel=1e-4)
    soft = attention()
    soft(x, x, training=True)
    assert not soft.losses


def test_padding_is_the_mean_of_experts():
    layer = AttentionMixture(EXPERTS, top_k(1))
    x = models.tokens(2, 5, WIDTH, seed=2)
    layer.build(x.shape)
    real = np.arange(5) < np.array([[5], [3]])
    x[~real] = np.nan
    with padding_mask(ops.convert_to_tensor(real)):
        received = models.array(layer(x))
    np.testing.assert_allclose(received[~real], 1 / EXPERTS)
    assert set(np.unique(received[real])) == {0.0, 1.0}


@pytest.mark.parametrize(
    "dense",
    [
        keras.layers.Dense(6, activation="relu"),
        keras.layers.Dense(6, use_bias=False),
        keras.layers.EinsumDense("abc,cde->abde", (None, 3, 2), bias_axes="de"),
    ],
)
def test_an_experts_projection_is_the_stock_layer_of_its_weights(dense):
    x = ops.convert_to_tensor(models.tokens(2, 5, WIDTH, seed=2))
    dense.build((2, 5, WIDTH))
    layer = ExpertProjection.copies_of(dense, EXPERTS, "query")
    layer.build(())
    models.randomized(layer, seed=1)
    again = ExpertProjection.from_config(layer.get_config())
    again.build(())
    again.set_weights(layer.get_weights())
    for expert in range(EXPERTS):
        for part in ("kernel", "bias"):
            own = getattr(dense, part)
            if own is not None:
                stacked = models.array(getattr(layer, part))
                own.assign(stacked[expert].reshape(own.shape))
        with expert_of_attention(expert):
            for each in (layer, again):
                np.testing.assert_allclose(
                    models.array(each(x)), models.array(dense(x)), rtol=1e-6
                )


@pytest.mark.parametrize("name", ["Adafactor", "Lamb"])
def test_optimizers_of_whole_weights_look_at_every_expert(name):
    layer = attention()
    (stack,) = [
        v
        for v in layer.trainable_variables
        if v.path.endswith("expert_attention_query/kernel")
    ]
    values = models.array(stack) * [[[[1.0]]], [[[3.0]]], [[[0.1]]]]
    stack.assign(values)
    singles = [keras.Variable(value, name="kernel") for value in values]
    gradient = models.tokens(*values.shape, seed=6)

    def made():
        return getattr(keras.optimizers, name)(1e-2)

    ku.per_expert(made()).apply([ops.convert_to_tensor(gradient)], [stack])
    for expert, variable in enumerate(singles):
        own = ops.convert_to_tensor(gradient[expert])
        made().apply([own], [variable])
        np.testing.assert_allclose(
            models.array(stack)[expert], models.array(variable), rtol=1e-5
        )


@pytest.mark.one_backend
def test_configs_make_equal_layers():
    layer = AttentionMixture(EXPERTS, top_k(), shared_key_values=False)
    again = AttentionMixture.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert not again.shared_key_values


@pytest.mark.one_backend
def test_it_must_be_called_by_its_attention():
    layer = ExpertProjection(2, (8, 6))
    with pytest.raises(ValueError, match="must be called by its attention"):
        layer(ops.ones((1, 5, 8)))

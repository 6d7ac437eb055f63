"""Heads as experts, head by head in NumPy: factors, values, gradients."""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers.call_context import padding_mask
from keras_upcycle.layers.routed_heads import count_experts, expert_of_head

HEADS, HEAD_DIM, WIDTH = 4, 3, 8


def projection_of(merged):
    if merged:
        return keras.layers.Dense(WIDTH)
    return keras.layers.EinsumDense(
        "abcd,cde->abe", (None, WIDTH), bias_axes="e"
    )


def layer_of(router, merged=False, **settings):
    layer = ku.RoutedHeads(projection_of(merged), HEADS, router, **settings)
    shape = (HEADS * HEAD_DIM,) if merged else (HEADS, HEAD_DIM)
    layer.build((None, None, *shape))
    models.randomized(layer, seed=1)
    return layer


def arrays(merged=False, batch=2, length=5):
    heads = models.tokens(batch, length, HEADS, HEAD_DIM, seed=2)
    x = models.tokens(batch, length, WIDTH, seed=3)
    return heads.reshape(batch, length, -1) if merged else heads, x


def top_k(normalize=True, k=2):
    return ku.TopKRouter(
        k, capacity_factor=None, normalize=normalize, load_balance_loss=0.0
    )


# The router, what a token's routed experts weigh, and whether times K.
ROUTERS = {
    "all": (ku.DSMoERouter, "all", {}, False),
    "threshold": (
        lambda: ku.DSMoERouter("threshold", threshold=0.9),
        "threshold",
        {"threshold": 0.9},
        False,
    ),
    "top_k": (top_k, "top_k", {"top_k": 2}, True),
    "top_k, as they are": (
        lambda: top_k(normalize=False),
        "top_k",
        {"top_k": 2},
        False,
    ),
}


def expected_factors(layer, x, selection, settings, times_k, shared=0):
    """`(B, S, H)`, a token at a time."""
    x = np.asarray(x, "float64")
    kernel = models.array(layer.router.kernel).astype("float64")
    logits = x @ kernel
    decisions = reference.ds_moe(
        logits, selection, normalize=times_k, **settings
    )
    count = logits.shape[-1]
    expert = expert_of_head(
        layer.num_experts, layer.num_heads, layer.num_key_value_heads
    )
    found = np.zeros((*x.shape[:-1], layer.num_heads))
    for b, decision in enumerate(decisions):
        for s in range(x.shape[1]):
            met = decision.processed[s].sum()
            routed = decision.weights[s] * (met if times_k else count)
            if shared:
                both = models.array(layer.balance_kernel).astype("float64")
                alpha = 2 * reference.softmax(x[b, s] @ both)
                always = np.ones(1)
                if shared > 1:
                    own = models.array(layer.shared_kernel).astype("float64")
                    always = shared * reference.softmax(x[b, s] @ own)
                routed = np.concatenate([alpha[0] * always, alpha[1] * routed])
            for h in range(layer.num_heads):
                found[b, s, h] = routed[expert[h]]
    return found


def projected(layer, heads, factors):
    kernel = models.array(layer.projection.kernel).astype("float64")
    kernel = kernel.reshape(HEADS, HEAD_DIM, WIDTH)
    heads = heads.reshape(*heads.shape[:2], HEADS, HEAD_DIM)
    summed = sum(
        factors[..., h, None] * (heads[..., h, :] @ kernel[h])
        for h in range(HEADS)
    )
    return summed + models.array(layer.projection.bias)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_outputs_are_a_sum_over_heads(name, merged, shared):
    make, selection, settings, times_k = ROUTERS[name]
    layer = layer_of(make(), merged, shared_heads=shared)
    heads, x = arrays(merged)
    factors = expected_factors(
        layer, x, selection, settings, times_k, shared=shared
    )
    received = models.array(layer(heads, router_inputs=x))
    np.testing.assert_allclose(
        received, projected(layer, heads, factors), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shared", [0, 2])
def test_gradients_are_those_of_the_sum(shared):
    """By differences of the oracle, of every weight and of the inputs."""
    layer = layer_of("ds_moe", shared_heads=shared)
    heads, x = arrays()
    cotangent = models.tokens(2, 5, WIDTH, seed=4)
    weights = {v.path: v for v in layer.trainable_variables}

    def total():
        factors = expected_factors(layer, x, "all", {}, False, shared=shared)
        return float(np.sum(projected(layer, heads, factors) * cotangent))

    given = [ops.convert_to_tensor(array) for array in (heads, x)]
    frozen = [v.value for v in layer.non_trainable_variables]

    def scalar(*values):
        outputs, _ = layer.stateless_call(
            list(values), frozen, given[0], router_inputs=given[1]
        )
        return ops.sum(ops.multiply(outputs, cotangent))

    _, _, found = gradients.pull_back(
        scalar, *[v.value for v in weights.values()]
    )
    rng = np.random.default_rng(0)
    for variable, gradient in zip(weights.values(), found, strict=True):
        value = models.array(variable).copy()
        for _ in range(3):
            place = tuple(rng.integers(0, n) for n in value.shape)
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * 1e-2
                variable.assign(moved)
                ends.append(total())
            variable.assign(value)
            slope = (ends[0] - ends[1]) / 2e-2
            assert gradient[place] == pytest.approx(
                slope, rel=2e-2, abs=2e-3
            ), variable.path


@pytest.mark.parametrize("shared", [0, 1])
def test_equal_scores_of_all_heads_are_the_projection_itself(shared):
    layer = layer_of("ds_moe", shared_heads=shared)
    for variable in layer.new_weights:
        variable.assign(ops.zeros(variable.shape))
    heads, x = arrays()
    np.testing.assert_allclose(
        models.array(layer(heads, router_inputs=x)),
        models.array(layer.projection(heads)),
        rtol=1e-6,
        atol=1e-6,
    )


def test_padding_is_what_the_dense_projection_makes_of_it():
    layer = layer_of(top_k())
    heads, x = arrays()
    real = np.arange(5) < np.array([[5], [3]])
    x[~real] = np.nan
    with padding_mask(ops.convert_to_tensor(real)):
        received = models.array(layer(heads, router_inputs=x))
    dense = models.array(layer.projection(heads))
    np.testing.assert_allclose(received[~real], dense[~real], atol=1e-5)
    alone = models.array(layer(heads, router_inputs=np.nan_to_num(x)))
    np.testing.assert_allclose(received[real], alone[real], atol=1e-5)
    assert np.abs(alone - dense).max() > 1e-2


def test_losses_are_the_routers():
    layer = layer_of(ku.DSMoERouter(mutual_information_loss=0.5))
    heads, x = arrays()
    layer(heads, router_inputs=x, training=True)
    logits = x @ models.array(layer.router.kernel)
    scores = np.apply_along_axis(reference.softmax, -1, logits)
    expected = 0.5 * reference.mutual_information(scores)
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-4)
    layer(heads, router_inputs=x, training=False)
    assert not layer.losses


def test_a_config_makes_an_equal_layer(tmp_path):
    layer = layer_of(top_k(), shared_heads=1)
    inputs = [keras.Input((5, HEADS, HEAD_DIM)), keras.Input((5, WIDTH))]
    model = keras.Model(inputs, layer(inputs[0], router_inputs=inputs[1]))
    model.save(tmp_path / "heads.keras")
    loaded = keras.saving.load_model(tmp_path / "heads.keras")
    batch = list(arrays())
    np.testing.assert_array_equal(
        models.array(model(batch)), models.array(loaded(batch))
    )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("asked", "heads", "groups", "experts", "expected"),
    [
        (None, 4, 4, 4, [0, 1, 2, 3]),
        (2, 4, 4, 2, [0, 0, 1, 1]),
        # One query head of each key-value head, as in DS-MoE.
        (None, 6, 2, 3, [0, 1, 2, 0, 1, 2]),
        (2, 8, 2, 2, [0, 0, 1, 1, 0, 0, 1, 1]),
        (8, 8, 2, 8, list(range(8))),
        (None, 4, 1, 4, [0, 1, 2, 3]),
    ],
)
def test_heads_are_divided(asked, heads, groups, experts, expected):
    assert count_experts(asked, heads, groups) == experts
    assert expert_of_head(experts, heads, groups).tolist() == expected


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 3}, "divide.*num_experts=3"),
        ({"num_key_value_heads": 3}, "must divide `num_heads`"),
        ({"shared_heads": 4}, "shared_heads.*from 0 to.*3"),
        ({"shared_heads": True}, "shared_heads"),
        ({"router": "expert_choice"}, "experts choose tokens"),
        ({"router": "default_moe"}, "does more than choose"),
        ({"router": ku.TopKRouter(2)}, "capacity_factor=1.25.*no slots"),
        (
            {
                "router": ku.TopKRouter(
                    2, capacity_factor=None, router_gradient="dense_mixer"
                )
            },
            "router_gradient='dense_mixer'",
        ),
        ({"router": top_k(k=5)}, "top_k"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    settings = {"num_heads": HEADS, **settings}
    with pytest.raises((ValueError, TypeError), match=words):
        ku.RoutedHeads(projection_of(False), **settings)


@pytest.mark.one_backend
def test_it_must_be_told_what_attention_saw():
    layer = layer_of("ds_moe")
    with pytest.raises(ValueError, match="router_inputs=None"):
        layer(arrays()[0])

"""Top-K of groups, one expert in each: values, gradients, and what it refuses.

The oracle chooses token by token in float64 (`reference.top_k_of_groups`).
"""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.routing import expert_groups, functional

GROUPS = {
    "pairs": (0, 0, 1, 1, 2, 2),
    "unlike": (0, 1, 2, 1, 0, 1),
    "one each": (0, 1, 2, 3, 4, 5),
}
every_groups = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
SETTINGS = {
    "normalized": {},
    "raw": {"normalize": False},
    "after_top_k": {"normalize": False, "softmax": "after_top_k"},
    "capacity": {"capacity_factor": 0.8},
    "bias": {"bias": np.float32([0.3, -0.2, 0.0, 0.2, -0.1, 0.1])},
    "bias of logits": {
        "softmax": "after_top_k",
        "bias": np.float32([0.3, -0.2, 0.0, 0.2, -0.1, 0.1]),
    },
    "mask": {"mask": np.arange(9) < 6},
}


def scores(seed=0, scale=2.0):
    return scale * models.tokens(2, 9, 6, seed=seed)


@every_groups
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_choice_is_the_oracles(groups, settings):
    given = dict(settings)
    mask = given.pop("mask", None)
    told = None if mask is None else np.stack([mask, mask])
    logits = expert_groups.logits(ops.convert_to_tensor(scores()), groups)
    chosen = functional.top_k(
        logits, 2, mask=told, expert_groups=groups, **given
    )
    weights = ops.convert_to_numpy(functional.combine_matrix(chosen, 9, 6))
    for row, received in zip(scores(), weights, strict=True):
        given = dict(settings)
        expected = reference.top_k_of_groups(
            row,
            2,
            groups,
            softmax_order=given.pop("softmax", "before_top_k"),
            **given,
        )
        np.testing.assert_allclose(received, expected.weights, atol=1e-6)


@every_groups
def test_logits_are_those_of_groups_and_within_them(groups):
    found = expert_groups.logits(ops.convert_to_tensor(scores()), groups)
    found = ops.convert_to_numpy(functional.probabilities(found))
    for row, received in zip(
        scores().reshape(-1, 6), found.reshape(-1, 6), strict=True
    ):
        parts = reference.of_groups(row.astype("float64"), groups)
        each = reference.softmax(np.array([logit for _, logit, _ in parts]))
        for (members, _, shares), group in zip(parts, each, strict=True):
            np.testing.assert_allclose(
                received[members], group * shares, rtol=1e-5
            )


@every_groups
def test_gradients_are_those_of_the_group_and_of_the_share_in_it(groups):
    """In closed form: values alone know nothing of shares."""
    cost = models.tokens(6, seed=3)

    def scalar(x):
        logits = expert_groups.logits(x, groups)
        chosen = functional.top_k(logits, 2, expert_groups=groups)
        matrix = functional.combine_matrix(chosen, 9, 6)
        return ops.sum(matrix * ops.convert_to_tensor(cost))

    _, _, (found,) = gradients.pull_back(scalar, scores())
    for row, received in zip(
        scores().reshape(-1, 6), found.reshape(-1, 6), strict=True
    ):
        parts = reference.of_groups(row.astype("float64"), groups)
        order = np.argsort([-logit for _, logit, _ in parts])[:2]
        weights = reference.softmax(np.array([parts[g][1] for g in order]))
        best = [parts[g][0][np.argmax(parts[g][2])] for g in order]
        mean = np.dot(weights, cost[best])
        expected = np.zeros(6)
        for group, weight, expert in zip(order, weights, best, strict=True):
            members, _, shares = parts[group]
            of_logit = weight * (cost[expert] - mean)
            # Of the group's mean, and of log(share of the chosen).
            expected[members] += of_logit / len(members) - of_logit * shares
            expected[expert] += of_logit
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-5)


def test_groups_of_one_are_any_experts():
    logits = ops.convert_to_tensor(scores())
    groups = GROUPS["one each"]
    plain = functional.top_k(logits, 2)
    grouped = functional.top_k(
        expert_groups.logits(logits, groups), 2, expert_groups=groups
    )
    for received, expected in zip(
        (grouped.experts, grouped.weights),
        (plain.experts, plain.weights),
        strict=True,
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(received),
            ops.convert_to_numpy(expected),
            atol=1e-6,
        )


def test_a_layer_computes_and_trains_as_its_weights_say():
    groups = GROUPS["unlike"]
    router = ku.TopKRouter(
        expert_groups=groups, capacity_factor=None, load_balance_loss=0.5
    )
    layer = ku.MoEFeedForward(6, 8, router, bias_initializer="normal")
    layer.build((None, 5, models.WIDTH))
    models.set_routers(layer)
    x = models.tokens(3, 5, models.WIDTH)
    expected = reference.moe(
        x,
        gradients.weights_of(layer),
        lambda row, mask: reference.top_k_of_groups(row, 2, groups),
        layer.router.group,
    )
    received, found = gradients.of_layer(layer, x, training=True)
    np.testing.assert_allclose(
        ops.convert_to_numpy(received), expected, rtol=1e-4, atol=1e-5
    )
    # The balance of experts reaches rows within a group, not their mean alone.
    gradient = found["router/kernel"]
    means = [gradient[:, np.array(groups) == g].mean(1) for g in range(3)]
    inside = gradient - np.stack(means, 1)[:, list(groups)]
    assert np.abs(inside).max() > 1e-4


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("0011", TypeError, "list with each expert's group"),
        ([0, 0.5], TypeError, "list with each expert's group"),
        ([0, 2, 2], ValueError, "without a gap"),
        ([], ValueError, "without a gap"),
        ([-1, 0], ValueError, "without a gap"),
    ],
    ids=["text", "float", "gap", "none", "negative"],
)
def test_groups_are_numbers_without_a_gap(given, error, said):
    with pytest.raises(error, match=said):
        ku.TopKRouter(expert_groups=given)


@pytest.mark.one_backend
def test_groups_must_suit_the_experts_and_the_losses():
    router = ku.TopKRouter(expert_groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="of 4 experts, num_experts=6"):
        ku.MoEFeedForward(6, 8, router)
    router = ku.TopKRouter(3, expert_groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="top_k=3, groups=2"):
        ku.MoEFeedForward(4, 8, router)
    with pytest.raises(ValueError, match="load_loss"):
        ku.TopKRouter(expert_groups=[0, 1], noise_stddev=0.1, load_loss=0.1)
    with pytest.raises(ValueError, match="Default MoE"):
        ku.DefaultMoERouter(expert_groups=[0, 1])


@pytest.mark.one_backend
def test_a_file_keeps_the_groups(tmp_path):
    inputs = keras.Input((5, models.WIDTH))
    router = ku.TopKRouter(expert_groups=GROUPS["pairs"])
    outputs = ku.MoEFeedForward(6, 8, router, name="moe")(inputs)
    model = models.randomized(keras.Model(inputs, outputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("moe").router.expert_groups == GROUPS["pairs"]
    x = models.tokens(3, 5, models.WIDTH)
    np.testing.assert_array_equal(
        models.output(again, x), models.output(model, x)
    )


@pytest.mark.one_backend
def test_what_is_left_of_a_group_is_chosen_as_the_group_was():
    kernel = models.tokens(4, 6).astype("float64")
    groups, left = GROUPS["unlike"], [1, 2, 3, 5]
    found = expert_groups.with_means_kept(kernel, groups, left)
    now = expert_groups.of_experts(groups, left)
    assert now == (0, 1, 0, 0)
    x = models.tokens(7, 4, seed=1).astype("float64")
    for row in x:
        before = reference.of_groups(row @ kernel, groups)
        after = reference.of_groups(row @ found, now)
        np.testing.assert_allclose(after[0][1], before[1][1])
        np.testing.assert_allclose(after[1][1], before[2][1])
        # The whole group 1 is left: shares among them stay.
        np.testing.assert_allclose(after[0][2], before[1][2])

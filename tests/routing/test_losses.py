import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gradients
import numpy as np
import pytest
import reference
from keras import ops

from keras_upcycle.routing import functional, losses

GROUPS, LENGTH, EXPERTS = 2, 8, 4
STDDEV, TOP_K = 0.5, 2


def random_logits(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(GROUPS, LENGTH, EXPERTS)).astype("float32")


def random_probabilities(seed=0):
    powers = np.exp(random_logits(seed))
    return powers / powers.sum(axis=-1, keepdims=True)


def noisy_logits(seed=0):
    logits = random_logits(seed)
    return logits, logits + STDDEV * random_logits(seed + 100)


def tensor(array):
    return None if array is None else ops.convert_to_tensor(array)


MASK = np.arange(LENGTH) < np.array([[5], [7]])
masked = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])


class Case(NamedTuple):
    """A loss of float arrays `(G, S, E)` and a mask, beside its oracle.

    `inputs(seed)` gives the arrays.
    """

    name: str
    loss: Callable
    oracle: Callable
    inputs: Callable[[int], tuple]

    def value(self, arrays, mask=None) -> Any:
        return float(self.loss(*map(tensor, arrays), mask=tensor(mask)))

    def gradients(self, arrays, mask=None) -> list:
        mask = tensor(mask)
        _, _, found = gradients.pull_back(
            lambda *tensors: self.loss(*tensors, mask=mask), *arrays
        )
        return found


PICKS = np.argsort(-random_logits(), axis=-1)[..., :TOP_K].astype("int32")


def balance_of_picks(probabilities, mask):
    experts = tensor(PICKS)
    if mask is not None:
        experts = ops.where(ops.expand_dims(mask, -1), experts, EXPERTS)
    return losses.load_balance(probabilities, experts, mask)


def oracle_of_picks(probabilities, mask):
    real = np.ones((GROUPS, LENGTH), bool) if mask is None else mask
    share = np.zeros(EXPERTS)
    for token in PICKS[real]:
        for expert in token:
            share[expert] += 1 / PICKS[real].size
    return EXPERTS * sum(share * probabilities[real].mean(axis=0))


CASES = (
    Case(
        "load_balance",
        balance_of_picks,
        oracle_of_picks,
        lambda seed: (random_probabilities(seed),),
    ),
    Case(
        "z_loss",
        losses.z_loss,
        reference.z_loss,
        lambda seed: (random_logits(seed),),
    ),
    Case(
        "importance",
        losses.importance,
        reference.importance,
        lambda seed: (random_probabilities(seed),),
    ),
    Case(
        "load",
        lambda x, noisy, mask: losses.load(x, noisy, STDDEV, TOP_K, mask),
        lambda x, noisy, mask: reference.load(x, noisy, STDDEV, TOP_K, mask),
        noisy_logits,
    ),
    Case(
        "mutual_information",
        losses.mutual_information,
        reference.mutual_information,
        lambda seed: (random_probabilities(seed),),
    ),
)
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# All losses alike.


@masked
@each
def test_value_and_gradients_are_those_of_the_reference(case, mask):
    arrays = case.inputs(0)
    expected = case.oracle(*arrays, mask=mask)
    np.testing.assert_allclose(
        case.value(arrays, mask), expected, rtol=1e-6, atol=1e-6
    )
    for place, found in enumerate(case.gradients(arrays, mask)):

        def moved(array, place=place):
            others = [*arrays[:place], array, *arrays[place + 1 :]]
            return case.oracle(*others, mask=mask)

        expected = reference.gradient(moved, arrays[place])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("filler", [7.0, np.nan, np.inf, -np.inf], ids=str)
@each
def test_padding_changes_nothing_whatever_it_holds(case, filler):
    arrays = case.inputs(0)
    value, slopes = case.value(arrays, MASK), case.gradients(arrays, MASK)
    filled = [np.where(MASK[..., None], x, np.float32(filler)) for x in arrays]
    assert case.value(filled, MASK) == value
    for found, expected in zip(
        case.gradients(filled, MASK), slopes, strict=True
    ):
        np.testing.assert_array_equal(found, expected)
        assert not found[~MASK].any()
    assert case.value(arrays, np.ones_like(MASK)) != pytest.approx(value)


@each
def test_more_padding_changes_nothing(case):
    if case.name == "load_balance":
        pytest.skip("Its picks are of one length; the router's test has more.")
    arrays = case.inputs(0)
    value = case.value(arrays, MASK)
    longer = [np.concatenate([x, x], axis=1) for x in arrays]
    longer_mask = np.concatenate([MASK, np.zeros_like(MASK)], axis=1)
    assert case.value(longer, longer_mask) == pytest.approx(value, abs=1e-6)
    # Whole groups of padding too.
    more = [np.concatenate([x, x[:1]]) for x in arrays]
    more_mask = np.concatenate([MASK, np.zeros_like(MASK[:1])])
    assert case.value(more, more_mask) == pytest.approx(value, abs=1e-6)


@each
def test_padding_alone_costs_nothing(case):
    arrays, nothing = case.inputs(0), np.zeros_like(MASK)
    assert case.value(arrays, nothing) == 0.0
    for found in case.gradients(arrays, nothing):
        assert not found.any()


# Load balancing and the z-loss.


def load_balance(logits, top_k, mask=None):
    """The package's loss, choices by the package's router."""
    logits, mask = tensor(logits), tensor(mask)
    requested = functional.top_k(logits, top_k, mask=mask).requested
    return losses.load_balance(ops.softmax(logits, axis=-1), requested, mask)


@masked
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_equals_the_reference(top_k, mask):
    logits = random_logits()
    expected = reference.load_balance(logits, top_k, mask)
    found = float(load_balance(logits, top_k, mask))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def balance_of_shares(shares, total=LENGTH):
    """The loss where expert `e` gets `shares[e]` tokens, with certainty."""
    picks = np.repeat(np.arange(len(shares)), shares).astype("int32")
    picks = np.tile(picks.reshape(1, total, 1), (GROUPS, 1, 1))
    certain = np.eye(len(shares), dtype="float32")[picks[..., 0]]
    return float(
        losses.load_balance(
            ops.convert_to_tensor(certain), ops.convert_to_tensor(picks)
        )
    )


def test_load_balance_is_one_for_equal_shares_and_larger_for_others():
    assert balance_of_shares([2, 2, 2, 2]) == pytest.approx(1.0, abs=1e-6)
    for shares in ([3, 2, 2, 1], [4, 4, 0, 0], [8, 0, 0, 0]):
        assert balance_of_shares(shares) > 1.01
    assert balance_of_shares([8, 0, 0, 0]) == pytest.approx(EXPERTS)


@pytest.mark.parametrize("top_k", [1, 3])
def test_load_balance_is_one_for_uniform_probabilities(top_k):
    found = float(load_balance(np.zeros((1, 6, 4), "float32"), top_k))
    assert found == pytest.approx(1.0, abs=1e-6)


def test_more_padding_does_not_change_load_balance():
    logits = random_logits()
    first = float(load_balance(logits, 2, MASK))
    longer = np.concatenate([logits, 20.0 * logits], axis=1)
    longer_mask = np.concatenate([MASK, np.zeros_like(MASK)], axis=1)
    found = float(load_balance(longer, 2, longer_mask))
    assert found == pytest.approx(first, rel=1e-6)


@masked
def test_load_balance_moves_probabilities_by_the_experts_shares(mask):
    logits = random_logits()
    requested = functional.top_k(ops.convert_to_tensor(logits), 2).requested
    probabilities = ops.convert_to_numpy(
        ops.softmax(ops.convert_to_tensor(logits), axis=-1)
    )
    tensor_mask = None if mask is None else ops.convert_to_tensor(mask)
    _, _, (found,) = gradients.pull_back(
        lambda p: losses.load_balance(p, requested, tensor_mask),
        probabilities,
    )
    real = np.ones_like(MASK) if mask is None else mask
    picks = ops.convert_to_numpy(requested)[real]
    share = np.bincount(picks.ravel(), minlength=EXPERTS) / picks.size
    expected = EXPERTS * share / real.sum() * real[..., None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@masked
def test_gradient_of_load_balance_is_the_slope_of_the_reference(mask):
    logits = random_logits()
    tensor_mask = tensor(mask)

    def loss(x):
        requested = functional.top_k(x, 2, mask=tensor_mask).requested
        return losses.load_balance(
            ops.softmax(x, axis=-1), requested, tensor_mask
        )

    _, _, (found,) = gradients.pull_back(loss, logits)
    expected = reference.gradient(
        lambda x: reference.load_balance(x, 2, mask), logits
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


# Importance.


def test_importance_is_0_for_equal_shares_and_largest_for_one_expert():
    def importance(probabilities):
        return float(losses.importance(tensor(probabilities)))

    sure = np.eye(EXPERTS, dtype="float32")
    assert importance(np.full((3, 5, EXPERTS), 0.25, "float32")) == 0.0
    assert importance(np.stack([sure, sure])) == 0.0
    one = np.stack([sure[:1].repeat(6, axis=0)])
    assert importance(one) == pytest.approx(EXPERTS - 1)


def test_importance_and_load_are_means_over_groups():
    # Two groups that are balanced together and not alone.
    sure = np.eye(2, dtype="float32")[:, None].repeat(3, axis=1)
    whole = sure.reshape(1, 6, 2)
    for apart, together in (
        (losses.importance(tensor(x)) for x in (sure, whole)),
        (losses.load(tensor(x), tensor(x), 0.1, 1) for x in (sure, whole)),
    ):
        assert float(apart) > 0.3
        assert float(together) == pytest.approx(0.0, abs=1e-6)


# Load.


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_load_equals_the_reference_for_every_top_k(top_k):
    logits, noisy = noisy_logits(1)
    found = losses.load(tensor(logits), tensor(noisy), STDDEV, top_k)
    expected = reference.load(logits, noisy, STDDEV, top_k)
    np.testing.assert_allclose(float(found), expected, rtol=1e-6, atol=1e-6)


def test_load_counts_choices_where_there_is_hardly_any_noise():
    # Probabilities of being chosen are then 0 or 1, but for the expert that
    # is the threshold, which the next draw puts above it or below.
    logits = random_logits(2)
    found = losses.load(tensor(logits), tensor(logits), 1e-6, TOP_K)
    counts = [
        (reference.top_k(rows, TOP_K).requested * 0.5).sum(axis=0)
        + (reference.top_k(rows, TOP_K - 1).requested * 0.5).sum(axis=0)
        for rows in logits
    ]
    expected = np.mean([reference.squared_variation(c) for c in counts])
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_load_is_the_chance_of_another_draw():
    # By drawing: each expert's noise again, the threshold as it was.
    rng = np.random.default_rng(5)
    logits, noisy = noisy_logits(3)
    threshold = np.sort(noisy, axis=-1)[..., -TOP_K, None]
    draws = logits + STDDEV * rng.normal(size=(20000, *logits.shape))
    chances = (draws > threshold).mean(axis=(0, 2))
    expected = np.mean([reference.squared_variation(c) for c in chances])
    found = losses.load(tensor(logits), tensor(noisy), STDDEV, TOP_K)
    assert float(found) == pytest.approx(expected, rel=0.05)


# Mutual information.


def information(probabilities):
    return float(losses.mutual_information(tensor(probabilities)))


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_mutual_information_lies_between_minus_log_e_and_0(experts):
    sure = np.eye(experts, dtype="float32")
    even = np.full((2, 3, experts), 1 / experts, "float32")
    one = sure[:1].repeat(6, axis=0)
    least = -math.log(experts)
    assert information(np.stack([sure, sure])) == pytest.approx(least, abs=1e-6)
    assert information(even) == pytest.approx(0.0, abs=1e-6)
    assert information(one[None]) == pytest.approx(0.0, abs=1e-6)
    powers = np.random.default_rng(0).random((2, 6, experts)) ** 4 + 1e-9
    some = (powers / powers.sum(axis=-1, keepdims=True)).astype("float32")
    assert least - 1e-6 < information(some) < 1e-6


def test_mutual_information_takes_all_groups_as_one():
    probabilities = random_probabilities()
    whole = probabilities.reshape(1, GROUPS * LENGTH, EXPERTS)
    assert information(whole) == pytest.approx(
        information(probabilities), abs=1e-6
    )


@pytest.mark.parametrize("gap", [20.0, 95.0, 200.0])
def test_mutual_information_of_saturated_logits_is_finite(gap):
    logits = gap * np.eye(EXPERTS, dtype="float32")[None]
    value, _, (found,) = gradients.pull_back(
        lambda x: losses.mutual_information(ops.softmax(x, axis=-1)),
        logits,
    )
    assert value == pytest.approx(-math.log(EXPERTS), abs=1e-6)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    _, _, (found,) = gradients.pull_back(
        losses.mutual_information, np.eye(EXPERTS, dtype="float32")[None]
    )
    assert np.isfinite(found).all()


@masked
def test_gradient_of_mutual_information_by_the_logits(mask):
    logits = random_logits()
    _, _, (found,) = gradients.pull_back(
        lambda x: losses.mutual_information(
            ops.softmax(x, axis=-1), tensor(mask)
        ),
        logits,
    )
    np.testing.assert_allclose(
        found, slope_of_information(logits, mask), rtol=1e-6, atol=1e-6
    )


def slope_of_information(logits, mask=None):
    """`S * (d - sum(S * d)) / T` with `d = log(mean(S)) - log(S)`."""
    real = np.ones(logits.shape[:2], bool) if mask is None else mask
    p = np.stack([reference.softmax(row) for row in logits[real]])
    difference = np.log(p.mean(axis=0)) - np.log(p)
    own = np.sum(p * difference, axis=-1, keepdims=True)
    slope = np.zeros(logits.shape)
    slope[real] = p * (difference - own) / len(p)
    return slope


# Values that others publish.


def test_values_of_vmoe():
    """`vmoe/nn/routing_test.py` of google-research/vmoe."""
    gates = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]
    gates = np.array([gates], "float32")
    first = gates.argmax(axis=-1)[..., None].astype("int32")
    balance = losses.load_balance(tensor(gates), tensor(first))
    assert float(balance) == pytest.approx(1.0875, abs=1e-6)
    found = float(losses.importance(tensor(gates)))
    assert found == pytest.approx(0.03874999, abs=1e-6)
    logits = [[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]
    noise = [
        [-0.037, 0.026, -0.018],
        [-0.074, 0.045, -0.015],
        [-0.067, -0.059, 0.073],
    ]
    logits = np.array([logits], "float32")
    noisy = logits + np.array([noise], "float32")
    found = losses.load(tensor(logits), tensor(noisy), 0.1, 2)
    assert float(found) == pytest.approx(0.48573864536489236, abs=1e-6)


# Drawn by `jax.random` as flaxformer's `routing_test.py` does: uniform in
# [-5, 5), `PRNGKey(0)`, `jax_threefry_partitionable` off as it was then.
FLAXFORMER_LOGITS = [
    [-4.2124424, 3.891939, -3.6481273, 1.8849981],
    [0.32625437, 2.918651, 0.84758997, -4.556842],
    [-3.32062, 4.6977115, -0.15439987, 0.44086337],
    [3.4467149, 4.3436565, -4.7224274, -4.264637],
    [-2.224406, -2.5318158, -1.3832569, 1.1891162],
    [-2.320062, -0.44705987, 4.289819, -0.0066268444],
    [0.99470854, -0.6992364, 0.25503993, 4.2952085],
    [3.5937333, -3.2408535, -4.298278, 4.426601],
    [0.7669008, 2.6588762, 2.4505413, 4.6051874],
    [0.23330331, -3.0845237, 0.6262374, -2.9865491],
    [0.7595146, -2.1099675, -4.155346, -2.8326452],
    [2.3771453, 1.004138, -3.1781673, 0.7581556],
]


def test_z_loss_of_flaxformer():
    """`flaxformer/architectures/moe/routing_test.py` of google/flaxformer."""
    logits = np.array(FLAXFORMER_LOGITS, "float32").reshape(2, 6, 4)
    found = float(losses.z_loss(tensor(logits)))
    assert found == pytest.approx(13.786719, rel=1e-6)


def test_mutual_information_worked_out_by_hand():
    logits = np.array([[[2, 1, 0], [0, 2, 1], [1, 1.5, 0]]], "float32")
    value, _, (found,) = gradients.pull_back(
        lambda x: losses.mutual_information(ops.softmax(x, axis=-1)),
        logits,
    )
    assert value == pytest.approx(0.8725329 - 1.0052033, abs=1e-6)
    expected = [-0.0927804, 0.0713328, 0.0214476]
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)


def test_token_mean_of_a_mask_is_the_mean_of_the_real_tokens():
    values = random_logits()
    found = losses.token_mean(
        ops.convert_to_tensor(values), ops.convert_to_tensor(MASK)
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), values[MASK].mean(axis=0), rtol=1e-5
    )

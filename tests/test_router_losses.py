import gradients
import numpy as np
import pytest
import reference
from keras import ops

from keras_upcycle import router_losses, routing

GROUPS, LENGTH, EXPERTS = 2, 8, 4


def random_logits(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(GROUPS, LENGTH, EXPERTS)).astype("float32")


MASK = np.arange(LENGTH) < np.array([[5], [7]])
masked = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])


def load_balance(logits, top_k, mask=None):
    """The package's loss, choices by the package's router."""
    logits = ops.convert_to_tensor(logits)
    mask = None if mask is None else ops.convert_to_tensor(mask)
    wanted = routing.top_k(logits, top_k, mask=mask).wanted
    return router_losses.load_balance(
        ops.softmax(logits, axis=-1), wanted, mask
    )


def z_loss(logits, mask=None):
    mask = None if mask is None else ops.convert_to_tensor(mask)
    return router_losses.z_loss(ops.convert_to_tensor(logits), mask)


@masked
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_equals_the_reference(top_k, mask):
    logits = random_logits()
    expected = reference.load_balance(logits, top_k, mask)
    found = float(load_balance(logits, top_k, mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@masked
def test_z_loss_equals_the_reference(mask):
    logits = 3.0 * random_logits()
    expected = reference.z_loss(logits, mask)
    np.testing.assert_allclose(float(z_loss(logits, mask)), expected, rtol=1e-5)


def balance_of_shares(shares, total=LENGTH):
    """The loss where expert `e` gets `shares[e]` tokens, with certainty."""
    picks = np.repeat(np.arange(len(shares)), shares).astype("int32")
    picks = np.tile(picks.reshape(1, total, 1), (GROUPS, 1, 1))
    certain = np.eye(len(shares), dtype="float32")[picks[..., 0]]
    return float(
        router_losses.load_balance(
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


@pytest.mark.parametrize(
    "loss",
    [lambda logits, mask: load_balance(logits, 2, mask), z_loss],
    ids=["load_balance", "z_loss"],
)
def test_padding_adds_to_no_loss(loss):
    logits = random_logits()
    other = np.where(MASK[..., None], logits, 20.0 * random_logits(seed=7))
    first = float(loss(logits, MASK))
    assert float(loss(other, MASK)) == pytest.approx(first, rel=1e-6)
    longer = np.concatenate([logits, other], axis=1)
    longer_mask = np.concatenate([MASK, np.zeros_like(MASK)], axis=1)
    assert float(loss(longer, longer_mask)) == pytest.approx(first, rel=1e-6)
    assert float(loss(other, np.ones_like(MASK))) != pytest.approx(first)


@pytest.mark.parametrize(
    "loss",
    [lambda logits, mask: load_balance(logits, 2, mask), z_loss],
    ids=["load_balance", "z_loss"],
)
def test_padding_alone_costs_nothing(loss):
    assert float(loss(random_logits(), np.zeros_like(MASK))) == 0.0


@masked
def test_load_balance_moves_probabilities_by_the_experts_shares(mask):
    logits = random_logits()
    wanted = routing.top_k(ops.convert_to_tensor(logits), 2).wanted
    probabilities = ops.convert_to_numpy(
        ops.softmax(ops.convert_to_tensor(logits), axis=-1)
    )
    tensor_mask = None if mask is None else ops.convert_to_tensor(mask)
    _, _, (found,) = gradients.pull_back(
        lambda p: router_losses.load_balance(p, wanted, tensor_mask),
        probabilities,
    )
    real = np.ones_like(MASK) if mask is None else mask
    picks = ops.convert_to_numpy(wanted)[real]
    share = np.bincount(picks.ravel(), minlength=EXPERTS) / picks.size
    expected = EXPERTS * share / real.sum() * real[..., None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@masked
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (
            lambda x, mask: router_losses.load_balance(
                ops.softmax(x, axis=-1),
                routing.top_k(x, 2, mask=mask).wanted,
                mask,
            ),
            lambda x, mask: reference.load_balance(x, 2, mask),
        ),
        (router_losses.z_loss, reference.z_loss),
    ],
    ids=["load_balance", "z_loss"],
)
def test_gradient_is_the_slope_of_the_reference(loss, oracle, mask):
    logits = random_logits()
    tensor_mask = None if mask is None else ops.convert_to_tensor(mask)
    _, _, (found,) = gradients.pull_back(lambda x: loss(x, tensor_mask), logits)
    direction = np.random.default_rng(3).normal(size=logits.shape)
    slope = reference.slope(
        lambda point: oracle(point["x"], mask),
        {"x": logits.astype("float64")},
        {"x": direction},
    )
    assert np.sum(found * direction) == pytest.approx(slope, rel=1e-3)


def test_token_mean_of_a_mask_is_the_mean_of_the_real_tokens():
    values = random_logits()
    found = router_losses.token_mean(
        ops.convert_to_tensor(values), ops.convert_to_tensor(MASK)
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), values[MASK].mean(axis=0), rtol=1e-5
    )

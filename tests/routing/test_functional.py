import math
from fractions import Fraction

import gradients
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import reference
from keras import ops
from routing_tables import tables

from keras_upcycle.routing import drop_policies, functional
from keras_upcycle.types import ExpertChoice, TokenChoice

GROUPS, LENGTH, EXPERTS = 2, 8, 4

few = hypothesis.settings(
    max_examples=20, deadline=None, derandomize=True, database=None
)

# Rows of logits with equal entries, and no two rows with nearly equal
# probabilities: tokens that draw the same row tie exactly, others never do.
ROWS = np.array(
    [
        [0.9, 0.1, 0.1, -0.7],
        [-0.3, 1.3, -0.3, 0.4],
        [0.0, 0.0, 0.0, 0.0],
        [-1.1, 0.2, 0.2, 0.2],
        [2.2, -0.5, 0.6, 1.1],
    ],
    "float32",
)
tied_logits = st.lists(
    st.integers(0, len(ROWS) - 1),
    min_size=GROUPS * LENGTH,
    max_size=GROUPS * LENGTH,
).map(lambda rows: ROWS[rows].reshape(GROUPS, LENGTH, EXPERTS))
masks = st.none() | st.lists(
    st.booleans(), min_size=GROUPS * LENGTH, max_size=GROUPS * LENGTH
).map(lambda real: np.array(real).reshape(GROUPS, LENGTH))


def random_logits(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shape = (GROUPS, LENGTH, EXPERTS)
    return (scale * rng.normal(size=shape)).astype("float32")


def requested_table(chosen, length, num_experts):
    requested = ops.convert_to_numpy(chosen.requested)
    table = np.zeros((len(requested), length, num_experts), bool)
    for g, s, k in np.ndindex(requested.shape):
        if requested[g, s, k] < num_experts:
            table[g, s, requested[g, s, k]] = True
    return table


def check_against(expected, chosen, length, num_experts):
    """Compares a routing with the oracle's decisions, group by group."""
    weights, processed = tables(chosen, length, num_experts)
    for g, decision in enumerate(expected):
        np.testing.assert_array_equal(processed[g], decision.processed)
        np.testing.assert_allclose(weights[g], decision.weights, atol=1e-6)
    if isinstance(chosen, TokenChoice):
        requested = requested_table(chosen, length, num_experts)
        for g, decision in enumerate(expected):
            np.testing.assert_array_equal(requested[g], decision.requested)


def top_k_both(logits, mask=None, **settings):
    """Top-K routing of the package, and the oracle's decisions."""
    bias = settings.pop("bias", None)
    chosen = functional.top_k(
        ops.convert_to_tensor(logits),
        mask=None if mask is None else ops.convert_to_tensor(mask),
        bias=None if bias is None else ops.convert_to_tensor(bias),
        **settings,
    )
    renamed = {**settings, "bias": bias}
    if "softmax" in renamed:
        renamed["softmax_order"] = renamed.pop("softmax")
    expected = [
        reference.top_k(
            logits[g], mask=None if mask is None else mask[g], **renamed
        )
        for g in range(len(logits))
    ]
    return chosen, expected


def expert_choice_both(logits, mask=None, **settings):
    chosen = functional.expert_choice(
        ops.convert_to_tensor(logits),
        mask=None if mask is None else ops.convert_to_tensor(mask),
        **settings,
    )
    expected = [
        reference.expert_choice(
            logits[g], mask=None if mask is None else mask[g], **settings
        )
        for g in range(len(logits))
    ]
    return chosen, expected


# The oracle itself, on cases small enough to do by hand.


def test_oracle_drops_by_policy_as_worked_out_by_hand():
    # Both tokens choose expert 0 first and expert 1 second; one slot each.
    logits = np.array([[1.0, 0.9], [3.0, 0.0]])
    settings = {"top_k": 2, "capacity_factor": 0.5, "normalize": False}
    by_position = reference.top_k(logits, **settings)
    np.testing.assert_array_equal(by_position.processed, [[1, 1], [0, 0]])
    by_certainty = reference.top_k(
        logits, drop_policy="batch_priority", **settings
    )
    np.testing.assert_array_equal(by_certainty.processed, [[0, 0], [1, 1]])
    by_probability = reference.top_k(
        logits, drop_policy="probability", **settings
    )
    np.testing.assert_array_equal(by_probability.processed, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(by_position.requested, [[1, 1], [1, 1]])


def test_oracle_renormalises_over_the_surviving_experts():
    logits = np.log([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2]])
    decision = reference.top_k(logits, 2, capacity_factor=0.75)
    # One slot an expert: token 0 keeps both, token 1 loses expert 0.
    np.testing.assert_allclose(decision.weights, [[2 / 3, 1 / 3, 0], [0, 0, 1]])


def test_oracle_expert_choice_gives_each_expert_its_likeliest_tokens():
    logits = np.log([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9]])
    decision = reference.expert_choice(logits, 1.0, normalize=False)
    np.testing.assert_allclose(
        decision.weights, [[0.7, 0], [0.6, 0], [0, 0.8], [0, 0.9]]
    )
    decision = reference.expert_choice(logits, 2.0, mask=[1, 0, 0, 1])
    np.testing.assert_allclose(
        decision.weights, [[0.7, 0.3], [0, 0], [0, 0], [0.1, 0.9]]
    )


# Capacity.


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor", "slots"),
    [
        (50, 1, 1.1, 50),
        (50, 10, 11.0, 50),
        (100, 2, 1.1, 55),
        (500, 10, 1.1, 55),
        (7, 2, 1.0, 4),
        (3, 8, 1.0, 1),
        (0, 4, 1.0, 0),
        (1000, 10, 0.29, 29),
    ],
)
def test_capacity_is_exact_in_integers(num_tokens, num_experts, factor, slots):
    assert functional.capacity(num_tokens, num_experts, factor) == slots
    counts = ops.convert_to_tensor(np.full((3,), num_tokens, "int32"))
    found = functional.capacity(counts, num_experts, factor)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), [slots] * 3)


def test_capacity_of_fifty_tokens_at_1_1_is_55_before_the_limit():
    # In floats 1.1 * 50 is 55.000000000000007, and its ceiling 56.
    assert math.ceil(1.1 * 50) == 56
    assert functional.capacity(50 * 4, 4, 1.1) == 55


@few
@hypothesis.given(
    num_tokens=st.integers(0, 5000),
    num_experts=st.integers(1, 64),
    hundredths=st.integers(1, 800),
)
def test_capacity_is_the_ceiling_of_the_exact_share(
    num_tokens, num_experts, hundredths
):
    share = Fraction(hundredths, 100) * num_tokens / num_experts
    found = functional.capacity(num_tokens, num_experts, hundredths / 100)
    assert found == min(math.ceil(share), num_tokens)


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_capacity_of_a_product_of_factors_is_exact(top_k):
    # 1.1 * 3 is 3.3000000000000003 in floats.
    found = functional.capacity(1000, 10, 1.1 * top_k)
    assert found == min(110 * top_k, 1000)


def test_real_capacity_counts_the_real_tokens_of_each_group():
    mask = np.arange(10) < np.array([[10], [7], [1], [0]])
    found = functional.real_capacity(ops.convert_to_tensor(mask), 4, 2.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), [5, 4, 1, 0])
    assert functional.real_capacity(None, 4, 2.0) is None


# Parts.


@pytest.mark.filterwarnings("error::UserWarning")
def test_probabilities_are_the_softmax_and_quiet_for_a_single_entry():
    logits = random_logits()
    found = ops.convert_to_numpy(
        functional.probabilities(ops.convert_to_tensor(logits))
    )
    for place in np.ndindex(GROUPS, LENGTH):
        expected = reference.softmax(logits[place].astype("float64"))
        np.testing.assert_allclose(found[place], expected, atol=1e-6)
    one = functional.probabilities(ops.convert_to_tensor(logits[..., :1]))
    assert (ops.convert_to_numpy(one) == 1).all()


def test_membership_is_all_zero_for_nowhere():
    experts = ops.convert_to_tensor(np.array([[0, 2, 3]], "int32"))
    found = ops.convert_to_numpy(functional.membership(experts, 3))
    np.testing.assert_array_equal(found, [[[1, 0, 0], [0, 0, 1], [0, 0, 0]]])


@pytest.mark.parametrize("ordered", [False, True], ids=["listed", "ordered"])
def test_ranks_count_who_came_before(ordered):
    rng = np.random.default_rng(1)
    experts = rng.integers(0, EXPERTS + 1, size=(3, 12)).astype("int32")
    order = np.stack([rng.permutation(12) for _ in range(3)]).astype("int32")
    if not ordered:
        order = np.tile(np.arange(12, dtype="int32"), (3, 1))
    expected = np.full(experts.shape, -1)
    for g in range(3):
        seen = [0] * EXPERTS
        for place in order[g]:
            expert = experts[g, place]
            if expert < EXPERTS:
                expected[g, place] = seen[expert]
                seen[expert] += 1
    found = drop_policies.ranks_within_experts(
        ops.convert_to_tensor(experts),
        EXPERTS,
        ops.convert_to_tensor(order) if ordered else None,
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(found), expected)


# Top-K.


@pytest.mark.parametrize("softmax", functional.SOFTMAX_ORDERS)
@pytest.mark.parametrize("normalize", [True, False], ids=["one", "raw"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.filterwarnings("error::UserWarning")
def test_dropless_top_k_equals_the_oracle(top_k, normalize, softmax):
    chosen, expected = top_k_both(
        random_logits(), top_k=top_k, normalize=normalize, softmax=softmax
    )
    check_against(expected, chosen, LENGTH, EXPERTS)
    assert chosen.ranks is None
    assert chosen.capacity is None


@pytest.mark.parametrize("policy", drop_policies.DROP_POLICIES)
@pytest.mark.parametrize("softmax", functional.SOFTMAX_ORDERS)
@few
@hypothesis.given(
    logits=tied_logits,
    mask=masks,
    normalize=st.booleans(),
    factor=st.sampled_from([0.3, 0.6, 1.1, 4.0]),
)
def test_top_k_with_ties_padding_and_drops_equals_the_oracle(
    policy, softmax, logits, mask, normalize, factor
):
    chosen, expected = top_k_both(
        logits,
        mask,
        top_k=2,
        normalize=normalize,
        softmax=softmax,
        capacity_factor=factor,
        drop_policy=policy,
    )
    check_against(expected, chosen, LENGTH, EXPERTS)


# With the probabilities and logits of `ROWS` no two choices tie by chance.
BIASES = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.5, -0.25, -0.25, 0.125],
        [-3.0, 0.03, 0.0, 0.0],
        [0.0, 0.0, 0.0, 2.5],
    ],
    "float32",
)


@pytest.mark.parametrize("policy", [None, *drop_policies.DROP_POLICIES])
@pytest.mark.parametrize("softmax", functional.SOFTMAX_ORDERS)
@few
@hypothesis.given(
    logits=tied_logits, mask=masks, bias=st.sampled_from(list(BIASES))
)
def test_a_bias_moves_choices_and_no_weights_as_the_oracle_says(
    policy, softmax, logits, mask, bias
):
    settings = {"top_k": 2, "normalize": False, "softmax": softmax}
    if policy:
        settings |= {"capacity_factor": 0.6, "drop_policy": policy}
    chosen, expected = top_k_both(logits, mask, bias=bias, **settings)
    check_against(expected, chosen, LENGTH, EXPERTS)


@pytest.mark.parametrize("softmax", functional.SOFTMAX_ORDERS)
@few
@hypothesis.given(logits=tied_logits, mask=masks)
def test_a_bias_of_0_changes_nothing_bit_for_bit(softmax, logits, mask):
    settings = {"top_k": 2, "softmax": softmax, "capacity_factor": 0.6}
    without, _ = top_k_both(logits, mask, **settings)
    with_it, _ = top_k_both(logits, mask, bias=BIASES[0], **settings)
    for a, b in zip(with_it[:4], without[:4], strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        )


def test_a_bias_decides_who_is_chosen_and_gets_no_gradient():
    logits = random_logits()
    bias = np.array([0.0, 9.0, -9.0, 0.0], "float32")
    cotangent = ops.convert_to_tensor(random_logits(seed=1))

    def scalar(x, b):
        chosen = functional.top_k(x, 2, normalize=False, bias=b)
        matrix = functional.combine_matrix(chosen, LENGTH, EXPERTS)
        return ops.sum(matrix * cotangent), chosen.experts

    _, experts, (of_logits, of_bias) = gradients.pull_back(scalar, logits, bias)
    experts = ops.convert_to_numpy(experts)
    assert (experts[..., 0] == 1).all()
    assert not (experts == 2).any()
    assert of_logits.any()
    assert not of_bias.any()


@few
@hypothesis.given(logits=tied_logits, mask=masks)
def test_every_kept_assignment_has_a_slot_of_its_own(logits, mask):
    chosen, _ = top_k_both(logits, mask, top_k=2, capacity_factor=0.6)
    experts = ops.convert_to_numpy(chosen.experts)
    ranks = ops.convert_to_numpy(chosen.ranks)
    for g in range(GROUPS):
        for e in range(EXPERTS):
            taken = sorted(ranks[g][experts[g] == e])
            assert taken == list(range(len(taken)))
            assert len(taken) <= chosen.capacity


@pytest.mark.parametrize(
    "settings",
    [{}, {"capacity_factor": 0.3}],
    ids=["dropless", "drops"],
)
def test_renormalised_weights_of_top_k_sum_to_one_or_nothing(settings):
    logits = random_logits(scale=4.0)  # small raw sums: an epsilon would show
    chosen, expected = top_k_both(logits, top_k=2, **settings)
    total = ops.convert_to_numpy(functional.token_weights(chosen, LENGTH))
    routed = np.stack([d.processed.any(axis=1) for d in expected])
    np.testing.assert_allclose(total, routed, atol=2e-7)
    if settings:
        assert not routed.all()


def test_renormalising_tiny_weights_has_no_epsilon():
    # Token 1 is left with its second choice alone, whose weight is 1e-7.
    logits = np.array([[[16.0, 0, -9, -9], [16.0, -9, 0, -9]]], "float32")
    chosen, expected = top_k_both(logits, top_k=2, capacity_factor=0.5)
    check_against(expected, chosen, 2, EXPERTS)
    assert expected[0].weights[1].tolist() == [0, 0, 1, 0]
    # Token 0 is left to experts that give it 1e-7 at most.
    logits = np.array([[[16.0, 0, -9, -9], [20.0, 1, -9, -9]]], "float32")
    chosen, expected = expert_choice_both(logits, capacity_factor=1.0)
    check_against(expected, chosen, 2, EXPERTS)
    assert not expected[0].processed[0, 0]


def test_softmax_orders_agree_where_weights_are_renormalised():
    logits = random_logits()
    before, _ = top_k_both(logits, top_k=2, softmax="before_top_k")
    after, _ = top_k_both(logits, top_k=2, softmax="after_top_k")
    np.testing.assert_allclose(
        ops.convert_to_numpy(before.weights),
        ops.convert_to_numpy(after.weights),
        atol=1e-6,
    )


def test_top_k_ties_go_to_the_lowest_expert():
    chosen, _ = top_k_both(np.zeros((1, 3, EXPERTS), "float32"), top_k=3)
    experts = ops.convert_to_numpy(chosen.experts)
    np.testing.assert_array_equal(experts, [[[0, 1, 2]] * 3])


def test_drop_policies_differ_in_who_is_dropped():
    logits = np.array([[[1.0, 0.9], [3.0, 0.0]]], "float32")
    kept = {}
    for policy in drop_policies.DROP_POLICIES:
        chosen, _ = top_k_both(
            logits, top_k=2, capacity_factor=0.5, drop_policy=policy
        )
        kept[policy] = tables(chosen, 2, 2)[1][0].astype(int).tolist()
    assert kept == {
        "position": [[1, 1], [0, 0]],
        "batch_priority": [[0, 0], [1, 1]],
        "probability": [[0, 1], [1, 0]],
    }


# Expert Choice.


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 2.0, 4.0])
@pytest.mark.parametrize("normalize", [True, False], ids=["one", "raw"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_expert_choice_equals_the_oracle(factor, normalize, masked):
    mask = np.arange(LENGTH) < np.array([[5], [8]]) if masked else None
    chosen, expected = expert_choice_both(
        random_logits(),
        mask,
        capacity_factor=factor,
        normalize=normalize,
    )
    check_against(expected, chosen, LENGTH, EXPERTS)


@few
@hypothesis.given(
    logits=tied_logits,
    mask=masks,
    normalize=st.booleans(),
    factor=st.sampled_from([1.0, 2.0]),
)
def test_expert_choice_with_ties_and_padding_equals_the_oracle(
    logits, mask, normalize, factor
):
    chosen, expected = expert_choice_both(
        logits, mask, capacity_factor=factor, normalize=normalize
    )
    check_against(expected, chosen, LENGTH, EXPERTS)


def test_expert_choice_ties_go_to_the_earliest_token():
    logits = ops.zeros((1, 6, 2))
    tokens = ops.convert_to_numpy(functional.expert_choice(logits, 1.0).tokens)
    np.testing.assert_array_equal(tokens, [[[0, 1, 2], [0, 1, 2]]])


def test_renormalised_weights_of_expert_choice_sum_to_one_or_nothing():
    chosen, expected = expert_choice_both(
        random_logits(scale=3.0), capacity_factor=1.0
    )
    total = ops.convert_to_numpy(functional.token_weights(chosen, LENGTH))
    routed = np.stack([d.processed.any(axis=1) for d in expected])
    np.testing.assert_allclose(total, routed, atol=3e-7)
    assert not routed.all()


# Padding.

SETTINGS = {
    "top_k": lambda logits, mask: functional.top_k(logits, 2, mask=mask),
    **{
        f"drops_{policy}": lambda logits, mask, policy=policy: functional.top_k(
            logits, 2, capacity_factor=0.7, drop_policy=policy, mask=mask
        )
        for policy in drop_policies.DROP_POLICIES
    },
    "expert_choice": lambda logits, mask: functional.expert_choice(
        logits, 1.0, mask=mask
    ),
}
every_routing = pytest.mark.parametrize(
    "route", SETTINGS.values(), ids=SETTINGS.keys()
)


def statistics(chosen, length):
    return [
        ops.convert_to_numpy(x)
        for x in (
            functional.combine_matrix(chosen, length, EXPERTS),
            functional.token_weights(chosen, length),
            functional.experts_per_token(chosen, length, EXPERTS),
            functional.expert_load(chosen, EXPERTS),
        )
    ]


@every_routing
def test_values_under_the_padding_change_nothing(route):
    mask = np.arange(LENGTH) < np.array([[5], [7]])
    logits = random_logits()
    other = np.where(mask[..., None], logits, 30.0 * random_logits(seed=9))
    tensor_mask = ops.convert_to_tensor(mask)
    first = statistics(
        route(ops.convert_to_tensor(logits), tensor_mask), LENGTH
    )
    second = statistics(
        route(ops.convert_to_tensor(other), tensor_mask), LENGTH
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@every_routing
def test_more_padding_changes_nothing(route):
    logits = random_logits()
    longer = np.concatenate([logits, 9 + random_logits(seed=9)], axis=1)
    mask = np.arange(2 * LENGTH) < np.array([[LENGTH]] * GROUPS)
    first = statistics(
        route(
            ops.convert_to_tensor(logits),
            ops.ones((GROUPS, LENGTH), "bool"),
        ),
        LENGTH,
    )
    second = statistics(
        route(ops.convert_to_tensor(longer), ops.convert_to_tensor(mask)),
        2 * LENGTH,
    )
    for a, b in zip(first[:3], second[:3], strict=True):
        np.testing.assert_allclose(a, b[:, :LENGTH], atol=1e-6)
        assert not b[:, LENGTH:].any()
    np.testing.assert_array_equal(first[3], second[3])


@every_routing
def test_an_all_real_mask_is_no_mask(route):
    logits = ops.convert_to_tensor(random_logits())
    mask = ops.ones((GROUPS, LENGTH), "bool")
    for a, b in zip(
        statistics(route(logits, mask), LENGTH),
        statistics(route(logits, None), LENGTH),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@every_routing
def test_a_group_of_padding_alone_goes_nowhere(route):
    mask = ops.convert_to_tensor(np.arange(GROUPS)[:, None] * np.ones(LENGTH))
    chosen = route(
        ops.convert_to_tensor(random_logits()), ops.cast(mask, "bool")
    )
    weights, processed = tables(chosen, LENGTH, EXPERTS)
    assert not processed[0].any()
    assert processed[1].any()
    assert np.isfinite(weights).all()


# What a routing says of itself.


@every_routing
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_statistics_equal_counts_by_hand(route, masked):
    mask = np.arange(LENGTH) < np.array([[5], [8]])
    chosen = route(
        ops.convert_to_tensor(random_logits()),
        ops.convert_to_tensor(mask) if masked else None,
    )
    weights, processed = tables(chosen, LENGTH, EXPERTS)
    matrix, total, experts_per_token, load = statistics(chosen, LENGTH)
    np.testing.assert_allclose(matrix, weights, atol=1e-7)
    np.testing.assert_allclose(total, weights.sum(-1), atol=1e-6)
    np.testing.assert_array_equal(experts_per_token, processed.sum(-1))
    np.testing.assert_array_equal(load, processed.sum((0, 1)))


@every_routing
def test_routing_has_the_declared_types(route):
    chosen = route(ops.convert_to_tensor(random_logits()), None)
    names = {
        TokenChoice: {"experts": "int32", "requested": "int32"},
        ExpertChoice: {"tokens": "int32", "active": "bool"},
    }[type(chosen)]
    for name, dtype in {**names, "weights": "float32"}.items():
        found = ops.convert_to_numpy(getattr(chosen, name)).dtype
        assert found == dtype, name


# Gradients.


@every_routing
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_gradient_of_the_weights_is_the_slope_of_the_oracle(route, masked):
    rng = np.random.default_rng(2)
    logits = random_logits()
    mask = np.arange(LENGTH) < np.array([[5], [8]]) if masked else None
    cotangent = rng.normal(size=logits.shape).astype("float32")
    tensor_mask = None if mask is None else ops.convert_to_tensor(mask)

    def scalar(x):
        matrix = functional.combine_matrix(
            route(x, tensor_mask), LENGTH, EXPERTS
        )
        return ops.sum(matrix * ops.convert_to_tensor(cotangent))

    _, _, (found,) = gradients.pull_back(scalar, logits)

    # The decision is constant around here: only the weights move.
    _, processed = tables(
        route(ops.convert_to_tensor(logits), tensor_mask), LENGTH, EXPERTS
    )

    def weights(x):
        raw = np.exp(x) / np.exp(x).sum(-1, keepdims=True) * processed
        total = raw.sum(-1, keepdims=True)
        return raw / np.where(total > 0, total, 1)

    for _ in range(3):
        direction = rng.normal(size=logits.shape)
        slope = reference.slope(
            lambda point: np.sum(weights(point["x"]) * cotangent),
            {"x": logits.astype("float64")},
            {"x": direction},
        )
        np.testing.assert_allclose(
            np.sum(found * direction), slope, rtol=1e-4, atol=1e-5
        )
    if masked:
        assert not found[~mask].any()


@every_routing
def test_unrouted_tokens_have_a_zero_gradient_not_nan(route):
    # Every token wants the same experts, so some go nowhere.
    logits = np.zeros((GROUPS, LENGTH, EXPERTS), "float32")

    def scalar(x):
        return ops.sum(
            ops.square(
                functional.combine_matrix(route(x, None), LENGTH, EXPERTS)
            )
        )

    _, _, (found,) = gradients.pull_back(scalar, logits)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["top_k", "expert_choice"])
def test_tokens_that_hardly_want_their_expert_are_processed_in_full(kind):
    """Probabilities underflow; weights and gradients must not follow."""
    # All want expert 0, which is full before the last two have their turn.
    rows = [[60.0, -40.0, 0.0]] * 4 + [[60.0, 0.0, -40.0]] * 2
    logits = np.array([rows], "float32")

    def run(logits):
        if kind == "top_k":
            chosen = functional.top_k(logits, 2, capacity_factor=0.5)
        else:
            chosen = functional.expert_choice(logits, 2.0)
        weight = ops.arange(1.0, 1.0 + chosen.weights.shape[-1])
        total = functional.token_weights(chosen, 6)
        number = functional.experts_per_token(chosen, 6, 3)
        return ops.sum(weight * chosen.weights), (total, number)

    _, (total, number), (gradient,) = gradients.pull_back(run, logits)
    total, number = (ops.convert_to_numpy(t) for t in (total, number))
    assert (number[0, 4:] > 0).all()
    np.testing.assert_allclose(total, number > 0, atol=1e-6)
    assert np.isfinite(gradient).all()

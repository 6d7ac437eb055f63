import gradients
import keras
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle
from keras_upcycle.routing import functional
from keras_upcycle.routing.expert_choice_router import ExpertChoiceRouter
from keras_upcycle.routing.registry import get_router
from keras_upcycle.routing.router import Router, clone
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import ExpertChoice, TokenChoice

GROUPS, LENGTH, DIM, EXPERTS = 2, 8, 4, 4
MASK = np.arange(LENGTH) < np.array([[5], [7]])


def random_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(GROUPS, LENGTH, DIM)).astype("float32")


def built(router, num_experts=EXPERTS):
    router.num_experts = num_experts
    router.build((None, None, DIM))
    return router


def wide():
    return gradients.normal(1.0)


def logits_of(router, tokens):
    return tokens @ router.kernel.numpy()


# What a router decides.


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
def test_a_masked_input_is_no_reason_to_warn(kind):
    router = built(kind())
    mask = ops.convert_to_tensor(MASK)
    chosen = router(ops.convert_to_tensor(random_tokens()), mask=mask)
    assert all(
        keras.src.backend.get_keras_mask(part) is None for part in chosen
    )


@pytest.mark.parametrize("training", [True, False])
def test_top_k_router_is_dropless_at_inference_alone(training):
    router = built(TopKRouter(capacity_factor=0.5))
    chosen = router(random_tokens(), training=training)
    assert isinstance(chosen, TokenChoice)
    dropped = ops.convert_to_numpy(chosen.experts == EXPERTS)
    assert dropped.any() == training
    assert (chosen.capacity is not None) == training


def test_top_k_router_drops_at_inference_where_asked():
    router = built(TopKRouter(capacity_factor=None, eval_capacity_factor=0.5))
    chosen = router(random_tokens(), training=False)
    assert ops.convert_to_numpy(chosen.experts == EXPERTS).any()
    assert router(random_tokens(), training=True).capacity is None


def test_top_k_router_passes_its_settings_on():
    router = built(
        TopKRouter(
            3,
            False,
            capacity_factor=0.6,
            softmax="after_top_k",
            drop_policy="probability",
            kernel_initializer=wide(),
        )
    )
    tokens = random_tokens()
    found = router(tokens, mask=ops.convert_to_tensor(MASK), training=True)
    expected = functional.top_k(
        ops.matmul(tokens, router.kernel),
        3,
        normalize=False,
        softmax="after_top_k",
        capacity_factor=0.6,
        drop_policy="probability",
        mask=ops.convert_to_tensor(MASK),
    )
    for a, b in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=1e-6
        )


def test_expert_choice_router_passes_its_settings_on():
    router = built(
        ExpertChoiceRouter(1.0, normalize=False, kernel_initializer=wide())
    )
    tokens = random_tokens()
    found = router(tokens, mask=ops.convert_to_tensor(MASK), training=True)
    assert isinstance(found, ExpertChoice)
    expected = functional.expert_choice(
        ops.matmul(tokens, router.kernel),
        1.0,
        normalize=False,
        mask=ops.convert_to_tensor(MASK),
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=1e-6
        )


@pytest.mark.parametrize(
    "policy", ["float32", "bfloat16", "mixed_bfloat16", "mixed_float16"]
)
def test_router_is_float32_under_every_policy(policy):
    router = built(TopKRouter(dtype=policy, kernel_initializer="zeros"))
    assert router.kernel.dtype == "float32"
    # In bfloat16 the two columns are equal, and expert 0 would win.
    columns = np.full((DIM, EXPERTS), 1.0, "float32")
    columns[:, 1] += 2.0**-12
    router.kernel.assign(columns)
    tokens = ops.ones((1, 3, DIM), dtype="bfloat16")
    chosen = router(tokens)
    assert keras.backend.standardize_dtype(chosen.weights.dtype) == "float32"
    best = ops.convert_to_numpy(chosen.experts)[..., 0]
    np.testing.assert_array_equal(best, [[1, 1, 1]])


def test_router_is_float32_under_a_global_policy():
    keras.config.set_dtype_policy("bfloat16")
    try:
        assert built(ExpertChoiceRouter()).kernel.dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


# Noise.


def experts_chosen(router, training):
    chosen = router(random_tokens(), training=training)
    return ops.convert_to_numpy(chosen.experts)


def test_noise_changes_choices_in_training_only():
    def router():
        return built(
            TopKRouter(
                capacity_factor=None,
                noise_stddev=5.0,
                kernel_initializer=keras.initializers.RandomNormal(seed=1),
                seed=3,
            )
        )

    noisy = router()
    quiet = experts_chosen(noisy, False)
    np.testing.assert_array_equal(quiet, experts_chosen(noisy, False))
    first, second = experts_chosen(noisy, True), experts_chosen(noisy, True)
    assert (first != quiet).any()
    assert (first != second).any()
    # The same seed gives the same noise.
    np.testing.assert_array_equal(first, experts_chosen(router(), True))


def test_a_router_without_noise_holds_no_random_state():
    assert not hasattr(built(TopKRouter()), "noise_seed")
    assert len(built(TopKRouter()).variables) == 1


# Losses.


STDDEV = 0.5


def softmax(logits):
    powers = np.exp(logits.astype("float64"))
    return powers / powers.sum(axis=-1, keepdims=True)


# By name: the argument, and the oracle's value from the logits before and
# after noise. Choices before any is dropped enter the losses.
TOP_K_LOSSES = {
    "load_balance": (
        "load_balance_loss",
        lambda x, noisy, mask: reference.load_balance(noisy, 2, mask),
    ),
    "z_loss": ("z_loss", lambda x, noisy, mask: reference.z_loss(x, mask)),
    "importance": (
        "importance_loss",
        lambda x, noisy, mask: reference.importance(softmax(x), mask),
    ),
    "load": (
        "load_loss",
        lambda x, noisy, mask: reference.load(x, noisy, STDDEV, 2, mask),
    ),
    "mutual_information": (
        "mutual_information_loss",
        lambda x, noisy, mask: reference.mutual_information(softmax(x), mask),
    ),
}
WEIGHTS = {
    argument: 0.1 * n
    for n, (argument, _) in enumerate(TOP_K_LOSSES.values(), start=2)
}


def noisy_router(**settings):
    return built(
        TopKRouter(
            **{
                "load_balance_loss": 0.0,
                "capacity_factor": 0.5,
                "noise_stddev": STDDEV,
                "seed": 3,
                "kernel_initializer": wide(),
                **settings,
            }
        )
    )


def first_noise():
    draws = keras.random.SeedGenerator(3)
    shape = (GROUPS, LENGTH, EXPERTS)
    return STDDEV * ops.convert_to_numpy(keras.random.normal(shape, seed=draws))


@pytest.mark.thinned
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("names", [*([n] for n in TOP_K_LOSSES), TOP_K_LOSSES])
def test_losses_equal_the_reference_times_their_weights(names, mask):
    arguments = [TOP_K_LOSSES[name][0] for name in names]
    router = noisy_router(**{name: WEIGHTS[name] for name in arguments})
    known = router.losses_by_name()
    assert set(known) == set(names)
    tokens = random_tokens()
    router(
        tokens,
        mask=None if mask is None else ops.convert_to_tensor(mask),
        training=True,
    )
    assert len(router.losses) == len(names)
    logits = logits_of(router, tokens)
    noisy = logits + first_noise()
    expected = 0.0
    for name in names:
        argument, oracle = TOP_K_LOSSES[name]
        assert known[name] == WEIGHTS[argument]
        expected += WEIGHTS[argument] * oracle(logits, noisy, mask)
    total = sum(float(loss) for loss in router.losses)
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("filler", [np.nan, np.inf], ids=str)
def test_padding_may_hold_anything(filler):
    mask = ops.convert_to_tensor(MASK)
    found = []
    for value in (0.5, filler):
        router = noisy_router(**WEIGHTS, bias_update_rate=0.125)
        tokens = np.where(MASK[..., None], random_tokens(), np.float32(value))
        chosen = router(tokens, mask=mask, training=True)
        losses = [float(loss) for loss in router.losses]
        found.append((*chosen[:3], losses, router.bias.numpy()))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        )


@pytest.mark.parametrize("name", TOP_K_LOSSES)
def test_each_loss_moves_the_kernel_as_the_reference_says(name):
    argument, oracle = TOP_K_LOSSES[name]
    router = noisy_router(**{argument: 1.0})
    tokens, noise = random_tokens(), first_noise()
    mask = ops.convert_to_tensor(MASK)
    _, found = gradients.of_layer(router, tokens, mask=mask, training=True)

    def loss(kernel):
        logits = tokens @ kernel
        return oracle(logits, logits + noise, MASK)

    expected = reference.gradient(loss, router.kernel.numpy())
    np.testing.assert_allclose(
        found["kernel"], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    "router",
    [
        lambda: TopKRouter(noise_stddev=STDDEV, **WEIGHTS),
        lambda: ExpertChoiceRouter(z_loss=1.0),
    ],
    ids=["top_k", "expert_choice"],
)
@pytest.mark.parametrize("training", [False, None])
def test_no_loss_outside_training(router, training):
    router = built(router())
    router(random_tokens(), training=training)
    assert router.losses == []


@pytest.mark.parametrize(
    ("router", "count"),
    [
        (lambda: TopKRouter(load_balance_loss=0.0), 0),
        (lambda: TopKRouter(), 1),
        (lambda: TopKRouter(z_loss=0.1), 2),
        (lambda: ExpertChoiceRouter(), 0),
        (lambda: ExpertChoiceRouter(z_loss=0.1), 1),
    ],
    ids=["none", "default", "both", "expert_choice", "expert_choice_z"],
)
def test_a_loss_of_weight_zero_is_left_out(router, count):
    router = built(router())
    router(random_tokens(), training=True)
    assert len(router.losses) == count


def test_expert_choice_router_z_loss_equals_the_reference():
    router = built(ExpertChoiceRouter(z_loss=0.5, kernel_initializer=wide()))
    tokens = random_tokens()
    router(tokens, mask=ops.convert_to_tensor(MASK), training=True)
    expected = 0.5 * reference.z_loss(logits_of(router, tokens), MASK)
    assert float(router.losses[0]) == pytest.approx(expected, rel=1e-4)


# Settings.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "at least 1.*top_k=0"),
        ({"top_k": 1.5}, TypeError, "must be an integer.*top_k=1.5"),
        (
            {"capacity_factor": 0},
            ValueError,
            "must be positive.*capacity_factor=0.*`None` for dropless",
        ),
        (
            {"eval_capacity_factor": -1.0},
            ValueError,
            "must be positive.*eval_capacity_factor=-1.0.*`None`",
        ),
        (
            {"capacity_factor": "2"},
            TypeError,
            "must be a number.*capacity_factor='2'",
        ),
        (
            {"load_balance_loss": -0.1},
            ValueError,
            "at least 0.0.*load_balance_loss=-0.1",
        ),
        ({"z_loss": -1}, ValueError, "at least 0.0.*z_loss=-1"),
        ({"noise_stddev": -2}, ValueError, "at least 0.0.*noise_stddev=-2"),
        (
            {"importance_loss": -0.5},
            ValueError,
            "at least 0.0.*importance_loss=-0.5",
        ),
        (
            {"load_loss": "0.1"},
            TypeError,
            "must be a number.*load_loss='0.1'",
        ),
        (
            {"load_loss": 0.1},
            ValueError,
            r"needs `noise_stddev > 0`.*load_loss=0.1, noise_stddev=0.0\. Set",
        ),
        (
            {"mutual_information_loss": float("inf")},
            ValueError,
            "finite.*mutual_information_loss=inf",
        ),
        (
            {"bias_update_rate": -0.001},
            ValueError,
            "at least 0.0.*bias_update_rate=-0.001",
        ),
        (
            {"softmax": "first"},
            ValueError,
            r"one of \['before_top_k', 'after_top_k'\].*softmax='first'",
        ),
        (
            {"drop_policy": "fifo"},
            ValueError,
            r"one of \['position', 'batch_priority', 'probability'\].*'fifo'",
        ),
        (
            {"group": "token"},
            ValueError,
            r"one of \['example', 'batch'\].*group='token'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_top_k_router_names_the_setting_and_its_value(settings, error, message):
    with pytest.raises(error, match=message):
        TopKRouter(**settings)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"capacity_factor": 0.0},
            ValueError,
            "must be positive.*capacity_factor=0.0",
        ),
        (
            {"capacity_factor": None},
            TypeError,
            "must be a number.*capacity_factor=None",
        ),
        ({"group": "all"}, ValueError, "one of.*'batch'.*group='all'"),
        ({"z_loss": "no"}, TypeError, "must be a number.*z_loss='no'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_expert_choice_router_names_the_setting_and_its_value(
    settings, error, message
):
    with pytest.raises(error, match=message):
        ExpertChoiceRouter(**settings)


@pytest.mark.one_backend
def test_top_k_larger_than_num_experts_is_found_when_they_meet():
    message = "top_k=5, num_experts=4. Lower `top_k` or add experts"
    with pytest.raises(ValueError, match=message):
        TopKRouter(5).check(4)
    TopKRouter(4).check(4)
    ExpertChoiceRouter(9.0).check(4)


@pytest.mark.one_backend
def test_a_router_must_know_its_experts_before_it_is_built():
    router = TopKRouter(name="scout")
    message = "router 'scout' with num_experts=None. Put it into a `MoEFeed"
    with pytest.raises(ValueError, match=message):
        router.build((None, None, DIM))


@pytest.mark.one_backend
def test_a_router_of_ones_own_is_told_what_to_define():
    router = built(type("Mine", (Router,), {})(group="batch"))
    with pytest.raises(NotImplementedError, match="Mine must define `choose"):
        router(random_tokens())
    message = r"define `average_experts_per_token\(num_experts, length=None\)"
    with pytest.raises(NotImplementedError, match=message):
        router.average_experts_per_token(4)
    router.check(1)


@pytest.mark.one_backend
def test_get_takes_names_routers_and_configs():
    assert isinstance(get_router("top_k"), TopKRouter)
    assert isinstance(get_router("expert_choice"), ExpertChoiceRouter)
    router = TopKRouter(1, normalize=False)
    assert get_router(router) is router
    config = keras.saving.serialize_keras_object(TopKRouter(3, z_loss=0.5))
    again = get_router(config)
    assert (again.top_k, again.z_loss) == (3, 0.5)


@pytest.mark.one_backend
def test_get_lists_the_known_routers():
    message = r"one of \[.*'top_k'\].*router='topk'"
    with pytest.raises(ValueError, match=message):
        get_router("topk")
    with pytest.raises(TypeError, match="router=3 of type int"):
        get_router(3)
    dense = keras.saving.serialize_keras_object(keras.layers.Dense(2))
    with pytest.raises(TypeError, match=r"one of.*Dense.* of type dict"):
        get_router(dense)


FULL_TOP_K = {
    "batches_per_step": 4,
    "top_k": 3,
    "normalize": False,
    "capacity_factor": 2.5,
    "eval_capacity_factor": 3.5,
    "load_balance_loss": 0.5,
    "z_loss": 0.25,
    "importance_loss": 0.75,
    "load_loss": 0.0625,
    "mutual_information_loss": 0.375,
    "bias_update_rate": 0.001,
    "softmax": "after_top_k",
    "noise_stddev": 0.125,
    "temperature": 2.5,
    "drop_policy": "probability",
    "router_gradient": "dense_mixer",
    "balance_over": "step",
    "group": "example",
    "seed": 7,
    "kernel_initializer": "he_normal",
    "use_bias": True,
    "name": "scout",
    "trainable": False,
}
FULL_EXPERT_CHOICE = {
    "capacity_factor": 1.5,
    "eval_capacity_factor": 0.75,
    "noise_stddev": 0.125,
    "temperature": 2.5,
    "batches_per_step": 4,
    "seed": 7,
    "group": 3,
    "normalize": False,
    "z_loss": 0.25,
    "kernel_initializer": "he_normal",
    "use_bias": True,
    "name": "scout",
    "trainable": False,
}
# Neither goes with the other.
APART = {"load_loss", "expert_groups", "router_gradient"}
FULL_GROUPS = {
    **{k: v for k, v in FULL_TOP_K.items() if k not in APART},
    "expert_groups": (0, 0, 1, 2, 1, 3),
}
full_routers = pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TopKRouter, FULL_TOP_K),
        (TopKRouter, FULL_GROUPS),
        (ExpertChoiceRouter, FULL_EXPERT_CHOICE),
    ],
    ids=["top_k", "groups", "expert_choice"],
)


@pytest.mark.one_backend
@full_routers
def test_config_holds_every_argument(kind, settings):
    config = kind(**settings).get_config()
    assert set(settings) <= set(config)
    apart = set(config) - set(settings)
    assert apart < APART
    for name, value in settings.items():
        if name != "kernel_initializer":
            assert config[name] == value, name
    assert config["kernel_initializer"]["class_name"] == "HeNormal"
    defaults = kind().get_config()
    equal = {name for name in config if config[name] == defaults[name]}
    assert equal == apart


@pytest.mark.one_backend
@full_routers
def test_config_round_trip_is_complete(kind, settings):
    router = kind(**settings)
    config = router.get_config()
    assert kind.from_config(config).get_config() == config
    serialized = keras.saving.serialize_keras_object(router)
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is kind
    assert again.get_config() == config


@full_routers
def test_clone_has_the_settings_but_not_the_weights(kind, settings):
    router = built(kind(**settings))
    copy = clone(router)
    assert copy is not router
    assert copy.num_experts is None
    mine, its = router.get_config(), copy.get_config()
    mine.pop("kernel_initializer")
    its.pop("kernel_initializer")
    assert mine == its


def test_a_clone_keeps_a_function_that_initialises():
    def ones(shape, dtype=None):
        return keras.ops.ones(shape, dtype)

    router = TopKRouter(2, kernel_initializer=ones)
    assert clone(router, seed=1).kernel_initializer is ones


def test_clones_draw_kernels_of_their_own_by_seed():
    router = TopKRouter()
    kernels = [built(clone(router, seed)).kernel.numpy() for seed in (1, 2, 1)]
    assert (kernels[0] != kernels[1]).all()
    np.testing.assert_array_equal(kernels[0], kernels[2])
    constant = TopKRouter(kernel_initializer="zeros")
    assert not built(clone(constant, 5)).kernel.numpy().any()


def test_default_kernel_is_small_and_not_zero():
    kernel = built(TopKRouter(), num_experts=500).kernel.numpy()
    assert kernel.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("router", "num_experts", "average"),
    [
        (lambda: TopKRouter(2), 8, 2),
        (lambda: TopKRouter(2, capacity_factor=None), 8, 2),
        (lambda: TopKRouter(2, capacity_factor=0.5), 8, 1),
        (lambda: ExpertChoiceRouter(2.0), 8, 2),
        (lambda: ExpertChoiceRouter(2.0), 1, 1),
    ],
    ids=["roomy", "dropless", "tight", "expert_choice", "one_expert"],
)
def test_average_experts_per_token(router, num_experts, average):
    assert router().average_experts_per_token(num_experts) == average


# Balance without a loss.


def biased(**settings):
    router = TopKRouter(
        bias_update_rate=0.125,
        load_balance_loss=0.0,
        kernel_initializer=wide(),
        **settings,
    )
    return built(router)


def expected_decisions(router, tokens, bias, mask=None):
    """The oracle's decisions, which no rounding can change."""
    logits = logits_of(router, tokens).astype("float64")
    scores = softmax(logits)
    if router.softmax == "after_top_k":
        scores = logits
    ordered = np.sort(scores + bias, axis=-1)
    gaps = ordered[..., -router.top_k] - ordered[..., -router.top_k - 1]
    assert gaps.min() > 1e-5
    return [
        reference.top_k(
            logits[g],
            router.top_k,
            softmax_order=router.softmax,
            mask=None if mask is None else mask[g],
            bias=bias,
        )
        for g in range(len(tokens))
    ]


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("order", functional.SOFTMAX_ORDERS)
@pytest.mark.parametrize("factor", [None, 0.5], ids=["dropless", "drops"])
def test_the_bias_moves_as_the_reference_says(order, factor, mask):
    router = biased(softmax=order, capacity_factor=factor)
    bias = np.zeros(EXPERTS)
    seen = []
    for seed in range(4):
        tokens = random_tokens(seed)
        decisions = expected_decisions(router, tokens, bias, mask)
        chosen = router(
            tokens,
            mask=None if mask is None else ops.convert_to_tensor(mask),
            training=True,
        )
        requested = ops.convert_to_numpy(chosen.requested)
        for g, decision in enumerate(decisions):
            for s, row in enumerate(requested[g]):
                real = set(row[row < EXPERTS])
                assert real == set(np.flatnonzero(decision.requested[s]))
        bias = reference.moved_bias(bias, decisions, 0.125)
        np.testing.assert_allclose(router.bias.numpy(), bias, atol=1e-6)
        seen.append(tuple(bias))
    assert len(set(seen)) > 2
    assert router.losses == []


def test_equal_loads_leave_the_bias_alone():
    # 21 times a float32 seventh is not 3: a mean so rounded would move it.
    assert np.float32(21) * (np.float32(1) / np.float32(7)) != 3
    router = TopKRouter(
        1, False, bias_update_rate=0.125, kernel_initializer="zeros"
    )
    router.num_experts = 7
    router.build((None, None, 7))
    router.kernel.assign(np.eye(7, dtype="float32"))
    tokens = np.eye(7, dtype="float32")[None].repeat(3, axis=1)
    router(tokens, training=True)
    assert not router.bias.numpy().any()
    router(tokens[:, 1:], training=True)
    np.testing.assert_allclose(
        router.bias.numpy(), [0.125] + [-0.125] * 6, atol=1e-7
    )


def test_padding_alone_leaves_the_bias_alone():
    router = biased()
    mask = ops.convert_to_tensor(np.zeros_like(MASK))
    router(random_tokens(), mask=mask, training=True)
    assert not router.bias.numpy().any()


@pytest.mark.parametrize("training", [False, None])
def test_inference_uses_the_bias_and_leaves_it(training):
    router = biased()
    bias = np.array([-9.0, 9.0, 0.0, 0.0], "float32")
    router.bias.assign(bias)
    experts = ops.convert_to_numpy(
        router(random_tokens(), training=training).experts
    )
    assert (experts[..., 0] == 1).all()
    assert not (experts == 0).any()
    np.testing.assert_array_equal(router.bias.numpy(), bias)


def test_a_frozen_router_keeps_its_bias():
    router = biased()
    router.trainable = False
    router(random_tokens(), training=True)
    assert not router.bias.numpy().any()
    router.trainable = True
    router(random_tokens(), training=True)
    assert router.bias.numpy().any()


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16"])
def test_the_bias_is_a_float32_weight_that_is_not_trained(policy):
    router = biased(dtype=policy)
    assert router.bias.dtype == "float32"
    assert [v.name for v in router.trainable_variables] == ["kernel"]
    assert router.count_params() == DIM * EXPERTS + EXPERTS
    router.trainable = False
    router.trainable = True
    assert [v.name for v in router.trainable_variables] == ["kernel"]
    assert built(TopKRouter()).bias is None


def test_the_first_routing_with_a_bias_is_the_one_without():
    tokens = random_tokens()
    for training in (False, True):
        plain = built(TopKRouter(kernel_initializer=wide()))
        found = biased()(tokens, training=training)
        expected = plain(tokens, training=training)
        for a, b in zip(found[:4], expected[:4], strict=True):
            if b is not None:
                np.testing.assert_array_equal(
                    ops.convert_to_numpy(a), ops.convert_to_numpy(b)
                )


def test_router_gradient_reaches_its_kernel_through_the_losses_alone():
    router = built(TopKRouter(z_loss=1.0, kernel_initializer=wide()))
    tokens = random_tokens()

    _, found = gradients.of_layer(router, tokens, training=True)
    found = found["kernel"]
    direction = np.random.default_rng(4).normal(size=found.shape)

    def oracle(point):
        logits = tokens @ point["kernel"]
        return 0.01 * reference.load_balance(logits, 2) + reference.z_loss(
            logits
        )

    slope = reference.slope(
        oracle,
        {"kernel": router.kernel.numpy().astype("float64")},
        {"kernel": direction},
    )
    assert np.sum(found * direction) == pytest.approx(slope, rel=1e-3)


# Top-1 with weights that are always 1.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softmax": "after_top_k"},
        {"normalize": False, "softmax": "after_top_k"},
    ],
)
def test_top_1_without_a_gradient_is_said_once(settings, recwarn):
    with pytest.warns(UserWarning, match="no gradient.*`normalize=False`"):
        router = TopKRouter(1, **settings)
    recwarn.clear()
    clone(router)
    TopKRouter.from_config(router.get_config())
    keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(router)
    )
    dense = keras.Sequential(
        [
            keras.Input((DIM,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(DIM),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(DIM),
        ]
    )
    moe = keras_upcycle.upcycle_model(dense, 2, router=router, layers=[0, 1])
    moe.get_config()
    keras.models.clone_model(moe)
    told = [w for w in recwarn if "top_k=1" in str(w.message)]
    assert not told


@pytest.mark.one_backend
def test_top_1_warns_where_it_was_made():
    with pytest.warns(UserWarning, match="DefaultMoERouter") as told:
        TopKRouter(1)
    assert told[0].filename == __file__


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": False},
        {"mutual_information_loss": 0.01},
        {"trainable": False},
        {"top_k": 2},
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_top_1_is_silent_where_the_router_learns_or_is_not_to(settings):
    TopKRouter(**{"top_k": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"normalize": True}, False),
        ({"normalize": False}, True),
        ({"normalize": False, "softmax": "after_top_k"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:top_k=1")
def test_the_gradient_is_as_the_warning_says(settings, learns):
    router = TopKRouter(1, load_balance_loss=0.0, **settings)
    layer = keras_upcycle.MoEFeedForward(EXPERTS, 6, router)
    layer.build((None, None, DIM))
    logits = np.random.default_rng(0).normal(size=(1, 5, EXPERTS))

    def scalar(logits):
        weights = router.choose(logits, None, True).weights
        # torch asks for a way from the logits, be it of gradient 0.
        return ops.sum(weights) + 0.0 * ops.sum(logits)

    _, _, (found,) = gradients.pull_back(scalar, logits.astype("float32"))
    assert (np.abs(found).max() > 1e-3) == learns
    assert router.learns_from_task == learns


# Expert Choice's noise, and its capacity at inference.


def test_expert_choice_noise_moves_choice_and_weights_in_training_alone():
    noisy = built(ExpertChoiceRouter(1.0, noise_stddev=0.5, seed=3))
    twin = built(ExpertChoiceRouter(1.0, noise_stddev=0.5, seed=3))
    logits = np.random.default_rng(0).normal(size=(2, 8, EXPERTS))
    logits = logits.astype("float32")
    noise = twin.noisy(ops.zeros(logits.shape), True)
    noise = ops.convert_to_numpy(noise)
    assert 0.2 < noise.std() < 0.8
    for training, seen in ((True, logits + noise), (False, logits)):
        chosen = noisy.choose(ops.convert_to_tensor(logits), None, training)
        found = functional.combine_matrix(chosen, 8, EXPERTS)
        for g in range(2):
            expected = reference.expert_choice(seen[g], 1.0).weights
            np.testing.assert_allclose(
                ops.convert_to_numpy(found)[g], expected, atol=1e-6
            )
    again = noisy.choose(ops.convert_to_tensor(logits), None, True)
    differs = ops.convert_to_numpy(again.weights != chosen.weights)
    assert differs.any()  # each call has its own noise


def test_expert_choice_noise_comes_before_the_gradient():
    settings = {"noise_stddev": 0.5, "seed": 3}
    router = built(ExpertChoiceRouter(2.0, **settings))
    twin = built(ExpertChoiceRouter(2.0, **settings))
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 6, EXPERTS)).astype("float32")
    cotangent = rng.normal(size=(6, EXPERTS))
    noise = ops.convert_to_numpy(twin.noisy(ops.zeros(logits.shape), True))
    times = ops.convert_to_tensor(cotangent.astype("float32"))

    def scalar(logits):
        chosen = router.choose(logits, None, True)
        matrix = functional.combine_matrix(chosen, 6, EXPERTS)
        return ops.sum(matrix[0] * times)

    with keras.StatelessScope():
        _, _, (found,) = gradients.pull_back(scalar, logits)
    expected = reference.gradient(
        lambda z: np.sum(reference.expert_choice(z, 2.0).weights * cotangent),
        (logits + noise)[0].astype("float64"),
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize(("factor", "slots"), [(None, 4), (1.0, 2), (4.0, 8)])
def test_expert_choice_capacity_at_inference(factor, slots):
    router = built(ExpertChoiceRouter(2.0, eval_capacity_factor=factor))
    logits = ops.convert_to_tensor(
        np.random.default_rng(0).normal(size=(2, 8, EXPERTS)).astype("float32")
    )
    assert router.choose(logits, None, True).tokens.shape[-1] == 4
    assert router.choose(logits, None, False).tokens.shape[-1] == slots


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"eval_capacity_factor": 0}, ValueError, "eval_capacity_factor=0"),
        ({"eval_capacity_factor": "1"}, TypeError, "eval_capacity_factor='1'"),
        ({"noise_stddev": -0.1}, ValueError, "noise_stddev=-0.1"),
        ({"noise_stddev": float("inf")}, ValueError, "noise_stddev=inf"),
    ],
)
def test_expert_choice_refuses(settings, kind, message):
    with pytest.raises(kind, match=message):
        ExpertChoiceRouter(**settings)


def test_expert_choice_noise_goes_on_in_a_file(tmp_path):
    inputs = keras.Input((8, DIM))
    router = ExpertChoiceRouter(1.0, noise_stddev=1.0, seed=3)
    layer = keras_upcycle.MoEFeedForward(EXPERTS, 6, router, name="moe")
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).normal(size=(2, 8, DIM)).astype("float32")
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    outputs = [
        gradients.as_float(each(x, training=True)) for each in (model, again)
    ]
    np.testing.assert_array_equal(*outputs)

import gradients
import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_upcycle import routers, routing
from keras_upcycle.routers import ExpertChoiceRouter, Router, TopKRouter
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
    expected = routing.top_k(
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
    expected = routing.expert_choice(
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


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_losses_equal_the_reference_times_their_weights(masked):
    router = built(
        TopKRouter(
            load_balance_loss=0.3,
            z_loss=0.7,
            capacity_factor=0.5,
            kernel_initializer=wide(),
        )
    )
    tokens = random_tokens()
    mask = MASK if masked else None
    router(
        tokens,
        mask=ops.convert_to_tensor(mask) if masked else None,
        training=True,
    )
    logits = logits_of(router, tokens)
    # Choices before any is dropped enter the loss.
    expected = 0.3 * reference.load_balance(logits, 2, mask)
    expected += 0.7 * reference.z_loss(logits, mask)
    assert len(router.losses) == 2
    total = sum(float(loss) for loss in router.losses)
    assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "router",
    [
        lambda: TopKRouter(load_balance_loss=1.0, z_loss=1.0),
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


def test_top_k_larger_than_num_experts_is_found_when_they_meet():
    message = "top_k=5, num_experts=4. Lower `top_k` or add experts"
    with pytest.raises(ValueError, match=message):
        TopKRouter(5).check(4)
    TopKRouter(4).check(4)
    ExpertChoiceRouter(9.0).check(4)


def test_a_router_must_know_its_experts_before_it_is_built():
    router = TopKRouter(name="scout")
    message = "router 'scout' with num_experts=None. Put it into a `MoEFeed"
    with pytest.raises(ValueError, match=message):
        router.build((None, None, DIM))


def test_a_router_of_ones_own_is_told_what_to_define():
    router = built(type("Mine", (Router,), {})(group="batch"))
    with pytest.raises(NotImplementedError, match="Mine must define `choose"):
        router(random_tokens())
    message = r"define `average_experts_per_token\(num_experts, length=None\)"
    with pytest.raises(NotImplementedError, match=message):
        router.average_experts_per_token(4)
    router.check(1)


def test_get_takes_names_routers_and_configs():
    assert isinstance(routers.get("top_k"), TopKRouter)
    assert isinstance(routers.get("expert_choice"), ExpertChoiceRouter)
    router = TopKRouter(1)
    assert routers.get(router) is router
    config = keras.saving.serialize_keras_object(TopKRouter(3, z_loss=0.5))
    again = routers.get(config)
    assert (again.top_k, again.z_loss) == (3, 0.5)


def test_get_lists_the_known_routers():
    message = r"one of \['expert_choice', 'top_k'\].*router='topk'"
    with pytest.raises(ValueError, match=message):
        routers.get("topk")
    with pytest.raises(TypeError, match="router=3 of type int"):
        routers.get(3)
    dense = keras.saving.serialize_keras_object(keras.layers.Dense(2))
    with pytest.raises(TypeError, match=r"one of.*Dense.* of type dict"):
        routers.get(dense)


FULL_TOP_K = {
    "top_k": 3,
    "normalize": False,
    "capacity_factor": 2.5,
    "eval_capacity_factor": 3.5,
    "load_balance_loss": 0.5,
    "z_loss": 0.25,
    "softmax": "after_top_k",
    "noise_stddev": 0.125,
    "drop_policy": "probability",
    "group": "example",
    "seed": 7,
    "kernel_initializer": "he_normal",
    "name": "scout",
    "trainable": False,
}
FULL_EXPERT_CHOICE = {
    "capacity_factor": 1.5,
    "group": "batch",
    "normalize": False,
    "z_loss": 0.25,
    "kernel_initializer": "he_normal",
    "name": "scout",
    "trainable": False,
}
full_routers = pytest.mark.parametrize(
    ("kind", "settings"),
    [(TopKRouter, FULL_TOP_K), (ExpertChoiceRouter, FULL_EXPERT_CHOICE)],
    ids=["top_k", "expert_choice"],
)


@full_routers
def test_config_holds_every_argument(kind, settings):
    config = kind(**settings).get_config()
    assert set(config) == set(settings)
    for name, value in settings.items():
        if name != "kernel_initializer":
            assert config[name] == value, name
    assert config["kernel_initializer"]["class_name"] == "HeNormal"
    defaults = kind().get_config()
    assert not [name for name in config if config[name] == defaults[name]]


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
    copy = routers.clone(router)
    assert copy is not router
    assert copy.num_experts is None
    mine, its = router.get_config(), copy.get_config()
    mine.pop("kernel_initializer")
    its.pop("kernel_initializer")
    assert mine == its


def test_clones_draw_kernels_of_their_own_by_seed():
    router = TopKRouter()
    kernels = [
        built(routers.clone(router, seed)).kernel.numpy() for seed in (1, 2, 1)
    ]
    assert (kernels[0] != kernels[1]).all()
    np.testing.assert_array_equal(kernels[0], kernels[2])
    constant = TopKRouter(kernel_initializer="zeros")
    assert not built(routers.clone(constant, 5)).kernel.numpy().any()


def test_default_kernel_is_small_and_not_zero():
    kernel = built(TopKRouter(), num_experts=500).kernel.numpy()
    assert kernel.std() == pytest.approx(0.02, rel=0.1)


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

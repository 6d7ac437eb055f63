"""DS-MoE against its equations, token by token.

Golden values and the list of what to test: Pan et al., arXiv 2404.05567,
equations 1 to 5.
"""

import math

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops
from routing_tables import tables

import keras_upcycle as ku
from keras_upcycle.conversion import plan
from keras_upcycle.layers import dispatch
from keras_upcycle.methods.ds_moe import SELECTIONS
from keras_upcycle.routing.registry import get_router
from keras_upcycle.routing.router import clone

GROUPS, LENGTH, DIM, HIDDEN, EXPERTS = 2, 8, 4, 6, 4
MASK = np.arange(LENGTH) < np.array([[5], [7]])
masked = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])

SETTINGS = {
    "all": {},
    "top_k": {"top_k": 2},
    "threshold": {"threshold": 0.9},
    "threshold_above_1": {"selection": "threshold", "threshold": 1.9},
    "batch_threshold": {"threshold": 0.9},
}
selections = pytest.mark.parametrize("name", SETTINGS)


def settings_of(name):
    return {"selection": name, **SETTINGS[name]}


def tensor(array):
    return None if array is None else ops.convert_to_tensor(array)


def random_logits(seed=0, num_experts=EXPERTS):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(GROUPS, LENGTH, num_experts)).astype("float32")


def router_of(num_experts=EXPERTS, dim=DIM, **settings):
    settings.setdefault("kernel_initializer", gradients.normal(1.0))
    router = ku.DSMoERouter(**settings)
    router.num_experts = num_experts
    router.build((None, None, dim))
    return router


def layer_of(dispatch="auto", **settings):
    settings.setdefault("kernel_initializer", gradients.normal(1.0))
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router=ku.DSMoERouter(**settings),
        dispatch=dispatch,
        kernel_initializer=gradients.normal(0.5),
        bias_initializer=gradients.normal(0.5, seed=1),
    )
    layer.build((None, None, DIM))
    return layer


# What is chosen.


@masked
@pytest.mark.parametrize("normalize", [False, True])
@selections
def test_the_choice_at_inference_is_the_references(name, normalize, mask):
    router = ku.DSMoERouter(**settings_of(name), normalize=normalize)
    logits = random_logits()
    chosen = router.choose(tensor(logits), tensor(mask), training=False)
    weights, processed = tables(chosen, LENGTH, EXPERTS)
    expected = reference.ds_moe(
        logits, **settings_of(name), normalize=normalize, mask=mask
    )
    for g, decision in enumerate(expected):
        np.testing.assert_array_equal(processed[g], decision.processed)
        np.testing.assert_allclose(weights[g], decision.weights, atol=1e-6)
    real = np.ones_like(MASK) if mask is None else mask
    assert (processed.any(-1) == real).all()
    if name != "all":
        assert processed[real].sum() < real.sum() * EXPERTS


@masked
@selections
def test_training_meets_all_experts_with_their_probabilities(name, mask):
    router = router_of(**settings_of(name), normalize=True)
    chosen = router.choose(tensor(random_logits()), tensor(mask), training=True)
    assert chosen.capacity is None
    assert not chosen.partial
    weights, processed = tables(chosen, LENGTH, EXPERTS)
    expected = reference.ds_moe(random_logits(), "all", mask=mask)
    for g, decision in enumerate(expected):
        np.testing.assert_array_equal(processed[g], decision.processed)
        np.testing.assert_allclose(weights[g], decision.weights, atol=1e-6)
    num_tokens = GROUPS * LENGTH * 100
    assert dispatch.choose(chosen, num_tokens, EXPERTS, True) == "dense"


def rows_with(*probabilities):
    """Logits `(1, S, 4)` of these probabilities."""
    return np.log(np.array([probabilities], "float32"))


SURE, PAIR, EVEN = (
    (0.97, 0.01, 0.01, 0.01),
    (0.46, 0.44, 0.05, 0.05),
    (0.26, 0.25, 0.25, 0.24),
)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("rows", "mask", "count"),
    [
        ((SURE, PAIR), None, 2),  # 1 and 2: 1.5, halves up
        ((SURE, SURE, PAIR), None, 1),
        ((SURE, PAIR, EVEN), None, 2),  # 1, 2 and 4: 2.33
        ((SURE, EVEN, EVEN), None, 3),
        ((SURE, PAIR, EVEN), [[True, True, False]], 2),
        ((SURE, EVEN, EVEN), [[True, False, False]], 1),
        ((EVEN, EVEN), [[False, False]], 0),
    ],
)
def test_batch_threshold_takes_the_rounded_mean(rows, mask, count):
    router = ku.DSMoERouter("batch_threshold", threshold=0.9)
    mask = None if mask is None else np.array(mask)
    chosen = router.choose(tensor(rows_with(*rows)), tensor(mask), False)
    _, processed = tables(chosen, len(rows), 4)
    real = np.ones(len(rows), bool) if mask is None else mask[0]
    assert (processed[0].sum(-1) == np.where(real, count, 0)).all()


def test_the_threshold_is_on_n_times_the_probability():
    router = ku.DSMoERouter("threshold", threshold=0.97)
    logits = rows_with(SURE, PAIR, EVEN)
    _, processed = tables(router.choose(tensor(logits), None, False), 3, 4)
    assert processed[0].sum(-1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("threshold", [1.0, 1.5, 4.0, 9.0])
def test_a_token_meets_its_likeliest_expert_whatever_the_threshold(threshold):
    for selection in ("threshold", "batch_threshold"):
        router = ku.DSMoERouter(selection, threshold=threshold)
        logits = np.zeros((1, 3, EXPERTS), "float32")
        chosen = router.choose(tensor(logits), None, training=False)
        _, processed = tables(chosen, 3, EXPERTS)
        assert processed[0].tolist() == [[True, False, False, False]] * 3


@pytest.mark.one_backend
@pytest.mark.parametrize("num_experts", [3, 32])
def test_a_threshold_above_1_bounds_the_candidates(num_experts):
    logits = random_logits(num_experts=num_experts)
    for threshold in (1.0, 1.28, 1.6, 2.0, 3.0):
        router = ku.DSMoERouter("threshold", threshold=threshold)
        chosen = router.choose(tensor(logits), None, training=False)
        assert chosen.experts.shape[-1] <= max(num_experts / threshold, 1) + 1
        _, processed = tables(chosen, LENGTH, num_experts)
        expected = reference.ds_moe(logits, "threshold", threshold=threshold)
        for g, decision in enumerate(expected):
            np.testing.assert_array_equal(processed[g], decision.processed)


@pytest.mark.one_backend
def test_fewer_experts_never_meet_more_and_all_are_the_dense_mode():
    layer = layer_of()
    x = tensor(np.random.default_rng(1).normal(size=(2, 8, DIM)))
    x = ops.cast(x, "float32")
    whole = models.array(layer(x, training=True))
    sweeps = {
        "top_k": range(1, EXPERTS + 1),
        "threshold": (3.0, 1.5, 1.0, 0.8, 0.5, 0.2, 0.0),
        "batch_threshold": (3.0, 1.5, 1.0, 0.8, 0.5, 0.2, 0.0),
    }
    for selection, values in sweeps.items():
        setting = "top_k" if selection == "top_k" else "threshold"
        before, errors = None, []
        for value in values:
            layer.router.select(selection, **{setting: value})
            chosen = layer.router(x, training=False)
            _, processed = tables(chosen, LENGTH, EXPERTS)
            if before is not None:
                assert (processed >= before).all()
            before = processed
            found = models.array(layer(x, training=False))
            errors.append(np.abs(found - whole).max())
        assert processed.all()
        assert errors[-1] < 1e-5 < 1e-2 < errors[0]


# What comes out, and its gradients.


@pytest.mark.thinned("mask", "engine", "name")
@masked
@pytest.mark.parametrize("engine", [*dispatch.ENGINES, "auto"])
@selections
def test_every_engine_puts_out_what_the_reference_does(name, engine, mask):
    layer = layer_of(engine, **settings_of(name))
    x = np.random.default_rng(2).normal(size=(GROUPS, LENGTH, DIM))
    x = x.astype("float32")
    weights = gradients.weights_of(layer)

    def route(logits, group_mask):
        (decision,) = reference.ds_moe(
            logits[None],
            **settings_of(name),
            mask=None if group_mask is None else group_mask[None],
        )
        return decision

    expected = reference.moe(x, weights, route, "batch", mask)
    found = models.array(layer(tensor(x), mask=tensor(mask), training=False))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_groups_by_example_choose_the_same():
    x = tensor(models.tokens(GROUPS, LENGTH, DIM))
    for name in SETTINGS:
        outputs = [
            models.array(layer_of(group=group, **settings_of(name))(x))
            for group in ("batch", "example")
        ]
        np.testing.assert_allclose(*outputs, atol=1e-6)


def by_oracle_name(found):
    return {
        gradients.oracle_name(path): gradient
        for path, gradient in found.items()
        if path != "inputs"
    }


def test_gradients_are_those_of_equation_3():
    """`dE_i = S_i dO`, and `dS_i = E_i dO` through the softmax."""
    layer = layer_of("auto", selection="top_k", top_k=1)
    layer.router.mutual_information_loss = 0.0
    x = models.tokens(1, 3, DIM)
    cotangent = models.tokens(1, 3, DIM, seed=1)
    weights = gradients.weights_of(layer)
    scores = np.stack([reference.softmax(r) for r in x[0] @ weights["router"]])
    _, found = gradients.of_layer(layer, x, cotangent, training=True)
    by_name = by_oracle_name(found)
    np.testing.assert_allclose(
        by_name["down_bias"][:, 0], scores.T @ cotangent[0], atol=1e-5
    )
    outputs = np.stack(
        [
            [reference.expert(token, weights, e) for e in range(EXPERTS)]
            for token in x[0].astype("float64")
        ]
    )
    by_score = np.einsum("sed,sd->se", outputs, cotangent[0])
    mean = (scores * by_score).sum(-1, keepdims=True)
    by_logit = scores * (by_score - mean)
    np.testing.assert_allclose(by_name["router"], x[0].T @ by_logit, atol=1e-5)
    for name in ("up", "up_bias", "down", "down_bias"):
        each = np.abs(by_name[name]).reshape(EXPERTS, -1).max(1)
        assert (each > 1e-4).all(), name


def test_every_token_trains_every_expert_and_its_router_column():
    layer = layer_of(selection="threshold", threshold=2.0)
    layer.router.mutual_information_loss = 0.0
    x = models.tokens(1, 2, DIM)
    for token in range(2):
        cotangent = np.zeros((1, 2, DIM), "float32")
        cotangent[0, token] = 1.0
        _, found = gradients.of_layer(layer, x, cotangent, training=True)
        by_name = by_oracle_name(found)
        for name in ("up", "down"):
            each = np.abs(by_name[name]).reshape(EXPERTS, -1).max(1)
            assert (each > 0).all()
        assert (np.abs(by_name["router"]).max(0) > 0).all()


# The mutual-information loss, through the router.

GOLDEN = np.array([[[2, 1, 0], [0, 2, 1], [1, 1.5, 0]]], "float32")


def loss_of(logits, mask=None, weight=1.0):
    """The loss that a router adds whose logits are its inputs."""
    size = logits.shape[-1]
    router = router_of(
        size,
        size,
        mutual_information_loss=weight,
        kernel_initializer="identity",
    )
    router(tensor(logits), mask=tensor(mask), training=True)
    (loss,) = router.losses
    return float(ops.convert_to_numpy(ops.stop_gradient(loss)))


@pytest.mark.one_backend
def test_the_loss_has_its_golden_value():
    assert loss_of(GOLDEN) == pytest.approx(-0.1326704, abs=1e-6)
    assert loss_of(GOLDEN, weight=0.25) == pytest.approx(-0.0331676, abs=1e-6)
    assert loss_of(np.zeros((2, 3, 4), "float32")) == pytest.approx(0, abs=1e-6)
    sure = 50.0 * np.eye(4, dtype="float32")[None]
    assert loss_of(sure) == pytest.approx(-math.log(4), abs=1e-5)
    for scale in (1.0, 30.0, 1e4):
        loss = loss_of(scale * random_logits())
        assert -math.log(EXPERTS) <= loss <= 1e-6


def test_the_loss_has_the_gradient_of_its_formula():
    router = router_of(
        3, 3, mutual_information_loss=1.0, kernel_initializer="identity"
    )
    _, found = gradients.of_layer(router, GOLDEN, training=True)
    scores = np.stack([reference.softmax(row) for row in GOLDEN[0]])
    logs = np.log(scores.mean(0)) - np.log(scores)
    mean = (scores * logs).sum(-1, keepdims=True)
    expected = scores * (logs - mean) / len(scores)
    np.testing.assert_allclose(found["inputs"][0], expected, atol=1e-6)
    np.testing.assert_allclose(
        found["inputs"][0, 0], [-0.0927804, 0.0713328, 0.0214476], atol=1e-6
    )


@pytest.mark.parametrize("filler", [9.0, 1e4])
def test_padding_is_in_neither_entropy(filler):
    logits = random_logits()
    filled = np.where(MASK[..., None], logits, np.float32(filler))
    filled[..., 0] = np.where(MASK, logits[..., 0], 2.0 * filler)
    scores = np.apply_along_axis(reference.softmax, -1, logits)
    expected = reference.mutual_information(scores, MASK)
    assert loss_of(logits, MASK) == pytest.approx(expected, abs=1e-6)
    assert loss_of(filled, MASK) == pytest.approx(expected, abs=1e-6)
    assert abs(loss_of(filled) - expected) > 1e-2


def test_losses_are_added_in_training_alone_and_known_by_name():
    router = router_of(z_loss=0.5, mutual_information_loss=0.25)
    assert router.losses_by_name() == {
        "z_loss": 0.5,
        "mutual_information": 0.25,
    }
    x = tensor(models.tokens(1, 3, DIM))
    router(x, training=False)
    assert not router.losses
    router(x, training=True)
    assert len(router.losses) == 2
    assert router_of(mutual_information_loss=0.0).losses_by_name() == {}


def entropies(layer, x):
    """`H(e|x)` on average, and `H(e)`, as shares of `log N`."""
    kernel = models.array(layer.router.kernel)
    scores = np.apply_along_axis(reference.softmax, -1, x @ kernel)
    each = np.mean([reference.entropy(row) for row in scores])
    both = each, reference.entropy(scores.mean(0))
    return np.array(both) / math.log(scores.shape[-1])


@pytest.mark.one_backend
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_tokens_become_sure_where_the_loss_is_on(weight):
    """Spec of the method: sure tokens, and every expert still in use."""
    rng = np.random.default_rng(0)
    centres = 2.0 * rng.normal(size=(16, 8))
    x = centres[np.arange(512) % 16] + 0.3 * rng.normal(size=(512, 8))
    x = x.astype("float32")
    dense = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, "gelu", kernel_initializer="identity"),
            keras.layers.Dense(8, kernel_initializer="identity"),
        ]
    )
    # Copies, which know the task up to its noise: to tell tokens apart would
    # gain nothing there.
    y = dense.predict(x, verbose=0) + 0.3 * rng.normal(size=(512, 8))
    moe = ku.upcycle_model(
        dense,
        4,
        router=ku.DSMoERouter(
            mutual_information_loss=weight,
            kernel_initializer=gradients.normal(0.02),
        ),
    )
    # Not Adam, under which a vanishing gradient moves as far as any.
    moe.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    (layer,) = models.mixtures(moe)
    start, _ = entropies(layer, x)
    moe.fit(x, y, batch_size=64, epochs=8, shuffle=False, verbose=0)
    sure, used = entropies(layer, x)
    assert start > 0.95, (start, sure, used)
    if weight:
        assert sure < 0.6
        assert used > 0.95
    else:
        assert sure > 0.95


# Settings.

FULL = {
    "selection": "batch_threshold",
    "top_k": None,
    "threshold": 0.48,
    "normalize": True,
    "mutual_information_loss": 0.125,
    "z_loss": 0.25,
    "temperature": 2.5,
    "batches_per_step": 4,
    "group": "example",
    "kernel_initializer": "he_normal",
    "use_bias": True,
    "name": "scout",
    "trainable": False,
}


@pytest.mark.one_backend
def test_config_holds_every_argument_and_rebuilds():
    router = ku.DSMoERouter(**FULL)
    config = router.get_config()
    assert set(config) == set(FULL)
    for name, value in FULL.items():
        if name != "kernel_initializer":
            assert config[name] == value, name
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(router)
    )
    assert again.get_config() == config
    assert clone(router).get_config() == config


@pytest.mark.one_backend
def test_it_has_a_name():
    router = get_router("ds_moe")
    assert isinstance(router, ku.DSMoERouter)
    assert router.selection == "all"
    assert router.average_experts_per_token(8) == 8


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"selection": "best"}, ValueError, "one of.*selection='best'"),
        ({"selection": "top_k"}, ValueError, "top_k=None. Pass one"),
        ({"top_k": 2}, ValueError, "selection='all' and top_k=2. Leave"),
        ({"selection": "threshold"}, ValueError, "threshold=None. Pass one"),
        (
            {"selection": "top_k", "top_k": 2, "threshold": 0.5},
            ValueError,
            "selection='top_k' and threshold=0.5. Leave it out",
        ),
        ({"selection": "top_k", "top_k": 0}, ValueError, "top_k=0"),
        ({"selection": "top_k", "top_k": 1.5}, TypeError, "top_k=1.5"),
        (
            {"selection": "threshold", "threshold": -1.0},
            ValueError,
            "threshold=-1.0",
        ),
        (
            {"mutual_information_loss": -0.1},
            ValueError,
            "mutual_information_loss=-0.1",
        ),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        ku.DSMoERouter(**settings)


@pytest.mark.one_backend
def test_more_experts_than_there_are():
    router = ku.DSMoERouter("top_k", top_k=5)
    with pytest.raises(ValueError, match=r"num_experts=4\. Lower"):
        ku.MoEFeedForward(4, 8, router=router)
    built = router_of()
    with pytest.raises(ValueError, match=r"num_experts=4\. Lower"):
        built.select("top_k", top_k=5)
    assert built.selection == "all"


# In models.


@pytest.mark.one_backend
def test_the_recipe_decides_for_every_layer():
    dense = models.t5_backbone()
    made = plan.make(dense, 4, recipe="ds_moe")
    assert [site.index for site in made.chosen] == [0, 1, 2, 3]
    for site in made.chosen:
        router = made.routers[site.index]
        assert isinstance(router, ku.DSMoERouter)
        assert router.mutual_information_loss == 6.3e-4
    for block in made.blocks:
        layout = block.num_experts, block.intermediate_dim
        assert layout == (4, models.HIDDEN // 4)
    estimate = ku.estimate_upcycle(dense, 4, recipe="ds_moe", attention=False)
    for layer in estimate.layers:  # slices cost what the block does
        router = 2 * models.WIDTH * 4
        assert layer.flops_per_token == layer.dense_flops_per_token + router


@pytest.mark.one_backend
@pytest.mark.parametrize("selection", SELECTIONS)
def test_causal_stacks_refuse_what_depends_on_the_batch(selection):
    dense = models.t5_backbone()
    settings = {"top_k": 2} if selection == "top_k" else {"threshold": 0.5}
    if selection == "all":
        settings = {}
    router = ku.DSMoERouter(selection, **settings)
    assert router.mixes_tokens == (selection == "batch_threshold")
    if not router.mixes_tokens:
        plan.make(dense, 4, router=router)
        return
    with pytest.raises(ku.UpcycleError, match="causal stack"):
        plan.make(dense, 4, router=router)
    plan.make(dense, 4, router={"encoder": router, "decoder": "ds_moe"})


@pytest.mark.one_backend
def test_a_prediction_depends_on_no_other_token_but_by_batch_threshold():
    x = models.tokens(1, 6, DIM)
    other = np.concatenate(
        [x[:, :3], 3.0 * models.tokens(1, 3, DIM, seed=1)], 1
    )
    for name in SETTINGS:
        layer = layer_of("dense", **settings_of(name))
        a, b = (models.array(layer(tensor(v)))[:, :3] for v in (x, other))
        if name != "batch_threshold":
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["vit", "t5"])
def test_a_file_keeps_the_selection(kind, tmp_path):
    if kind == "vit":
        dense, inputs = models.vit_classifier(), models.images()
    else:
        dense, inputs = models.t5_backbone(), models.t5_inputs()
    moe = ku.upcycle_model(dense, 4, recipe="ds_moe", seed=0)
    models.set_routers(moe)
    ku.set_active_experts(moe, threshold=1.1)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    for layer in models.mixtures(again):
        assert layer.router.selection == "threshold"
        assert layer.router.threshold == 1.1
    found, expected = models.output(again, inputs), models.output(moe, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_fit_and_the_monitor_see_it():
    dense = models.vit_classifier()
    moe = ku.upcycle_model(dense, 4, recipe="ds_moe", seed=0)
    moe.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    monitor = ku.RouterMonitor()
    moe.preprocessor = None
    x, y = models.images(), models.labels()
    history = moe.fit(x, y, epochs=2, verbose=0, callbacks=[monitor]).history
    assert history["moe_mutual_information"][0] == pytest.approx(0, abs=1e-5)
    assert history["moe_max_load"] == pytest.approx([1.0, 1.0])
    assert history["moe_dropped"] == [0.0, 0.0]
    assert history["moe_entropy"][-1] <= 1.0
    moved = [
        np.abs(models.array(m.router.kernel)).max()
        for m in models.mixtures(moe)
    ]
    assert min(moved) > 0


@pytest.mark.one_backend
def test_pruning_takes_what_is_hardly_met():
    dense = models.vit_classifier()
    moe = ku.upcycle_model(dense, 4, recipe="ds_moe", layers=[1], seed=0)
    models.set_routers(moe)
    ku.set_active_experts(moe, top_k=1)
    smaller, _ = ku.prune_experts(moe, models.images(), num_experts=2)
    (layer,) = models.mixtures(smaller)
    assert layer.num_experts == 2
    assert layer.router.top_k == 1

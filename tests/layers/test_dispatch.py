import functools

import gradients
import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import reference
from keras import ops
from routing_tables import tables

from keras_upcycle.backend import portable
from keras_upcycle.layers import dispatch
from keras_upcycle.layers.engines import (
    AS_ONE_FROM_TOKENS,
    capacity,
    dense,
    dropless,
)
from keras_upcycle.layers.experts import Experts
from keras_upcycle.layers.packings import most_tiles
from keras_upcycle.methods.ds_moe import DSMoERouter
from keras_upcycle.routing import functional

GROUPS, LENGTH, DIM, HIDDEN, EXPERTS = 2, 8, 4, 6, 4

engines = pytest.mark.parametrize("engine", dispatch.ENGINES)


def bank(num_experts=EXPERTS, **settings):
    layer = Experts(
        num_experts,
        HIDDEN,
        kernel_initializer=gradients.normal(0.5),
        bias_initializer=gradients.normal(0.5, seed=1),
        **settings,
    )
    layer.build((num_experts, None, DIM))
    return layer


def random_tokens(seed=0, length=LENGTH):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(GROUPS, length, DIM)).astype("float32")


def tied_logits():
    """Identical tokens and identical experts, and some that differ."""
    rows = np.array([[1, 1, 0, -1], [0, 0, 0, 0], [-1, 2, 2, 2]], "float32")
    return rows[np.array([[0, 0, 1, 0, 2, 2, 2, 1], [1] * 8])]


def crowded_logits():
    """All tokens want expert 2, then 0: the others are empty."""
    logits = np.tile(np.array([2, -3, 4, -3], "float32"), (2, 8, 1))
    noise = np.random.default_rng(5).normal(size=logits.shape)
    return logits + 0.1 * noise.astype("float32")


LOGITS = {
    "random": np.random.default_rng(6)
    .normal(size=(GROUPS, LENGTH, EXPERTS))
    .astype("float32"),
    "ties": tied_logits(),
    "empty_experts": crowded_logits(),
}
MASK = np.arange(LENGTH) < np.array([[5], [0]])
ROUTINGS = {
    "top_2": lambda x, mask: functional.top_k(x, 2, mask=mask),
    "top_2_drops": lambda x, mask: functional.top_k(
        x, 2, capacity_factor=0.6, normalize=False, mask=mask
    ),
    "expert_choice": lambda x, mask: functional.expert_choice(
        x, 1.0, mask=mask
    ),
    # All experts are candidates, and many are nowhere.
    "partial": lambda x, mask: DSMoERouter("threshold", threshold=0.9).choose(
        x, mask, training=False
    ),
}


@functools.cache
def run(engine, route):
    """Some experts, and a compiled call of them with an engine."""
    experts = bank()

    def call(tokens, logits, mask):
        chosen = ROUTINGS[route](logits, mask)
        outputs = dispatch.ENGINES[engine](tokens, chosen, experts)
        return outputs, chosen

    return experts, gradients.compiled(call)


@pytest.mark.thinned("engine", "masked", "logits", "route")
@engines
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("route", ROUTINGS)
def test_engine_equals_the_oracle_for_the_same_routing(
    engine, masked, logits, route
):
    tokens = random_tokens()
    experts, call = run(engine, route)
    mask = MASK if masked else np.ones_like(MASK)
    found, chosen = call(
        *map(ops.convert_to_tensor, (tokens, LOGITS[logits], mask))
    )
    weights, processed = tables(chosen, LENGTH, EXPERTS)
    for g in range(GROUPS):
        decision = reference.Decision(weights[g], processed[g], None)
        expected = reference.combine(
            tokens[g].astype("float64"), decision, gradients.weights_of(experts)
        )
        np.testing.assert_allclose(
            ops.convert_to_numpy(found)[g], expected, atol=1e-5
        )


@functools.cache
def gradients_of(engine, route):
    """A compiled call to the gradients of some experts with an engine."""
    experts, _ = run(engine, route)
    cotangent = ops.convert_to_tensor(random_tokens(seed=1))
    values = [v.value for v in experts.trainable_variables]

    def scalar(tokens, logits, mask, *weights):
        pairs = zip(experts.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=list(pairs)):
            chosen = ROUTINGS[route](logits, mask > 0)
            outputs = dispatch.ENGINES[engine](tokens, chosen, experts)
        return ops.sum(outputs * cotangent)

    pull_back = gradients.compiled_pull_back(scalar)
    return lambda *arrays: pull_back(*arrays, *values)[2]


@pytest.mark.thinned("engine", "logits", "route")
@pytest.mark.parametrize(
    "engine", [n for n in dispatch.ENGINES if n != "dense"]
)
@pytest.mark.parametrize("logits", ["ties", "empty_experts"])
@pytest.mark.parametrize("route", ROUTINGS)
def test_gradients_are_those_of_every_expert_on_every_token(
    engine, logits, route
):
    mask = np.arange(LENGTH) < np.array([[5], [8]])
    arrays = random_tokens(), LOGITS[logits], mask.astype("float32")
    found = gradients_of(engine, route)(*arrays)
    expected = gradients_of("dense", route)(*arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert np.abs(expected[0]).max() > 1e-3


@engines
@pytest.mark.parametrize(
    ("length", "num_experts", "top_k"),
    [(100, 3, 2), (3, 8, 1)],
    ids=["many_tiles", "few_tokens"],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_engines_agree_at_odd_shapes(engine, length, num_experts, top_k):
    experts, tokens = bank(num_experts), random_tokens(length=length)
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(GROUPS, length, num_experts)).astype("float32")

    def call(tokens, logits):
        both = (
            functional.top_k(logits, top_k),
            functional.expert_choice(logits, 1.0),
        )
        run = dispatch.ENGINES[engine]
        return [(chosen, run(tokens, chosen, experts)) for chosen in both]

    arguments = map(ops.convert_to_tensor, (tokens, logits))
    for chosen, found in gradients.compiled(call)(*arguments):
        # By a loop over experts instead of tokens: 100 tokens are many.
        table, _ = tables(chosen, length, num_experts)
        weights = gradients.weights_of(experts)
        expected = sum(
            table[..., e, None] * reference.expert(tokens, weights, e)
            for e in range(num_experts)
        )
        np.testing.assert_allclose(
            ops.convert_to_numpy(found), expected, atol=1e-5
        )


@pytest.mark.thinned
@pytest.mark.parametrize("length", [31, 32])
@pytest.mark.parametrize("kind", ["token", "expert"])
def test_narrow_experts_run_as_one_for_many_tokens(length, kind, monkeypatch):
    """From 64 tokens on, of two groups; with the same result."""
    experts = Experts(EXPERTS, DIM - 1, activation="gelu")
    experts.build((EXPERTS, None, DIM))
    tokens = random_tokens(length=length)
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(GROUPS, length, EXPERTS)).astype("float32")
    if kind == "token":
        chosen = functional.top_k(ops.convert_to_tensor(logits), 2)
    else:
        chosen = functional.expert_choice(ops.convert_to_tensor(logits), 1.0)
    calls = []
    run = experts.apply_as_one
    monkeypatch.setattr(
        experts, "apply_as_one", lambda *a: calls.append(a) or run(*a)
    )
    found = dense(ops.convert_to_tensor(tokens), chosen, experts)
    assert len(calls) == (2 * length >= AS_ONE_FROM_TOKENS)
    expected = capacity(ops.convert_to_tensor(tokens), chosen, experts)
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), ops.convert_to_numpy(expected), atol=1e-5
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("activation", ["softmax", lambda x: x * x.shape[-1]])
def test_activations_of_one_hidden_layer_stay_apart(activation):
    """Narrow experts too: a softmax over all of them would be another one."""
    experts = Experts(EXPERTS, DIM - 1, activation=activation)
    experts.build((EXPERTS, None, DIM))
    tokens = random_tokens(length=64)
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(GROUPS, 64, EXPERTS)).astype("float32")
    chosen = functional.top_k(ops.convert_to_tensor(logits), 2)
    found, *others = (
        ops.convert_to_numpy(
            engine(ops.convert_to_tensor(tokens), chosen, experts)
        )
        for engine in (dense, capacity, dropless)
    )
    for other in others:
        np.testing.assert_allclose(found, other, atol=1e-5)


@pytest.mark.parametrize("engine", ["capacity", "dropless"])
def test_tokens_that_go_nowhere_get_zero_whatever_the_others_hold(engine):
    tokens = random_tokens()
    tokens[:, 0] = np.inf
    mask = np.tile(np.arange(LENGTH) < 3, (GROUPS, 1))
    _, call = run(engine, "top_2")
    found, _ = call(
        *map(ops.convert_to_tensor, (tokens, LOGITS["random"], mask))
    )
    found = ops.convert_to_numpy(found)
    assert not found[:, 3:].any()
    assert np.isfinite(found[:, 1:]).all()


@engines
def test_dropped_tokens_get_zero(engine):
    _, call = run(engine, "top_2_drops")
    mask = np.ones_like(MASK)
    found, _ = call(
        *map(ops.convert_to_tensor, (random_tokens(), crowded_logits(), mask))
    )
    found = ops.convert_to_numpy(found)
    # All want the same two experts: the first tokens get their slots.
    slots = reference.slots(LENGTH, EXPERTS, 0.6 * 2)
    assert (np.abs(found[:, :slots]).max(axis=-1) > 0).all()
    assert not found[:, slots:].any()


@pytest.mark.parametrize("engine", dispatch.ENGINES)
def test_kernels_that_nobody_chose_do_not_matter(engine):
    experts = bank()
    tokens = random_tokens()[:1, :1]
    logits = np.array([[[0, 3, -1, 2]]], "float32")  # to experts 1 and 3
    for weight in experts.weights:
        if "kernel" not in weight.name:
            continue
        value = ops.convert_to_numpy(weight.value).copy()
        value[[0, 2]] = np.nan
        weight.assign(value)

    def call(tokens, logits):
        chosen = functional.top_k(logits, 2)
        return dispatch.ENGINES[engine](tokens, chosen, experts)

    found = gradients.compiled(call)(
        *map(ops.convert_to_tensor, (tokens, logits))
    )
    found = ops.convert_to_numpy(found)
    if engine == "dense":  # it multiplies them by 0, and 0 * NaN shows it
        assert np.isnan(found).all()
        return
    decision = reference.top_k(logits[0], 2)
    expected = reference.combine(
        tokens[0].astype("float64"), decision, gradients.weights_of(experts)
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


# Which engine `auto` runs.


def chosen_by(kind):
    logits = ops.zeros((1, 4, 4))
    return {
        "dropless": lambda: functional.top_k(logits, 2),
        "buffers": lambda: functional.top_k(logits, 2, capacity_factor=1.0),
        "everyone": lambda: functional.top_k(logits, 4),
        "room for everyone": lambda: functional.top_k(
            logits, 4, capacity_factor=1.0
        ),
        "room for half": lambda: functional.top_k(
            logits, 4, capacity_factor=0.5
        ),
        "expert_choice": lambda: functional.expert_choice(logits, 1.0),
        "partial": lambda: functional.top_k(logits, 4)._replace(partial=True),
    }[kind]()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("partial", "dropless"),
        ("dropless", "dropless"),
        ("buffers", "capacity"),
        ("everyone", "dense"),
        ("room for everyone", "dense"),
        ("room for half", "capacity"),
        ("expert_choice", "capacity"),
    ],
)
def test_auto_chooses_by_shape(kind, engine):
    chosen, limit = chosen_by(kind), dispatch.DENSE_UP_TO_ROWS
    assert dispatch.choose(chosen, limit // 4, 4) == "dense"
    assert dispatch.choose(chosen, limit // 4 + 1, 4) == engine
    unknown = ops.convert_to_tensor(np.int32(1))
    assert dispatch.choose(chosen, unknown, 4) == engine


@pytest.mark.parametrize("kind", ["dropless", "buffers"])
@pytest.mark.parametrize(
    ("num_experts", "few", "more"),
    [(4, [1], [2, 8]), (8, [1, 2], [4, 16]), (64, [1, 16, 128], [])],
)
def test_auto_reads_no_idle_experts_at_inference(kind, num_experts, few, more):
    """Those that are chosen are few, or else all are quicker in a row."""
    chosen = chosen_by(kind)  # K = 2
    for tokens in few:
        found = dispatch.choose(chosen, tokens, num_experts)
        assert found == "dropless"
    for tokens in more:
        assert dispatch.choose(chosen, tokens, num_experts) == "dense"
    assert dispatch.choose(chosen, 1, num_experts, training=True) == "dense"


@pytest.mark.parametrize("kind", ["everyone", "expert_choice"])
def test_auto_runs_all_experts_where_a_token_needs_them(kind):
    assert dispatch.choose(chosen_by(kind), 1, 4) == "dense"


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_auto_reads_no_idle_experts_of_a_partial_routing(num_tokens):
    chosen = chosen_by("partial")
    assert dispatch.choose(chosen, num_tokens, 4) == "dropless"
    assert dispatch.choose(chosen, num_tokens, 4, training=True) == "dense"


@pytest.mark.one_backend
def test_work_on_a_partial_routing_follows_the_choices():
    """No slot, and no more tiles in use than the choices fill."""
    seen = {}

    class Watching:
        num_experts = EXPERTS
        placement = None

        def apply_groups(self, slots, tiles, tile_experts, used, training=None):
            seen.update(slots=slots.shape[1], rows=tiles.shape[1])
            seen.update(used=int(ops.convert_to_numpy(used)))
            return slots, tiles

    length, tokens = 600, random_tokens(length=600)
    logits = np.random.default_rng(2).normal(size=(GROUPS, length, EXPERTS))
    logits = ops.convert_to_tensor(logits.astype("float32"))
    chosen = ROUTINGS["partial"](logits, None)
    counts = ops.convert_to_numpy(functional.expert_load(chosen, EXPERTS))
    assert chosen.experts.shape[-1] == EXPERTS
    assert counts.sum() < 0.5 * GROUPS * length * EXPERTS
    dropless(ops.convert_to_tensor(tokens), chosen, Watching())
    assert seen["slots"] == 0
    assert seen["used"] == sum(-(-n // seen["rows"]) for n in counts)
    whole = chosen._replace(partial=False)
    dropless(ops.convert_to_tensor(tokens), whole, Watching())
    if keras.backend.backend() != "torch":  # where slots spare no time
        assert seen["slots"] > 0


@pytest.mark.one_backend
@hypothesis.given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    slots=st.integers(0, 9),
    rows=st.sampled_from([1, 2, 8, 16]),
)
def test_no_routing_needs_more_tiles_than_there_are(counts, slots, rows):
    beyond = [max(count - slots, 0) for count in counts]
    needed = sum(-(-count // rows) for count in beyond)
    most = most_tiles(sum(counts), len(counts), slots, rows)
    assert needed <= most


@pytest.mark.one_backend
def test_tiles_do_not_multiply_with_experts():
    # Sixteen times the experts for the same assignments: as many rows.
    rows_of = []
    for num_experts in (8, 128):
        slots, rows = portable.packing(4096, 2, num_experts, training=True)
        tiles = most_tiles(8192, num_experts, slots, rows)
        rows_of.append(num_experts * slots + tiles * rows)
    assert rows_of[1] <= 1.07 * rows_of[0] <= 1.07 * 2 * 8192


# What an engine must not make.


def largest_intermediate(jaxpr):
    """Elements of the largest value any equation makes, sub-jaxprs too."""
    import jax.extend

    largest = 0
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            largest = max(largest, int(np.prod(value.aval.shape)))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            largest = max(largest, largest_intermediate(inner))
    return largest


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="only JAX shows every intermediate, as a jaxpr",
)
@pytest.mark.parametrize(
    "route",
    [
        lambda x: functional.top_k(x, 2, capacity_factor=1.0),
        lambda x: functional.expert_choice(x, 2.0),
    ],
    ids=["top_k", "expert_choice"],
)
def test_no_table_of_tokens_by_experts_by_slots(route):
    import jax

    length, num_experts, slots = 256, 8, 64
    experts = bank(num_experts)
    tokens = np.zeros((1, length, DIM), "float32")
    logits = np.zeros((1, length, num_experts), "float32")

    def scalar(x, scores):
        chosen = route(scores)
        shape = chosen.experts if hasattr(chosen, "experts") else None
        size = chosen.tokens.shape[-1] if shape is None else chosen.capacity
        assert size == slots
        return ops.sum(capacity(x, chosen, experts))

    jaxpr = jax.make_jaxpr(jax.grad(scalar, (0, 1)))(tokens, logits)
    largest = largest_intermediate(jaxpr.jaxpr)
    assert num_experts * slots * DIM <= largest  # the buffers, at least
    assert largest < length * num_experts * slots

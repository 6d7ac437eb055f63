"""Default MoE against its equations, token by token.

Golden values and the list of what to test: Panda et al., arXiv 2504.12463,
equations 8 to 11.
"""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers import dispatch
from keras_upcycle.layers.engines import dense
from keras_upcycle.layers.experts import Experts
from keras_upcycle.methods.default_moe import FORWARDS, SCORE_WEIGHTINGS
from keras_upcycle.routing import functional
from keras_upcycle.routing.registry import get_router

DIM, HIDDEN, EXPERTS = 4, 6, 4
engines = pytest.mark.parametrize("engine", dispatch.ENGINES)


class Scaling:
    """Experts that multiply by a constant each."""

    are_narrow = False
    placement = None

    def __init__(self, factors):
        self.factors = np.asarray(factors, "float32")
        self.num_experts = len(factors)

    def apply_slots(self, slots, training=None):
        return slots * ops.reshape(self.factors, (-1, 1, 1))

    def apply_groups(self, slots, tiles, tile_experts, used, training=None):
        of_tiles = ops.take(np.append(self.factors, 0.0), tile_experts)
        return (
            self.apply_slots(slots),
            tiles * ops.reshape(ops.cast(of_tiles, "float32"), (-1, 1, 1)),
        )


def built(num_experts=EXPERTS, dim=DIM, **settings):
    settings = {"capacity_factor": None, "load_balance_loss": 0.0, **settings}
    router = ku.DefaultMoERouter(**settings)
    router.num_experts = num_experts
    router.build((None, None, dim))
    return router


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


X = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], "float32")
LOGITS = np.array([[[2, 1, 0], [0, 2, 1], [1, 1.5, 0]]], "float32")


def call(router, experts, engine, tokens, logits, mask=None, training=True):
    chosen = router.choose(logits, mask, training)
    return router.run(
        tokens, chosen, dispatch.ENGINES[engine], experts, training
    )


@engines
def test_golden_step(engine):
    router = built(
        3, 2, top_k=1, default_forward="paper", score_weighting="none"
    )
    experts = Scaling([1, 2, -1])

    def scalar(logits):
        outputs = call(router, experts, engine, X, logits)
        # The state is an output too: JAX would leak it otherwise.
        return ops.sum(outputs), outputs

    with keras.StatelessScope() as scope:
        total, outputs, (by_logits,) = gradients.pull_back(scalar, LOGITS)
        moved = scope.get_current_value(router.default_vectors)
        if keras.backend.backend() == "jax":
            moved = None  # a tracer of the compiled function
    expected = [
        [0.6897138, 0.0489457],
        [0.0090031, 1.3304819],
        [1.1262487, 1.0930988],
    ]
    outputs = ops.convert_to_numpy(ops.stop_gradient(outputs))
    np.testing.assert_allclose(outputs[0], expected, atol=1e-6)
    np.testing.assert_allclose(
        by_logits[0, 0], [0.1738544, -0.1073525, -0.0665019], atol=1e-6
    )
    assert total == pytest.approx(np.sum(expected), abs=1e-5)
    if moved is not None:
        moved = ops.convert_to_numpy(ops.stop_gradient(moved))
        np.testing.assert_allclose(
            moved, [[0.1, 0], [0.1, 0.2], [0, 0]], atol=1e-7
        )


def oracle(router, kernels, tokens, logits, mask=None):
    """Equations 10 and 11 in float64, token by token.

    Returns:
        Outputs, and the vectors after the step.
    """
    up, up_bias, down, down_bias = (k.astype("float64") for k in kernels)
    vectors = ops.convert_to_numpy(router.default_vectors).astype("float64")
    groups, length, _ = tokens.shape
    scores = softmax(logits.astype("float64"))
    total = np.zeros_like(vectors)
    divisor = np.zeros(len(vectors))
    runs = {}
    for place in np.ndindex(groups, length):
        if mask is not None and not mask[place]:
            continue
        x, p = tokens[place].astype("float64"), scores[place]
        best = np.argsort(-p, kind="stable")[: router.top_k]
        outputs = {}
        for e in best:
            hidden = np.maximum(x @ up[e] + up_bias[e, 0], 0)
            outputs[e] = hidden @ down[e] + down_bias[e, 0]
            weighting = router.score_weighting
            total[e] += outputs[e] * (1 if weighting == "none" else p[e])
            divisor[e] += p[e] if weighting == "normalized" else 1
        runs[place] = outputs
    for e in np.flatnonzero(divisor):
        mean = total[e] / divisor[e]
        vectors[e] = router.decay * vectors[e] + (1 - router.decay) * mean
    results = np.zeros(tokens.shape)
    for place, outputs in runs.items():
        p = scores[place]
        share = sum(p[e] for e in outputs)
        if router.default_forward == "paper":
            share = 1.0
        for e, output in outputs.items():
            results[place] += p[e] / share * output
        if router.default_forward == "paper":
            for e in set(range(len(vectors))) - set(outputs):
                results[place] += p[e] * vectors[e]
    return results, vectors


def bank(num_experts=EXPERTS):
    experts = Experts(
        num_experts,
        HIDDEN,
        activation="relu",
        kernel_initializer=gradients.normal(0.7),
        bias_initializer=gradients.normal(0.5, seed=1),
    )
    experts.build((num_experts, None, DIM))
    arrays = [ops.convert_to_numpy(v) for v in experts.weights]
    return experts, arrays


def drawn(seed, length=7):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(2, length, DIM)).astype("float32"),
        rng.normal(size=(2, length, EXPERTS)).astype("float32"),
    )


@pytest.mark.thinned("engine", "masked", "forward", "weighting")
@engines
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("weighting", SCORE_WEIGHTINGS)
def test_two_steps_against_the_equations(engine, weighting, forward, masked):
    router = built(
        top_k=2,
        default_forward=forward,
        score_weighting=weighting,
        decay=0.7,
    )
    experts, kernels = bank()
    mask = np.arange(7) < np.array([[4], [6]]) if masked else None
    for step in range(2):
        tokens, logits = drawn(step)
        expected, vectors = oracle(router, kernels, tokens, logits, mask)
        given = None if mask is None else ops.convert_to_tensor(mask)
        outputs = call(
            router,
            experts,
            engine,
            ops.convert_to_tensor(tokens),
            ops.convert_to_tensor(logits),
            given,
        )
        outputs = ops.convert_to_numpy(ops.stop_gradient(outputs))
        np.testing.assert_allclose(outputs, expected, atol=2e-5)
        np.testing.assert_allclose(
            ops.convert_to_numpy(router.default_vectors), vectors, atol=2e-6
        )


# Settings, the engine that runs, and whether there is padding.
CASES = {
    "plain": ({"top_k": 2}, "dense", False),
    "top_1": ({"top_k": 1}, "dropless", True),
    "every_expert": ({"top_k": EXPERTS}, "dense", True),
    "drops": ({"top_k": 2, "capacity_factor": 0.5}, "capacity", False),
    "drops_padded": ({"top_k": 2, "capacity_factor": 0.5}, "capacity", True),
    "top_1_drops": ({"top_k": 1, "capacity_factor": 0.5}, "dense", False),
    "every_expert_drops": (
        {"top_k": EXPERTS, "capacity_factor": 0.5},
        "dropless",
        False,
    ),
    "noise": ({"top_k": 2, "noise_stddev": 2.0, "seed": 3}, "dense", True),
    "groups": (
        {"top_k": 2, "capacity_factor": 0.75, "group": "example"},
        "capacity",
        True,
    ),
}


@pytest.mark.thinned("case")
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_router_is_equation_8(case, forward):
    """And nothing flows through the vectors into tokens."""
    settings, engine, masked = CASES[case]
    settings = {"default_forward": forward, "decay": 0.7, **settings}
    router, twin = built(**settings), built(**settings)
    experts, kernels = bank()
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(EXPERTS, DIM)).astype("float32")
    router.default_vectors.assign(vectors)
    tokens, logits = drawn(3)
    cotangent = rng.normal(size=tokens.shape).astype("float32")
    mask = np.arange(7) < np.array([[4], [6]]) if masked else None

    def scalar(logits, tokens):
        outputs = call(router, experts, engine, tokens, logits, mask)
        return ops.sum(ops.multiply(outputs, cotangent))

    def plain(logits, tokens):
        noisy = twin.noisy(logits, True)
        chosen = twin.choose_by(noisy, logits, mask, True)
        outputs = dispatch.ENGINES[engine](tokens, chosen, experts, True)
        return ops.sum(ops.multiply(outputs, cotangent))

    with keras.StatelessScope():
        _, _, (found, by_tokens) = gradients.pull_back(scalar, logits, tokens)
        _, _, (_, of_plain) = gradients.pull_back(plain, logits, tokens)
    np.testing.assert_allclose(by_tokens, of_plain, atol=1e-6)

    noisy = built(**settings).noisy(ops.convert_to_tensor(logits), True)
    noisy = ops.convert_to_numpy(noisy)
    probabilities = softmax(noisy.astype("float64"))
    decisions = [
        reference.top_k(
            group,
            router.top_k,
            capacity_factor=router.capacity_factor,
            mask=None if mask is None else mask[g],
        )
        for g, group in enumerate(noisy)
    ]
    up, up_bias, down, down_bias = (k.astype("float64") for k in kernels)
    hidden = np.einsum("gsd,edf->gsef", tokens, up) + up_bias[:, 0]
    outputs = np.einsum("gsef,efd->gsed", np.maximum(hidden, 0), down)
    outputs = outputs + down_bias[:, 0]
    moved = reference.moved_vectors(
        vectors, router.decay, probabilities, decisions, outputs
    )
    for g, decision in enumerate(decisions):
        expected = reference.default_moe_by_logits(
            noisy[g],
            decision,
            outputs[g],
            moved,
            cotangent[g],
            forward == "backward_only",
        )
        np.testing.assert_allclose(
            found[g], expected, atol=2e-5 * np.abs(expected).max()
        )


def test_a_chosen_expert_of_almost_no_probability_gives_no_nan():
    """`d / P` would be infinite where a bias chose it, and forward be NaN."""
    router = built(top_k=1, bias_update_rate=0.1)
    router.bias.assign([0.0, 0.0, 0.0, 9.0])
    router.default_vectors.assign(np.full((EXPERTS, DIM), 1e3))
    logits = np.array([[[90.0, 0.0, 0.0, 0.0]]], "float32")
    tokens = np.ones((1, 1, DIM), "float32")
    outputs = call(
        router,
        bank()[0],
        "dense",
        ops.convert_to_tensor(tokens),
        ops.convert_to_tensor(logits),
    )
    assert np.isfinite(ops.convert_to_numpy(ops.stop_gradient(outputs))).all()


def test_top_1_teaches_the_router_without_a_warning(recwarn):
    ku.DefaultMoERouter(1)
    assert not recwarn.list


def layer_of(router, seed=0, dispatch="auto"):
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router=router,
        activation="relu",
        dispatch=dispatch,
        kernel_initializer=gradients.normal(0.7, seed=seed),
        bias_initializer=gradients.normal(0.5, seed=seed + 1),
    )
    layer.build((None, None, DIM))
    return layer


def settled(**settings):
    settings = {"capacity_factor": None, "load_balance_loss": 0.0, **settings}
    return ku.DefaultMoERouter(**settings)


def test_inference_leaves_the_vectors_and_uses_them_if_asked():
    x = drawn(5)[0]
    results = {}
    for used in (True, False):
        layer = layer_of(
            settled(default_forward="paper", use_default_at_inference=used)
        )
        layer.router.default_vectors.assign(np.ones((EXPERTS, DIM)))
        layer.router.kernel.assign(np.eye(DIM, EXPERTS))
        results[used] = ops.convert_to_numpy(layer(x, training=False))
        vectors = ops.convert_to_numpy(layer.router.default_vectors)
        np.testing.assert_array_equal(vectors, 1.0)
    logits = x @ ops.convert_to_numpy(layer.router.kernel)
    left = 1 - np.sort(softmax(logits), axis=-1)[..., -2:].sum(-1)
    np.testing.assert_allclose(
        results[True] - results[False],
        np.repeat(left[..., None], DIM, axis=-1),
        atol=1e-5,
    )


def test_renormalised_it_starts_as_the_dense_model_and_trains():
    dense = models.dense_pairs()
    moe = ku.upcycle_model(dense, EXPERTS, router="default_moe", seed=0)
    x = np.random.default_rng(0).normal(size=(16, *dense.input_shape[1:]))
    x = x.astype("float32")
    report = ku.verify_upcycle(dense, moe, x)
    assert report.relative_difference < 1e-5
    inputs = ops.convert_to_tensor(x)
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.stop_gradient(moe(inputs, training=True))),
        ops.convert_to_numpy(ops.stop_gradient(dense(inputs, training=True))),
        atol=1e-5,
    )
    y = np.zeros((16, *dense.output_shape[1:]), "float32")
    moe.compile("sgd", "mse")
    moe.fit(x, y, epochs=2, batch_size=8, verbose=0)
    routers = [m.router for m in moe.layers if hasattr(m, "router")]
    for router in routers:
        assert ops.convert_to_numpy(router.default_vectors).any()


def test_what_drops_takes_the_default_vector():
    """All tokens want one expert, which has two slots."""
    router = settled(
        top_k=1,
        default_forward="paper",
        capacity_factor=1.0,
        score_weighting="none",
        decay=0.0,
    )
    router.num_experts = EXPERTS
    router.build((None, None, DIM))
    experts = Scaling([1, 1, 1, 1])
    tokens = np.arange(1, 9, dtype="float32").reshape(1, 8, 1)
    tokens = np.tile(tokens, (1, 1, DIM))
    logits = np.tile(np.array([50, 0, 0, 0], "float32"), (1, 8, 1))
    outputs = call(
        router,
        experts,
        "capacity",
        ops.convert_to_tensor(tokens),
        ops.convert_to_tensor(logits),
    )
    outputs = ops.convert_to_numpy(ops.stop_gradient(outputs))[0, :, 0]
    np.testing.assert_allclose(outputs, [1, 2, *[1.5] * 6], rtol=1e-5)


@pytest.mark.parametrize("forward", FORWARDS)
def test_all_experts_need_no_vectors(forward):
    layer = layer_of(settled(top_k=EXPERTS, default_forward=forward))
    layer.router.default_vectors.assign(np.full((EXPERTS, DIM), 1e6))
    plain = layer_of(
        ku.TopKRouter(EXPERTS, capacity_factor=None, load_balance_loss=0.0)
    )
    plain.router.kernel.assign(layer.router.kernel)
    x = drawn(6)[0]
    for training in (False, True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(
                ops.stop_gradient(layer(x, training=training))
            ),
            ops.convert_to_numpy(
                ops.stop_gradient(plain(x, training=training))
            ),
            atol=1e-5,
        )


def test_constant_experts_have_the_dense_gradient():
    """Once the vectors have settled (equation 9 without an error)."""
    constants = np.random.default_rng(7).normal(size=(EXPERTS, DIM))

    class Constant(Scaling):
        def apply_slots(self, slots, training=None):
            row = ops.reshape(constants.astype("float32"), (EXPERTS, 1, DIM))
            return ops.zeros_like(slots) + row

    router = built(top_k=1, default_forward="paper", score_weighting="none")
    router.default_vectors.assign(constants)
    tokens, logits = drawn(8)
    cotangent = np.random.default_rng(9).normal(size=tokens.shape)

    def scalar(logits):
        outputs = call(
            router, Constant(np.ones(EXPERTS)), "dense", tokens, logits
        )
        return ops.sum(ops.multiply(outputs, cotangent.astype("float32")))

    with keras.StatelessScope():
        _, _, (received,) = gradients.pull_back(scalar, logits)
    p = softmax(logits.astype("float64"))
    by_p = cotangent @ constants.T
    expected = p * (by_p - (p * by_p).sum(-1, keepdims=True))
    np.testing.assert_allclose(received, expected, atol=1e-5)


def test_router_gradients_are_nearer_to_the_dense_ones():
    """Figure 4 in miniature: the mean cosine over 20 random layers."""
    experts, _ = bank()
    cosines = {"default": [], "top_k": []}
    program = {}

    def scalar_of(name):
        router = built(top_k=1, default_forward="paper", decay=0.0)

        def scalar(logits, tokens, cotangent, up, down):
            experts.expert_up.kernel.assign(up)
            experts.expert_down.kernel.assign(down)
            if name == "default":
                outputs = call(router, experts, "dense", tokens, logits)
            else:
                k = EXPERTS if name == "dense" else 1
                chosen = functional.top_k(logits, k, normalize=False)
                outputs = dense(tokens, chosen, experts, True)
            return ops.sum(ops.multiply(outputs, cotangent))

        return gradients.compiled_pull_back(scalar)

    program = {name: scalar_of(name) for name in ("default", "top_k", "dense")}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        arrays = (
            rng.normal(size=(1, 64, EXPERTS)),
            rng.normal(size=(1, 64, DIM)),
            rng.normal(size=(1, 64, DIM)) + rng.normal(size=DIM),
            rng.normal(size=(EXPERTS, DIM, HIDDEN)),
            rng.normal(size=(EXPERTS, HIDDEN, DIM)) + 1.0,
        )
        arrays = [a.astype("float32") for a in arrays]
        found = {}
        for name, pull_back in program.items():
            with keras.StatelessScope():
                found[name] = pull_back(*arrays)[2][0].ravel()
        for name, values in cosines.items():
            a, b = found[name], found["dense"]
            values.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.mean(cosines["default"]) > np.mean(cosines["top_k"]) + 0.02


@pytest.mark.one_backend
def test_vectors_are_float32_saved_and_not_trained(tmp_path):
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router=ku.DefaultMoERouter(top_k=2),
        dtype="mixed_bfloat16",
        name="moe",
    )
    model = keras.Sequential([keras.Input((7, DIM)), layer])
    vectors = layer.router.default_vectors
    assert vectors.dtype == "float32"
    assert id(vectors) not in {id(v) for v in model.trainable_variables}
    x, _ = drawn(10)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    before = ops.convert_to_numpy(vectors)
    assert before.any()
    model.predict(x, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(vectors), before)
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    router = again.layers[0].router
    np.testing.assert_array_equal(
        ops.convert_to_numpy(router.default_vectors), before
    )
    assert router.get_config() == layer.router.get_config()
    layer.router.trainable = False
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(vectors), before)


@pytest.mark.one_backend
def test_pruning_keeps_the_vectors_of_those_that_stay():
    router = ku.DefaultMoERouter(top_k=1, default_forward="paper")
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN, router=router, name="moe")
    model = keras.Sequential([keras.Input((7, DIM)), layer])
    numbers = np.arange(EXPERTS * DIM, dtype="float32").reshape(EXPERTS, DIM)
    router.default_vectors.assign(numbers)
    smaller, _ = ku.prune_experts(model, keep={model.name: [1, 3]})
    kept = smaller.layers[0].router.default_vectors
    np.testing.assert_array_equal(ops.convert_to_numpy(kept), numbers[[1, 3]])


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_forward": "both"}, "default_forward='both'"),
        ({"score_weighting": "mean"}, "score_weighting='mean'"),
        ({"decay": 1.0}, "below 1.*decay=1.0"),
        ({"decay": -0.5}, "decay=-0.5"),
        ({"normalize": False}, "needs `normalize=True`.*normalize=False"),
        ({"softmax": "after_top_k"}, "softmax='after_top_k'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ku.DefaultMoERouter(**settings)


@pytest.mark.one_backend
def test_by_name_and_by_recipe():
    assert isinstance(get_router("default_moe"), ku.DefaultMoERouter)
    moe = ku.upcycle_model(
        models.dense_pairs(), EXPERTS, recipe="default_moe", seed=0
    )
    routers = [m.router for m in moe.layers if hasattr(m, "router")]
    assert routers
    for router in routers:
        assert isinstance(router, ku.DefaultMoERouter)
        assert router.capacity_factor is None

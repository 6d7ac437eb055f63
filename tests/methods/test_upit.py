"""UpIT, step by step, against its definition; and all steps in a row."""

import warnings

import gradients
import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle as ku
from keras_upcycle.analysis import assignments
from keras_upcycle.conversion import pairing
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.methods.upit import buckets as sorting
from keras_upcycle.methods.upit.working_copy import (
    RoutingVectorRouter,
    WorkingCopy,
    attraction,
    samples_of,
)

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")

CLASSES = 3
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def expert_of(seed, scale=1.0, model=None):
    """An expert for `dense_pairs`, drawn."""
    rng = np.random.default_rng(seed)
    base = ku.ExpertWeights.from_model(model or models.dense_pairs())
    return ku.ExpertWeights(
        [
            {
                name: scale * rng.normal(size=value.shape).astype("float32")
                for name, value in block.items()
            }
            for block in base.blocks
        ]
    )


def flat(expert, base=None):
    """All weights of an expert as one vector, less those of a base."""
    parts = [value.ravel() for _, value in expert.items()]
    vector = np.concatenate(parts).astype("float64")
    return vector if base is None else vector - flat(base)


# Step 1: checkpoints.


def stepped(count):
    """The feed-forward weights after each of `count` steps, from NumPy on."""
    model, (x, y) = tuned(), data_of(count)
    found = []
    for step in range(count):
        part = slice(4 * step, 4 * step + 4)
        model.train_on_batch(x[part], y[part])
        found.append(ku.ExpertWeights.from_model(model))
    return found


def tuned():
    model = models.fixed(models.dense_pairs())
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    return model


def data_of(steps):
    y = np.arange(4 * steps) % CLASSES
    return models.tokens(4 * steps, models.WIDTH), y


def fit(model, callback, steps=8, **more):
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0, **more}
    return model.fit(*data_of(steps), callbacks=[callback], **arguments)


@pytest.mark.one_backend
@pytest.mark.parametrize("where", ["memory", "directory"])
def test_checkpoints_are_the_weights_of_their_steps(where, tmp_path):
    directory = tmp_path / "experts" if where == "directory" else None
    checkpoints = ku.ExpertCheckpoints(directory=directory)
    fit(tuned(), checkpoints)
    assert checkpoints.steps == [2, 4, 6, 8]
    expected = stepped(8)
    for step, expert in zip(
        checkpoints.steps, checkpoints.experts, strict=True
    ):
        np.testing.assert_allclose(
            flat(expert), flat(expected[step - 1]), atol=1e-6
        )
        assert expert.description == f"step {step}"
        assert expert.others is None
    if directory:
        assert len(list(directory.iterdir())) == 4
        assert len(ku.ExpertCheckpoints.load(directory)) == 4


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every": 1.0}, [8, 16]),
        ({"every": 1.5}, [12]),
        ({"every": 0.3}, [3, 5, 8, 10, 12, 15]),
        ({"every_steps": 5}, [5, 10, 15]),
    ],
)
def test_intervals_go_on_across_epochs(settings, steps):
    checkpoints = ku.ExpertCheckpoints(**settings)
    fit(tuned(), checkpoints, epochs=2)
    assert checkpoints.steps == steps


@pytest.mark.one_backend
def test_a_run_that_goes_on_goes_on_in_its_folder(tmp_path):
    model, folder = tuned(), tmp_path / "experts"
    fit(model, ku.ExpertCheckpoints(0.5, directory=folder))
    after = model.get_weights(), int(model.optimizer.iterations)
    fit(model, ku.ExpertCheckpoints(0.5, directory=folder))
    assert ku.ExpertCheckpoints(directory=folder).steps == [4, 8, 12, 16]
    # Back to step 8, as from a backup: what came after is done again.
    model.set_weights(after[0])
    model.optimizer.iterations.assign(after[1])
    checkpoints = ku.ExpertCheckpoints(every_steps=6, directory=folder)
    fit(model, checkpoints)
    assert checkpoints.steps == [4, 8, 12]
    # A new model starts anew.
    fit(tuned(), ku.ExpertCheckpoints(1.0, directory=folder))
    assert ku.ExpertCheckpoints(directory=folder).steps == [8]


def test_a_model_around_the_dense_one_may_train():
    dense = models.dense_pairs()
    around = keras.Model(dense.input, layers.Softmax()(dense.output))
    around.compile("sgd", "sparse_categorical_crossentropy")
    checkpoints = ku.ExpertCheckpoints(1.0, model=dense, other_weights=True)
    fit(around, checkpoints)
    (expert,) = checkpoints.experts
    now = ku.ExpertWeights.from_model(dense, other_weights=True)
    for (_, one), (_, other) in zip(expert.items(), now.items(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(expert.others) == 2


@pytest.mark.one_backend
def test_checkpoints_say_what_is_wrong():
    with pytest.raises(ValueError, match="every=0"):
        ku.ExpertCheckpoints(0)
    with pytest.raises(TypeError, match=r"every_steps=2\.5"):
        ku.ExpertCheckpoints(every_steps=2.5)
    moe = ku.upcycle_model(models.dense_pairs(), 2)
    moe.compile("sgd", CROSS_ENTROPY)
    with pytest.raises(ku.UpcycleError, match="holds MoE layers"):
        fit(moe, ku.ExpertCheckpoints())

    def endless():
        while True:
            yield data_of(1)

    with pytest.raises(ValueError, match="Pass `every_steps`"):
        tuned().fit(endless(), callbacks=[ku.ExpertCheckpoints()], verbose=0)


# Step 2: expansion.


def pool_with_a_distant_pair(base):
    """Experts 1 and 3 point in opposite directions, others alike."""
    start, direction = flat(base), flat(expert_of(1))
    other = flat(expert_of(2))
    deltas = [
        direction + 0.1 * other,
        direction,
        direction - 0.1 * other,
        -direction,
        direction + 0.2 * other,
    ]
    return [from_flat(start + d, base) for d in deltas]


def from_flat(vector, like):
    blocks, place = [], 0
    for block in like.blocks:
        made = {}
        for name, value in block.items():
            part = vector[place : place + value.size]
            made[name] = part.reshape(value.shape).astype("float32")
            place += value.size
        blocks.append(made)
    return ku.ExpertWeights(blocks)


def coefficients(child, parents, base):
    """Of a child in its parents, by least squares, and what is left."""
    a = np.stack([flat(parent, base) for parent in parents], axis=1)
    solution, *_ = np.linalg.lstsq(a, flat(child, base), rcond=None)
    return solution, np.abs(a @ solution - flat(child, base)).max()


@pytest.mark.one_backend
def test_the_most_distant_pair_has_a_child():
    base = expert_of(0)
    pool = pool_with_a_distant_pair(base)
    grown = ku.expand_experts(pool, 6, base, drop_rate=0.0, seed=3)
    assert all(a is b for a, b in zip(grown, pool, strict=False))
    # Parents 1 and 3 are collinear with the base: a child is on their line.
    step = flat(grown[5], base)
    line = flat(pool[1], base)
    share = (step @ line / (line @ line) + 1) / 2
    assert 0 <= share <= 1
    np.testing.assert_allclose(step, (2 * share - 1) * line, atol=1e-5)
    assert "expert 1 and" in grown[5].description
    assert f"{share:.3f}" in grown[5].description
    assert "expert 3" in grown[5].description


@pytest.mark.one_backend
def test_without_drops_a_child_is_the_merge_of_its_parents():
    """The same two, in the same shares, in every block."""
    base, pool = expert_of(0), [expert_of(1), expert_of(2)]
    *_, child = ku.expand_experts(pool, 3, base, drop_rate=0.0, seed=1)
    shares, left = coefficients(child, pool, base)
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert 0 <= shares.min()
    assert left < 1e-5
    np.testing.assert_allclose(
        flat(child), shares @ np.stack([flat(e) for e in pool]), atol=1e-5
    )


@pytest.mark.one_backend
def test_drops_leave_the_mean_and_take_their_share():
    base, pool = expert_of(0), [expert_of(1), expert_of(2)]
    merged, dropped = [], []
    for seed in range(200):
        # The share is drawn first, so both have the same.
        *_, plain = ku.expand_experts(pool, 3, base, drop_rate=0.0, seed=seed)
        *_, child = ku.expand_experts(pool, 3, base, drop_rate=0.6, seed=seed)
        merged.append(flat(plain, base))
        dropped.append(flat(child, base))
    merged, dropped = np.array(merged), np.array(dropped)
    # Both parents' entries fall out: 0.6 * 0.6 of all.
    assert (dropped == 0).mean() == pytest.approx(0.36, abs=0.005)
    error = (dropped - merged).mean(0)
    spread = dropped.std(0) / 200**0.5
    assert np.abs(error / spread).mean() < 1.0
    assert np.abs(error).mean() < 0.1 * np.abs(merged).mean()
    # What is left of one parent alone is scaled by 1 / (1 - 0.6).
    alone = ku.expand_experts([pool[0], base], 3, base, drop_rate=0.6, seed=0)[
        -1
    ]
    kept = flat(alone, base) != 0
    ratio = flat(alone, base)[kept] / flat(pool[0], base)[kept]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    share = float(np.random.default_rng(0).random())
    assert ratio[0] == pytest.approx(share / 0.4, rel=1e-3)


@pytest.mark.one_backend
def test_a_child_may_be_a_parent():
    """Three points on a line: the ends' child, then another of the ends."""
    base = expert_of(0)
    pool = [expert_of(1), expert_of(2)]
    grown = ku.expand_experts(
        pool, 6, base, drop_rate=0.0, parents="random", seed=2
    )
    described = " ".join(expert.description for expert in grown[2:])
    assert any(f"expert {n}" in described for n in (2, 3, 4))
    for expert in grown[2:]:
        shares, left = coefficients(expert, pool, base)
        assert left < 1e-5
        assert shares.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.one_backend
def test_equal_pairs_go_to_the_lowest_numbers():
    base, one = expert_of(0), expert_of(1)
    away = from_flat(flat(base) - flat(one, base), base)
    pool = [one, one, away, away]
    for seed in range(3):
        *_, child = ku.expand_experts(pool, 5, base, seed=seed)
        assert "expert 0 and" in child.description
        assert "expert 2" in child.description
    still = ku.expand_experts([base, base], 3, base, seed=0)[-1]
    np.testing.assert_allclose(flat(still), flat(base), atol=1e-6)


@pytest.mark.one_backend
def test_expansion_says_what_is_wrong():
    base, pool = expert_of(0), [expert_of(1), expert_of(2)]
    with pytest.raises(ValueError, match=r"num_experts=1 and 2.*\[-1:\]"):
        ku.expand_experts(pool, 1, base)
    with pytest.raises(ValueError, match="two parents"):
        ku.expand_experts(pool[:1], 3, base)
    with pytest.raises(ValueError, match="drop_rate=1"):
        ku.expand_experts(pool, 3, base, drop_rate=1.0)
    with pytest.raises(ValueError, match="parents='near'"):
        ku.expand_experts(pool, 3, base, parents="near")
    with pytest.raises(TypeError, match="base=None"):
        ku.expand_experts(pool, 3, None)
    with pytest.raises(ku.UpcycleError, match="Expert 0 must have"):
        ku.expand_experts(pool, 3, models.vit_backbone(4))
    assert ku.expand_experts(pool, 2, base) == pool


# Step 3: buckets.


def speaker():
    """A model that says what its block's output bias says."""
    model = keras.Sequential(
        [
            keras.Input((None, CLASSES)),
            layers.Dense(6, "relu"),
            layers.Dense(CLASSES),
            layers.Dense(CLASSES, name="head"),
        ]
    )
    model.set_weights([np.zeros(v.shape) for v in model.weights])
    model.get_layer("head").kernel.assign(np.eye(CLASSES))
    return model


def fan_of(label, strength=5.0):
    """An expert that finds one label likeliest, whatever it reads."""
    expert = ku.ExpertWeights.from_model(speaker())
    expert.blocks[0]["down_bias"][label] = strength
    return expert


def oracle(logits, labels, weights):
    """Perplexity of one sample, token by token."""
    total = 0.0
    for label, weight in zip(labels, weights, strict=True):
        p = np.exp(logits) / np.exp(logits).sum()
        total -= weight * np.log(p[label])
    return np.exp(total / sum(weights))


def test_samples_go_to_the_expert_that_finds_them_likeliest():
    y = np.array(
        [[0, 0, 1], [2, 2, 2], [0, 0, 1], [0, 1, 2], [1, 1, 0], [1, 0, 0]]
    )
    # The third counts its answer alone, the last no padding.
    weights = np.ones(y.shape, "float32")
    weights[2] = [0, 0, 1]
    weights[5] = [2, 0, 0]
    x = models.tokens(*y.shape, CLASSES)
    experts = [fan_of(label) for label in range(CLASSES)]
    found = ku.perplexity_buckets(
        experts, speaker(), (x, y, weights), batch_size=4, verbose=0
    )
    # A tie of all three, in the fourth, goes to the first.
    assert found.index.tolist() == [0, 2, 1, 0, 1, 1]
    assert found.index.dtype == "int32"
    for number in range(CLASSES):
        logits = 5.0 * np.eye(CLASSES)[number]
        for row in range(len(y)):
            assert found.perplexity[row, number] == pytest.approx(
                oracle(logits, y[row], weights[row]), rel=1e-5
            )


def test_probabilities_will_do():
    model = speaker()
    model.add(layers.Softmax())
    y = np.array([[0, 0], [1, 1]])
    found = ku.perplexity_buckets(
        [fan_of(0), fan_of(1)],
        model,
        (np.zeros((2, 2, CLASSES)), y),
        from_logits=False,
        verbose=0,
    )
    assert found.index.tolist() == [0, 1]
    p = np.exp(5) / (np.exp(5) + 2)
    assert found.perplexity[0, 0] == pytest.approx(1 / p, rel=1e-5)


@pytest.mark.one_backend
def test_random_buckets_are_even():
    found = sorting.random_buckets(10, 4, seed=0)
    assert sorted(np.bincount(found.index)) == [2, 2, 3, 3]
    again = sorting.random_buckets(10, 4, seed=0)
    assert found.index.tolist() == again.index.tolist()
    other = sorting.random_buckets(10, 4, seed=1)
    assert found.index.tolist() != other.index.tolist()


@pytest.mark.one_backend
def test_buckets_say_what_is_wrong():
    experts, x = [fan_of(0)], np.zeros((2, 2, CLASSES))
    y = np.zeros((2, 2), "int32")
    bad = [
        ((x, y, [[1, 1], [0, 0]]), ValueError, "number 1"),
        ((x, y[:1]), ValueError, r"\[1, 2\]"),
        ((x, y, np.ones((2, 3))), ValueError, r"shape \(2, 3\)"),
        ([x, y], TypeError, "list"),
        ((x, y[:, :1]), ku.UpcycleError, r"\(2, 1\)"),
    ]
    for data, error, expected in bad:
        with pytest.raises(error, match=expected):
            ku.perplexity_buckets(experts, speaker(), data, verbose=0)
    with pytest.raises(ku.UpcycleError, match="Expert 0 must have"):
        ku.perplexity_buckets([expert_of(0)], speaker(), (x, y), verbose=0)
    with pytest.raises(TypeError, match="number 0 of type str"):
        ku.perplexity_buckets(["a"], speaker(), (x, y), verbose=0)
    with pytest.raises(ValueError, match="at least one expert"):
        ku.perplexity_buckets([], speaker(), (x, y), verbose=0)


# Step 3: routing vectors.


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_the_attraction_and_its_gradient():
    z = np.array([[[-2.0], [0.5], [3.0]], [[1.0], [90.0], [-90.0]]], "float32")
    value, (gradient,) = value_and_gradient(attraction, z)
    expected = np.where(z > -50, -np.log(sigmoid(np.maximum(z, -50))), -z)
    assert value == pytest.approx(expected.mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, (sigmoid(z) - 1) / 6, atol=1e-6)


def test_padding_attracts_nothing():
    z = np.array([[[-2.0], [np.inf]], [[np.nan], [3.0]]], "float32")
    mask = np.array([[True, False], [False, True]])
    value, (gradient,) = value_and_gradient(
        lambda t: attraction(t, ops.convert_to_tensor(mask)), z
    )
    real = np.array([-2.0, 3.0])
    assert value == pytest.approx(-np.log(sigmoid(real)).mean(), rel=1e-5)
    np.testing.assert_allclose(
        gradient[mask][:, 0], (sigmoid(real) - 1) / 2, atol=1e-6
    )
    assert (gradient[~mask] == 0).all()


def value_and_gradient(function, z):
    value, _, found = gradients.pull_back(function, z)
    return value, found


def test_the_loss_is_the_papers_mixture():
    """alpha times the model's loss and 1 - alpha times the attraction's."""
    dense = models.dense_pairs()
    x, y = data_of(2)
    expert = ku.ExpertWeights.from_model(dense)
    copy = WorkingCopy(
        dense, [expert], router=None, layers=None, weight=1 - 0.3
    )
    copy.place(expert)
    copy.compile(0.3, 1e-3, True, False)
    ((index, layer),) = copy.layers.items()
    vector = models.tokens(models.WIDTH, 1)
    layer.router.kernel.assign(vector)
    with record_calls() as calls:
        logits = models.array(copy.model(x))
    h = models.array(calls[0].inputs)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    of_model = -np.log(p[np.arange(len(y)), y]).mean()
    pull = -np.log(sigmoid(h @ vector)).mean()
    loss = copy.model.train_on_batch(x, y)
    loss = loss[0] if isinstance(loss, (list, tuple)) else loss
    assert float(loss) == pytest.approx(0.3 * of_model + 0.7 * pull, rel=1e-4)
    # The dense model is what it was, and so is the expert.
    assert index == 1
    np.testing.assert_array_equal(flat(copy.placed(expert)), flat(expert))
    assert not np.array_equal(models.array(layer.router.kernel), vector)


def two_domains(count=64, seed=0):
    """One feature tells two domains, whose rules for labels contradict.

    The others are noise, so that a router drawn at random sees no domains.
    """
    rng = np.random.default_rng(seed)
    domain = np.arange(count) % 2
    x = rng.normal(size=(count, models.WIDTH))
    y = (x[:, 1 : 1 + CLASSES].argmax(1) + domain) % CLASSES
    x[:, 0] = 2.0 - 4.0 * domain + 0.3 * x[:, 0]
    return x.astype("float32"), y.astype("int32"), domain


@pytest.mark.one_backend
def test_a_vector_turns_to_its_own_samples():
    x, y, domain = two_domains()
    dense = models.dense_pairs()
    before = models.weights(dense)
    experts = [ku.ExpertWeights.from_model(dense)] * 2
    arguments = {"learning_rate": 0.01, "batch_size": 8, "seed": 0}
    vectors = ku.routing_vectors(
        experts, dense, (x, y), domain, verbose=0, **arguments
    )
    (kernel,) = vectors.kernels.values()
    assert kernel.shape == (models.WIDTH, 2)
    moe = ku.upcycle_model(
        dense, 2, router="top_k", expert_init=ku.UpIT(experts, vectors)
    )
    with record_calls() as calls:
        moe(x)
    near = sigmoid(models.array(calls[0].inputs)[:, :] @ kernel)
    near = near.reshape(-1, 2)
    for own in range(2):
        mine, other = (near[domain == d, own].mean() for d in (own, 1 - own))
        assert mine > other + 0.05
    # The experts and the dense model are what they were.
    assert all(a is b for a, b in zip(vectors.experts, experts, strict=True))
    models.assert_same_weights(dense, before)
    again = ku.routing_vectors(
        experts, dense, (x, y), domain, verbose=0, **arguments
    )
    np.testing.assert_allclose(again.kernels[1], kernel, atol=1e-6)


def test_experts_may_train_with_their_vectors():
    x, y, domain = two_domains(32)
    dense = models.dense_pairs()
    dense.trainable = False  # what is tuned here trains all the same
    experts = [ku.ExpertWeights.from_model(dense)] * 2
    vectors = ku.routing_vectors(
        experts,
        dense,
        (x, y),
        domain,
        train_experts=True,
        learning_rate=0.01,
        batch_size=16,
        verbose=0,
    )
    first, second = vectors.experts
    for one in (first, second):
        # Block 1 is converted; block 0 is not.
        for name, value in experts[0].blocks[0].items():
            np.testing.assert_array_equal(one.blocks[0][name], value)
        moved = one.blocks[1]["up_kernel"] - experts[0].blocks[1]["up_kernel"]
        assert np.abs(moved).max() > 1e-3
    assert not np.array_equal(
        first.blocks[1]["up_kernel"], second.blocks[1]["up_kernel"]
    )


def test_a_larger_bucket_makes_no_larger_vector():
    """Unless the paper's letter is asked for: then it wins everywhere."""
    rng = np.random.default_rng(0)
    x = 1.0 + 0.1 * rng.normal(size=(48, models.WIDTH)).astype("float32")
    y = np.zeros(48, "int32")
    dense = models.dense_pairs()
    experts = [ku.ExpertWeights.from_model(dense)] * 2
    buckets = (np.arange(48) >= 4).astype("int32")  # 4 and 44 samples
    gaps = {}
    for equal in (True, False):
        vectors = ku.routing_vectors(
            experts,
            dense,
            (x, y),
            buckets,
            batch_size=4,
            learning_rate=0.01,
            equal_steps=equal,
            layers=[0],
            seed=0,
            verbose=0,
        )
        logits = x @ vectors.kernels[0]
        gaps[equal] = (logits[:, 1] - logits[:, 0]).mean()
    assert abs(gaps[True]) < 0.3
    assert gaps[False] > 2


def test_an_empty_bucket_leaves_its_vector_random():
    x, y, _ = two_domains(8)
    dense = models.dense_pairs()
    experts = [ku.ExpertWeights.from_model(dense)] * 3
    made = []
    for epochs in (1, 3):
        with pytest.warns(UserWarning, match=r"Experts \[1\] are best at no"):
            vectors = ku.routing_vectors(
                experts,
                dense,
                (x, y),
                np.array([0, 2] * 4),
                epochs=epochs,
                seed=4,
                verbose=0,
            )
        made.append(vectors.kernels[1])
    np.testing.assert_array_equal(made[0][:, 1], made[1][:, 1])
    assert 0.005 < made[0][:, 1].std() < 0.05
    assert not np.array_equal(made[0][:, 0], made[1][:, 0])
    with pytest.raises(ValueError, match="from 0 to 2"):
        ku.routing_vectors(experts, dense, (x, y), np.arange(8), verbose=0)
    with pytest.raises(ValueError, match="alpha=2"):
        ku.routing_vectors(
            experts, dense, (x, y), np.zeros(8, "int32"), alpha=2
        )


@pytest.mark.one_backend
@pytest.mark.parametrize("alpha", [0.5, 0.3, 1.0])
def test_an_alpha_that_would_do_nothing_is_refused(alpha):
    dense = models.dense_pairs()
    experts = [expert_of(s) for s in range(2)]
    x, y = data_of(2)
    before = models.weights(dense)
    message = rf"alpha={alpha} with train_experts=False.*Leave `alpha` out"
    with pytest.raises(ValueError, match=message):
        ku.routing_vectors(
            experts, dense, (x, y), np.arange(8) % 2, alpha=alpha, verbose=0
        )
    with pytest.raises(ValueError, match=message):
        ku.upit_upcycle(dense, 2, experts, (x, y), alpha=alpha, verbose=0)
    with pytest.raises(ValueError, match=r"alpha=.*router_init='random'"):
        ku.upit_upcycle(
            dense,
            2,
            experts,
            alpha=alpha,
            router_init="random",
            train_experts=True,
        )
    models.assert_same_weights(dense, before)


def test_alpha_does_something_where_experts_train():
    dense = models.dense_pairs()
    experts = [expert_of(s) for s in range(2)]
    x, y = data_of(2)
    found = []
    for alpha in (None, 0.5, 0.9):
        vectors = ku.routing_vectors(
            experts,
            dense,
            (x, y),
            np.arange(8) % 2,
            alpha=alpha,
            train_experts=True,
            epochs=1,
            seed=0,
            verbose=0,
        )
        found.append(flat(vectors.experts[0]))
    np.testing.assert_array_equal(found[0], found[1])  # the paper's
    assert not np.allclose(found[0], found[2], atol=1e-7)


def test_the_vectors_router_belongs_to_one_expert():
    with pytest.raises(ValueError, match="num_experts=2"):
        ku.MoEFeedForward(2, 8, router=RoutingVectorRouter())
    layer = ku.MoEFeedForward(1, 8, router=RoutingVectorRouter(0.25))
    again = ku.MoEFeedForward.from_config(layer.get_config())
    assert again.router.weight == 0.25
    assert again.router.losses_by_name() == {"attraction": 0.25}


def test_samples_may_be_tensors():
    x, y = data_of(1)
    samples = samples_of((ops.convert_to_tensor(x), ops.convert_to_tensor(y)))
    assert isinstance(samples.x, np.ndarray)
    assert samples.sample_weight.tolist() == [1, 1, 1, 1]


# Step 4: assembly.


def test_as_many_checkpoints_as_experts_are_them_in_order():
    dense = models.dense_pairs()
    experts = [expert_of(seed) for seed in range(3)]
    moe = ku.upcycle_model(
        dense, 3, expert_init=ku.UpIT(experts), layers=[0, 1]
    )
    _, places = pairing.converted(dense, moe)
    assert len(places) == 2
    for site, layer in places:
        for name in site.kernels:
            role, part = name.split("_")
            weight = getattr(layer.experts.projections[role], part)
            for number, expert in enumerate(experts):
                value = expert.blocks[site.index][name]
                np.testing.assert_array_equal(
                    models.array(weight)[number].reshape(value.shape), value
                )
    np.testing.assert_array_equal(
        models.array(moe.get_layer("head").kernel),
        models.array(dense.get_layer("head").kernel),
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("which", ["last", "average"])
def test_other_weights_may_come_from_the_pool(which):
    dense = models.dense_pairs()
    tuned_models = [
        models.randomized(models.dense_pairs(), seed) for seed in (1, 2)
    ]
    experts = [
        ku.ExpertWeights.from_model(m, other_weights=True) for m in tuned_models
    ]
    pool = [*experts, expert_of(3)]  # a child, which holds no others
    init = ku.UpIT(pool, other_weights=which)
    moe = ku.upcycle_model(dense, 3, expert_init=init)
    heads = [models.array(m.get_layer("head").kernel) for m in tuned_models]
    expected = heads[1] if which == "last" else (heads[0] + heads[1]) / 2
    np.testing.assert_allclose(
        models.array(moe.get_layer("head").kernel), expected, atol=1e-6
    )
    with pytest.raises(ValueError, match='other_weights="model"'):
        ku.UpIT([expert_of(1)], other_weights=which)


@pytest.mark.one_backend
def test_assembly_says_what_is_wrong():
    dense = models.dense_pairs()
    before = models.weights(dense)
    experts = [expert_of(0), expert_of(1)]
    with pytest.raises(ValueError, match=r"2 for num_experts=3.*`expand_exp"):
        ku.upcycle_model(dense, 3, expert_init=ku.UpIT(experts))
    with pytest.raises(ValueError, match=r"\[-1:\]"):
        ku.upcycle_model(dense, 1, expert_init=ku.UpIT(experts))
    for kernels, got in (
        ({0: np.ones((16, 2))}, "none"),
        ({1: np.ones((16, 3))}, r"shape \(16, 3\)"),
    ):
        init = ku.UpIT(experts, kernels)
        with pytest.raises(ValueError, match=f"Received: {got} for block 1"):
            ku.upcycle_model(dense, 2, expert_init=init)
    with pytest.raises(ValueError, match="base=None with 2"):
        ku.upit_upcycle(dense, 3, experts, data_of(1))
    with pytest.raises(ValueError, match="expand_experts"):
        ku.upit_upcycle(dense, 3, experts, data_of(1), expand=False)
    with pytest.raises(ValueError, match="data=None"):
        ku.upit_upcycle(dense, 2, experts)
    with pytest.raises(ValueError, match="router_init='best'"):
        ku.upit_upcycle(dense, 2, experts, router_init="best")
    models.assert_same_weights(dense, before)


# All steps.


@pytest.mark.one_backend
def test_a_t5_from_checkpoints_to_training(tmp_path):
    """Padding changes nothing; tasks do not preprocess again."""
    dense = models.t5_lm(
        models.t5_backbone(1, dropout=0.0),
        preprocessor=models.t5_preprocessor(),
    )
    base = ku.ExpertWeights.from_model(dense)
    experts = [
        ku.ExpertWeights.from_model(models.randomized(dense, seed))
        for seed in (5, 6)
    ]
    x = models.t5_inputs(lengths=[(6, 5), (3, 2), (4, 5), (6, 1)])
    y = np.roll(x["decoder_token_ids"], -1, axis=1)
    weight = x["decoder_padding_mask"].astype("float32")
    made = []
    for filler in (3, 30):
        mine = dict(x)
        for stack in ("encoder", "decoder"):
            mine[f"{stack}_token_ids"] = np.where(
                x[f"{stack}_padding_mask"] == 1,
                x[f"{stack}_token_ids"],
                filler,
            ).astype("int32")
        made.append(
            ku.upit_upcycle(
                dense,
                3,
                experts,
                (mine, y, weight),
                base=base,
                router_init="random_data",
                batch_size=4,
                layers={"encoder": None, "decoder": [0]},
                epochs=1,
                seed=1,
                verbose=0,
            )
        )
    moe = made[0]
    found = models.mixtures(moe)
    assert len(found) == 1  # the encoder stays dense
    for layer, other in zip(found, models.mixtures(made[1]), strict=True):
        kernel = models.array(layer.router.kernel)
        np.testing.assert_allclose(
            kernel, models.array(other.router.kernel), atol=1e-6
        )
        assert kernel.shape == (models.WIDTH, 3)
        assert layer.router.top_k == 2
        assert layer.router.load_balance_loss > 0
    assert moe.preprocessor is not None
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, moe)
    loaded.preprocessor = None
    loaded.compile("adam", CROSS_ENTROPY)
    before = models.array(models.mixtures(loaded)[0].router.kernel)
    loaded.train_on_batch(x, y, weight)
    after = models.array(models.mixtures(loaded)[0].router.kernel)
    assert np.isfinite(after).all()
    assert not np.array_equal(before, after)


def test_columns_are_the_vectors_in_every_layer():
    x, y, domain = two_domains(16)
    dense = models.dense_pairs()
    experts = [expert_of(s, 0.1) for s in range(2)]
    vectors = ku.routing_vectors(
        experts, dense, (x, y), domain, layers=[0, 1], verbose=0
    )
    moe = ku.upcycle_model(
        dense, 2, layers=[0, 1], expert_init=ku.UpIT(experts, vectors)
    )
    places = pairing.converted(dense, moe)[1]
    assert [site.index for site, _ in places] == [0, 1]
    for site, layer in places:
        np.testing.assert_array_equal(
            models.array(layer.router.kernel), vectors.kernels[site.index]
        )


@pytest.mark.one_backend
def test_upit_converts_what_its_recipe_does():
    x, y, _ = two_domains(16)
    dense = models.vit_backbone(3)
    pairs = models.dense_pairs(blocks=3)
    for model, data in ((dense, None), (pairs, (x, y))):
        experts = [ku.ExpertWeights.from_model(model)] * 2
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r".*first block")
            moe = ku.upit_upcycle(
                model,
                2,
                experts,
                data,
                router_init="random" if data is None else "random_data",
                epochs=1,
                verbose=0,
                seed=0,
            )
        assert len(models.mixtures(moe)) == 3


def information(moe, x, domain):
    (share,) = ku.expert_assignments(moe, x, domain).values()
    return assignments.mutual_information(share)


@pytest.mark.one_backend
def test_upit_specialises_where_copies_do_not():
    """One domain, then the other, then both: who tells them apart."""
    x, y, domain = two_domains(256)
    dense = models.dense_pairs()
    dense.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY)
    order = [np.tile(np.flatnonzero(domain == kind), 12) for kind in (0, 1)]
    order = np.concatenate(order)
    checkpoints = ku.ExpertCheckpoints(0.5)
    dense.fit(
        x[order],
        y[order],
        batch_size=16,
        shuffle=False,
        verbose=0,
        callbacks=[checkpoints],
    )
    router = ku.TopKRouter(top_k=1, capacity_factor=None)
    where = {"router": router, "layers": "last_half"}
    made = {"copies": ku.upcycle_model(dense, 2, **where, seed=0)}
    for init in ("perplexity", "random_data"):
        made[init] = ku.upit_upcycle(
            dense,
            2,
            checkpoints.experts,
            (x[:64], y[:64]),
            **where,
            router_init=init,
            learning_rate=0.01,
            batch_size=16,
            seed=0,
            verbose=0,
        )
    held_out, _, kind = two_domains(128, seed=1)
    found = {}
    for name, moe in made.items():
        moe.compile(keras.optimizers.Adam(1e-3), CROSS_ENTROPY)
        moe.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
        found[name] = information(moe, held_out, kind)
    assert found["perplexity"] > found["copies"] + 0.1
    # The samples matter, not the training of vectors as such.
    assert found["perplexity"] > found["random_data"] + 0.1


@pytest.mark.one_backend
def test_mutual_information_by_hand():
    share = np.array([[0.75, 0.25], [0.25, 0.75], [np.nan, np.nan]])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert assignments.mutual_information(share) == pytest.approx(expected)
    assert assignments.mutual_information(np.full((2, 4), 0.25)) == 0

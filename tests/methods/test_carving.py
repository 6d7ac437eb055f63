"""Carving: activations counted, neurons grouped, experts chosen, by hand."""

import itertools

import gradients
import hub_models
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.conversion import plan
from keras_upcycle.methods import activation_patterns
from keras_upcycle.methods.activation_patterns import Patterns
from keras_upcycle.methods.neuron_groups import GROUPINGS, cut_of

EXPERTS = 6
BUILDS = {
    "plain": (
        models.sequence_dense_pairs,
        lambda: models.tokens(8, 6, models.WIDTH),
    ),
    "row": (models.sequential, lambda: models.tokens(64, models.WIDTH)),
    "vit": (lambda: models.vit_backbone(2), lambda: models.images(4)),
    "t5": (models.t5_backbone, lambda: models.t5_inputs(8)),
    "llama": (
        lambda: hub_models.dense("LlamaBackbone"),
        lambda: hub_models.inputs_of(hub_models.dense("LlamaBackbone"), 8),
    ),
}


def carved(dense, x, num_experts=EXPERTS, top_k=2, balance=0.0, **settings):
    return ku.upcycle_model(
        dense,
        num_experts,
        recipe="carving",
        router=ku.CarvingRouter(top_k, bias_update_rate=balance),
        expert_init=ku.Carving(x, **settings),
        seed=0,
    )


def places(dense, moe):
    """Site and MoE layer of each block."""
    return list(
        zip(ku.find_feed_forwards(dense), models.mixtures(moe), strict=True)
    )


def neurons_of(networks):
    """Each expert's neurons as rows of all their weights but the last bias."""
    found = []
    for e in range(networks.num_experts):
        parts = []
        for role, projection in networks.projections.items():
            kernel = models.array(projection.kernel)[e]
            parts.append(kernel if role == "down" else kernel.T)
            if role != "down" and projection.bias is not None:
                parts.append(models.array(projection.bias)[e].T)
        found.append(np.concatenate(parts, axis=1))
    return found


def neurons_of_block(site):
    parts = []
    for role in ("gate", "up", "down") if site.gated else ("up", "down"):
        kernel = models.array(site.kernels[f"{role}_kernel"])
        parts.append(kernel if role == "down" else kernel.T)
        if role != "down" and site.use_bias:
            parts.append(models.array(site.kernels[f"{role}_bias"])[:, None])
    return np.concatenate(parts, axis=1)


def numbers_of(networks, site):
    """Which dense neurons each expert holds, by their weights."""
    dense = neurons_of_block(site)
    return [
        [int(np.flatnonzero((dense == row).all(1))[0]) for row in rows]
        for rows in neurons_of(networks)
    ]


# What the sparse model computes.


@pytest.mark.thinned
@pytest.mark.parametrize("kind", BUILDS)
def test_with_all_experts_it_is_the_dense_model(kind):
    build, inputs = BUILDS[kind]
    dense, x = build(), inputs()
    count = 3  # divides what a quarter of every block leaves
    moe = carved(dense, x, count, top_k=count)
    report = ku.verify_upcycle(dense, moe, x)
    assert report.relative_difference < 2e-6
    assert "computes what the dense one does.\n" in str(report)
    estimate = ku.estimate_upcycle(
        dense,
        count,
        recipe="carving",
        router=ku.CarvingRouter(count),
        expert_init=ku.Carving(iter(())),
    )
    assert estimate.total_params == moe.count_params()


@pytest.mark.thinned
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_the_oracles(gated, training):
    layer = random_layer(gated)
    x, cotangent = (models.tokens(2, 4, 5, seed=s) for s in (0, 1))
    weights = {
        v.path.split("/", 1)[1]: models.array(v).astype("float64")
        for v in layer.weights
    }

    def outputs(weights, x=x):
        return oracle(x.astype("float64"), weights, 2, gated)

    received, found = gradients.of_layer(layer, x, cotangent, training=training)
    np.testing.assert_allclose(received, outputs(weights), atol=1e-5)
    rng = np.random.default_rng(2)
    for name, gradient in found.items():
        if name == "inputs":
            continue
        direction = rng.normal(size=gradient.shape)
        slope = reference.slope(
            lambda w: np.sum(outputs(w) * cotangent),
            weights,
            {name: direction},
        )
        assert np.sum(gradient * direction) == pytest.approx(
            slope, rel=2e-3, abs=1e-4
        ), name
    assert {"router/kernel", "router/logits_bias", "router/scale"} <= set(found)
    assert gated == ("router/up_kernel" in found)


def random_layer(gated):
    layer = ku.MoEFeedForward(
        4,
        3,
        ku.CarvingRouter(
            2,
            activation="gelu",
            gated=gated,
            use_bias=True,
            bias_update_rate=0.01,
        ),
        gated=gated,
        output_bias=True,
        shared_intermediate_dim=2,
    )
    layer.build((None, None, 5))
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    # So large that it changes choices.
    layer.router.bias.assign([0.0, 0.4, 0.0, -0.3])
    return layer


def oracle(x, weights, top_k, gated):
    def network(token, owner, e, act=reference.gelu):
        def project(token, role):
            bias = weights.get(f"{owner}/expert_{role}/bias")
            kernel = weights[f"{owner}/expert_{role}/kernel"][e]
            return token @ kernel + (0 if bias is None else bias[e, 0])

        if gated:
            hidden = act(project(token, "gate")) * project(token, "up")
        else:
            hidden = act(project(token, "up"))
        return project(hidden, "down")

    result = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        token = x[place]
        neuron = reference.gelu(
            token @ weights["router/kernel"] + weights["router/logits_bias"]
        )
        if gated:
            neuron = neuron * (
                token @ weights["router/up_kernel"] + weights["router/up_bias"]
            )
        share = reference.softmax(np.abs(neuron))
        result[place] = network(token, "shared", 0)
        result[place] += weights["output_bias/bias"]
        for e in np.argsort(-(share + weights["router/bias"]))[:top_k]:
            weight = 1 + share[e] * weights["router/scale"][e]
            result[place] += weight * network(token, "experts", e)
    return result


def test_at_first_the_task_teaches_the_scale_alone():
    layer = random_layer(gated=True)
    layer.router.scale.assign(np.zeros(4))
    x, cotangent = (models.tokens(2, 4, 5, seed=s) for s in (0, 1))
    _, found = gradients.of_layer(layer, x, cotangent, training=True)
    assert not found["router/kernel"].any()
    assert not found["router/up_kernel"].any()
    assert found["router/scale"].any()


def test_padding_and_dropped_tokens_get_nothing():
    layer = ku.MoEFeedForward(4, 3, ku.CarvingRouter(2, capacity_factor=0.5))
    layer.build((None, None, 5))
    x = models.tokens(2, 6, 5)
    mask = np.arange(6) < np.array([[4], [6]])
    given = {"mask": ops.convert_to_tensor(mask)}
    assert not models.array(layer(x, **given))[~mask].any()
    layer.router.scale.assign(np.ones(4))
    chosen = layer.router(
        ops.reshape(x, (1, 12, 5)),
        mask=ops.reshape(given["mask"], (1, 12)),
        training=True,
    )
    weights = models.array(chosen.weights)
    nowhere = models.array(chosen.experts) == 4
    assert nowhere.any()
    assert not weights[nowhere].any()
    assert (weights[~nowhere] > 1).all()
    assert (weights < 2).all()


# What the model's neurons did.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["plain", "t5"])
def test_rates_are_those_of_the_largest_activations(kind, normalize):
    build, inputs = BUILDS[kind]
    dense, x = build(), inputs()
    sites = ku.find_feed_forwards(dense)[:2]
    found = activation_patterns.recorded(
        dense, x, sites, [5, 3], normalize=normalize, max_tokens=1000
    )
    (first, _) = sites
    tokens = models.array(first_inputs(dense, x)).reshape(-1, models.WIDTH)
    kernels = {n: models.array(v) for n, v in first.kernels.items()}

    def project(role):
        kernel = kernels[f"{role}_kernel"].astype("float64")
        values = tokens @ kernel + kernels.get(f"{role}_bias", 0.0)
        if normalize:
            values /= np.linalg.norm(tokens, axis=1, keepdims=True)
            values /= np.linalg.norm(kernel, axis=0)
        return values

    if kind == "t5":
        sizes = np.abs(reference.gelu(project("gate")) * project("up"))
    else:
        sizes = np.abs(reference.gelu(project("up")))
    order = np.argsort(-sizes, axis=1)
    expected = np.zeros(sizes.shape, bool)
    for token, row in enumerate(order[:, :5]):
        expected[token, row] = True
    np.testing.assert_array_equal(found[0].marks, expected)
    np.testing.assert_allclose(found[0].rates, expected.mean(axis=0))
    assert found[0].tokens == len(tokens)
    assert (found[1].marks.sum(axis=1) == 3).all()


def first_inputs(dense, x):
    """What reaches the first block, seen by a layer that stands there."""
    site = ku.find_feed_forwards(dense)[0]
    seen, layer = [], site.layers[0]
    call = layer.call

    def noted(inputs, *args, **kwargs):
        seen.append(inputs)
        return call(inputs, *args, **kwargs)

    layer.call = noted
    try:
        dense(
            keras.tree.map_structure(ops.convert_to_tensor, x), training=False
        )
    finally:
        del layer.call
    return seen[0]


@pytest.mark.one_backend
def test_padding_does_not_count():
    dense = models.t5_backbone()
    x = models.t5_inputs(lengths=[(4, 3)] * 6)
    longer = {}
    rng = np.random.default_rng(5)
    for name, value in x.items():
        shape = (6, value.shape[1] + 4)
        more = rng.integers(3, models.VOCABULARY, shape).astype("int32")
        if name.endswith("mask"):
            more = np.zeros(shape, "int32")
        more[:, : value.shape[1]] = value
        longer[name] = more
    sites = ku.find_feed_forwards(dense)
    settings = {"normalize": True, "max_tokens": 100}
    one, other = (
        activation_patterns.recorded(dense, i, sites, [4] * 4, **settings)
        for i in (x, longer)
    )
    for a, b in zip(one, other, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_array_equal(a.rates, b.rates)


@pytest.mark.one_backend
def test_batches_add_up_and_marks_stay_few():
    dense = models.sequential()
    x = models.tokens(50, models.WIDTH)
    sites = ku.find_feed_forwards(dense)
    settings = {"normalize": True, "max_tokens": 16}
    (whole, _), (parts, _) = (
        activation_patterns.recorded(dense, i, sites, [4, 4], **settings)
        for i in (x, iter([x[:7], x[7:39], x[39:]]))
    )
    np.testing.assert_allclose(whole.rates, parts.rates)
    assert whole.tokens == parts.tokens == 50
    # Every fourth of 50, whatever the batches.
    assert len(whole.marks) == len(parts.marks) == 13
    np.testing.assert_array_equal(whole.marks, parts.marks)


@pytest.mark.one_backend
def test_what_is_zero_is_not_active():
    sizes = np.array([[0.0, 3.0, 0.0, 1.0], [2.0, 3.0, 4.0, 5.0]])
    assert activation_patterns.most_active(sizes, 3).tolist() == [
        [False, True, False, True],
        [False, True, True, True],
    ]


# Where neurons go.


def planted(seed=0):
    """Marks of 2 always-active neurons and 3 groups of 4; where each is."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation([-1, -1, *np.repeat(np.arange(3), 4)])
    topic = rng.integers(0, 3, 200)
    marks = (owner == -1) | (owner == topic[:, None])
    noise = rng.random(marks.shape) < 0.03
    marks = np.where(owner == -1, marks, marks ^ noise)
    return owner, Patterns(200, marks.mean(axis=0), marks)


@pytest.mark.one_backend
@pytest.mark.parametrize("seed", range(3))
def test_what_is_active_together_stands_together(seed):
    owner, patterns = planted(seed)
    cut = cut_of(patterns, 2, 3)
    assert (owner[cut.shared] == -1).all()
    assert sorted(owner[group].tolist() for group in cut.routed) == [
        [0] * 4,
        [1] * 4,
        [2] * 4,
    ]
    rates = [patterns.rates[group].sum() for group in cut.routed]
    assert rates == sorted(rates, reverse=True)
    for group, chosen in zip(cut.routed, cut.representatives, strict=True):
        columns = patterns.marks[:, group].astype(float)
        away = np.abs(columns - columns.mean(1, keepdims=True)).sum(0)
        assert chosen in group
        # CMoE measures by sums of absolute differences; marks are 0 or 1, so
        # squares give the same neuron.
        assert away[group.tolist().index(chosen)] == pytest.approx(away.min())


@pytest.mark.one_backend
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_neuron_goes_to_one_place(grouping):
    dense, x = models.sequential(), models.tokens(64, models.WIDTH)
    moe = carved(dense, x, 4, grouping=grouping)
    again = carved(dense, x, 4, grouping=grouping)
    for (site, layer), other in zip(
        places(dense, moe), models.mixtures(again), strict=True
    ):
        assert layer.shared_intermediate_dim == models.HIDDEN // 4
        assert layer.intermediate_dim == models.HIDDEN // 4 * 3 // 4
        found = [
            *itertools.chain(*numbers_of(layer.shared, site)),
            *itertools.chain(*numbers_of(layer.experts, site)),
        ]
        assert sorted(found) == list(range(models.HIDDEN))
        models.assert_same_weights(other, models.weights(layer))


@pytest.mark.one_backend
def test_groupings_differ_and_share_what_is_shared():
    dense, x = models.sequential(), models.tokens(64, models.WIDTH)
    experts, shared = [], []
    for grouping in GROUPINGS:
        moe = carved(dense, x, 4, grouping=grouping)
        site, layer = places(dense, moe)[0]
        shared.append(numbers_of(layer.shared, site))
        experts.append(sorted(map(sorted, numbers_of(layer.experts, site))))
    assert shared[0] == shared[1] == shared[2]
    assert experts[0] != experts[1] != experts[2] != experts[0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["plain", "t5"])
def test_a_logit_is_the_activation_of_a_neuron_of_the_expert(kind, normalize):
    build, inputs = BUILDS[kind]
    dense, x = build(), inputs()
    moe = carved(dense, x, normalize=normalize)
    tokens = models.tokens(1, 7, models.WIDTH, seed=3)
    for site, layer in places(dense, moe):
        kernels = {n: models.array(v) for n, v in site.kernels.items()}

        def project(role, kernels=kernels):
            kernel = kernels[f"{role}_kernel"].astype("float64")
            values = tokens[0] @ kernel + kernels.get(f"{role}_bias", 0.0)
            if normalize:
                values /= np.linalg.norm(kernel, axis=0)
            return values

        if site.gated:
            sizes = np.abs(reference.gelu(project("gate")) * project("up"))
        else:
            sizes = np.abs(reference.gelu(project("up")))
        logits = models.array(layer.router.scores_of(tokens))[0]
        for e, own in enumerate(numbers_of(layer.experts, site)):
            off = np.abs(sizes[:, own] - logits[:, e : e + 1]).max(axis=0)
            assert off.min() < 1e-5


# What users do with it.


@pytest.mark.one_backend
def test_the_report_says_how_much_is_missing():
    dense, x = models.sequential(), models.tokens(64, models.WIDTH)
    report = ku.verify_upcycle(dense, carved(dense, x), x)
    assert 1e-3 < report.relative_difference
    for layer in report.layers:
        assert layer.intact_neurons == 1.0
        assert layer.slices_met == 2.0
    text = str(report)
    assert "a token meets 2.00 of the 6 slices of" in text
    assert "as was asked for" in text
    assert "combine weights" not in text
    assert "of itself differs" not in text


@pytest.mark.one_backend
def test_an_estimate_needs_no_data_and_counts_both_kernels():
    dense, x = models.t5_backbone(), models.t5_inputs(8)
    batches = iter([x])
    init = ku.Carving(batches)
    settings = {"recipe": "carving", "expert_init": init}
    estimate = ku.estimate_upcycle(dense, EXPERTS, **settings)
    moe = ku.upcycle_model(dense, EXPERTS, **settings)
    assert estimate.total_params == moe.count_params()
    (layer, *_) = models.mixtures(moe)
    met = models.HIDDEN // 4 + 2 * layer.intermediate_dim
    (block, *_) = plan.make(
        dense, EXPERTS, recipe="carving", init=ku.Carving(x)
    ).blocks
    assert block.flops() == 2 * models.WIDTH * (3 * met + 2 * EXPERTS)
    with pytest.raises(ValueError, match=r"no batch.*iterator gives its"):
        ku.upcycle_model(dense, EXPERTS, **settings)


@pytest.mark.one_backend
def test_one_init_serves_several_models():
    x = models.tokens(64, models.WIDTH)
    init = ku.Carving(x)
    settings = {"recipe": "carving", "expert_init": init, "seed": 0}
    for seed in (0, 1):
        dense = models.fixed(models.sequential(), seed)
        moe = ku.upcycle_model(dense, EXPERTS, **settings)
        models.assert_same_weights(moe, carved(dense, x))


@pytest.mark.one_backend
def test_only_chosen_blocks_are_carved():
    dense, x = models.t5_lm(), models.t5_inputs(8)
    moe = ku.upcycle_model(
        dense,
        EXPERTS,
        recipe="carving",
        layers={"encoder": None, "decoder": [1]},
        expert_init=ku.Carving(x),
    )
    (layer,) = models.mixtures(moe)
    assert layer.router.num_experts == EXPERTS


def test_it_trains_and_files_keep_it(tmp_path):
    dense, x = models.sequence_dense_pairs(), models.tokens(8, 6, models.WIDTH)
    dense.compile("adam", "mse")
    moe = carved(dense, x, balance=0.001)
    before = models.weights(moe)
    y = models.output(dense, x) + 1.0
    monitor = ku.RouterMonitor()
    for _ in range(2):
        moe.fit(x, y, verbose=0, callbacks=[monitor])
    router = models.mixtures(moe)[0].router
    assert models.array(router.scale).any()
    assert models.array(router.bias).any()
    assert any(
        (a != b).any() for a, b in zip(before, models.weights(moe), strict=True)
    )
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(again, moe)
    for old, new in zip(
        models.mixtures(moe), models.mixtures(again), strict=True
    ):
        assert new.router.get_config() == old.router.get_config()
    np.testing.assert_array_equal(
        models.output(again, x), models.output(moe, x)
    )


@pytest.mark.one_backend
def test_presets_and_gates_are_kept(tmp_path):
    dense, x = models.t5_backbone(), models.t5_inputs(8)
    moe = carved(dense, x)
    moe.save_to_preset(str(tmp_path))
    again = type(moe).from_preset(str(tmp_path))
    models.assert_same_weights(again, moe)
    assert models.mixtures(again)[0].router.gated
    ku.freeze(again, "router")
    names = {v.path.split("/")[-2] for v in again.trainable_variables}
    assert "router" not in names


@pytest.mark.one_backend
def test_fewer_experts_and_int8():
    dense = models.sequential()
    x = models.tokens(64, models.WIDTH)
    moe = carved(dense, x)
    smaller, _ = ku.prune_experts(moe, x, num_experts=4)
    layer = models.mixtures(smaller)[0]
    assert layer.num_experts == layer.router.scale.shape[0] == 4
    whole = models.output(moe, x)
    moe.quantize("int8")
    # Of the median token: a choice that is close may fall the other way in a
    # later layer, whose inputs are a little different.
    gap = np.abs(models.output(moe, x) - whole).max(axis=-1)
    assert np.median(gap) < 0.02 * np.abs(whole).max()


@pytest.mark.one_backend
def test_ways_that_lead_nowhere_are_refused():
    dense, x = models.sequential(), models.tokens(64, models.WIDTH)
    moe = carved(dense, x)
    with pytest.raises(ku.UpcycleError, match="slices of it"):
        ku.densify_model(moe, dense=dense)
    adam = keras.optimizers.Adam()
    adam.build(dense.trainable_variables)
    with pytest.raises(ku.UpcycleError, match="slices of it"):
        ku.upcycle_optimizer(adam, dense, moe)
    with pytest.raises(ku.UpcycleError, match='router="copy"'):
        ku.grow_experts(moe, 8)
    with pytest.raises(ku.UpcycleError, match="is no model of KerasHub"):
        ku.export_model(moe, "keras_hub")


# What does not fit.


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("num_experts", "settings", "match"),
    [
        (5, {}, r"num_experts=5 for 24 of 32.*shared=0\.21875.*divisor of 24"),
        (25, {}, r"num_experts=25 for 24 of 32.*shared=0\.21875"),
        (2, {"shared": 0.99}, r"num_experts=2 for 0 of 32"),
        (4, {"active_neurons": 33}, "active_neurons=33 for 32 neurons"),
    ],
)
def test_sizes_that_do_not_fit(num_experts, settings, match):
    dense, x = models.sequential(), models.tokens(8, models.WIDTH)
    with pytest.raises(ValueError, match=match):
        carved(dense, x, num_experts, **settings)
    with pytest.raises(ValueError, match=match):
        ku.estimate_upcycle(
            dense,
            num_experts,
            recipe="carving",
            expert_init=ku.Carving(x, **settings),
        )


@pytest.mark.one_backend
def test_data_that_does_not_fit():
    dense = models.sequential()
    with pytest.raises(ValueError, match="needs data that only you have"):
        ku.upcycle_model(dense, 4, recipe="carving")
    with pytest.raises(TypeError, match="inputs=None"):
        ku.Carving(None)
    with pytest.raises(TypeError, match="must hold arrays"):
        ku.Carving(dense)
    with pytest.raises(ValueError, match=r"of the shapes \[\(3, 5\)\]"):
        carved(dense, models.tokens(3, 5), 4)
    bad = models.tokens(8, models.WIDTH)
    bad[2, 3] = np.nan
    with pytest.raises(ValueError, match="finite activations"):
        carved(dense, bad, 4)
    with pytest.warns(UserWarning, match="3 tokens, each of which marks 8 of"):
        carved(dense, models.tokens(3, models.WIDTH), 4)
    t5, ids = models.t5_backbone(), models.t5_inputs()
    nobody = {
        name: np.zeros_like(value) if name.endswith("mask") else value
        for name, value in ids.items()
    }
    with pytest.raises(ValueError, match="none that sends any to"):
        carved(t5, nobody, 4)


@pytest.mark.one_backend
def test_routers_that_do_not_fit():
    dense, x = models.sequential(), models.tokens(8, models.WIDTH)
    with pytest.raises(ValueError, match=r'a TopKRouter.*recipe="carving"'):
        ku.upcycle_model(dense, 4, expert_init=ku.Carving(x))
    with pytest.raises(ValueError, match=r"slices.*Carving\(inputs\)"):
        ku.upcycle_model(dense, 4, router="carving")
    for name, value in (
        ("normalize", True),
        ("softmax", "after_top_k"),
        ("router_gradient", "dense_mixer"),
        ("expert_groups", [0, 0, 1, 1]),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            ku.CarvingRouter(2, **{name: value})
    router = ku.CarvingRouter(2)
    router.num_experts = 4
    router.build((None, None, 5))
    with pytest.raises(RuntimeError, match="before the router is built"):
        router.start_from({})
    with pytest.raises(ValueError, match="SharedExperts"):
        ku.upcycle_model(
            dense,
            4,
            router=ku.CarvingRouter(2),
            expert_init=ku.SharedExperts(routed=ku.Carving(x)),
        )

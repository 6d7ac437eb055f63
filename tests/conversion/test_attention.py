"""`upcycle_attention` and `upcycle_model(attention=)` in use."""

import functools

import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.conversion import pairing
from keras_upcycle.layers.moe_layers import moe_layers_in, routed_heads_in
from keras_upcycle.layers.routed_heads import RoutedHeads

pytestmark = pytest.mark.filterwarnings("ignore:The first block")
BLOCK = "transformer_block_2"
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@functools.cache
def vit():
    return models.randomized(models.vit_classifier(preprocessor=None), seed=2)


@functools.cache
def llama():
    backbone = hub_models.dense("LlamaBackbone")
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def scored(model, seed=0):
    rng = np.random.default_rng(seed)
    for layer in routed_heads_in(model):
        kernel = layer.router.kernel
        kernel.assign(rng.normal(0, 1, tuple(kernel.shape)))
    return model


def ds_moe(dense, **settings):
    return ku.upcycle_model(dense, 4, recipe="ds_moe", seed=1, **settings)


def test_ds_moe_routes_both_and_starts_as_the_dense_model():
    moe = ds_moe(vit())
    heads, experts = routed_heads_in(moe), moe_layers_in(moe)
    assert len(heads) == len(experts) == 2
    assert heads[0].router.mutual_information_loss == 3.5e-4
    assert experts[0].router.mutual_information_loss == 6.3e-4
    x = models.images()
    report = ku.verify_upcycle(vit(), moe, x)
    assert report.max_difference < 1e-5
    dense = ds_moe(vit(), attention=False)
    assert not routed_heads_in(dense)
    estimate = ku.estimate_upcycle(vit(), 4, recipe="ds_moe")
    assert estimate.total_params == moe.count_params()
    # Two routers of two heads.
    more = estimate.total_params - dense.count_params()
    assert more == 2 * 2 * models.WIDTH
    without = ku.estimate_upcycle(vit(), 4, recipe="ds_moe", attention=False)
    assert estimate.flops_per_token - without.flops_per_token == 2 * more


@pytest.mark.parametrize("make", [vit, llama])
def test_a_task_is_saved_and_found_by_stock_entry_points(make, tmp_path):
    routed = scored(ku.upcycle_attention(make()))
    if make is vit:
        inputs, task = models.images(), keras_hub.models.ImageClassifier
    else:
        inputs = hub_models.inputs_of(make().backbone)
        task = keras_hub.models.CausalLM
    expected = models.output(routed, inputs)
    routed.save(tmp_path / "routed.keras")
    routed.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.saving.load_model(tmp_path / "routed.keras"),
        task.from_preset(str(tmp_path / "preset")),
    ):
        assert len(routed_heads_in(loaded)) == len(routed_heads_in(routed))
        np.testing.assert_array_equal(models.output(loaded, inputs), expected)


def test_words_are_said_with_a_cache_as_without():
    """Greedy, by two of four heads; and a cached step is an uncached one."""
    router = ku.TopKRouter(2, capacity_factor=None)
    experts = ku.AttentionExperts(router, num_experts=4)
    routed = scored(ku.upcycle_attention(llama(), experts))
    routed.compile(sampler="greedy")
    ids = np.array([[3, 5, 7, 0, 0, 0, 0, 0], [4, 6, 1, 2, 0, 0, 0, 0]])
    prompt = {"token_ids": ids, "padding_mask": (ids > 0).astype("int32")}
    said = routed.generate(prompt, stop_token_ids=None)["token_ids"]
    said = ops.convert_to_numpy(said)
    logits = models.output(
        routed, {"token_ids": said, "padding_mask": np.ones_like(said)}
    )
    for row, start in ((0, 3), (1, 4)):
        for place in range(start, 8):
            assert said[row, place] == np.argmax(logits[row, place - 1])


def test_it_learns_and_the_optimizer_goes_on():
    dense = models.randomized(models.vit_classifier(), seed=2)
    dense.compile(keras.optimizers.Adam(1e-2), LOSS)
    x, y = models.images(8), models.labels(8)
    dense.fit(x, y, epochs=1, verbose=0)
    moe = ku.upcycle_model(dense, 4, router="top_k", attention=True, seed=1)
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    moe.compile(optimizer, LOSS)
    monitor = ku.RouterMonitor(every=1)
    history = moe.fit(x, y, epochs=4, verbose=0, callbacks=[monitor])
    assert history.history["loss"][-1] < history.history["loss"][0]
    names = {reading.layer for reading in monitor.readings}
    assert sum("mha" in name for name in names) == 2
    assert len(names) == 3
    for layer in routed_heads_in(moe):
        assert np.abs(models.array(layer.router.kernel)).max() > 0


def test_each_weight_has_its_counterpart():
    moe = ds_moe(vit())
    for pair in pairing.pairs(vit(), moe):
        if pair.relation == pairing.COPIED and pair.dense.path.endswith(
            "kernel"
        ):
            np.testing.assert_array_equal(
                models.array(pair.sparse), models.array(pair.dense)
            )
    new = {
        pair.sparse.path
        for pair in pairing.pairs(vit(), moe)
        if pair.relation == pairing.NEW
    }
    assert sum("routed_heads/router/kernel" in path for path in new) == 2


def test_parts_are_frozen():
    moe = ds_moe(vit())
    of_heads = [layer.router.kernel for layer in routed_heads_in(moe)]
    of_experts = [layer.router.kernel for layer in moe_layers_in(moe)]
    projections = [layer.projection.kernel for layer in routed_heads_in(moe)]
    ku.freeze(moe, "router")
    assert not any(v.trainable for v in of_heads + of_experts)
    assert all(v.trainable for v in projections)
    ku.unfreeze(moe, "router")
    ku.freeze(moe, "dense")
    assert all(v.trainable for v in of_heads + of_experts)
    assert not any(v.trainable for v in projections)
    trained = {id(v) for v in moe.trainable_variables}
    assert all(id(v) in trained for v in of_heads)


def test_fewer_heads_at_inference():
    moe = scored(ds_moe(vit()), seed=3)
    x = models.images()
    everything = models.output(moe, x)
    # Top-K is for experts, as in the paper.
    assert ku.set_active_experts(moe, top_k=1) == 2
    assert all(h.router.selection == "all" for h in routed_heads_in(moe))
    assert ku.set_active_experts(moe) == 4
    np.testing.assert_array_equal(models.output(moe, x), everything)
    assert ku.set_active_experts(moe, top_k=1, part="heads") == 2
    assert np.abs(models.output(moe, x) - everything).max() > 1e-4
    report = ku.measure_active_experts(moe, x)
    shares = {
        layer.name: layer.expert_share
        for layer in report.layers
        if "mha" in layer.name
    }
    assert list(shares.values()) == [0.5, 0.5]
    assert ku.set_active_experts(moe, threshold=0.5) == 4
    heads = ku.measure_active_experts(moe, x).layers[-1]
    assert 1 <= heads.experts_per_token <= 2


def test_padding_changes_nothing():
    routed = scored(ku.upcycle_attention(hub_models.dense("T5Backbone")))
    inputs = models.t5_inputs()
    inputs["encoder_token_ids"] = inputs["encoder_token_ids"] % 20
    inputs["decoder_token_ids"] = inputs["decoder_token_ids"] % 20
    before = routed(inputs)["decoder_sequence_output"]
    other = {**inputs, "encoder_token_ids": inputs["encoder_token_ids"].copy()}
    other["encoder_token_ids"][inputs["encoder_padding_mask"] == 0] = 3
    after = routed(other)["decoder_sequence_output"]
    real = inputs["decoder_padding_mask"].astype(bool)
    np.testing.assert_allclose(
        models.array(after)[real], models.array(before)[real], atol=1e-6
    )


def test_shared_heads_start_as_the_dense_model_too():
    """MoH's two scores, beside DS-MoE's router of all."""
    experts = ku.AttentionExperts("ds_moe", num_experts=4, shared_heads=2)
    routed = ku.upcycle_attention(llama(), experts)
    inputs = hub_models.inputs_of(llama().backbone)
    np.testing.assert_allclose(
        models.output(routed, inputs),
        models.output(llama(), inputs),
        rtol=1e-5,
        atol=1e-5,
    )
    width = llama().backbone.hidden_dim
    added = routed.count_params() - llama().count_params()
    assert added == 2 * width * (2 + 2 + 2)


def test_pruned_and_quantized_models_keep_their_heads():
    moe = scored(
        ku.upcycle_model(vit(), 4, router="top_k", attention=True, seed=0)
    )
    x = models.images()
    pruned, _ = ku.prune_experts(moe, keep={BLOCK: [0, 1, 2, 3]})
    np.testing.assert_allclose(
        models.output(pruned, x), models.output(moe, x), atol=1e-6
    )
    expected = models.output(moe, x)
    moe.quantize("int8")
    assert routed_heads_in(moe)[0].projection.quantization_mode == "int8"
    gap = np.abs(models.output(moe, x) - expected).max()
    assert gap < 0.1 * np.abs(expected).max()


def test_a_model_that_holds_a_backbone():
    inner = hub_models.dense("ViTBackbone")
    inputs = keras.Input(inner.inputs[0].shape[1:])
    dense = keras.Model(inputs, inner(inputs))
    x = hub_models.inputs_of(inner)
    routed = ku.upcycle_attention(dense)
    np.testing.assert_allclose(
        models.output(routed, x), models.output(dense, x), atol=1e-6
    )
    moe = ku.upcycle_model(dense, 4, attention=True, layers="all")
    assert len(routed_heads_in(moe)) == len(moe_layers_in(moe)) == 2


def under_remat():
    with keras.RematScope("full"):
        ku.upcycle_attention(vit())


REFUSED = {
    "under a scope that computes twice": (under_remat, "`keras.RematScope`"),
    "routed already": (
        lambda: ku.upcycle_attention(ku.upcycle_attention(vit())),
        "routed already",
    ),
    "experts after": (
        lambda: ku.upcycle_model(ku.upcycle_attention(vit()), 4),
        "routes attention heads already",
    ),
    "a plain model": (
        lambda: ku.upcycle_attention(models.dense_pairs()),
        "must have self-attention",
    ),
    "a target": (
        lambda: ku.upcycle_model(llama(), 4, target="mixtral", attention=True),
        "target='mixtral' has dense attention",
    ),
    "numbers that do not divide": (
        lambda: ku.upcycle_attention(vit(), ku.AttentionExperts(num_experts=3)),
        "must divide the heads",
    ),
    "no settings": (
        lambda: ku.upcycle_attention(vit(), "top_k"),
        "`experts` must be an `AttentionExperts`.*AttentionExperts\\(router\\)",
    ),
    "a flag where there is none": (
        lambda: ku.upcycle_attention(vit(), False),
        "`experts` must be an `AttentionExperts`",
    ),
    "a number for a flag": (
        lambda: ku.upcycle_model(vit(), 4, attention=2),
        "`attention` must be True, False, an `AttentionExperts`",
    ),
    "a class": (
        lambda: ku.upcycle_attention(vit(), ku.AttentionExperts),
        "not its class",
    ),
    "a router of slices": (
        lambda: ku.upcycle_attention(vit(), ku.AttentionExperts("carving")),
        "weighs slices",
    ),
    "and of copies": (
        lambda: ku.upcycle_attention(vit(), ku.CopiedAttention(2, "carving")),
        "weighs slices",
    ),
    "a batch's threshold in a causal stack": (
        lambda: ku.upcycle_attention(
            llama(),
            ku.AttentionExperts(ku.DSMoERouter("batch_threshold", threshold=1)),
        ),
        "must not see",
    ),
    "and later": (
        lambda: ku.set_active_experts(
            ku.upcycle_attention(llama()), batch_threshold=1.0
        ),
        "must not see",
    ),
    "nothing chosen": (
        lambda: ku.upcycle_attention(
            vit(), ku.AttentionExperts(layers=lambda site: False)
        ),
        "selects none",
    ),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(case):
    act, words = REFUSED[case]
    before = models.weights(vit())
    with pytest.raises((ValueError, TypeError), match=words):
        act()
    models.assert_same_weights(vit(), before)


@pytest.mark.one_backend
def test_an_export_says_that_no_format_has_them():
    moe = ku.upcycle_model(llama(), 4, attention=True, layers="all")
    reasons = ku.can_export(moe, "keras_hub").reasons
    assert any("routes attention heads" in reason for reason in reasons)


@pytest.mark.one_backend
def test_attention_that_stays_dense_is_said_aloud():
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = keras.layers.Dense(16, activation="relu")(x)
    dense = keras.Model(inputs, keras.layers.Dense(8)(x))
    with pytest.warns(UserWarning, match="attention stays dense"):
        moe = ku.upcycle_model(dense, 4, recipe="ds_moe")
    assert not any(
        isinstance(layer, RoutedHeads) for layer in routed_heads_in(moe)
    )

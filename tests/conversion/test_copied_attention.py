"""`CopiedAttention` in use."""

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
from keras_upcycle.layers.moe_layers import (
    attention_mixtures_in,
    moe_layers_in,
)

pytestmark = pytest.mark.filterwarnings("ignore:The first block")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BAM = ku.CopiedAttention(3)


@functools.cache
def vit():
    return models.randomized(models.vit_classifier(preprocessor=None), seed=2)


@functools.cache
def llama():
    backbone = hub_models.dense("LlamaBackbone")
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def other_vit(seed):
    return models.randomized(models.vit_classifier(preprocessor=None), seed)


def changed(model, seed=0):
    rng = np.random.default_rng(seed)
    for layer in attention_mixtures_in(model):
        kernels = [one.kernel for one in layer.projections.values()]
        for variable in [layer.router.kernel, *kernels]:
            noise = rng.normal(0, 0.3, tuple(variable.shape))
            variable.assign(models.array(variable) + noise)
    return model


def both(**settings):
    return ku.upcycle_model(
        vit(), 4, router="top_k", attention=BAM, seed=1, **settings
    )


@pytest.mark.parametrize("shared", [True, False])
def test_both_become_experts_as_was_estimated(shared):
    experts = ku.CopiedAttention(3, shared_key_values=shared)
    settings = {"router": "top_k", "attention": experts}
    moe = ku.upcycle_model(vit(), 4, seed=1, **settings)
    assert len(attention_mixtures_in(moe)) == 2
    assert len(moe_layers_in(moe)) == 1
    report = ku.verify_upcycle(vit(), moe, models.images())
    assert report.max_difference < 1e-5
    estimate = ku.estimate_upcycle(vit(), 4, **settings)
    assert estimate.total_params == moe.count_params()
    assert estimate.weight_bytes == 4 * moe.count_params()
    trained = sum(np.prod(v.shape) for v in moe.trainable_variables)
    assert estimate.adam_bytes == 8 * trained
    without = ku.estimate_upcycle(vit(), 4, router="top_k")
    # Two layers, of `D x D` projections, and a router of three.
    width, owned = models.WIDTH, 2 if shared else 4
    more = 2 * (2 * owned * width * width + 3 * width)
    assert estimate.flops_per_token - without.flops_per_token == 2 * more


def test_words_are_said_with_a_cache_as_without():
    model = changed(ku.upcycle_attention(llama(), BAM, seed=1))
    model.compile(sampler="greedy")
    ids = np.array([[3, 5, 7, 0, 0, 0, 0, 0], [4, 6, 1, 2, 0, 0, 0, 0]])
    prompt = {"token_ids": ids, "padding_mask": (ids > 0).astype("int32")}
    said = model.generate(prompt, stop_token_ids=None)["token_ids"]
    said = ops.convert_to_numpy(said)
    logits = models.output(
        model, {"token_ids": said, "padding_mask": np.ones_like(said)}
    )
    for row, start in ((0, 3), (1, 4)):
        for place in range(start, 8):
            assert said[row, place] == np.argmax(logits[row, place - 1])


def test_own_keys_and_values_refuse_a_cache():
    experts = ku.CopiedAttention(2, shared_key_values=False)
    model = ku.upcycle_attention(llama(), experts)
    model.compile(sampler="greedy", run_eagerly=True)
    ids = np.array([[3, 5, 7, 0]])
    prompt = {"token_ids": ids, "padding_mask": (ids > 0).astype("int32")}
    with pytest.raises(ku.UpcycleError, match="shared_key_values=False"):
        model.generate(prompt, stop_token_ids=None)


def test_donors_are_the_experts_and_the_rest_is_their_mean():
    donors = [other_vit(5), other_vit(6)]
    moe = ku.upcycle_model(
        vit(),
        4,
        router="top_k",
        layers="all",
        expert_init=ku.BranchTrainMix(donors),
        attention=ku.CopiedAttention(4, donors=donors),
    )
    of_donors = [[s.layer for s in ku.find_attention(d)] for d in donors]
    for number, mixture in enumerate(attention_mixtures_in(moe)):
        for role, projection in mixture.projections.items():
            for part in ("kernel", "bias"):
                stacked = models.array(getattr(projection, part))
                for expert in range(4):
                    source = of_donors[expert // 2][number]
                    own = getattr(getattr(source, f"_{role}_dense"), part)
                    np.testing.assert_array_equal(
                        stacked[expert].reshape(own.shape), models.array(own)
                    )
    block = moe.backbone.layers[-1].encoder_layers[0]
    shared = block.mha._key_dense.kernel
    mean = np.mean(
        [models.array(layers[0]._key_dense.kernel) for layers in of_donors], 0
    )
    np.testing.assert_allclose(models.array(shared), mean, rtol=1e-6)


def test_it_learns_and_the_optimizer_goes_on():
    dense = models.randomized(models.vit_classifier(), seed=2)
    dense.compile(keras.optimizers.Adam(1e-2), LOSS)
    x, y = models.images(8), models.labels(8)
    dense.fit(x, y, epochs=1, verbose=0)
    moe = ku.upcycle_model(dense, 4, router="top_k", attention=BAM, seed=1)
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    by_path = {v.path: v for v in optimizer.variables}
    slots = [
        v for path, v in by_path.items() if "query_kernel_momentum" in path
    ]
    assert len(slots) == 2
    source = next(
        v
        for v in dense.optimizer.variables
        if "query_kernel_momentum" in v.path
    )
    for expert in range(3):  # a third of the gradient each
        np.testing.assert_allclose(
            3 * models.array(slots[0])[expert], models.array(source), rtol=1e-5
        )
    moe.compile(optimizer, LOSS)
    monitor = ku.RouterMonitor(every=1)
    history = moe.fit(x, y, epochs=4, verbose=0, callbacks=[monitor])
    assert history.history["loss"][-1] < history.history["loss"][0]
    names = {reading.layer for reading in monitor.readings}
    assert sum("mha" in name for name in names) == 2
    assert len(names) == 3
    for mixture in attention_mixtures_in(moe):
        kernel = models.array(mixture.projections["query"].kernel)
        assert np.abs(kernel - kernel.mean(0)).max() > 0


def test_what_was_compiled_goes_with_it(recwarn):
    dense = other_vit(4)
    optimizer = keras.optimizers.AdamW(1e-2)
    site = ku.find_attention(dense)[0]
    bias = site.layer._query_dense.bias
    optimizer.exclude_from_weight_decay(var_list=[bias])
    dense.compile(optimizer, LOSS)
    moe = ku.upcycle_attention(dense, BAM)
    assert not [w for w in recwarn if "Which variables" in str(w.message)]
    query = attention_mixtures_in(moe)[0].projections["query"]
    moe.optimizer.build(moe.trainable_variables)
    assert not moe.optimizer._use_weight_decay(query.bias)
    assert moe.optimizer._use_weight_decay(query.kernel)


def test_each_weight_has_its_counterpart():
    moe = both()
    stacked = [
        pair
        for pair in pairing.pairs(vit(), moe)
        if pair.relation == pairing.STACKED
        and pair.name.startswith(("query", "output"))
    ]
    assert len(stacked) == 8
    for pair in stacked:
        for one in models.array(pair.sparse):
            np.testing.assert_array_equal(
                one.reshape(pair.dense.shape), models.array(pair.dense)
            )


def test_without_experts_it_is_their_mean():
    moe = both()
    again = ku.densify_model(moe)
    assert type(again) is type(vit())
    x = models.images()
    np.testing.assert_array_equal(
        models.output(again, x), models.output(vit(), x)
    )
    changed(moe)
    again = ku.densify_model(moe, 1)
    site = ku.find_attention(again)[0]
    projection = attention_mixtures_in(moe)[0].projections["query"]
    np.testing.assert_allclose(
        models.array(site.layer._query_dense.kernel),
        models.array(projection.kernel).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_parts_are_frozen():
    moe = both()
    routers, experts = [], []
    for mixture in attention_mixtures_in(moe):
        routers += mixture.router.weights
        for projection in mixture.projections.values():
            experts += projection.weights
    ku.freeze(moe, "router")
    assert not any(v.trainable for v in routers)
    assert all(v.trainable for v in experts)
    ku.unfreeze(moe, "router")
    ku.freeze(moe, "experts")
    trained = {id(v) for v in moe.trainable_variables}
    assert all(id(v) in trained for v in routers)
    assert not any(id(v) in trained for v in experts)
    ku.unfreeze(moe, "experts")
    ku.freeze(moe, "dense")
    trained = {id(v) for v in moe.trainable_variables}
    assert all(id(v) in trained for v in routers + experts)
    others = len(moe_layers_in(moe)[0].trainable_variables)
    assert len(trained) == len(routers + experts) + others


def test_a_frozen_projection_stays_frozen():
    dense = other_vit(3)
    site = ku.find_attention(dense)[0]
    site.layer._query_dense.trainable = False
    moe = ku.upcycle_attention(dense, BAM)
    mixture = attention_mixtures_in(moe)[0]
    assert not mixture.projections["query"].kernel.trainable
    assert mixture.projections["output"].kernel.trainable
    assert mixture.router.kernel.trainable


def test_active_experts_are_counted():
    moe = both()
    report = ku.measure_active_experts(moe, models.images())
    found = [layer for layer in report.layers if "mha" in layer.name]
    assert [layer.experts_per_token for layer in found] == [3, 3]
    width = models.WIDTH
    assert found[0].expert_parameters == 2 * (width * width + width)


def test_pruned_and_quantized_models_keep_their_attention():
    moe = changed(both())
    x = models.images()
    (name,) = (layer.path.split("/")[-2] for layer in moe_layers_in(moe))
    pruned, _ = ku.prune_experts(moe, keep={name: [0, 1, 2, 3]})
    expected = models.output(moe, x)
    np.testing.assert_allclose(models.output(pruned, x), expected, atol=1e-6)
    moe.quantize("int8")
    query = attention_mixtures_in(moe)[0].projections["query"]
    assert query.kernel.dtype == "float32"
    gap = np.abs(models.output(moe, x) - expected).max()
    assert 0 < gap < 0.1 * np.abs(expected).max()


def test_a_task_is_saved_and_found_by_stock_entry_points(tmp_path):
    moe = changed(both())
    x = models.images()
    expected = models.output(moe, x)
    moe.save(tmp_path / "moe.keras")
    moe.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.saving.load_model(tmp_path / "moe.keras"),
        keras_hub.models.ImageClassifier.from_preset(str(tmp_path / "preset")),
    ):
        np.testing.assert_array_equal(models.output(loaded, x), expected)


def test_a_model_that_holds_a_backbone():
    inner = hub_models.dense("ViTBackbone")
    inputs = keras.Input(inner.inputs[0].shape[1:])
    dense = keras.Model(inputs, inner(inputs))
    x = hub_models.inputs_of(inner)
    moe = ku.upcycle_model(dense, 4, attention=BAM, layers="all")
    assert len(attention_mixtures_in(moe)) == len(moe_layers_in(moe)) == 2
    np.testing.assert_array_equal(
        models.output(ku.densify_model(moe), x), models.output(dense, x)
    )


def test_padding_changes_nothing():
    router = ku.TopKRouter(2, capacity_factor=None)
    model = changed(
        ku.upcycle_attention(
            hub_models.dense("T5Backbone"), ku.CopiedAttention(3, router)
        )
    )
    inputs = models.t5_inputs()
    inputs["encoder_token_ids"] = inputs["encoder_token_ids"] % 20
    inputs["decoder_token_ids"] = inputs["decoder_token_ids"] % 20
    before = model(inputs)["decoder_sequence_output"]
    other = {**inputs, "encoder_token_ids": inputs["encoder_token_ids"].copy()}
    other["encoder_token_ids"][inputs["encoder_padding_mask"] == 0] = 3
    after = model(other)["decoder_sequence_output"]
    real = inputs["decoder_padding_mask"].astype(bool)
    np.testing.assert_allclose(
        models.array(after)[real], models.array(before)[real], atol=1e-6
    )


def with_regularizer():
    dense = other_vit(3)
    layer = ku.find_attention(dense)[0].layer
    layer._query_dense.kernel.regularizer = keras.regularizers.L2(0.1)
    return dense


def attend(**settings):
    return lambda: ku.upcycle_attention(
        vit(), ku.CopiedAttention(**{"num_experts": 2, **settings})
    )


REFUSED = {
    "several already": (
        lambda: ku.upcycle_attention(ku.upcycle_attention(vit(), BAM), BAM),
        "routed already",
    ),
    "experts after": (
        lambda: ku.upcycle_model(ku.upcycle_attention(vit(), BAM), 4),
        "several experts already",
    ),
    "no number": (attend(num_experts=0), "num_experts"),
    "no flag": (attend(shared_key_values=1), "shared_key_values"),
    "a router with slots": (attend(router=ku.TopKRouter(2)), "no slots"),
    "too many chosen": (
        attend(router=ku.TopKRouter(3, capacity_factor=None)),
        "top_k",
    ),
    "a batch's threshold in a causal stack": (
        lambda: ku.upcycle_attention(
            llama(),
            ku.CopiedAttention(
                2, ku.DSMoERouter("batch_threshold", threshold=1)
            ),
        ),
        "must not see",
    ),
    "a target": (
        lambda: ku.upcycle_model(llama(), 4, target="mixtral", attention=BAM),
        "has dense attention",
    ),
    "a regularizer": (
        lambda: ku.upcycle_attention(with_regularizer(), BAM),
        "kernel_regularizer",
    ),
    "no donors": (attend(donors=[]), "at least one model"),
    "a donor that is none": (attend(donors=["x"]), "must be a Keras model"),
    "another class": (lambda: attend(donors=[llama()])(), "Donor 0"),
    "a sparse donor": (
        lambda: attend(donors=[ku.upcycle_attention(vit(), BAM)])(),
        "Donor 0",
    ),
    "three donors of two": (
        lambda: attend(donors=[vit(), vit(), vit()])(),
        "multiple of the number of donors",
    ),
    "other heads": (
        lambda: attend(
            donors=[
                models.vit_classifier(
                    models.vit_backbone(num_heads=1), preprocessor=None
                )
            ]
        )(),
        "Donor 0 must have the attention",
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
def test_adapters_go_to_what_is_one():
    model = ku.upcycle_attention(llama(), BAM)
    trainable = len(model.trainable_variables)
    with pytest.raises(ku.UpcycleError, match="take no adapters"):
        model.backbone.enable_lora(2)
    assert len(model.trainable_variables) == trainable
    model.backbone.enable_lora(2, ["value"])
    assert len(model.trainable_variables) == 4


@pytest.mark.one_backend
def test_an_export_says_that_no_format_has_them():
    moe = ku.upcycle_model(llama(), 4, attention=BAM, layers="all")
    reasons = ku.can_export(moe, "keras_hub").reasons
    assert any("several experts" in reason for reason in reasons)


@pytest.mark.one_backend
def test_donors_of_an_iterator_are_there_for_a_second_use():
    experts = ku.CopiedAttention(2, donors=iter([1, 2]))
    assert list(experts.donors) == list(experts.donors) == [1, 2]

"""Experts of one frozen network and a low rank each, beside whole ones."""

import gradients
import hub_models
import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers.dispatch import ENGINES
from keras_upcycle.layers.moe_layers import moe_layers_in

DIM, HIDDEN, EXPERTS, RANK = 6, 10, 4, 2


def layer_of(engine="auto", **settings):
    """A built layer whose every weight has a value of its own."""
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        ku.TopKRouter(2, capacity_factor=None, load_balance_loss=0.0),
        activation="relu",
        low_rank=RANK,
        dispatch=engine,
        name="moe",
        **settings,
    )
    layer.build((None, None, DIM))
    rng = np.random.default_rng(1)
    for variable in layer.weights:
        variable.assign(rng.normal(scale=0.6, size=variable.shape))
    return layer


def whole(layer):
    """The same with whole experts."""
    settings = {
        **layer.settings(),
        "low_rank": None,
        "low_rank_alpha": None,
        "router": ku.TopKRouter(2, capacity_factor=None, load_balance_loss=0.0),
    }
    made = ku.MoEFeedForward(**settings, name="moe")
    made.build((None, None, DIM))
    made.router.kernel.assign(layer.router.kernel)
    for role, projection in made.experts.projections.items():
        own = layer.experts.projections[role]
        projection.kernel.assign(own.kernel)
        if projection.bias is not None:
            projection.bias.assign(own.bias)
    return made


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize(
    "settings",
    [{}, {"gated": True, "use_bias": False, "low_rank_alpha": 5.0}],
    ids=["plain", "gated"],
)
def test_values_and_gradients_are_those_of_whole_experts(settings, engine):
    layer = layer_of(engine, **settings)
    full = whole(layer)
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(2, 7, DIM)).astype("float32")
    cotangent = rng.normal(size=inputs.shape).astype("float32")
    mask = np.arange(7) < np.array([[4], [6]])
    found, own = gradients.of_layer(
        layer, inputs, cotangent, mask=mask, training=True
    )
    expected, by_kernel = gradients.of_layer(
        full, inputs, cotangent, mask=mask, training=True
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(own["inputs"], by_kernel["inputs"], atol=3e-5)
    np.testing.assert_allclose(
        own["router/kernel"], by_kernel["router/kernel"], atol=3e-5
    )
    for role, projection in layer.experts.projections.items():
        of_kernel = by_kernel[f"experts/expert_{role}/kernel"]
        a, b = (models.array(v) for v in (projection.lora_a, projection.lora_b))
        path = f"experts/expert_{role}"
        np.testing.assert_allclose(
            own[f"{path}/lora_a"],
            projection.scale * of_kernel @ np.swapaxes(b, 1, 2),
            atol=1e-4,
        )
        np.testing.assert_allclose(
            own[f"{path}/lora_b"],
            projection.scale * np.swapaxes(a, 1, 2) @ of_kernel,
            atol=1e-4,
        )
    kinds = {path.rsplit("/", 1)[1] for path in own if path != "inputs"}
    assert kinds == {"kernel", "lora_a", "lora_b"}


@pytest.mark.one_backend
def test_remat_and_dropout_are_those_of_whole_experts():
    inputs = models.tokens(2, 7, DIM)
    outputs = []
    for settings in ({}, {"remat": True}):
        layer = layer_of("dropless", **settings)
        found, own = gradients.of_layer(layer, inputs, inputs, training=True)
        outputs.append((found, own["router/kernel"]))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    dropping = layer_of("capacity", dropout=0.5)
    keras.utils.set_random_seed(0)
    assert (
        np.abs(
            models.array(dropping(inputs, training=True))
            - models.array(dropping(inputs))
        ).max()
        > 1e-3
    )


def converted(name="LlamaBackbone", rank=RANK, **settings):
    dense = hub_models.dense(name)
    settings.setdefault("router", ku.TopKRouter(2, capacity_factor=None))
    return ku.upcycle_model(
        dense, EXPERTS, experts=ku.LowRankExperts(rank), seed=0, **settings
    )


def learned(moe):
    rng = np.random.default_rng(3)
    for layer in moe_layers_in(moe):
        for projection in layer.experts.projections.values():
            b = projection.lora_b
            b.assign(rng.normal(scale=0.2, size=b.shape))
    return moe


def real(model, inputs):
    outputs = models.array(model(inputs, training=False))
    return outputs[inputs["padding_mask"].astype(bool)]


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["LlamaBackbone", "BertBackbone"])
def test_it_starts_as_the_dense_model_and_learns_by_adapters(name):
    dense = hub_models.dense(name)
    inputs = hub_models.inputs_of(dense)
    settings = {}
    if name == "BertBackbone":
        settings["router"] = ku.TopKRouter(2, capacity_factor=None)
    moe = converted(name, **settings)
    outputs = [
        models.array(keras.tree.flatten(model(inputs))[-1])
        for model in (dense, moe)
    ]
    mask = inputs["padding_mask"].astype(bool)
    if outputs[0].ndim == 3:
        outputs = [each[mask] for each in outputs]
    np.testing.assert_allclose(*outputs, atol=2e-6 * np.abs(outputs[0]).max())
    ku.freeze(moe, "dense")
    trained = [v.path.rsplit("/", 2)[-2:] for v in moe.trainable_variables]
    assert {kind for _, kind in trained} == {"kernel", "lora_a", "lora_b"}
    assert {owner for owner, kind in trained if kind == "kernel"} == {"router"}
    before = {v.path: models.array(v).copy() for v in moe.weights}

    def loss(y_true, y_pred):
        return ops.mean(ops.square(y_pred - 0.1))

    moe.compile(keras.optimizers.SGD(0.5), loss=loss)
    target = keras.tree.map_structure(
        lambda x: np.zeros(tuple(x.shape), "float32"), moe(inputs)
    )
    moe.train_on_batch(inputs, target)
    moved = {
        v.path.rsplit("/", 1)[1]
        for v in moe.weights
        if (models.array(v) != before[v.path]).any()
    }
    # B is 0 at first, so that A has no gradient yet; a router has its losses.
    assert moved == {"lora_b", "kernel"}


@pytest.mark.one_backend
def test_it_is_small():
    """Bytes of what trains: what Adam and gradients cost."""
    dense = hub_models.dense("LlamaBackbone")
    moe = converted(layers="all_but_first")
    ku.freeze(moe, "dense")
    (layer,) = moe_layers_in(moe)
    kernels = 3 * RANK * (24 + 20) * EXPERTS
    assert (
        sum(np.prod(v.shape) for v in moe.trainable_variables)
        == kernels + 24 * EXPERTS
    )
    assert moe.count_params() == dense.count_params() + kernels + 24 * EXPERTS
    estimate = ku.estimate_upcycle(
        dense,
        EXPERTS,
        experts=ku.LowRankExperts(RANK),
        layers="all_but_first",
    )
    assert estimate.total_params == moe.count_params()
    assert estimate.active_params == moe.count_params() - kernels // 2
    # Adam's slots of the rest, which was not frozen there, and of these.
    rest = dense.count_params() - 3 * 24 * 20
    assert estimate.adam_bytes == 8 * (rest + kernels + 24 * EXPERTS)
    assert layer.low_rank == RANK


@pytest.mark.one_backend
def test_files_give_the_same(tmp_path):
    moe = learned(converted())
    inputs = hub_models.inputs_of(moe)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(real(again, inputs), real(moe, inputs))
    assert [v.path for v in again.trainable_variables] == [
        v.path for v in moe.trainable_variables
    ]


@pytest.mark.one_backend
def test_adapters_alone_are_a_small_file(tmp_path):
    moe = learned(converted())
    inputs = hub_models.inputs_of(moe)
    other = converted()
    assert np.abs(real(other, inputs) - real(moe, inputs)).max() > 1e-3
    ku.save_adapters(moe, tmp_path / "a.npz")
    ku.load_adapters(other, tmp_path / "a.npz")
    np.testing.assert_array_equal(real(other, inputs), real(moe, inputs))
    moe.save_weights(tmp_path / "all.weights.h5")
    size = (tmp_path / "a.npz").stat().st_size
    assert size < (tmp_path / "all.weights.h5").stat().st_size
    for wrong in (converted(rank=3), converted(layers=[-1])):
        before = models.weights(wrong)
        if wrong.transformer_layers[1].moe_layer.low_rank == RANK:
            continue
        with pytest.raises(ValueError, match=r"rank\. Received.*Nothing was"):
            ku.load_adapters(wrong, tmp_path / "a.npz")
        models.assert_same_weights(wrong, before)
    (tmp_path / "b.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        ku.load_adapters(other, tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="there is none"):
        ku.load_adapters(other, tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        ku.save_adapters(moe, tmp_path / "a.h5")


def test_merged_experts_are_whole_and_the_same():
    moe = learned(converted())
    inputs = hub_models.inputs_of(moe)
    before = models.weights(moe)
    merged = ku.merge_experts(moe)
    models.assert_same_weights(moe, before)
    expected = real(moe, inputs)
    np.testing.assert_allclose(
        real(merged, inputs), expected, atol=3e-6 * np.abs(expected).max()
    )
    (layer,) = moe_layers_in(merged)
    assert layer.low_rank is None
    assert tuple(layer.experts.expert_up.kernel.shape) == (EXPERTS, 24, 20)
    assert layer.experts.trainable_variables
    dense = ku.densify_model(merged)
    assert type(dense) is type(hub_models.dense("LlamaBackbone"))


@pytest.mark.one_backend
@pytest.mark.parametrize("mode", [None, "int8"], ids=["floats", "int8"])
def test_merging_keeps_what_stands_beside_the_experts(mode):
    """A shared network and its gate, a bias, a frozen router."""
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        ku.TopKRouter(2, capacity_factor=None, use_bias=True),
        low_rank=RANK,
        shared_intermediate_dim=3,
        shared_gate=True,
        name="moe",
    )
    moe = keras.Sequential([keras.Input((7, DIM)), layer])
    rng = np.random.default_rng(1)
    for variable in layer.weights:
        variable.assign(rng.normal(scale=0.6, size=variable.shape))
    layer.router.trainable = False
    inputs = models.tokens(2, 7, DIM)
    if mode is not None:
        moe.quantize(mode)
    expected = models.array(moe(inputs))
    merged = ku.merge_experts(moe)
    found = models.array(merged(inputs))
    scale = np.abs(expected).max()
    # int8 rounds what comes in, and floats do not.
    tolerance = 2e-6 if mode is None else 0.05
    np.testing.assert_allclose(found, expected, atol=tolerance * scale)
    (whole_layer,) = moe_layers_in(merged)
    assert not whole_layer.router.trainable_variables
    assert whole_layer.shared_gate is not None


@pytest.mark.one_backend
def test_int8_keeps_the_shared_network_and_trains_the_rest(tmp_path):
    moe = learned(converted())
    inputs = hub_models.inputs_of(moe)
    expected = real(moe, inputs)
    merged = ku.merge_experts(moe)
    moe.quantize("int8", filters=lambda layer: "/moe/" in (layer.path or ""))
    (layer,) = moe_layers_in(moe)
    for projection in layer.experts.projections.values():
        assert projection.base.kernel.dtype == "int8"
        assert projection.lora_a.dtype == "float32"
    found = real(moe, inputs)
    scale = np.abs(expected).max()
    assert 0 < np.abs(found - expected).max() < 0.05 * scale
    again = ku.merge_experts(moe)
    np.testing.assert_allclose(real(again, inputs), found, atol=0.05 * scale)
    assert np.abs(real(again, inputs) - real(merged, inputs)).max() > 0
    moe.save(tmp_path / "int8.keras")
    loaded = keras.saving.load_model(tmp_path / "int8.keras")
    np.testing.assert_array_equal(real(loaded, inputs), found)
    moe.compile(keras.optimizers.SGD(0.1), "mse")
    before = models.array(layer.experts.expert_down.lora_b).copy()
    moe.train_on_batch(inputs, np.zeros((*inputs["token_ids"].shape, 24)))
    assert (models.array(layer.experts.expert_down.lora_b) != before).any()


@pytest.mark.one_backend
def test_freezing_and_thawing_leave_what_is_shared():
    moe = converted()
    ku.freeze(moe, "experts")
    assert not any("lora" in v.path for v in moe.trainable_variables)
    ku.unfreeze(moe, "experts")
    kinds = {
        v.path.rsplit("/", 1)[1]
        for layer in moe_layers_in(moe)
        for v in layer.trainable_variables
    }
    assert kinds == {"kernel", "lora_a", "lora_b"}
    for layer in moe_layers_in(moe):
        for projection in layer.experts.projections.values():
            assert not projection.base.trainable_variables


@pytest.mark.one_backend
def test_monitors_and_verifies():
    dense = hub_models.dense("LlamaBackbone")
    moe = converted()
    inputs = hub_models.inputs_of(moe)
    report = ku.verify_upcycle(dense, moe, inputs)
    assert report.relative_difference < 1e-5
    monitor = ku.RouterMonitor(dense=dense, inputs=inputs)
    moe.compile(keras.optimizers.SGD(0.01), "mse")
    targets = np.zeros((*inputs["token_ids"].shape, 24))
    moe.fit(inputs, targets, verbose=0, callbacks=[monitor])
    assert str(monitor)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda moe: ku.densify_model(moe), ku.UpcycleError, "merge_experts"),
        (
            lambda moe: ku.prune_experts(moe, keep={}),
            ku.UpcycleError,
            "merge_experts",
        ),
        (
            lambda moe: ku.export_model(moe, "keras_hub"),
            ku.UpcycleError,
            "merge_experts",
        ),
        (
            lambda moe: ku.merge_experts(ku.merge_experts(moe)),
            ku.UpcycleError,
            "whole already",
        ),
        (
            lambda moe: ku.save_adapters(ku.merge_experts(moe), "a.npz"),
            ku.UpcycleError,
            "low-rank experts",
        ),
        (lambda moe: ku.LowRankExperts(0), ValueError, "`rank`"),
        (lambda moe: ku.LowRankExperts(2, 0.0), ValueError, "`alpha`"),
        (
            lambda moe: ku.MoEFeedForward(2, 4, low_rank_alpha=1.0),
            ValueError,
            "low_rank=None",
        ),
        (
            lambda moe: converted(expert_init="copy"),
            ValueError,
            "`experts` and `expert_init`",
        ),
        (
            lambda moe: ku.upcycle_model(
                hub_models.dense("LlamaBackbone"), 2, experts=8
            ),
            TypeError,
            "`experts`",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(run, error, message):
    with pytest.raises(error, match=message):
        run(converted())


@pytest.mark.one_backend
def test_merged_experts_are_exported():
    moe = learned(converted(target="mixtral"))
    merged = ku.merge_experts(moe)
    inputs = hub_models.inputs_of(moe)
    stock = ku.export_model(merged, "keras_hub")
    expected = real(moe, inputs)
    np.testing.assert_allclose(
        real(stock, inputs), expected, atol=3e-6 * np.abs(expected).max()
    )


@pytest.mark.one_backend
def test_weights_of_whole_experts_are_refused(tmp_path):
    converted().save_weights(tmp_path / "low.weights.h5")
    moe = ku.upcycle_model(
        hub_models.dense("LlamaBackbone"), EXPERTS, router=ku.TopKRouter(2)
    )
    with pytest.raises(ValueError, match="rank=2 in the file"):
        moe.load_weights(tmp_path / "low.weights.h5")

"""The choice of experts changed after training, and counted."""

import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku

CHOICES = (
    {"top_k": 1},
    {"threshold": 1.2},
    {"batch_threshold": 1.2},
    {},
)


def vit(num_experts=4):
    moe = ku.upcycle_model(
        models.vit_classifier(),
        num_experts,
        recipe="ds_moe",
        attention=False,
        layers=[1],
        seed=0,
    )
    moe.preprocessor = None
    return models.set_routers(moe)


def test_compiled_functions_follow_the_choice():
    moe, x = vit(), models.images()
    moe.compile(loss="mse", metrics=[])
    y = np.zeros((len(x), models.CLASSES), "float32")
    seen = []
    for choice in CHOICES:
        assert ku.set_active_experts(moe, **choice) == 1
        eager = models.output(moe, x)
        np.testing.assert_allclose(
            moe.predict(x, verbose=0), eager, atol=1e-5, rtol=1e-5
        )
        loss = moe.evaluate(x, y, verbose=0)
        assert loss == pytest.approx(np.mean(eager**2), rel=1e-4)
        seen.append(eager)
    assert np.abs(seen[0] - seen[-1]).max() > 1e-4


@pytest.mark.one_backend
def test_generation_follows_the_choice():
    moe = ku.upcycle_model(
        models.t5_lm(), 4, recipe="ds_moe", attention=False, seed=0
    )
    moe.make_generate_function()
    assert moe.generate_function is not None
    assert ku.set_active_experts(moe, top_k=1) == 4
    assert moe.generate_function is None
    assert all(m.router.top_k == 1 for m in models.mixtures(moe))


def test_training_is_left_as_it_is():
    moe = vit()
    x = ops.convert_to_tensor(models.images())
    before = models.array(moe(x, training=True))
    ku.set_active_experts(moe, top_k=1)
    np.testing.assert_array_equal(models.array(moe(x, training=True)), before)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"top_k": 5}, ValueError, "top_k=5, num_experts=4"),
        ({"top_k": 2.0}, TypeError, r"top_k=2\.0"),
        ({"threshold": -1}, ValueError, "threshold=-1"),
        (
            {"top_k": 1, "threshold": 0.5},
            ValueError,
            "At most one.*top_k=1, threshold=0.5",
        ),
    ],
)
def test_a_bad_choice_changes_nothing(choice, error, message):
    moe = vit()
    moe.predict(models.images(), verbose=0)
    with pytest.raises(error, match=message):
        ku.set_active_experts(moe, **choice)
    (layer,) = models.mixtures(moe)
    assert layer.router.selection == "all"
    assert moe.predict_function is not None


@pytest.mark.one_backend
def test_there_must_be_such_a_router():
    with pytest.raises(ku.UpcycleError, match=r'with none.*recipe="ds_moe"'):
        ku.set_active_experts(models.dense_pairs(), top_k=1)
    with pytest.raises(TypeError, match="model=3 of type int"):
        ku.set_active_experts(3, top_k=1)


@pytest.mark.one_backend
@pytest.mark.parametrize("build", [models.t5_backbone, models.t5_lm])
def test_a_causal_stack_refuses_the_batchs_threshold(build):
    moe = ku.upcycle_model(build(), 4, recipe="ds_moe", attention=False, seed=0)
    with pytest.raises(ku.UpcycleError, match=r"causal decoder.*Pass `top_k`"):
        ku.set_active_experts(moe, batch_threshold=0.5)
    assert {m.router.selection for m in models.mixtures(moe)} == {"all"}
    assert ku.set_active_experts(moe, threshold=0.5) == 4


@pytest.mark.one_backend
def test_an_encoder_alone_does_not():
    moe = ku.upcycle_model(
        models.t5_backbone(),
        4,
        recipe="ds_moe",
        attention=False,
        layers={"encoder": [1], "decoder": None},
        seed=0,
    )
    assert ku.set_active_experts(moe, batch_threshold=0.5) == 1


# Counting.


def test_shares_are_those_of_the_choice():
    moe, x = vit(), models.images()
    (layer,) = models.mixtures(moe)
    of_experts = layer.experts.count_params()
    for top_k in (1, 3, 4):
        ku.set_active_experts(moe, top_k=top_k)
        report = ku.measure_active_experts(moe, x)
        (activity,) = report.layers
        assert activity.experts_per_token == top_k
        assert activity.tokens == len(x) * 17
        assert report.expert_share == pytest.approx(top_k / 4)
        idle = (4 - top_k) * of_experts // 4
        assert report.active_parameters == moe.count_params() - idle
        assert report.active_share == pytest.approx(
            1 - idle / moe.count_params()
        )
        assert f"{top_k:.2f} of 4" in str(report)


@pytest.mark.one_backend
def test_padding_is_not_counted_and_batches_add_up():
    moe = ku.upcycle_model(
        models.t5_backbone(), 4, recipe="ds_moe", attention=False, seed=0
    )
    models.set_routers(moe, scale=2.0)
    ku.set_active_experts(moe, threshold=0.9)
    lengths = [(6, 5), (2, 3)]
    both = models.t5_inputs(lengths=lengths)
    whole = ku.measure_active_experts(moe, both)
    assert [a.tokens for a in whole.layers] == [8, 8] * 2
    rows = [
        {name: value[n : n + 1] for name, value in both.items()}
        for n in range(2)
    ]
    parts = ku.measure_active_experts(moe, rows)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert a.tokens == b.tokens
        assert a.experts_per_token == pytest.approx(b.experts_per_token)
        assert 1 <= a.experts_per_token < 4


def test_it_counts_any_router():
    router = ku.ExpertChoiceRouter(2.0)
    moe = ku.upcycle_model(models.vit_backbone(), 4, router=router, seed=0)
    report = ku.measure_active_experts(moe, models.images())
    (activity,) = report.layers
    assert activity.experts_per_token == pytest.approx(9 * 4 / 17)


@pytest.mark.one_backend
def test_somebody_must_be_counted():
    with pytest.raises(ValueError, match="no batch"):
        ku.measure_active_experts(vit(), [])

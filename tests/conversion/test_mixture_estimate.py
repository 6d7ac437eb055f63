"""What a mixture that is there costs: as was predicted, and by counting."""

import math

import hub_models
import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import moe_layers_in

pytestmark = pytest.mark.one_backend

CASES = {
    "pairs": (models.sequence_dense_pairs, {}),
    "gated": (lambda: hub_models.dense("LlamaBackbone"), {}),
    "low_rank": (
        lambda: hub_models.dense("LlamaBackbone"),
        {"experts": ku.LowRankExperts(rank=3)},
    ),
    "shared": (
        lambda: hub_models.dense("LlamaBackbone"),
        {"expert_init": "shared_experts"},
    ),
    "t5": (models.t5_backbone, {"layers": "all"}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_was_estimated_before(name):
    make, settings = CASES[name]
    settings = {"router": ku.TopKRouter(capacity_factor=None), **settings}
    dense = make()
    expected = ku.estimate_upcycle(dense, 4, **settings)
    moe = ku.upcycle_model(dense, 4, **settings)
    found = ku.estimate_mixture(moe)
    assert found.total_params == expected.total_params == moe.count_params()
    assert found.active_params == expected.active_params
    assert found.weight_bytes == expected.weight_bytes
    assert 2 * found.gradient_bytes == expected.adam_bytes
    for own, told in zip(found.layers, expected.layers, strict=True):
        assert own.num_experts == 4
        assert own.experts_per_token == 2
        assert own.total_params == told.total_params
        assert own.active_params == told.active_params
        assert own.flops_per_token == pytest.approx(told.flops_per_token)
    assert found.layers[0].name in str(found)


@pytest.mark.parametrize("name", ["MixtralBackbone", "GptOssBackbone"])
def test_an_adopted_mixture_is_counted(name):
    moe = ku.adopt_model(hub_models.mixture(name))
    found = ku.estimate_mixture(moe)
    assert found.total_params == moe.count_params()
    idle = 0
    for told, layer in zip(found.layers, moe_layers_in(moe), strict=True):
        count, met = layer.num_experts, layer.router.top_k
        own = sum(math.prod(v.shape) for v in layer.experts.weights)
        idle += own * (count - met) // count
        kernels = [
            2 * math.prod(p.kernel.shape)
            for p in layer.experts.projections.values()
        ]
        router = 2 * math.prod(layer.router.kernel.shape)
        assert told.every_expert_flops == router + sum(kernels)
        assert told.flops_per_token == router + sum(kernels) * met // count
    assert found.active_params == found.total_params - idle
    larger, _ = ku.grow_experts(moe, moe_layers_in(moe)[0].num_experts + 2)
    grown = ku.estimate_mixture(larger)
    assert grown.total_params > found.total_params
    assert [each.experts_per_token for each in grown.layers] == [
        each.experts_per_token for each in found.layers
    ]


def test_flags_and_widths_count():
    moe = ku.upcycle_model(hub_models.dense("LlamaBackbone"), 4)
    whole = ku.estimate_mixture(moe)
    ku.freeze(moe, "dense")
    left = ku.estimate_mixture(moe)
    assert left.weight_bytes == whole.weight_bytes
    assert left.gradient_bytes == 4 * sum(
        int(np.prod(v.shape)) for v in moe.trainable_variables
    )
    assert left.gradient_bytes < whole.gradient_bytes
    inputs = keras.Input((4, 8))
    layer = ku.MoEFeedForward(4, 16, dtype="bfloat16")
    narrow = keras.Model(inputs, layer(inputs))
    kernel = layer.router.kernel
    assert ku.estimate_mixture(narrow).weight_bytes == 2 * (
        narrow.count_params() - math.prod(kernel.shape)
    ) + 4 * math.prod(kernel.shape)

"""What experts hold when they start."""

import types

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle
from keras_upcycle.layers import expert_init


@pytest.mark.parametrize("num_experts", [1, 3], ids="E={}".format)
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["bias", "kernel"])
def test_copies_are_equal_and_stacked_in_front(shape, num_experts):
    value = models.tokens(*shape)
    result = models.array(
        expert_init.copy(ops.convert_to_tensor(value), num_experts, "up_bias")
    )
    assert result.shape == (num_experts, *shape)
    for expert in result:
        np.testing.assert_array_equal(expert, value)


@pytest.mark.one_backend
def test_names_and_functions_are_known():
    def own(value, num_experts, name):
        return expert_init.copy(value, num_experts, name)

    assert expert_init.get_init("copy").function is expert_init.copy
    made = expert_init.get_init(own)
    assert made.function is own
    assert expert_init.get_init(made) is made


@pytest.mark.one_backend
def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['copy', .*Received.*'split'"):
        expert_init.get_init("split")


@pytest.mark.one_backend
def test_what_is_neither_name_nor_function_is_refused():
    with pytest.raises(TypeError, match="expert_init=3 of type int"):
        expert_init.get_init(3)


def test_a_function_of_the_users_own_sets_every_weight():
    seen = []

    def numbered(value, num_experts, name):
        seen.append((name, tuple(value.shape)))
        copies = expert_init.copy(value, num_experts, name)
        offset = ops.reshape(
            ops.arange(num_experts, dtype="float32"),
            (-1,) + (1,) * len(value.shape),
        )
        return copies + offset

    dense = models.dense_pairs()
    moe = keras_upcycle.upcycle_model(dense, 3, expert_init=numbered)
    assert sorted(seen) == [
        ("down_bias", (models.WIDTH,)),
        ("down_kernel", (models.HIDDEN, models.WIDTH)),
        ("up_bias", (models.HIDDEN,)),
        ("up_kernel", (models.WIDTH, models.HIDDEN)),
    ]
    (layer,) = models.mixtures(moe)
    up = models.array(dense.get_layer("up_1").kernel)
    down = models.array(dense.get_layer("down_1").bias)
    for expert in range(3):
        np.testing.assert_allclose(
            models.array(layer.experts.expert_up.kernel)[expert],
            up + expert,
            rtol=1e-6,
        )
        np.testing.assert_allclose(
            models.array(layer.experts.expert_down.bias)[expert, 0],
            down + expert,
            rtol=1e-6,
        )


def test_first_values_take_the_asked_shape_and_dtype():
    bias = keras.Variable(models.tokens(5), name="bias")
    block = types.SimpleNamespace(kernels={"up_bias": bias})
    made = expert_init.get_init("copy").values(block, None, 2, seed=None)
    value = made["up_bias"]((2, 1, 5), dtype="float16")
    assert keras.backend.standardize_dtype(value.dtype) == "float16"
    assert tuple(value.shape) == (2, 1, 5)

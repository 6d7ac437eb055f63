"""Dense and sparse side by side: is a weight still what it came from?"""

import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import converted


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_right_after_upcycling_nothing_has_changed(case):
    dense = case.build()
    assert converted.changed(dense, ku.upcycle_model(dense, 3)) == []


def test_one_bit_of_one_expert_is_a_change():
    dense = models.vit_backbone()
    moe = ku.upcycle_model(dense, 3)
    (layer,) = models.mixtures(moe)
    for variable in (
        layer.experts.expert_up.kernel,
        layer.experts.expert_down.bias,
        moe.get_layer("vit_encoder").encoder_layers[0].mlp.dense_1.kernel,
    ):
        before = models.array(variable)
        after = before.copy()
        after[-1, ...] = np.nextafter(before[-1, ...], np.inf)
        variable.assign(after)
        assert converted.changed(dense, moe) == [variable.path]
        variable.assign(before)


def test_what_is_new_is_compared_with_what_it_was():
    dense = models.dense_pairs()
    moe = ku.upcycle_model(dense, 3, layers="all")
    added = converted.added(dense, moe)
    assert [a.shape for a in added] == 2 * [(models.WIDTH, 3)]
    assert converted.changed(dense, moe, added) == []
    first, second = (layer.router.kernel for layer in models.mixtures(moe))
    value = models.array(second)
    value[0, 0] = np.nan
    second.assign(value)
    assert converted.changed(dense, moe, added) == [second.path]
    assert converted.changed(dense, moe) == []
    assert first.path != second.path

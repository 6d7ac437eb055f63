"""How alike experts are, and what is left of the dense block: by hand."""

import itertools

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.analysis.similarity import (
    expert_cosine,
    expert_distance,
    intact_neurons,
)

WIDTH, HIDDEN, EXPERTS = 6, 8, 3


def layer_of(gated=False, **settings):
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN, gated=gated, **settings)
    layer.build((None, 5, WIDTH))
    return models.randomized(layer, seed=3)


def rows_of(layer):
    """Each expert's kernels in one row; biases do not count."""
    kernels = [
        models.array(projection.kernel)
        for projection in layer.experts.projections.values()
    ]
    return np.concatenate([k.reshape(EXPERTS, -1) for k in kernels], axis=1)


@pytest.mark.parametrize("gated", [False, True])
def test_distance_and_cosine_are_those_of_all_kernels_together(gated):
    layer = layer_of(gated)
    rows = rows_of(layer)
    mean = rows.mean(axis=0)
    apart = np.linalg.norm(rows - mean, axis=1) / np.linalg.norm(mean)
    assert expert_distance(layer) == pytest.approx(apart.mean(), rel=1e-5)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in itertools.combinations(rows, 2)
    ]
    assert expert_cosine(layer) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_copies_are_alike_and_int8_says_nothing():
    layer = layer_of()
    for projection in layer.experts.projections.values():
        one = models.array(projection.kernel)[:1]
        projection.kernel.assign(np.repeat(one, EXPERTS, axis=0))
    assert expert_distance(layer) == pytest.approx(0.0, abs=1e-6)
    assert expert_cosine(layer) == pytest.approx(1.0, abs=1e-6)
    layer.quantize("int8")
    assert expert_distance(layer) is None
    assert expert_cosine(layer) is None


def test_a_neuron_is_whole_wherever_it_stands_and_however_long_it_is():
    dense = models.randomized(
        keras.Sequential(
            [
                keras.Input((WIDTH,)),
                keras.layers.Dense(HIDDEN, activation="relu"),
                keras.layers.Dense(WIDTH),
            ]
        )
    )
    (site,) = ku.find_feed_forwards(dense)
    layer = ku.upcycle_model(dense, EXPERTS, layers="all").layers[0]
    up, down = layer.experts.expert_up, layer.experts.expert_down
    assert intact_neurons(site, layer) == 1.0
    # The second expert: in another order, and twice as long.
    order = np.random.default_rng(0).permutation(HIDDEN)
    kernels = models.array(up.kernel), models.array(down.kernel)
    kernels[0][1] = 2.0 * kernels[0][1][:, order]
    kernels[1][1] = 2.0 * kernels[1][1][order]
    # The third: two neurons lead elsewhere, and one is turned round.
    kernels[1][2][:2] += 1.0
    kernels[0][2][:, 2] *= -1.0
    up.kernel.assign(kernels[0])
    down.kernel.assign(kernels[1])
    whole = EXPERTS * HIDDEN - 3
    assert intact_neurons(site, layer) == whole / (EXPERTS * HIDDEN)

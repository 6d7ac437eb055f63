"""Qwen2's experts against their description, neuron by neuron."""

import collections
import warnings

import models
import numpy as np
import pytest

import keras_upcycle as ku

WIDTH, HIDDEN = models.WIDTH, models.HIDDEN


def upcycled(dense, num_experts, **settings):
    init = ku.ReplicateShuffleCut(**settings)
    return ku.upcycle_model(
        dense, num_experts, expert_init=init, layers="all", seed=0
    )


def sources(dense, moe, number=0):
    """For each expert the dense neuron at each place; -1 for a new one."""
    site = ku.find_feed_forwards(dense)[number]
    layer = models.mixtures(moe)[number]
    old = models.array(site.kernels["up_kernel"]).T
    by_column = {column.tobytes(): n for n, column in enumerate(old)}
    up = models.array(layer.experts.expert_up.kernel)
    return [
        [by_column.get(np.ascontiguousarray(c).tobytes(), -1) for c in expert.T]
        for expert in up
    ]


@pytest.mark.parametrize(
    ("num_experts", "width"), [(4, 4), (5, 6), (3, HIDDEN)]
)
def test_the_copies_are_cut_with_nothing_twice(num_experts, width):
    """Without new neurons; `ceil(E * H / F)` copies, the rest dropped."""
    dense = models.dense_pairs()
    moe = upcycled(dense, num_experts, intermediate_dim=width, ratio=0.0)
    found = sources(dense, moe)
    flat = np.concatenate(found)
    assert len(flat) == num_experts * width
    copies = [flat[n : n + HIDDEN] for n in range(0, len(flat), HIDDEN)]
    assert len(copies) == -(-num_experts * width // HIDDEN)
    for copy in copies:
        assert len(set(copy)) == len(copy)
        assert -1 not in copy
    full = [tuple(copy) for copy in copies if len(copy) == HIDDEN]
    assert len(set(full)) == len(full)  # each shuffled by itself
    for order in full:
        assert order != tuple(range(HIDDEN))
    # Kernels and biases of a neuron go together.
    site = ku.find_feed_forwards(dense)[0]
    experts = models.mixtures(moe)[0].experts
    for e, order in enumerate(found):
        np.testing.assert_array_equal(
            models.array(experts.expert_down.kernel)[e],
            models.array(site.kernels["down_kernel"])[order],
        )
        np.testing.assert_array_equal(
            models.array(experts.expert_up.bias)[e, 0],
            models.array(site.kernels["up_bias"])[order],
        )
    np.testing.assert_array_equal(
        models.array(models.mixtures(moe)[0].output_bias.bias),
        models.array(site.kernels["down_bias"]),
    )


def test_half_of_each_expert_is_new():
    dense = models.dense_pairs()
    moe = upcycled(dense, 6, intermediate_dim=4)
    for expert in sources(dense, moe):
        assert collections.Counter(n == -1 for n in expert) == {
            True: 2,
            False: 2,
        }


@pytest.mark.one_backend
def test_all_experts_together_are_the_dense_block():
    """Rescaled, with as many experts as make up whole copies."""
    dense, inputs = models.t5_backbone(), models.t5_inputs()
    moe = ku.upcycle_model(
        dense,
        4,
        router={
            stack: ku.TopKRouter(
                4,
                capacity_factor=None,
                kernel_initializer="zeros",
            )
            for stack in ("encoder", "decoder")
        },
        expert_init=ku.ReplicateShuffleCut(
            HIDDEN // 2, ratio=0.0, rescale=True
        ),
        layers="all",
        seed=0,
    )
    report = ku.verify_upcycle(dense, moe, inputs)
    assert report.relative_difference < 1e-5


@pytest.mark.one_backend
def test_an_eighth_by_default_and_no_wider_than_the_block():
    moe = upcycled(models.dense_pairs(), 3)
    assert {m.intermediate_dim for m in models.mixtures(moe)} == {
        max(1, HIDDEN // 8)
    }
    with pytest.raises(ValueError, match=f"={HIDDEN + 1} for a width"):
        upcycled(models.dense_pairs(), 3, intermediate_dim=HIDDEN + 1)
    with pytest.raises(ValueError, match="intermediate_dim=0"):
        ku.ReplicateShuffleCut(0)
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        ku.ReplicateShuffleCut(ratio=1.5)


@pytest.mark.one_backend
def test_one_seed_one_result():
    dense = models.dense_pairs()
    first, second = (upcycled(dense, 3) for _ in range(2))
    models.assert_same_weights(first, models.weights(second))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "qwen2_moe"},
        {"expert_init": "replicate_shuffle_cut"},
        {"expert_init": ku.ReplicateShuffleCut(4, ratio=0.75)},
        {"expert_init": ku.SharedExperts(8, routed=ku.ReplicateShuffleCut(4))},
    ],
    ids=lambda given: str(*given.values())[:30],
)
def test_a_share_found_to_collapse_is_warned_of(given):
    with pytest.warns(
        UserWarning, match=r"23\.2.*50\.2.*ratio=0\.\d+\. Pass a lower share"
    ) as caught:
        ku.upcycle_model(models.dense_pairs(), 8, **given)
    (warning,) = [w for w in caught if "23.2" in str(w.message)]
    assert warning.filename == __file__  # where the user called it
    assert "\n" not in str(warning.message)


@pytest.mark.one_backend
def test_a_lower_share_and_an_estimate_are_not():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*23\.2")
        ku.upcycle_model(
            models.dense_pairs(),
            8,
            recipe="qwen2_moe",
            expert_init=ku.ReplicateShuffleCut(ratio=0.25),
        )
        ku.estimate_upcycle(models.dense_pairs(), 8, recipe="qwen2_moe")

"""What a conversion costs on several devices: arithmetic, and refusals.

`tests/distribution` compares it with compiled steps.
"""

import keras
import pytest
from keras import layers

import keras_upcycle as ku

pytestmark = pytest.mark.one_backend
WIDTH, HIDDEN, EXPERTS, TOKENS = 16, 32, 8, 64


def dense():
    inputs = keras.Input((4, WIDTH))
    hidden = layers.Dense(HIDDEN, activation="relu")(inputs)
    x = layers.add([inputs, layers.Dense(WIDTH)(hidden)])
    return keras.Model(inputs, layers.Dense(3)(x))


def estimate(**settings):
    router = ku.TopKRouter(2, capacity_factor=1.5)
    return ku.estimate_upcycle(dense(), EXPERTS, router=router, **settings)


def on(mesh, **settings):
    (found,) = estimate(mesh=mesh, **settings).meshes
    return found


EXPERT = 4 * (2 * WIDTH * HIDDEN + HIDDEN + WIDTH)  # bytes of one
ALWAYS = 4 * (WIDTH * EXPERTS + 3 * WIDTH + 3)  # the router and the head


def test_on_one_device_it_is_the_estimate_itself():
    whole = estimate(mesh=1, tokens_per_device=TOKENS)
    (one,) = whole.meshes
    assert one.weight_bytes == whole.weight_bytes == EXPERTS * EXPERT + ALWAYS
    assert one.optimizer_bytes == whole.adam_bytes
    assert one.flops == 3 * TOKENS * whole.flops_per_token
    assert (one.sent_bytes, one.exchange_bytes, one.reduce_bytes) == (0, 0, 0)


@pytest.mark.parametrize("shard_dense", [False, True])
def test_each_part_is_divided_by_whom_it_is_spread_over(shard_dense):
    found = on(
        {"data": 2, "expert": 4},
        tokens_per_device=TOKENS,
        shard_dense=shard_dense,
    )
    experts, always = EXPERTS * EXPERT // 4, ALWAYS
    cut = always / 8 if shard_dense else always
    assert found.weight_bytes == round(experts + cut)
    assert found.optimizer_bytes == round(2 * (experts + cut))
    assert found.gradient_bytes == experts + always
    # 3 slots a token, there and back, forward and backward.
    exchanged = 4 * 3 * TOKENS * WIDTH * 4
    assert found.exchange_bytes == exchanged
    assert found.reduce_bytes == experts + always
    gathered = 2 * always if shard_dense else 0
    assert found.gather_bytes == gathered
    sent = exchanged * 3 / 4 + 7 / 4 * always + experts + 7 / 8 * gathered
    assert found.sent_bytes == round(sent)
    assert found.step_seconds(1e6, 1e3) == pytest.approx(
        found.flops / 1e6 + found.sent_bytes / 1e3
    )


def test_a_number_of_devices_is_every_mesh_that_experts_fit():
    found = estimate(mesh=24).meshes
    assert [(m.data_devices, m.expert_devices) for m in found] == [
        *((24, 1), (12, 2), (6, 4), (3, 8)),
    ]
    text = str(estimate(mesh=24))
    assert "data x expert" in text
    assert "3 x 8" in text
    held = [mesh.bytes_per_device for mesh in found]
    assert held == sorted(held, reverse=True)


def test_frozen_weights_have_no_gradient():
    model = dense()
    for layer in model.layers[1:3]:
        layer.trainable = False
    (found,) = ku.estimate_upcycle(model, EXPERTS, mesh={"expert": 8}).meshes
    assert found.gradient_bytes == 4 * (3 * WIDTH + 3)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mesh": "eight"}, TypeError, "`mesh` must be a number.*'eight'"),
        ({"mesh": 0}, ValueError, "`mesh` must be at least 1"),
        ({"mesh": {"data": 8}}, ValueError, "axis 'expert'.*size 1"),
        (
            {"mesh": {"data": 2, "expert": 3}},
            ValueError,
            "8 experts and mesh=.*more experts, or fewer devices",
        ),
        ({"mesh": {"expert": 0}}, ValueError, "at least 1"),
        ({"tokens_per_device": 4}, ValueError, "mesh=None.*Pass `mesh`"),
        ({"shard_dense": True}, ValueError, "mesh=None.*Pass `mesh`"),
        ({"mesh": 2, "tokens_per_device": 0}, ValueError, "at least 1"),
    ],
)
def test_what_is_no_mesh_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        estimate(**settings)


@pytest.mark.parametrize("rates", [(0, 1), (1, -1.0)])
def test_speeds_are_above_0(rates):
    with pytest.raises(ValueError, match="per_second"):
        on({"expert": 4}).step_seconds(*rates)

"""What is switched off leaves no trace in the program that runs.

Shown by the operations of the program, not by its time: as lowered to XLA on
JAX, as traced on TensorFlow, as dispatched on torch.
"""

import re
from collections import Counter

import keras
import models
import pytest

import keras_upcycle as ku
from keras_upcycle import backend
from keras_upcycle.layers.call_context import record_calls

WIDTH = 8


def layer(router=None, **settings):
    router = router or top_2()
    made = ku.MoEFeedForward(4, 16, router=router, **settings)
    made.build((None, None, WIDTH))
    return made


def top_2(**settings):
    """No losses, no noise, and the same buffers in training as later."""
    return ku.TopKRouter(
        2,
        **{
            "capacity_factor": 1.0,
            "eval_capacity_factor": 1.0,
            "load_balance_loss": 0.0,
            **settings,
        },
    )


def operations(layer, training):
    """How often each operation stands in a call's program."""
    x = keras.ops.convert_to_tensor(models.tokens(2, 8, WIDTH))
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def call(trainable, frozen, x):
            return layer.stateless_call(
                trainable, frozen, x, training=training, return_losses=True
            )

        text = jax.jit(call).lower(
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            x,
        )
        return Counter(re.findall(r"stablehlo\.(\w+)", text.as_text()))
    if backend == "tensorflow":
        import tensorflow as tf

        def call(x):
            return layer(x, training=training), layer.losses

        graph = tf.function(call).get_concrete_function(x).graph
        return Counter(op.type for op in graph.get_operations())
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[str(function)] += 1
            return function(*args, **(kwargs or {}))

    with Counting():
        layer(x, training=training)
        assert layer.losses is not None
    return counts


@pytest.mark.parametrize("engine", ["capacity", "dropless", "dense"])
@pytest.mark.parametrize("choice", ["top_k", "expert_choice"])
def test_training_without_extras_is_inference(choice, engine, monkeypatch):
    backend_name = keras.backend.backend()
    if (backend_name, choice, engine) == ("tensorflow", "top_k", "dropless"):
        pytest.skip("keeps in training what its gradient needs, by itself")
    # Which rows go where may differ, and is no extra.
    monkeypatch.setattr(backend, "packing", lambda *_: (2, 8))
    router = top_2() if choice == "top_k" else ku.ExpertChoiceRouter(2.0)
    made = layer(router, dispatch=engine)
    assert operations(made, training=True) == operations(made, training=False)


@pytest.mark.parametrize(
    ("extra", "beside"),
    [
        ({"load_balance_loss": 0.01}, {}),
        ({"z_loss": 0.001}, {}),
        ({"importance_loss": 0.005}, {}),
        ({"mutual_information_loss": 0.0002}, {}),
        ({"noise_stddev": 0.1}, {}),
        ({"load_loss": 0.005}, {"noise_stddev": 0.1}),
    ],
    ids=lambda extra: next(iter(extra), ""),
)
def test_an_extra_costs_in_training_only(extra, beside):
    plain, made = layer(top_2(**beside)), layer(top_2(**beside, **extra))
    assert operations(made, training=False) == operations(plain, training=False)
    added = operations(made, training=True) - operations(plain, training=True)
    assert sum(added.values()) > 0


def test_a_bias_costs_its_addition_and_in_training_its_move():
    plain, made = layer(), layer(top_2(bias_update_rate=0.001))
    used = operations(made, training=False)
    added = used - operations(plain, training=False)
    assert 0 < sum(added.values()) <= 4  # read, broadcast and add
    assert sum((operations(made, training=True) - used).values()) > 4
    # A frozen router only reads it.
    made.router.trainable = False
    used = operations(made, training=False)
    assert operations(made, training=True) == used


def test_a_temperature_of_one_costs_nothing_and_another_its_division():
    plain = layer()
    for training in (False, True):
        base = operations(plain, training)
        one = layer(top_2(temperature=1.0))
        assert operations(one, training) == base
        added = operations(layer(top_2(temperature=2.0)), training) - base
        assert 0 < sum(added.values()) <= 3  # a constant, broadcast, divided


def test_a_schedule_costs_its_count_in_training_alone():
    schedule = keras.optimizers.schedules.ExponentialDecay(2.0, 10, 0.5)
    plain, made = layer(), layer(top_2(temperature=schedule))
    used = operations(made, training=False)
    assert sum((used - operations(plain, training=False)).values()) > 0
    assert sum((operations(made, training=True) - used).values()) > 0
    # A frozen router divides, and does not count.
    made.router.trainable = False
    used = operations(made, training=False)
    assert operations(made, training=True) == used
    # Noise is for training, and so is its schedule.
    noisy = layer(top_2(noise_stddev=schedule))
    assert operations(noisy, training=False) == operations(plain, False)


def test_dropout_and_remat_cost_in_training_only():
    plain, made = layer(), layer(dropout=0.5, output_dropout=0.5, remat=True)
    assert operations(made, training=False) == operations(plain, training=False)
    assert operations(made, training=True) != operations(plain, training=True)


def test_recording_costs_only_who_records():
    made = layer()
    before = operations(made, training=False)
    with record_calls() as calls:
        made(models.tokens(2, 8, WIDTH))
    assert len(calls) == 1
    assert operations(made, training=False) == before


def test_counting_costs_only_a_watched_router_that_trains():
    plain, made = layer(), layer()
    made.router.watch()
    assert operations(made, training=False) == operations(plain, training=False)
    added = operations(made, training=True) - operations(plain, training=True)
    assert sum(added.values()) > 0

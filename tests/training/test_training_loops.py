"""Training other than by `fit` on one device, a step a batch.

What a loop of one's own must do is what its test does.
"""

import keras
import models
import numpy as np
import pytest
import reference
from places import gaps_in, run_script

import keras_upcycle as ku

BACKEND = keras.backend.backend()
WIDTH, EXPERTS, RATE, BATCH = 8, 4, 0.05, 4


def data(batches, seed=0):
    x = models.tokens(batches * BATCH, WIDTH, seed=seed)
    return x, np.tanh(x[:, ::-1])


def batches_of(*arrays):
    return [
        [array[start : start + BATCH] for array in arrays]
        for start in range(0, len(arrays[0]), BATCH)
    ]


def router(**settings):
    return ku.TopKRouter(
        2,
        **{
            "capacity_factor": None,
            "load_balance_loss": 0.0,
            "bias_update_rate": RATE,
            **settings,
        },
    )


def kernel():
    made = np.random.default_rng(0).normal(size=(WIDTH, EXPERTS))
    return made.astype("float32")


def built(made_router=None, wrap=keras.Model):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((WIDTH,))
    layer = ku.MoEFeedForward(EXPERTS, 8, router=made_router or router())
    model = wrap(inputs, layer(inputs))
    layer.router.kernel.assign(kernel())
    return model


def router_of(model):
    return models.mixtures(model)[0].router


def bias_of(model):
    return models.array(router_of(model).bias)


def expected_bias(x, batches_per_step):
    """The oracle's, at a learning rate of 0; no rounding can change it."""
    bias = np.zeros(EXPERTS)
    batches = [x for (x,) in batches_of(x)]
    for first in range(0, len(batches), batches_per_step):
        decisions = []
        step = batches[first : first + batches_per_step]
        for batch in step:
            logits = batch.astype("float64") @ kernel()
            scores = [reference.softmax(row) + bias for row in logits]
            ordered = np.sort(scores, axis=-1)
            assert (ordered[:, -2] - ordered[:, -3]).min() > 1e-6
            decisions.append(reference.top_k(logits, 2, bias=bias))
        if len(step) == batches_per_step:
            bias = reference.moved_bias(bias, decisions, RATE)
    return bias


def fitted(model, x, y, optimizer, **settings):
    model.compile(optimizer, "mse", **settings)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return model


def still(steps):
    return keras.optimizers.SGD(0.0, gradient_accumulation_steps=steps)


class OwnStep(keras.Model):
    """A step of the user's own around the one that Keras has."""

    def train_step(self, *args):
        return super().train_step(*args)


class Around(keras.Model):
    """Holds a model that was compiled for itself, with another optimizer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs, training=None):
        return self.inner(inputs, training=training)


def around():
    inner = built()
    inner.compile("adam", "mse")
    return Around(inner)


MODELS = {
    "functional": built,
    "own train step": lambda: built(wrap=OwnStep),
    "compiled inside": around,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bias_moves_once_an_optimizer_step(name):
    x, y = data(8)
    once = expected_bias(x, 4)
    # Which the load of the last batch alone, or moves a batch, would not give.
    assert np.abs(once - expected_bias(x, 1)).max() > RATE / 2
    model = fitted(MODELS[name](), x, y, still(4))
    np.testing.assert_allclose(bias_of(model), once, atol=1e-6)


SETTINGS = {
    "steps per execution": {"steps_per_execution": 4},
    "eagerly": {"run_eagerly": True},
}


executes_several = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras on torch refuses `steps_per_execution`"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("steps per execution", marks=executes_several),
        "eagerly",
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_so_it_does_however_steps_are_run(name, steps):
    x, y = data(8)
    optimizer = still(steps) if steps > 1 else keras.optimizers.SGD(0.0)
    model = fitted(built(), x, y, optimizer, **SETTINGS[name])
    expected = expected_bias(x, steps)
    np.testing.assert_allclose(bias_of(model), expected, atol=1e-6)


def test_so_it_does_under_a_loss_scale_and_without_a_loss_function():
    class OwnLoss(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight, **kwargs):
            return keras.ops.mean(keras.ops.square(y - y_pred))

    x, y = data(8)
    scaled = keras.optimizers.LossScaleOptimizer(still(4), initial_scale=2.0)
    model = built(wrap=OwnLoss)
    model.compile(scaled)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    np.testing.assert_allclose(bias_of(model), expected_bias(x, 4), atol=1e-6)


def test_a_step_goes_on_over_epochs_and_files(tmp_path):
    x, y = data(6)
    model = fitted(built(), x, y, still(4))
    np.testing.assert_allclose(bias_of(model), expected_bias(x, 4), atol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    # Two batches of the second step are over, six and six make three steps.
    whole = expected_bias(np.concatenate([x, x]), 4)
    for one in (model, again):
        one.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        np.testing.assert_allclose(bias_of(one), whole, atol=1e-6)
    models.assert_same_weights(again, model)


def test_gathered_loads_are_no_weights():
    with_it, without = (
        built(router(bias_update_rate=rate)) for rate in (RATE, 0.0)
    )
    assert with_it.count_params() - without.count_params() == EXPERTS
    copied = keras.models.clone_model(with_it)
    copied.set_weights(with_it.get_weights())
    models.assert_same_weights(copied, with_it)


@pytest.mark.one_backend
@pytest.mark.parametrize("given", [0, -1])
def test_batches_per_step_is_a_count(given):
    with pytest.raises(ValueError, match=r"batches_per_step.*at least 1"):
        ku.TopKRouter(2, batches_per_step=given)
    with pytest.raises(TypeError, match=r"batches_per_step.*integer"):
        ku.TopKRouter(2, batches_per_step=True)


def test_default_vectors_of_four_batches_are_those_of_one():
    x, y = data(4)
    for weighting in ("none", "normalized", "raw"):
        vectors = []
        for steps, batch in ((4, BATCH), (None, 4 * BATCH)):
            made = ku.DefaultMoERouter(
                2,
                capacity_factor=None,
                load_balance_loss=0.0,
                score_weighting=weighting,
            )
            model = built(made)
            made.default_vectors.assign(np.ones((EXPERTS, WIDTH)))
            optimizer = keras.optimizers.SGD(
                0.0, gradient_accumulation_steps=steps
            )
            model.compile(optimizer, "mse")
            model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
            vectors.append(models.array(made.default_vectors))
        np.testing.assert_allclose(*vectors, atol=1e-6)
        assert np.abs(vectors[0] - 1.0).max() > 0.05


# Loops of one's own.


def _loss(y, prediction):
    return keras.ops.mean(keras.ops.square(y - prediction))


def _by_jax(model, optimizer, batches, at_batch=lambda n: None):
    import jax

    def loss(trained, others, x, y):
        prediction, others, losses = model.stateless_call(
            trained, others, x, training=True, return_losses=True
        )
        return _loss(y, prediction) + sum(losses), others

    @jax.jit
    def step(state, x, y):
        trained, others, memory = state
        gradient = jax.grad(loss, has_aux=True)
        gradients, others = gradient(trained, others, x, y)
        trained, memory = optimizer.stateless_apply(memory, gradients, trained)
        return trained, others, memory

    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    for number, (x, y) in enumerate(batches):
        at_batch(number)
        state = tuple([v.value for v in variables] for variables in lists)
        state = step(state, x, y)
        for variables, values in zip(lists, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _by_tape(model, optimizer, batches, at_batch=lambda n: None):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = _loss(y, prediction) + sum(model.losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    for number, (x, y) in enumerate(batches):
        at_batch(number)
        step(tf.constant(x), tf.constant(y))


def _by_torch(model, optimizer, batches, at_batch=lambda n: None):
    import torch

    for number, (x, y) in enumerate(batches):
        at_batch(number)
        model.zero_grad()
        prediction = model(torch.as_tensor(x), training=True)
        loss = _loss(torch.as_tensor(y), prediction) + sum(model.losses)
        loss.backward()
        variables = model.trainable_variables
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            optimizer.apply(gradients, variables)


LOOP = {"jax": _by_jax, "tensorflow": _by_tape, "torch": _by_torch}[BACKEND]


def dense_and_sparse(optimizer):
    """A trained dense model, and its sparse copy with a skewed router."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(12, activation="gelu", name="up")(inputs)
    dense = keras.Model(inputs, keras.layers.Dense(WIDTH, name="d")(hidden))
    x, y = data(3, seed=5)
    fitted(dense, x, y, optimizer)
    moe = ku.upcycle_model(
        dense,
        EXPERTS,
        layers="all",
        router=router(
            load_balance_loss=0.01,
            temperature=keras.optimizers.schedules.ExponentialDecay(
                2.0, 1, 0.9
            ),
        ),
        expert_init=ku.RandomNoise(stddev=0.1),
        seed=0,
    )
    router_of(moe).kernel.assign(kernel())
    return dense, moe


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-2),
    "nadam": lambda: keras.optimizers.Nadam(1e-2),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "schedule": lambda: keras.optimizers.SGD(
        ku.InverseSquareRoot(0.1, 5), momentum=0.9
    ),
    "scaled": lambda: keras.optimizers.AdamW(1e-2),
    "accumulates": lambda: keras.optimizers.Adam(
        ku.InverseSquareRoot(0.01, 4), gradient_accumulation_steps=2
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_of_ones_own_trains_as_fit_does(name):
    x, y = data(4)
    found = []
    for way in ("fit", "loop"):
        dense, moe = dense_and_sparse(OPTIMIZERS[name]())
        router_of(moe).batches_per_step = 2 if name == "accumulates" else None
        carried = ku.upcycle_optimizer(dense.optimizer, dense, moe)
        if name == "scaled":
            carried = ku.scale_learning_rate(carried, {"/router/": 0.1})
        if way == "fit":
            fitted(moe, x, y, carried)
        else:
            carried.build(moe.trainable_variables)
            LOOP(moe, carried, batches_of(x, y))
        assert bias_of(moe).any()
        steps = 2 if name == "accumulates" else 4
        assert models.array(router_of(moe).training_step) == steps
        found.append(models.weights(moe))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, equal_nan=False)


def test_a_monitor_counts_in_a_loop_of_ones_own():
    x, y = data(5)
    model = built()
    model.compile("sgd", "mse")  # not what trains it
    monitor = ku.RouterMonitor(every=2)
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)
    LOOP(model, optimizer, batches_of(x, y), monitor.on_train_batch_begin)
    logs = {}
    monitor.on_epoch_end(0, logs)
    found = [(r.step, r.steps, r.tokens) for r in monitor.readings]
    assert found == [(2, 2, 2 * BATCH), (4, 2, 2 * BATCH), (5, 1, BATCH)]
    reference_run = fitted_monitor(x, y)
    for a, b in zip(monitor.readings, reference_run.readings, strict=True):
        np.testing.assert_allclose(a.load, b.load)
        np.testing.assert_allclose(a.entropy, b.entropy, rtol=1e-5)
    assert logs["moe_dropped"] == 0.0


def fitted_monitor(x, y, **settings):
    model, monitor = built(), ku.RouterMonitor(every=2)
    model.compile(keras.optimizers.SGD(0.0), "mse", **settings)
    model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[monitor]
    )
    return monitor


@executes_several
def test_a_monitor_counts_with_several_steps_an_execution():
    x, y = data(6)
    monitor = fitted_monitor(x, y, steps_per_execution=2)
    found = [(r.step, r.steps, r.tokens) for r in monitor.readings]
    assert found == [(n, 2, 2 * BATCH) for n in (2, 4, 6)]


def test_a_monitor_counts_optimizer_steps():
    x, y = data(8)
    model, monitor = built(), ku.RouterMonitor(every=4)
    model.compile(still(4), "mse")
    model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[monitor]
    )
    assert [(r.step, r.steps) for r in monitor.readings] == [(1, 4), (2, 4)]


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own optimizers")
def test_torchs_own_optimizer_trains_a_sparse_model():
    import torch

    x, y = data(8)
    made = router(batches_per_step=4)
    model, monitor = built(made), ku.RouterMonitor(every=4)
    parameters = {id(p) for p in model.parameters()}
    for variable in model.trainable_variables:
        assert id(variable.value) in parameters
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    for number, (a, b) in enumerate(batches_of(x, y)):
        monitor.on_train_batch_begin(number)
        loss = _loss(
            torch.as_tensor(b), model(torch.as_tensor(a), training=True)
        )
        (loss / 4).backward()
        if number % 4 == 3:
            sgd.step()
            sgd.zero_grad()
    monitor.on_epoch_end(0)
    np.testing.assert_allclose(bias_of(model), expected_bias(x, 4), atol=1e-6)
    assert [r.steps for r in monitor.readings] == [4, 4]
    # And it moves what it is to move, and nothing else.
    before, bias = models.weights(model), bias_of(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.as_tensor(x), training=False).square().mean().backward()
    adam.step()
    assert all(
        np.abs(old - models.array(new)).max() > 0.01
        for old, new in zip(before, model.weights, strict=True)
        if new.trainable
    )
    np.testing.assert_array_equal(bias_of(model), bias)


@pytest.mark.slow
@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="`tf.distribute` is TensorFlow's"
)
def test_two_replicas_train_as_one_device():
    gaps = gaps_in(run_script("mirrored_training.py"))
    assert {name for name, _ in gaps} >= {
        *("adam", "scaled", "bias", "vectors", "balance of a step"),
        "temperature",
        *("losses of replicas", "losses read"),
    }
    assert [(name, gap) for name, gap in gaps if not gap <= 1e-3] == []

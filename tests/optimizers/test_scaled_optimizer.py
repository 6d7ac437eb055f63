"""Factors on learning rates and gradients, against optimizers without any."""

import json

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle import keras_internals

WIDTH = 4
optimizers = keras.optimizers


def schedule(rate):
    return optimizers.schedules.ExponentialDecay(rate, 2, 0.7)


# From a factor on the learning rate to an optimizer.
OPTIMIZERS = {
    "adam": lambda f: optimizers.Adam(schedule(0.02 * f)),
    "amsgrad": lambda f: optimizers.Adam(0.01 * f, amsgrad=True, clipnorm=0.5),
    "adamw": lambda f: optimizers.AdamW(
        0.01 * f, weight_decay=3.0, global_clipnorm=0.5
    ),
    "adamax": lambda f: optimizers.Adamax(0.01 * f),
    "nadam": lambda f: optimizers.Nadam(0.01 * f),
    "adafactor": lambda f: optimizers.Adafactor(0.05 * f, weight_decay=0.1),
    "sgd": lambda f: optimizers.SGD(schedule(0.02 * f), clipvalue=0.3),
    "momentum": lambda f: optimizers.SGD(
        0.05 * f, 0.9, nesterov=True, weight_decay=0.5
    ),
    "rmsprop": lambda f: optimizers.RMSprop(
        0.01 * f, momentum=0.5, centered=True
    ),
    "lion": lambda f: optimizers.Lion(0.01 * f, weight_decay=0.1),
    "lamb": lambda f: optimizers.Lamb(0.01 * f),
    "adagrad": lambda f: optimizers.Adagrad(0.05 * f),
    "adadelta": lambda f: optimizers.Adadelta(1.0 * f),
    "ftrl": lambda f: optimizers.Ftrl(0.05 * f),
    "schedule_free": lambda f: optimizers.ScheduleFreeAdamW(0.01 * f),
    "muon": lambda f: optimizers.Muon(0.02 * f, weight_decay=0.1),
    "loss_scale": lambda f: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.01 * f), initial_scale=8.0, dynamic_growth_steps=2
    ),
    "average": lambda f: optimizers.Adam(
        0.01 * f, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "accumulates": lambda f: optimizers.AdamW(
        0.01 * f, gradient_accumulation_steps=2
    ),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def variables(seed=0):
    """A router's and two experts' variables, the same every time."""
    layer = ku.MoEFeedForward(2, 3, name="moe")
    layer.build((None, WIDTH))
    models.fixed(layer, seed)
    return layer.trainable_variables


def gradients(step, scale=1.0):
    rng = np.random.default_rng(step)
    return [
        ops.convert_to_tensor(scale * rng.normal(size=v.shape), "float32")
        for v in variables()
    ]


def apply(optimizer, targets, steps=(1, 2, 3), scale=1.0):
    for step in steps:
        update(optimizer, gradients(step, scale), targets)
    return arrays(targets)


def update(optimizer, grads, targets):
    """As `fit` does it: on JAX a loss scale knows no other way."""
    if keras.backend.backend() != "jax":
        optimizer.apply(grads, targets)
        return
    if not optimizer.built:
        optimizer.build(targets)
    memory = optimizer.variables
    values = optimizer.stateless_apply(
        [v.value for v in memory], grads, [v.value for v in targets]
    )
    for found, own in zip(values, (targets, memory), strict=True):
        for variable, value in zip(own, found, strict=True):
            variable.assign(value)


def arrays(found):
    return [models.array(v.value) for v in found]


def is_router(variable):
    return "/router/" in variable.path


def inner(optimizer):
    return getattr(optimizer, "inner_optimizer", optimizer)


def assert_equal(found, expected, atol=0.0):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.one_backend
@every
def test_a_factor_of_one_changes_nothing_to_the_last_bit(name):
    plain = OPTIMIZERS[name](1.0)
    expected = apply(plain, variables())
    other = OPTIMIZERS[name](1.0)
    scaled = ku.scale_learning_rate(other, {"/router/": 1})
    scaled = ku.scale_gradients(scaled, {"/experts/": 1.0})
    assert_equal(apply(scaled, variables()), expected)
    assert_equal(arrays(scaled.variables), arrays(plain.variables))
    assert isinstance(inner(scaled), type(inner(plain)))
    assert scaled.name == other.name


@pytest.mark.thinned
@every
def test_a_variable_trains_at_its_own_learning_rate(name):
    factor, start = 0.5, variables()
    everything = apply(OPTIMIZERS[name](1.0), variables())
    routers = apply(OPTIMIZERS[name](factor), variables())
    scaled = ku.scale_learning_rate(OPTIMIZERS[name](1.0), {"/router/": factor})
    found = apply(scaled, variables())
    expected = [
        routers[n] if is_router(v) else everything[n]
        for n, v in enumerate(start)
    ]
    assert_equal(found, expected, atol=1e-6)
    for n, variable in enumerate(start):
        if is_router(variable):
            assert np.abs(routers[n] - everything[n]).max() > 1e-4


@pytest.mark.thinned
@every
def test_with_a_factor_of_zero_weights_stay_and_memory_goes_on(name):
    start, scaled = arrays(variables()), OPTIMIZERS[name](1.0)
    scaled = ku.scale_learning_rate(scaled, {"/router/": 0})
    targets, plain = variables(), OPTIMIZERS[name](1.0)
    found, expected = apply(scaled, targets), apply(plain, variables())
    for n, variable in enumerate(targets):
        wanted = start[n] if is_router(variable) else expected[n]
        np.testing.assert_array_equal(found[n], wanted)
    of_plain = keras_internals.optimizer_slots(inner(plain))
    of_scaled = keras_internals.optimizer_slots(inner(scaled))
    reads_weights = {"_linears", "_model_variables_moving_average"}
    assert of_plain.keys() == of_scaled.keys()
    for slots in of_plain.keys() - reads_weights:
        for one, other in zip(of_plain[slots], of_scaled[slots], strict=True):
            if one is not None:
                assert_equal(arrays([other]), arrays([one]))


def test_adafactor_whose_rate_is_bounded_has_its_updates_scaled():
    # Half of a rate of 8 would be bounded as the whole is, and change nothing.
    targets, plain = variables(), optimizers.Adafactor(8.0)
    factors = {"/experts/": 0.25}
    scaled = ku.scale_learning_rate(optimizers.Adafactor(8.0), factors)
    scaled.build(targets)
    plain.build(same := variables())
    for step in (1, 2, 3):
        pairs = zip(
            [*same, *plain.variables],
            [*targets, *scaled.variables],
            strict=True,
        )
        for one, other in pairs:
            one.assign(ops.copy(other.value))
        before = arrays(targets)
        found = apply(scaled, targets, [step])
        expected = apply(plain, same, [step])
        for n, variable in enumerate(targets):
            factor = 1.0 if is_router(variable) else 0.25
            wanted = before[n] + factor * (expected[n] - before[n])
            np.testing.assert_allclose(found[n], wanted, atol=1e-6)
            assert np.abs(found[n] - before[n]).max() > 1e-4


@pytest.mark.thinned
@every
def test_gradients_are_scaled_before_accumulation_and_clipping(name):
    scaled = ku.scale_gradients(OPTIMIZERS[name](1.0), {".": 8})
    expected = apply(OPTIMIZERS[name](1.0), variables(), scale=8.0)
    assert_equal(apply(scaled, variables()), expected, atol=1e-6)


def test_adam_hardly_sees_scaled_gradients_but_scaled_rates():
    start = arrays(variables())

    def moved(optimizer):
        found = apply(optimizer, variables())
        return np.concatenate(
            [(a - b).ravel() for a, b in zip(found, start, strict=True)]
        )

    def adam():
        return optimizers.Adam(0.01)

    plain = moved(adam())
    by_gradient = moved(ku.scale_gradients(adam(), {".": 8}))
    by_rate = moved(ku.scale_learning_rate(adam(), {".": 8}))
    np.testing.assert_allclose(by_gradient, plain, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(by_rate, 8 * plain, rtol=1e-3, atol=1e-6)


@pytest.mark.one_backend
def test_the_first_expression_found_counts():
    factors = {"/router/": 0.5, "kernel": 3.0}
    sgd = ku.scale_learning_rate(optimizers.SGD(1.0), factors)
    targets, before = variables(), arrays(variables())
    after = apply(sgd, targets, [1])
    for n, (variable, gradient) in enumerate(
        zip(targets, gradients(1), strict=True)
    ):
        factor = 3.0 if variable.name == "kernel" else 1.0
        factor = 0.5 if is_router(variable) else factor
        wanted = before[n] - factor * models.array(gradient)
        np.testing.assert_allclose(after[n], wanted, atol=1e-5)


@pytest.mark.one_backend
def test_factors_of_one_kind_leave_the_other_and_replace_their_own():
    sgd = ku.scale_gradients(optimizers.SGD(1.0), {"kernel": 2.0})
    both = ku.scale_learning_rate(sgd, {"/router/": 0.5})
    assert dict(both.gradient_factors) == {"kernel": 2.0}
    other = ku.scale_learning_rate(both, {"/experts/": 0.1})
    assert dict(other.learning_rate_factors) == {"/experts/": 0.1}
    assert dict(both.learning_rate_factors) == {"/router/": 0.5}
    bare = ku.scale_gradients(ku.scale_learning_rate(other, {}), {})
    assert type(bare) is type(optimizers.SGD(1.0))


def test_what_is_spared_weight_decay_stays_so():
    def make():
        adam = optimizers.AdamW(0.01, weight_decay=5.0)
        adam.exclude_from_weight_decay(var_names=["bias"])
        return adam

    scaled = ku.scale_learning_rate(make(), {"/router/": 1.0})
    assert_equal(apply(scaled, variables()), apply(make(), variables()))
    adam, targets = make(), variables()
    apply(adam, targets, [1])
    scaled = ku.scale_learning_rate(adam, {"/experts/": 0.5})
    for variable in targets:
        decays = keras_internals.decays(scaled, variable)
        assert decays == (variable.name == "kernel")


@pytest.mark.one_backend
@pytest.mark.thinned
@every
def test_what_a_trained_optimizer_remembers_is_copied(name):
    plain, targets = OPTIMIZERS[name](1.0), variables()
    apply(plain, targets, [1])
    before = arrays(plain.variables)
    scaled = ku.scale_learning_rate(plain, {"/router/": 1.0})
    assert int(scaled.iterations) == int(plain.iterations)
    apply(scaled, targets, [2, 3])
    assert_equal(arrays(plain.variables), before)
    assert_equal(arrays(targets), apply(OPTIMIZERS[name](1.0), variables()))


@pytest.mark.one_backend
@every
def test_a_config_is_json_and_makes_an_equal_optimizer(name):
    scaled = ku.scale_learning_rate(OPTIMIZERS[name](1.0), {"/router/": 0.5})
    config = json.loads(json.dumps(optimizers.serialize(scaled)))
    again = optimizers.deserialize(config)
    assert type(again) is type(scaled)
    assert_equal(apply(again, variables()), apply(scaled, variables()))
    of_class = inner(again).get_config()["optimizer"]
    assert of_class["module"] == "keras.optimizers"  # on every backend
    assert optimizers.serialize(again) == optimizers.serialize(scaled)


# In a model.


def moe_of(optimizer, load_balance_loss=0.0):
    router = ku.TopKRouter(2, load_balance_loss=load_balance_loss)
    moe = ku.upcycle_model(models.dense_pairs(), 3, router=router)
    return compiled(models.fixed(moe), optimizer)


def compiled(model, optimizer):
    quick = "auto" if keras.backend.backend() == "jax" else False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=quick)
    return model


def fit(model, seed=0, steps=4):
    x = models.tokens(4 * steps, models.WIDTH, seed=seed)
    y = models.labels(4 * steps)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return arrays(model.trainable_variables)


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["nadam", "loss_scale", "accumulates"])
def test_fit_trains_at_the_given_rate(name):
    scaled = ku.scale_learning_rate(OPTIMIZERS[name](2.0), {".": 0.5})
    moe = moe_of(scaled)
    before = [value.copy() for value in arrays(moe.trainable_variables)]
    found = fit(moe)
    assert_equal(found, fit(moe_of(OPTIMIZERS[name](1.0))), atol=1e-6)
    for old, new in zip(before, found, strict=True):
        assert np.abs(old - new).max() > 1e-4


def test_a_file_brings_the_factors_and_the_memory_back(tmp_path):
    adam = ku.scale_learning_rate(OPTIMIZERS["loss_scale"](1.0), {"router": 0})
    moe = moe_of(ku.scale_gradients(adam, {"bias": 2.0}))
    fit(moe)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert type(again.optimizer.inner_optimizer) is type(
        moe.optimizer.inner_optimizer
    )
    assert_equal(fit(again, seed=1), fit(moe, seed=1))


@keras.saving.register_keras_serializable("keras_upcycle_tests")
class Steady(keras.optimizers.Optimizer):
    """An optimizer of one's own: the sign, and no memory."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, learning_rate * ops.sign(gradient))


def test_an_optimizer_of_ones_own_is_scaled_saved_and_loaded(tmp_path):
    moe = moe_of(ku.scale_learning_rate(Steady(0.01), {"/router/": 0.5}))
    kernel = models.mixtures(moe)[0].router.kernel
    before = models.array(kernel.value).copy()
    fit(moe, steps=1)
    moved = np.abs(models.array(kernel.value) - before)
    np.testing.assert_allclose(moved, 0.005, rtol=1e-3)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert isinstance(again.optimizer, Steady)
    assert_equal(fit(again, seed=1), fit(moe, seed=1))


COUNTING = ["adam", "nadam", "adafactor", "lamb", "muon", "loss_scale"]


@pytest.mark.one_backend
@pytest.mark.filterwarnings("ignore:Keras's Muon")
@pytest.mark.parametrize("name", COUNTING)
def test_what_upcycle_optimizer_gives_goes_through(name):
    dense, optimizer = models.dense_pairs(), OPTIMIZERS[name](1.0)
    rng = np.random.default_rng(0)
    update(optimizer, noise(rng, dense), dense.trainable_variables)
    moe = ku.upcycle_model(dense, 3)
    start = moe.get_weights()

    def train(made):
        moe.set_weights(start)
        rng = np.random.default_rng(1)
        for _ in range(3):
            update(made, noise(rng, moe), moe.trainable_variables)
        return arrays(moe.trainable_variables)

    plain = ku.upcycle_optimizer(optimizer, dense, moe)
    scaled = ku.scale_learning_rate(plain, {"/router/": 1.0})
    half = ku.scale_learning_rate(plain, {"/router/": 0.5})
    expected = train(plain)
    assert_equal(train(scaled), expected)
    assert_equal(arrays(scaled.variables), arrays(plain.variables))
    before = [models.array(w) for w in start]
    for n, found in enumerate(train(half)):
        router = is_router(moe.trainable_variables[n])
        if not router:
            np.testing.assert_array_equal(found, expected[n])
        elif name != "lamb":  # whose ratio follows the weights
            wanted = before[n] + 0.5 * (expected[n] - before[n])
            np.testing.assert_allclose(found, wanted, atol=2e-3)
            assert np.abs(found - expected[n]).max() > 1e-3


def noise(rng, model):
    return [
        ops.convert_to_tensor(rng.normal(size=v.shape), "float32")
        for v in model.trainable_variables
    ]


@pytest.mark.one_backend
@pytest.mark.parametrize("build", [models.vit_classifier, models.t5_backbone])
def test_routers_and_experts_of_kerashub_models_are_found_by_name(build):
    moe = ku.upcycle_model(build(), 2)
    sgd = optimizers.SGD(1.0)
    sgd.build(moe.trainable_variables)
    factors = {"/router/": 0.25, "/experts/": 4.0}
    scaled = ku.scale_learning_rate(sgd, factors)
    wanted = {}
    for layer in models.mixtures(moe):
        wanted |= {id(v): 0.25 for v in layer.router.weights}
        wanted |= {id(v): 4.0 for v in layer.experts.weights}
    targets = keras_internals.optimizer_targets(scaled)
    assert len(targets) > len(wanted)
    assert list(scaled.rate_scales) == [
        wanted.get(id(variable), 1.0) for variable in targets
    ]


# Bad input.


@pytest.mark.one_backend
def test_an_expression_that_decides_for_nothing_is_an_error():
    sgd = optimizers.SGD(1.0)
    message = r"Received: 'routr', .*such as \['moe/router/kernel'"
    unbuilt = ku.scale_learning_rate(sgd, {"/router/": 0.5, "routr": 0.5})
    with pytest.raises(ValueError, match=message):
        unbuilt.build(variables())
    assert not unbuilt.built
    sgd.build(variables())
    with pytest.raises(ValueError, match=message):
        ku.scale_gradients(sgd, {"routr": 0.5})
    hidden = {"/moe|/router/": 0.5, "kernel": 2.0, "router": 0.1}
    with pytest.raises(ValueError, match="Received: 'router', which"):
        ku.scale_learning_rate(sgd, hidden)


@pytest.mark.one_backend
def test_bad_arguments_are_named():
    sgd = optimizers.SGD(1.0)
    scale = ku.scale_learning_rate
    for function in (scale, ku.scale_gradients):
        with pytest.raises(TypeError, match="Received: optimizer='sgd'"):
            function("sgd", {"router": 0.5})
        with pytest.raises(TypeError, match="must be a mapping"):
            function(sgd, [("router", 0.5)])
        with pytest.raises(TypeError, match="Received: 3 of type int"):
            function(sgd, {3: 0.5})
        with pytest.raises(ValueError, match=r"Received: '\(', of which"):
            function(sgd, {"(": 0.5})
        with pytest.raises(TypeError, match="must be a number"):
            function(sgd, {"router": "half"})
        for factor in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"=.*{factor}"):
                function(sgd, {"router": factor})
        multi = optimizers.MultiOptimizer(optimizers.OptimizerMap(sgd))
        with pytest.raises(ValueError, match="A `MultiOptimizer` has"):
            function(multi, {"router": 0.5})


@pytest.mark.one_backend
def test_a_dense_models_factors_do_not_cross_the_conversion():
    dense, sgd = models.dense_pairs(), optimizers.SGD(1.0)
    scaled = ku.scale_learning_rate(sgd, {"head": 0.5})
    scaled.build(dense.trainable_variables)
    moe = ku.upcycle_model(dense, 2)
    with pytest.raises(ku.UpcycleError, match="scale the result of"):
        ku.upcycle_optimizer(scaled, dense, moe)
    bare = ku.scale_learning_rate(scaled, {})
    assert ku.upcycle_optimizer(bare, dense, moe).built

"""Temperature and noise by schedule: values by hand, and the count of steps."""

import functools

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.routing.router import clone

EXPERTS, HIDDEN = 4, 6
schedules = keras.optimizers.schedules
# A token's one expert is enough in places; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")


def halved(start=2.0):
    """`start * 2 ** -step`."""
    return schedules.ExponentialDecay(start, 1, 0.5)


def falling(start=3.0, end=0.5, steps=4):
    """A line from `start` to `end`."""
    return schedules.PolynomialDecay(start, steps, end)


def on_the_line(step, start=3.0, end=0.5, steps=4):
    return start + (end - start) * min(step, steps) / steps


@keras.saving.register_keras_serializable(package="test_router_schedules")
class OneOver(schedules.LearningRateSchedule):
    """`1 / (1 + step)`, in plain arithmetic."""

    def __call__(self, step):
        return 1.0 / (1.0 + ops.cast(step, "float32"))

    def get_config(self):
        return {}


def normalized(scores):
    centred = scores - scores.mean(-1, keepdims=True)
    return centred / scores.std(-1, keepdims=True)


OPEN = {"capacity_factor": None, "load_balance_loss": 0.0}
EVERY = range(EXPERTS)
PAIRS = [0, 1, 0, 1]
# A router, and the oracle's decision from what the kernel gives and a
# temperature.
ROUTERS = {
    "top_k": (
        functools.partial(ku.TopKRouter, 2, **OPEN),
        lambda z, t: reference.top_k(z / t, 2),
    ),
    "not normalized": (
        functools.partial(ku.TopKRouter, 2, False, **OPEN),
        lambda z, t: reference.top_k(z / t, 2, False),
    ),
    "after": (
        functools.partial(ku.TopKRouter, 2, softmax="after_top_k", **OPEN),
        lambda z, t: reference.top_k(z / t, 2, softmax_order="after_top_k"),
    ),
    "groups": (
        functools.partial(ku.TopKRouter, 1, False, expert_groups=PAIRS, **OPEN),
        lambda z, t: reference.top_k_of_groups(z / t, 1, PAIRS, False),
    ),
    "expert_choice": (
        functools.partial(ku.ExpertChoiceRouter, 1.5, normalize=False),
        lambda z, t: reference.expert_choice(z / t, 1.5, False),
    ),
    "skywork": (
        functools.partial(
            ku.SkyworkRouter,
            2,
            False,
            capacity_factor=4.0,
            load_balance_loss=0.0,
        ),
        lambda z, t: reference.top_k(normalized(z) / t, 2, False),
    ),
    "ds_moe": (
        functools.partial(
            ku.DSMoERouter, mutual_information_loss=0.0, group="example"
        ),
        lambda z, t: reference.top_k(z / t, EXPERTS, False),
    ),
    "default_moe": (
        functools.partial(ku.DefaultMoERouter, 2, **OPEN),
        lambda z, t: reference.top_k(z / t, 2),
    ),
    "dense_mixer": (
        functools.partial(
            ku.TopKRouter, 2, router_gradient="dense_mixer", **OPEN
        ),
        lambda z, t: reference.top_k(z / t, 2),
    ),
}
by_name = pytest.mark.parametrize("name", ROUTERS)


def layer_of(router, **settings):
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN, router, **settings)
    layer.build((None, 5, models.WIDTH))
    return models.set_routers(models.randomized(layer, seed=1), 2)


def tokens(batch=3, seed=0):
    return models.tokens(batch, 5, models.WIDTH, seed=seed)


def step_of(router):
    return int(ops.convert_to_numpy(router.training_step))


def expected(layer, x, route, temperature, kernel=None):
    weights = gradients.weights_of(layer)
    if kernel is not None:
        weights["router"] = kernel
    return reference.moe(
        x,
        weights,
        lambda scores, mask: route(scores, temperature),
        layer.router.group,
    )


# What a temperature does.


@by_name
def test_a_schedule_divides_by_what_it_says_of_each_step(name):
    make, route = ROUTERS[name]
    layer, x = layer_of(make(temperature=falling())), tokens()
    seen = []
    for step in (0, 1, 2, 3):
        want = expected(layer, x, route, on_the_line(step))
        at_inference = models.output(layer, x)
        np.testing.assert_allclose(at_inference, want, rtol=1e-4, atol=1e-4)
        trained = models.array(layer(x, training=True))
        np.testing.assert_allclose(trained, want, rtol=1e-4, atol=1e-4)
        assert step_of(layer.router) == step + 1
        seen.append(at_inference)
    assert np.abs(seen[0] - seen[-1]).max() > 1e-3


@by_name
def test_a_number_divides_always(name):
    make, route = ROUTERS[name]
    layer, x = layer_of(make(temperature=2.5)), tokens()
    for training in (True, True, False):
        np.testing.assert_allclose(
            models.array(layer(x, training=training)),
            expected(layer, x, route, 2.5),
            rtol=1e-4,
            atol=1e-4,
        )
    assert layer.router.training_step is None


# Whose gradients are not those of what they compute.
STRAIGHT = ("default_moe", "dense_mixer", "groups")


@pytest.mark.thinned
@pytest.mark.parametrize("name", [n for n in ROUTERS if n not in STRAIGHT])
def test_gradients_are_those_of_divided_logits(name):
    """Differences of the oracle, in float64, by the kernel."""
    make, route = ROUTERS[name]
    layer = layer_of(make(temperature=falling()))
    layer.router.training_step.assign(3)
    x, cotangent = tokens(2), tokens(2, seed=3)
    _, found = gradients.of_layer(layer, x, cotangent, training=True)

    def total(kernel):
        want = expected(layer, x, route, on_the_line(3), kernel)
        return np.sum(want * cotangent)

    kernel = gradients.weights_of(layer)["router"]
    slopes = reference.gradient(total, kernel)
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(
        found["router/kernel"], slopes, rtol=1e-3, atol=1e-4
    )


@pytest.mark.thinned
@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "skywork"])
def test_it_is_a_kernel_divided_by_it(name):
    """So with the gradients that are straight through a choice, too."""
    make, _ = ROUTERS[name]
    x, cotangent = tokens(2), tokens(2, seed=3)
    layer = layer_of(make(temperature=falling()))
    router = layer.router
    router.training_step.assign(4)
    outputs, scheduled = gradients.of_layer(layer, x, cotangent, training=True)
    router.temperature = 1.0
    router.kernel.assign(models.array(router.kernel) / 0.5)
    same, plain = gradients.of_layer(layer, x, cotangent, training=True)
    np.testing.assert_allclose(outputs, same, rtol=1e-4, atol=1e-5)
    assert np.abs(plain["router/kernel"]).max() > 1e-3
    plain["router/kernel"] = plain["router/kernel"] / 0.5
    for path, gradient in plain.items():
        np.testing.assert_allclose(
            scheduled[path], gradient, rtol=1e-3, atol=1e-4, err_msg=path
        )


LOSSES = {
    "load_balance_loss": 0.3,
    "z_loss": 0.2,
    "importance_loss": 0.4,
    "load_loss": 0.5,
    "mutual_information_loss": 0.6,
}


def drawn(seed, count, stddev):
    """The noise of a router's first calls, each by its own stddev."""
    draws = keras.random.SeedGenerator(seed)
    shape = (1, 15, EXPERTS)
    return [
        stddev(step)
        * ops.convert_to_numpy(keras.random.normal(shape, seed=draws))
        for step in range(count)
    ]


def test_losses_are_of_divided_logits_with_the_noise_divided_too():
    stddev, router = 0.5, functools.partial(ku.TopKRouter, 2, seed=3)
    layer = layer_of(
        router(temperature=falling(), noise_stddev=stddev, **LOSSES)
    )
    kernel = gradients.weights_of(layer)["router"]
    for step, noise in enumerate(drawn(3, 3, lambda step: stddev)):
        x, t = tokens(seed=step), on_the_line(step)
        scores = x.reshape(1, -1, models.WIDTH).astype("float64") @ kernel
        z, noisy = scores / t, (scores + noise) / t
        p = np.stack([[reference.softmax(row) for row in z[0]]])
        layer(x, training=True)
        wanted = {
            "load_balance_loss": reference.load_balance(noisy, 2),
            "z_loss": reference.z_loss(z),
            "importance_loss": reference.importance(p),
            "load_loss": reference.load(z, noisy, stddev / t, 2),
            "mutual_information_loss": reference.mutual_information(p),
        }
        total = sum(LOSSES[name] * value for name, value in wanted.items())
        assert float(sum(layer.losses)) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["not normalized", "expert_choice"])
def test_noise_follows_its_schedule(name):
    """And is divided with the logits: the choice is that of `z + n`."""
    make, route = ROUTERS[name]
    settings = {"noise_stddev": halved(), "seed": 3, "group": "batch"}
    layer = layer_of(make(temperature=falling(), **settings))
    x = tokens()
    for step, noise in enumerate(drawn(3, 4, lambda step: 2.0 * 0.5**step)):
        # Noise on logits, and not on outputs of experts, of one group.
        want = expected(
            layer,
            x,
            lambda z, t, noise=noise: route(z + noise[0], t),
            on_the_line(step),
        )
        found = models.array(layer(x, training=True))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    quiet = expected(layer, x, route, on_the_line(4))
    np.testing.assert_allclose(
        models.output(layer, x), quiet, rtol=1e-4, atol=1e-4
    )


# The count of steps.


def one_layer(router, scope=None, **settings):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5, models.WIDTH))
    with keras.RematScope(scope):
        layer = ku.MoEFeedForward(
            EXPERTS, HIDDEN, router, name="moe", **settings
        )
    model = keras.Model(inputs, layer(inputs), name="one")
    return models.set_routers(models.randomized(model, seed=1), 2)


def scheduled(**settings):
    return ku.TopKRouter(
        2,
        **{
            "temperature": falling(),
            "noise_stddev": halved(0.5),
            "seed": 3,
            **settings,
        },
    )


def router_of(model):
    return models.mixtures(model)[0].router


def fitted(model, epochs=1, batches=4, optimizer=None, callbacks=(), **compile):
    if optimizer is not None:
        model.compile(optimizer, "mse", **compile)
    x = tokens(2 * batches)
    model.fit(
        x,
        np.tanh(x[..., ::-1]),
        batch_size=2,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def sgd(steps=None):
    return keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)


@pytest.mark.thinned
@pytest.mark.parametrize(
    "settings",
    [{}, {"remat": True}, {"scope": "full"}, {"dispatch": "dropless"}],
    ids=["plain", "remat", "remat scope", "dropless"],
)
def test_fit_counts_steps_and_nothing_else_does(settings):
    model = fitted(one_layer(scheduled(), **settings), 2, 3, sgd())
    assert step_of(router_of(model)) == 6
    model.predict(tokens(), verbose=0)
    model.evaluate(tokens(), tokens(), verbose=0)
    model(tokens())
    assert step_of(router_of(model)) == 6
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 6


def test_a_compiled_step_is_an_eager_one():
    found = []
    for eagerly in (True, False):
        model = one_layer(scheduled())
        fitted(model, 2, 2, sgd(), run_eagerly=eagerly)
        found.append(models.weights(model))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, equal_nan=False)


def test_batches_of_one_optimizer_step_are_one(tmp_path):
    """Each sees the same temperature; a file keeps where a step stands."""
    model = fitted(one_layer(scheduled()), 1, 5, sgd(2))
    assert step_of(router_of(model)) == 2
    model.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    for each in (model, again):
        fitted(each, 1, 3)
        assert step_of(router_of(each)) == 4
    models.assert_same_weights(again, model)


@pytest.mark.one_backend
def test_calls_of_one_step_are_as_many_as_is_said():
    inputs = keras.Input((5, models.WIDTH))
    layer = ku.MoEFeedForward(EXPERTS, HIDDEN, scheduled(batches_per_step=2))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert step_of(layer.router) == 0
    fitted(model, 1, 3, sgd())
    assert step_of(layer.router) == 3
    for make in (ku.ExpertChoiceRouter, ku.DSMoERouter):
        layer = layer_of(make(temperature=halved(), batches_per_step=2))
        for step in (0, 1, 1, 2):
            layer(tokens(), training=True)
            assert step_of(layer.router) == step


@pytest.mark.one_backend
def test_a_frozen_router_does_not_count():
    model = one_layer(scheduled())
    ku.freeze(model, "router")
    fitted(model, 1, 2, sgd())
    assert step_of(router_of(model)) == 0
    ku.unfreeze(model, "router")
    fitted(model, 1, 2, sgd())
    assert step_of(router_of(model)) == 2
    assert not router_of(model).training_step.trainable


@pytest.mark.one_backend
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_steps_are_whole_numbers_under_every_policy(policy):
    layer = layer_of(scheduled(), dtype=policy)
    count = layer.router.training_step
    assert keras.backend.is_int_dtype(count.dtype)
    count.assign(1000)
    layer(tokens(), training=True)
    assert step_of(layer.router) == 1001


@pytest.mark.one_backend
def test_without_a_schedule_there_is_no_count():
    plain, cold = (layer_of(ku.TopKRouter(2, temperature=t)) for t in (1, 0.5))
    assert [v.name for v in plain.router.variables] == ["kernel"]
    assert [v.name for v in cold.router.variables] == ["kernel"]
    made = layer_of(scheduled())
    assert [v.name for v in made.router.weights] == ["kernel", "training_step"]


# Files and models made of models.


def test_training_that_goes_on_from_a_file_ends_as_a_whole_one(tmp_path):
    whole = fitted(one_layer(scheduled()), 4, 2, keras.optimizers.Adam(0.01))
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "moe.keras")
    fitted(
        one_layer(scheduled()),
        2,
        2,
        keras.optimizers.Adam(0.01),
        callbacks=[saved],
    )
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert step_of(router_of(again)) == 4
    fitted(again, 2, 2)
    for a, b in zip(whole.weights, again.weights, strict=True):
        assert np.isfinite(models.array(a)).all()
        np.testing.assert_array_equal(models.array(a), models.array(b))


@pytest.mark.one_backend
def test_files_hold_count_and_schedule(tmp_path):
    model = one_layer(scheduled(temperature=OneOver()))
    router_of(model).training_step.assign(7)
    model.save_weights(tmp_path / "moe.weights.h5")
    fresh = one_layer(scheduled(temperature=OneOver()))
    fresh.load_weights(tmp_path / "moe.weights.h5")
    assert step_of(router_of(fresh)) == 7
    copied = keras.models.clone_model(model)
    assert step_of(router_of(copied)) == 0
    copied.set_weights(model.get_weights())
    for each in (fresh, copied):
        router = router_of(each)
        assert router.scheduled_now()["temperature"] == pytest.approx(1 / 8)
        assert router.get_config() == router_of(model).get_config()
        np.testing.assert_array_equal(
            models.output(each, tokens()), models.output(model, tokens())
        )
    without = one_layer(ku.TopKRouter(2))
    with pytest.raises(ValueError, match="schedule a `training_step`"):
        without.load_weights(tmp_path / "moe.weights.h5")


class Local(schedules.LearningRateSchedule):
    """Registered nowhere."""

    def __call__(self, step):
        return 2.0

    def get_config(self):
        return {}


@pytest.mark.one_backend
def test_a_clone_keeps_the_schedule_itself():
    schedule = Local()
    router = ku.TopKRouter(2, temperature=schedule, noise_stddev=schedule)
    again = clone(router)
    assert again.temperature is again.noise_stddev is schedule
    assert models.array(layer_of(again)(tokens(), training=True)).all()


@pytest.mark.one_backend
def test_upcycled_routers_have_it_and_are_counted(tmp_path):
    dense = models.sequence_dense_pairs()
    moe = ku.upcycle_model(dense, EXPERTS, layers="all", router=scheduled())
    x = models.tokens(4, 6, models.WIDTH)
    gap = models.relative_gap(models.output(moe, x), models.output(dense, x))
    assert gap < 1e-5
    estimate = ku.estimate_upcycle(
        dense, EXPERTS, layers="all", router=scheduled()
    )
    assert estimate.total_params == moe.count_params()
    moe.compile("adam", "mse")
    moe.fit(x, models.output(dense, x), verbose=0)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    for layer in models.mixtures(again):
        assert step_of(layer.router) == 1
    models.assert_same_weights(again, moe)
    back = ku.densify_model(moe, dense=dense)
    assert len(back.weights) == len(dense.weights)


REMADE = {
    "prune": lambda moe: ku.prune_experts(
        moe, keep={"moe": list(range(EXPERTS))}
    )[0],
    "grow": lambda moe: ku.grow_experts(moe, 7, seed=0)[0],
    "merge": ku.merge_experts,
}


@pytest.mark.one_backend
@pytest.mark.parametrize("name", REMADE)
def test_other_experts_go_on_at_the_same_step(name):
    settings = {"low_rank": 2} if name == "merge" else {}
    router = scheduled(capacity_factor=None)
    moe = one_layer(router, **settings)
    router_of(moe).training_step.assign(3)
    made = REMADE[name](moe)
    assert step_of(router_of(made)) == 3
    assert router_of(made).scheduled_now() == router_of(moe).scheduled_now()
    np.testing.assert_allclose(
        models.output(made, tokens()),
        models.output(moe, tokens()),
        rtol=1e-4,
        atol=1e-5,
    )
    fitted(made, 1, 1, sgd())
    assert step_of(router_of(made)) == 4
    assert step_of(router_of(moe)) == 3


@pytest.mark.one_backend
def test_a_monitor_shows_what_schedules_give():
    model = one_layer(scheduled())
    monitor = ku.RouterMonitor(every=1, detail=True)
    fitted(model, 2, 2, sgd(), callbacks=[monitor])
    found = [reading.scheduled for reading in monitor.readings]
    assert [reading.step for reading in monitor.readings] == [1, 2, 3, 4]
    for step, shown in enumerate(found, 1):
        assert shown == {
            "temperature": pytest.approx(on_the_line(step)),
            "noise_stddev": pytest.approx(0.5 * 0.5**step),
        }
    history = model.history.history
    for name in ("moe_temperature", "moe_temperature/one/moe"):
        if name in history:
            assert history[name][-1] == pytest.approx(on_the_line(4))
    assert "moe_temperature" in history
    plain = one_layer(ku.TopKRouter(2, temperature=0.5))
    fitted(plain, 1, 1, sgd(), callbacks=[ku.RouterMonitor()])
    assert "moe_temperature" not in plain.history.history


# What is refused.


class Unsaved(schedules.LearningRateSchedule):
    """Without a config."""

    def __call__(self, step):
        return 1.0


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"temperature": 0.0}, ValueError, "positive.*temperature=0.0"),
        (
            {"temperature": falling(0.0)},
            ValueError,
            r"positive.*temperature=0\.0.*PolynomialDecay gives at step 0",
        ),
        (
            {"noise_stddev": falling(-1.0)},
            ValueError,
            r"at least 0.*noise_stddev=-1\.0.*at step 0",
        ),
        (
            {"temperature": ku.InverseSquareRoot(1.0, 10)},
            ValueError,
            "InverseSquareRoot gives at step 0",
        ),
        (
            {"temperature": schedules.ExponentialDecay(2, 10, 0.5)},
            ValueError,
            "of floats.*ExponentialDecay with initial_learning_rate=2.*2.0",
        ),
        (
            {"noise_stddev": schedules.PiecewiseConstantDecay([3], [1, 0.5])},
            ValueError,
            "noise_stddev.*of floats.*values=",
        ),
        (
            {"temperature": Unsaved()},
            TypeError,
            "files can hold.*Unsaved.*get_config",
        ),
        (
            {"temperature": lambda step: 1.0},
            TypeError,
            "must be a number.*LearningRateSchedule",
        ),
        ({"temperature": Local}, TypeError, "not its class"),
        ({"temperature": {"a": 1}}, ValueError, "a number or a learning-rate"),
        (
            {"noise_stddev": halved(), "load_loss": 0.1},
            ValueError,
            "load_loss.*noise_stddev.*ExponentialDecay.*importance_loss",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, error, said):
    with pytest.raises(error, match=f"(?s){said}") as raised:
        ku.TopKRouter(2, **settings)
    assert "Received" in str(raised.value)

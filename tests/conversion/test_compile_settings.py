"""What a compiled model knew arrives in what is made of it, or is said."""

import functools
import re
import warnings

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku

D = 6


def pairs_model(outputs=1):
    """Two pairs of `Dense`, the last one an output of the model."""
    x = keras.Input((D,), name="x")
    hidden = keras.layers.Dense(12, activation="relu", name="up_a")(x)
    hidden = keras.layers.Dense(D, name="down_a")(hidden)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    ends = []
    for number in range(outputs):
        end = keras.layers.Dense(12, activation="relu", name=f"up_{number}")
        out = keras.layers.Dense(D, name=f"down_{number}")
        ends.append(out(end(hidden)))
    return keras.Model(x, ends if outputs > 1 else ends[0], name="pairs")


def data(outputs=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, D)).astype("float32")
    y = rng.normal(size=(8, D)).astype("float32")
    return x, y if outputs == 1 else [y] * outputs


def convert(model, num_experts=2, **kwargs):
    return ku.upcycle_model(
        model, num_experts, router="top_k", layers="all", seed=0, **kwargs
    )


def quietly(make, *args, **kwargs):
    """What `make` gives, once it is sure that it warns of nothing of ours."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = make(*args, **kwargs)
    assert not [str(w.message) for w in seen if w.filename == __file__], (
        "a warning at the user's line"
    )
    return result


def said(make, *args, **kwargs):
    """What `make` gives, and the warnings at the user's line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = make(*args, **kwargs)
    lines = [str(w.message) for w in seen if w.filename == __file__]
    assert all("\n" not in line for line in lines)
    return result, lines


def pruned(model):
    moe = convert(model, num_experts=3)
    return ku.prune_experts(
        moe, keep={layer.name: [0, 2] for layer in models.mixtures(moe)}
    )[0]


def dense_again(model):
    return ku.densify_model(convert(model), dense=model)


def extracted(model):
    return ku.extract_expert(convert(model), 1, dense=model)


MAKERS = {
    "upcycle": convert,
    "slices": lambda m: convert(m, expert_init="feed_forward_slices"),
    "shared": lambda m: convert(m, expert_init="shared_experts"),
    "prune": pruned,
    "densify": dense_again,
    "extract": extracted,
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def decayed(model):
    """Paths of the variables that one step of pure weight decay shrinks."""
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    before = {v.path: models.array(v) for v in model.trainable_variables}
    optimizer.apply(
        [ops.zeros(v.shape) for v in model.trainable_variables],
        model.trainable_variables,
    )
    return {
        v.path
        for v in model.trainable_variables
        if np.any(models.array(v) < before[v.path])
    }


# Weight decay.


@pytest.mark.one_backend
@pytest.mark.thinned
@every_maker
def test_variables_spared_from_weight_decay_by_name(make):
    dense = pairs_model()
    adam = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    adam.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    dense.compile(adam, "mse")
    result = quietly(make, dense)
    kernels = {v.path for v in result.trainable_variables if v.name == "kernel"}
    assert decayed(result) == kernels


@pytest.mark.one_backend
@every_maker
def test_variables_spared_from_weight_decay_by_list(make):
    """The experts of one block, the norm, and nothing else."""
    dense = pairs_model()
    adam = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    by_name = {layer.name: layer for layer in dense.layers}
    adam.exclude_from_weight_decay(
        var_list=[
            by_name["down_a"].kernel,
            by_name["up_0"].bias,
            by_name["norm"].gamma,
        ]
    )
    dense.compile(adam, "mse")
    result = quietly(make, dense)
    spared = {v.path for v in result.trainable_variables} - decayed(result)
    first, last = "(up_a_moe|down_a)", "(up_0_moe|up_0)"
    expected = [
        rf"{first}(/(experts|shared)/(expert_)?down)?/kernel",
        rf"{last}(/(experts|shared)/(expert_)?up)?/bias",
        "norm/gamma",
    ]
    for pattern in expected:
        assert any(re.fullmatch(pattern, path) for path in spared), pattern
    for path in spared:
        assert any(re.fullmatch(p, path) for p in expected), path


@pytest.mark.one_backend
def test_a_trained_optimizers_exclusions_too_and_the_dense_ones_stay():
    dense = pairs_model()
    adam = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    adam.exclude_from_weight_decay(var_list=[dense.layers[1].kernel])
    dense.compile(adam, "mse")
    dense.fit(*data(), verbose=0)
    moe = quietly(convert, dense)
    (spared,) = {v.path for v in moe.trainable_variables} - decayed(moe)
    assert "up_a_moe" in spared
    assert spared.endswith("kernel")
    spared = [
        v.path
        for v in dense.trainable_variables
        if not dense.optimizer._use_weight_decay(v)
    ]
    assert spared == ["up_a/kernel"]


@pytest.mark.one_backend
def test_exclusions_under_a_loss_scale_and_factors():
    dense = pairs_model()
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.5, clipvalue=2.0)
    inner.exclude_from_weight_decay(var_names=["bias"])
    scaled = ku.scale_learning_rate(inner, {"up_a/": 0.5})
    dense.compile(
        keras.optimizers.LossScaleOptimizer(
            scaled, initial_scale=64.0, dynamic_growth_steps=7
        ),
        "mse",
    )
    moe = quietly(convert, dense)
    assert isinstance(moe.optimizer, keras.optimizers.LossScaleOptimizer)
    assert moe.optimizer is not dense.optimizer
    assert moe.optimizer.initial_scale == 64.0
    assert moe.optimizer.dynamic_growth_steps == 7
    found = moe.optimizer.inner_optimizer
    assert found is not scaled
    assert found.clipvalue == 2.0
    moe.fit(*data(), verbose=0)
    for variable in moe.trainable_variables:
        decays = found._use_weight_decay(variable)
        assert decays == (variable.name != "bias"), variable.path


# Other settings of the optimizer.


SETTINGS = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "ema": {
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 5,
    },
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 1.5},
    "loss_scale_factor": {"loss_scale_factor": 8.0},
}


@pytest.mark.thinned
@every_maker
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_the_optimizer(make, settings):
    dense = pairs_model()
    dense.compile(keras.optimizers.SGD(0.125, momentum=0.5, **settings), "mse")
    dense.optimizer.learning_rate.assign(0.0625)
    result = quietly(make, dense)
    assert type(result.optimizer) is type(dense.optimizer)
    assert result.optimizer.get_config() == dense.optimizer.get_config()
    for name, value in settings.items():
        assert getattr(result.optimizer, name) == value
    assert float(result.optimizer.learning_rate) == 0.0625


@pytest.mark.one_backend
def test_the_step_is_the_dense_ones_at_one_expert():
    """Clipping, decay, a schedule, accumulation: what they do, not say."""
    dense = pairs_model()
    adam = keras.optimizers.AdamW(
        keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.5),
        weight_decay=0.25,
        clipnorm=0.1,
        gradient_accumulation_steps=2,
    )
    adam.exclude_from_weight_decay(var_names=["bias"])
    dense.compile(adam, "mse")
    moe = quietly(ku.upcycle_model, dense, 1, router="top_k", layers="all")
    x, y = data()
    for model in (dense, moe):
        model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(
        models.output(moe, x), models.output(dense, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.one_backend
def test_factors_hold_for_what_came_of_their_variables():
    dense = pairs_model()
    factors = {"up_a/kernel": 0.5, "down_": 0.25, "norm/": 3.0}
    dense.compile(
        ku.scale_learning_rate(keras.optimizers.SGD(0.5), factors), "mse"
    )
    moe = quietly(convert, dense)
    moe.fit(*data(), verbose=0)
    scales = {
        v.path: scale
        for v, scale in zip(
            moe.trainable_variables, moe.optimizer.rate_scales, strict=True
        )
    }
    for path, scale in scales.items():
        if "norm" in path:
            assert scale == 3.0
        elif "router" in path:
            assert scale == 1.0
        elif "expert_down" in path:
            assert scale == 0.25
        elif path.startswith("up_a_moe") and path.endswith("up/kernel"):
            assert scale == 0.5
        else:
            assert scale == 1.0, path
    # And on the way back.
    again = quietly(ku.densify_model, moe, dense=dense)
    again.fit(*data(), verbose=0)
    for variable, scale in zip(
        again.trainable_variables, again.optimizer.rate_scales, strict=True
    ):
        keys = [key for key in factors if key in variable.path]
        assert scale == (factors[keys[0]] if keys else 1.0), variable.path


@pytest.mark.one_backend
def test_factors_of_routers_may_be_given_before_there_are_any():
    dense = pairs_model()
    dense.compile(
        ku.scale_learning_rate(keras.optimizers.SGD(0.5), {"/router/": 0.1}),
        "mse",
    )
    moe = quietly(convert, dense)
    moe.fit(*data(), verbose=0)
    for variable, scale in zip(
        moe.trainable_variables, moe.optimizer.rate_scales, strict=True
    ):
        assert scale == (0.1 if "/router/" in variable.path else 1.0)


@pytest.mark.one_backend
def test_the_choice_of_a_multi_optimizer_holds():
    dense = pairs_model()
    names = keras.src.optimizers.multi_optimizer
    fast, slow = keras.optimizers.SGD(0.5), keras.optimizers.Adam(0.001)
    dense.compile(
        keras.optimizers.MultiOptimizer(
            names.OptimizerMap(slow, {"down_a/.*": fast})
        ),
        "mse",
    )
    moe = quietly(convert, dense)
    choose = moe.optimizer._optimizer_map
    for variable in moe.trainable_variables:
        wanted = (
            "SGD"
            if "up_a_moe/experts/expert_down" in variable.path
            else ("Adam")
        )
        chosen = choose(variable)
        assert type(chosen).__name__ == wanted, variable.path
        assert chosen is not fast
        assert chosen is not slow
    assert "SGD" in {type(choose(v)).__name__ for v in moe.trainable_variables}


@pytest.mark.one_backend
def test_an_optimizer_of_upcycle_optimizer_starts_anew_when_pruned():
    """Late slots count from a step that the new optimizer has not reached."""
    dense = pairs_model()
    dense.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = data()
    dense.fit(x, y, epochs=5, verbose=0)
    moe = convert(dense)
    moe.compile(ku.upcycle_optimizer(dense.optimizer, dense, moe), "mse")
    smaller, _ = ku.prune_experts(
        moe, keep={layer.name: [0, 1] for layer in models.mixtures(moe)}
    )
    assert int(smaller.optimizer.fresh_since) == 0
    again, _ = ku.prune_experts(
        moe, keep={layer.name: [0, 1] for layer in models.mixtures(moe)}
    )
    again.compile(keras.optimizers.Adam(0.01), "mse")
    for model in (smaller, again):
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(
        models.output(smaller, x), models.output(again, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.one_backend
def test_a_deeper_model_knows_it_of_every_block():
    dense = models.vit_classifier()
    adam = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    kernels = [b.kernels["up_kernel"] for b in ku.find_feed_forwards(dense)]
    head = dense.layers[-1].kernel
    adam.exclude_from_weight_decay(var_list=[kernels[1], head])
    dense.compile(adam, plain_loss)
    deeper = quietly(ku.tile_depth, dense, 2)
    assert deeper.loss is plain_loss
    kernels = [b.kernels["up_kernel"] for b in ku.find_feed_forwards(deeper)]
    count = len(kernels) // 2
    expected = [kernels[1], kernels[1 + count], deeper.layers[-1].kernel]
    spared = {v.path for v in deeper.trainable_variables} - decayed(deeper)
    assert spared == {variable.path for variable in expected}


class Doubling(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered, and without a config."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 2.0 ** ops.cast(step, "float32")


class Own(keras.optimizers.SGD):
    """Not registered; its config leaves `boost` out."""

    def __init__(self, learning_rate=0.1, boost=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.boost = boost


class Secretive(keras.optimizers.SGD):
    def __init__(self, learning_rate=0.1, boost=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.hidden = 2 * boost


@pytest.mark.one_backend
@every_maker
def test_what_is_not_registered_is_carried(make):
    dense = pairs_model()
    dense.compile(Own(Doubling(0.25), boost=3.0, momentum=0.5), "mse")
    result = quietly(make, dense)
    assert type(result.optimizer) is Own
    assert result.optimizer is not dense.optimizer
    assert (result.optimizer.boost, result.optimizer.momentum) == (3.0, 0.5)
    assert float(result.optimizer.learning_rate) == 0.25
    result.fit(*data(), verbose=0)
    assert float(result.optimizer.learning_rate) == 0.5


@pytest.mark.one_backend
def test_a_rate_that_is_a_function_is_carried_by_reference():
    dense = pairs_model()
    dense.compile(keras.optimizers.SGD(lambda: 0.375), "mse")
    moe = quietly(convert, dense)
    assert float(moe.optimizer.learning_rate) == 0.375


@pytest.mark.one_backend
def test_an_optimizer_that_does_not_tell_is_left_out_and_the_rest_carried():
    dense = pairs_model()
    dense.compile(Secretive(boost=3.0), "mae", metrics=["mse"])
    moe, lines = said(convert, dense)
    (line,) = lines
    assert "Secretive" in line
    assert "'boost'" in line
    assert "Call `compile` on the result" in line
    x, y = data()
    logs = moe.evaluate(x, y, verbose=0, return_dict=True)
    assert logs == pytest.approx(
        dense.evaluate(x, y, verbose=0, return_dict=True), rel=1e-4
    )
    moe.compile("sgd", "mae", metrics=["mse"])
    moe.fit(x, y, verbose=0)


# Losses and metrics.


def plain_loss(y, p):
    return ops.mean(ops.square(y - p), axis=-1) + 1.0


def largest(y, p):
    return ops.max(ops.abs(y - p), axis=-1)


class Weighing(keras.losses.Loss):
    """Not registered; without a config."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.secret = factor  # under another name

    def call(self, y, p):
        return self.secret * ops.mean(ops.square(y - p), axis=-1)


class Largest(keras.metrics.Metric):
    """Not registered, with an argument that no config tells."""

    def __init__(self, above=0.0, name="largest", **kwargs):
        super().__init__(name=name, **kwargs)
        self.above = above
        self.found = self.add_variable((), "zeros", name="found")

    def update_state(self, y, p, sample_weight=None):
        value = ops.max(ops.abs(ops.cast(y, p.dtype) - p)) + self.above
        self.found.assign(ops.maximum(self.found.value, value))

    def result(self):
        return ops.convert_to_tensor(self.found)


class Unknowable(Largest):
    def __init__(self, start=0.0, **kwargs):
        super().__init__(above=2 * start, name="unknowable", **kwargs)
        self.begin = start


LOSSES = {
    "function": lambda: plain_loss,
    "lambda": lambda: lambda y, p: ops.mean(ops.abs(y - p)),
    "partial": lambda: functools.partial(keras.losses.huber, delta=0.2),
    "keras": lambda: keras.losses.Huber(0.2, reduction="sum"),
    "keras's of one config": lambda: keras.losses.CategoricalHinge("sum"),
    "own": lambda: Weighing(7.0),
    "name": lambda: "mae",
    "class": lambda: keras.losses.MeanAbsoluteError,
}


@pytest.mark.thinned
@every_maker
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_the_same(make, loss):
    dense = pairs_model()
    dense.compile("sgd", loss())
    result = quietly(make, dense)
    x, y = data()
    predicted = ops.convert_to_tensor(models.output(result, x))
    expected = dense.compute_loss(y=ops.convert_to_tensor(y), y_pred=predicted)
    got = result.evaluate(x, y, verbose=0)
    assert got == pytest.approx(float(expected), rel=1e-4)
    if isinstance(dense.loss, keras.losses.CategoricalHinge):
        assert result.loss is not dense.loss


@pytest.mark.thinned
@every_maker
def test_metrics_are_anew_and_have_their_names(make):
    x, y = data()
    dense = pairs_model()
    given = [
        "mae",
        largest,
        lambda y, p: ops.mean(p, axis=-1),
        keras.metrics.MeanMetricWrapper(largest, name="wrapped"),
        keras.metrics.RootMeanSquaredError(name="root"),
        Largest(above=5.0),
    ]
    weighted = [keras.metrics.MeanSquaredError(name="weighed")]
    dense.compile("sgd", "mse", metrics=given, weighted_metrics=weighted)
    dense.fit(x, y, verbose=0)
    counted = [models.array(v) for m in dense.metrics for v in m.variables]
    result = quietly(make, dense)
    weight = np.arange(1.0, 9.0, dtype="float32")
    logs = result.evaluate(
        x, y, sample_weight=weight, verbose=0, return_dict=True
    )
    after = [models.array(v) for m in dense.metrics for v in m.variables]
    for before, now in zip(counted, after, strict=True):
        np.testing.assert_array_equal(before, now)
    p = models.output(result, x)
    error = np.abs(y - p)
    squares = (error**2).mean(-1)
    expected = {
        "mae": error.mean(),
        "largest": error.max(-1).mean(),
        "lambda": p.mean(),
        "wrapped": error.max(-1).mean(),
        "root": np.sqrt(squares.mean()),
        "largest_1": error.max() + 5.0,
        "weighed": (squares * weight).sum() / weight.sum(),
    }
    assert set(logs) - {"loss"} == set(expected)
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.one_backend
def test_a_metric_that_does_not_tell_is_left_out_and_the_rest_carried():
    dense = pairs_model()
    dense.compile("sgd", plain_loss, metrics=["mae", Unknowable(2.0), "mse"])
    moe, lines = said(convert, dense)
    (line,) = lines
    assert "'unknowable'" in line
    assert "'start'" in line
    logs = moe.evaluate(*data(), verbose=0, return_dict=True)
    assert set(logs) == {"loss", "mae", "mse"}


@pytest.mark.one_backend
def test_a_loss_with_a_state_is_shared_and_said():
    class Adaptive(keras.losses.Loss):
        def __init__(self):
            super().__init__(name="adaptive")
            self.weight = keras.Variable(3.0)

        def call(self, y, p):
            return self.weight * ops.mean(ops.square(y - p), axis=-1)

    dense = pairs_model()
    dense.compile("sgd", Adaptive())
    moe, (line,) = said(convert, dense)
    assert "'adaptive' holds variables" in line
    assert moe.loss is dense.loss


@pytest.mark.one_backend
def test_a_loss_that_reads_the_dense_model_is_named():
    dense = pairs_model()
    kernel = dense.layers[1].kernel

    def decaying(y, p):
        return ops.mean(ops.square(y - p)) + ops.sum(ops.square(kernel))

    for loss in (decaying, functools.partial(lambda m, y, p: 0.0, dense)):
        dense.compile("sgd", loss)
        moe, (line,) = said(convert, dense)
        assert "reads 'pairs'" in line
        assert moe.loss is loss


# Several outputs.


def two_dense():
    return pairs_model(outputs=2)


@pytest.mark.one_backend
def test_outputs_named_in_dicts_are_named_anew():
    dense = two_dense()
    x, y = data(2)
    dense.compile(
        "sgd",
        {"down_0": "mse", "down_1": plain_loss},
        loss_weights={"down_0": 0.5, "down_1": 2.0},
        metrics={"down_1": ["mae", Largest()]},
    )
    expected = dense.evaluate(x, y, verbose=0, return_dict=True)
    moe, lines = said(convert, dense)
    (line,) = lines
    assert "'down_1' is 'up_1_moe' in the result" in line
    got = moe.evaluate(x, y, verbose=0, return_dict=True)
    got = {re.sub(r"up_(\d)_moe", r"down_\1", k): v for k, v in got.items()}
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.one_backend
def test_a_metric_left_out_of_a_list_by_output_leaves_its_place():
    dense = two_dense()
    x, y = data(2)
    dense.compile("sgd", ["mse", "mae"], metrics=[Unknowable(1.0), "mae"])
    moe, lines = said(convert, dense)
    assert any("'unknowable'" in line for line in lines)
    logs = moe.evaluate(x, y, verbose=0, return_dict=True)
    assert [k for k in logs if k.endswith("mae") and "loss" not in k] == [
        "up_1_moe_mae"
    ]


@pytest.mark.one_backend
def test_outputs_in_a_dict_keep_their_keys():
    flat = two_dense()
    dense = keras.Model(
        flat.input, {"a": flat.output[0], "b": flat.output[1]}, name="pairs"
    )
    x, (ya, yb) = data(2)
    y = {"a": ya, "b": yb}
    dense.compile(
        "sgd",
        {"a": "mse", "b": lambda y, p: ops.mean(ops.abs(y - p), -1)},
        loss_weights={"a": 1.0, "b": 3.0},
        metrics={"b": ["mae"]},
    )
    expected = dense.evaluate(x, y, verbose=0, return_dict=True)
    moe = quietly(convert, dense)
    got = moe.evaluate(x, y, verbose=0, return_dict=True)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.one_backend
def test_a_metric_in_two_places_stays_one():
    dense = two_dense()
    shared = keras.metrics.MeanAbsoluteError(name="both")
    dense.compile("sgd", "mse", metrics=[[shared], [shared]])
    moe, _ = said(convert, dense)
    moe.evaluate(*data(2), verbose=0)
    found = {id(m) for m in moe._compile_metrics.metrics}
    assert len(found) == 1
    assert id(shared) not in found


# How it runs.


@pytest.mark.thinned
@every_maker
def test_run_settings_as_they_are_now(make):
    dense = pairs_model()
    dense.compile("sgd", "mse", steps_per_execution=3, jit_compile=False)
    dense.run_eagerly = True  # after `compile`
    result = quietly(make, dense)
    assert result.run_eagerly
    assert result.steps_per_execution == 3
    assert not result.jit_compile


@pytest.mark.one_backend
def test_a_loss_kept_from_an_earlier_compile():
    """Keras keeps it, and its record of `compile` does not."""
    dense = pairs_model()
    dense.compile("sgd", "mae", metrics=["mse"])
    dense.compile("adam")
    moe = quietly(convert, dense)
    x, y = data()
    assert moe.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(
        dense.evaluate(x, y, verbose=0, return_dict=True), rel=1e-4
    )


@pytest.mark.one_backend
def test_a_loss_scale_that_was_declined_stays_declined():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        dense = pairs_model()
    finally:
        keras.config.set_dtype_policy(policy)
    dense.compile("sgd", "mse", auto_scale_loss=False)
    assert isinstance(quietly(convert, dense).optimizer, keras.optimizers.SGD)
    dense.compile("sgd", "mse")
    assert isinstance(
        quietly(convert, dense).optimizer, keras.optimizers.LossScaleOptimizer
    )


@pytest.mark.one_backend
def test_what_is_not_compiled_makes_nothing_compiled():
    """A KerasHub task compiles itself, with defaults that nobody chose."""
    dense = models.vit_classifier()
    dense.compiled = False  # as `freeze` leaves it
    assert not ku.upcycle_model(dense, 2).compiled


@pytest.mark.one_backend
def test_a_task_made_dense_again_keeps_its_settings():
    dense = models.vit_classifier()
    dense.compile(
        keras.optimizers.SGD(0.25, clipnorm=1.0),
        plain_loss,
        metrics=[largest],
    )
    moe = quietly(ku.upcycle_model, dense, 2)
    again = quietly(ku.densify_model, moe)
    for result in (moe, again):
        assert type(result.optimizer) is type(dense.optimizer)
        assert result.optimizer.get_config() == dense.optimizer.get_config()
        assert result.loss is plain_loss


@pytest.mark.one_backend
def test_it_is_saved_and_loaded_as_any(tmp_path):
    dense = pairs_model()
    dense.compile(
        ku.scale_learning_rate(
            keras.optimizers.AdamW(0.5, weight_decay=0.1), {"up_a": 0.5}
        ),
        "mae",  # a file keeps no `delta` of a `Huber`
        metrics=[keras.metrics.RootMeanSquaredError(name="root")],
    )
    moe = convert(dense)
    x, y = data()
    moe.fit(x, y, verbose=0)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(
        moe.evaluate(x, y, verbose=0), rel=1e-5
    )
    for model in (moe, loaded):
        model.fit(x, y, verbose=0)
    np.testing.assert_allclose(
        models.output(loaded, x), models.output(moe, x), rtol=1e-4, atol=1e-5
    )

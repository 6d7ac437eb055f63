"""Each expert is updated as a weight of its own.

The oracle is Keras's own optimizer, on the slices one by one.
"""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import keras_internals

WIDTH, HIDDEN, EXPERTS = 6, 10, 3
MAKERS = {
    "adafactor": lambda **s: keras.optimizers.Adafactor(0.05, **s),
    "adafactor clipped": lambda **s: keras.optimizers.Adafactor(
        0.5, clip_threshold=0.3, relative_step=False, **s
    ),
    "lamb": lambda **s: keras.optimizers.Lamb(0.05, weight_decay=0.1, **s),
    "muon": lambda **s: keras.optimizers.Muon(0.05, **s),
}


def layer(**settings):
    made = ku.MoEFeedForward(EXPERTS, HIDDEN, router="top_k", **settings)
    made.build((None, WIDTH))
    rng = np.random.default_rng(0)
    for variable in made.trainable_variables:
        # Experts of very different sizes, one of them all zeros.
        scale = np.array([0.0, 0.1, 10.0]).reshape(-1, 1, 1)
        value = rng.normal(size=variable.shape)
        if len(variable.shape) == 3 and variable.shape[0] == EXPERTS:
            value = value * scale
        variable.assign(value.astype("float32"))
    return made


def gradients_of(variables, seed):
    """Of very different sizes too."""
    rng = np.random.default_rng(seed)
    found = []
    for variable in variables:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) == 3:
            value = (
                value
                * np.geomspace(1e-2, 1e2, variable.shape[0])[:, None, None]
            )
        found.append(value.astype("float32"))
    return found


def slices_of(variable, value):
    """What each expert's own variable would be: kernels and biases."""
    if len(variable.shape) != 3:
        return [value]
    return [v[0] if variable.name == "bias" else v for v in value]


def scope_named(path):
    return keras.name_scope(path.split("/")[-2])


@pytest.mark.thinned("name")
@pytest.mark.parametrize("settings", [{}, {"gated": True}], ids=["", "gated"])
@pytest.mark.parametrize("name", MAKERS)
def test_experts_are_updated_one_by_one(name, settings):
    made = layer(**settings)
    variables = made.trainable_variables
    whole = ku.per_expert(MAKERS[name]())
    whole.build(variables)
    alone = []
    for variable in variables:
        for value in slices_of(variable, models.array(variable.value)):
            with scope_named(variable.path):
                alone.append(keras.Variable(value, name=variable.name))
    single = MAKERS[name]()
    single.build(alone)
    for step in range(3):
        gradients = gradients_of(variables, step)
        parts = [
            part
            for variable, gradient in zip(variables, gradients, strict=True)
            for part in slices_of(variable, gradient)
        ]
        as_tensors = keras.ops.convert_to_tensor
        whole.apply([as_tensors(g) for g in gradients], variables)
        single.apply([as_tensors(g) for g in parts], alone)
        found = [
            part
            for variable in variables
            for part in slices_of(variable, models.array(variable.value))
        ]
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(
                a, models.array(b.value), rtol=2e-4, atol=2e-6
            )


@pytest.mark.one_backend
@pytest.mark.parametrize("name", MAKERS)
def test_kerass_own_would_not_do(name):
    # That the test above can fail.
    found = []
    for cured in (False, True):
        made = layer()
        optimizer = MAKERS[name]()
        optimizer = ku.per_expert(optimizer) if cured else optimizer
        optimizer.build(made.trainable_variables)
        gradients = gradients_of(made.trainable_variables, 0)
        optimizer.apply(
            [keras.ops.convert_to_tensor(g) for g in gradients],
            made.trainable_variables,
        )
        found.append(models.weights(made))
    kernel = [v.path for v in made.weights].index(
        made.experts.expert_up.kernel.path
    )
    gap = np.abs(found[0][kernel] - found[1][kernel]).max()
    assert gap > 1e-3


def compiled(optimizer):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((WIDTH,))
    outputs = ku.MoEFeedForward(EXPERTS, HIDDEN)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "mse")
    return model


def train(model):
    x = models.tokens(8, WIDTH)
    model.fit(x, np.tanh(x), batch_size=4, shuffle=False, verbose=0)


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["adafactor", "lamb", "muon"])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_with_kerass_own_warns_once_and_names_the_cure(
    name, scaled, recwarn
):
    optimizer = MAKERS[name]()
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = compiled(optimizer)
    for _ in range(2):
        train(model)
    told = [w for w in recwarn if "per_expert(keras.optimizers." in str(w)]
    assert len(told) == 1
    recwarn.clear()
    train(compiled(ku.per_expert(MAKERS[name]())))
    train(compiled(keras.optimizers.Adam()))
    assert not [w for w in recwarn if "per_expert" in str(w)]


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_memory_settings_and_files_survive(name, tmp_path):
    first = MAKERS[name](gradient_accumulation_steps=2)
    model = compiled(first)
    train(model)
    second = ku.per_expert(first)
    assert type(second) is not type(first)
    assert second.gradient_accumulation_steps == 2
    for a, b in zip(first.variables, second.variables, strict=True):
        np.testing.assert_array_equal(
            models.array(a.value), models.array(b.value)
        )
    model.compile(second, "mse")
    train(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is type(second)
    for one in (model, again):
        train(one)
    for a, b in zip(models.weights(model), models.weights(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.one_backend
def test_what_was_spared_weight_decay_still_is():
    first = keras.optimizers.Lamb(weight_decay=0.1)
    first.exclude_from_weight_decay(var_names=["bias"])
    second = ku.per_expert(first)
    for variable in layer().trainable_variables:
        decays = keras_internals.decays(second, variable)
        assert decays == (variable.name == "kernel")


def test_factors_come_after():
    plain = ku.per_expert(keras.optimizers.Adafactor(0.05))
    scaled = ku.scale_learning_rate(plain, {"/experts/": 0.0, "router": 1.0})
    model = compiled(scaled)
    before = models.weights(model)
    train(model)
    for variable, old in zip(model.weights, before, strict=True):
        still = np.array_equal(models.array(variable.value), old)
        assert still == ("/experts/" in variable.path)
    again = type(scaled).from_config(scaled.get_config())
    assert type(again) is type(scaled)


@pytest.mark.one_backend
def test_those_that_look_at_numbers_are_left_alone():
    for optimizer in (keras.optimizers.Adam(), keras.optimizers.Lion()):
        assert ku.per_expert(optimizer) is optimizer


class OwnLamb(keras.optimizers.Lamb):
    """May do anything."""


@pytest.mark.one_backend
def test_what_cannot_be_cured_is_refused():
    with pytest.raises(TypeError, match=r"Keras optimizer.*'lamb'"):
        ku.per_expert("lamb")
    with pytest.raises(ku.UpcycleError, match=r"OwnLamb.*per_expert\(keras"):
        ku.per_expert(OwnLamb())
    scaled = ku.scale_learning_rate(keras.optimizers.Lamb(), {"router": 2.0})
    with pytest.raises(ku.UpcycleError, match=r"Factors come last"):
        ku.per_expert(scaled)
    muon = keras.optimizers.Muon()
    muon.build(layer().trainable_variables)
    with pytest.raises(ku.UpcycleError, match=r"Call `per_expert` before"):
        ku.per_expert(muon)

"""The optimizer's memory crosses the conversion.

With one expert a block, training on must give what never upcycling gives.
"""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import keras_internals

WIDTH, HIDDEN = 6, 12
schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.7)
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(schedule),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipnorm=0.5),
    "adamw": lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.5),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "sgd": lambda: keras.optimizers.SGD(schedule),
    "momentum": lambda: keras.optimizers.SGD(0.05, 0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(
        0.01, momentum=0.5, centered=True
    ),
    "lion": lambda: keras.optimizers.Lion(0.01, weight_decay=0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "muon": lambda: keras.optimizers.Muon(0.02, weight_decay=0.01),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=8.0, dynamic_growth_steps=2
    ),
    "average": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "accumulates": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2
    ),
}


def dense_model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((WIDTH,))
    x = keras.layers.Dense(WIDTH, name="before")(inputs)
    hidden = keras.layers.Dense(HIDDEN, activation="gelu", name="up")(x)
    x = keras.layers.Add()([x, keras.layers.Dense(WIDTH, name="down")(hidden)])
    return keras.Model(inputs, keras.layers.Dense(2, name="after")(x))


def data(seed, steps=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * steps, WIDTH)).astype("float32")
    return x, rng.normal(size=(4 * steps, 2)).astype("float32")


def compiled(model, optimizer):
    # Without XLA on TensorFlow, which takes longer to compile than to run.
    quick = "auto" if keras.backend.backend() == "jax" else False
    model.compile(optimizer, "mse", jit_compile=quick)
    return model


def train(model, seed, steps=3):
    x, y = data(seed, steps)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)


def trained(name, steps=3):
    model = compiled(dense_model(), OPTIMIZERS[name]())
    train(model, 0, steps)
    return model


def upcycled(dense, num_experts, **settings):
    router = ku.TopKRouter(min(num_experts, 2), load_balance_loss=0.0)
    moe = ku.upcycle_model(dense, num_experts, router=router, layers="all")
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe, **settings)
    return compiled(moe, optimizer)


def mixture(moe):
    return models.mixtures(moe)[0]


def arrays(variables):
    return [models.array(v.value) for v in variables]


def same_as_dense(moe, dense, atol=2e-6):
    experts = mixture(moe).experts
    pairs = [
        (experts.expert_up, dense.get_layer("up")),
        (experts.expert_down, dense.get_layer("down")),
        (moe.get_layer("before"), dense.get_layer("before")),
        (moe.get_layer("after"), dense.get_layer("after")),
    ]
    for new, old in pairs:
        for kind in ("kernel", "bias"):
            value = models.array(getattr(old, kind).value)
            found = models.array(getattr(new, kind).value)
            np.testing.assert_allclose(
                found.reshape(value.shape), value, atol=atol
            )


@pytest.mark.thinned
@pytest.mark.filterwarnings("ignore:Keras's Muon")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_expert_trains_on_as_if_never_upcycled(name):
    if name == "average" and keras.backend.backend() == "jax":
        pytest.skip("Keras 3.15 on JAX cannot `fit` twice with `use_ema`.")
    dense = trained(name)
    moe = upcycled(dense, 1)
    before = arrays(dense.trainable_variables)
    train(moe, 1)
    train(dense, 1)
    same_as_dense(moe, dense)
    for old, new in zip(before, arrays(dense.trainable_variables), strict=True):
        assert np.abs(old - new).max() > 1e-5
    assert int(moe.optimizer.iterations) == int(dense.optimizer.iterations)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_a_new_optimizer_would_not_do(name):
    # That the test above can fail.
    dense = trained(name)
    moe = upcycled(dense, 1)
    compiled(moe, OPTIMIZERS[name]())
    train(moe, 1)
    train(dense, 1)
    with pytest.raises(AssertionError):
        same_as_dense(moe, dense, atol=1e-4)


@pytest.mark.thinned
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.01),
        lambda: keras.optimizers.AdamW(0.01),
        lambda: keras.optimizers.Adamax(0.01),
        lambda: keras.optimizers.Nadam(0.01),
        lambda: keras.optimizers.Adafactor(0.05),
        lambda: keras.optimizers.Lamb(0.01),
    ],
    ids=["adam", "adamw", "adamax", "nadam", "adafactor", "lamb"],
)
def test_routers_are_updated_as_by_a_new_optimizer(make):
    dense = compiled(dense_model(), make())
    train(dense, 0)
    moe = upcycled(dense, 4)
    kernel = mixture(moe).router.kernel
    gradient = np.random.default_rng(2).normal(size=kernel.shape)
    gradient = keras.ops.convert_to_tensor(gradient.astype("float32"))
    gradients = [
        gradient if v is kernel else keras.ops.zeros(v.shape)
        for v in moe.trainable_variables
    ]
    alone, new = keras.Variable(kernel.value, name="kernel"), make()
    new.build([alone])
    for _ in range(3):
        moe.optimizer.apply(gradients, moe.trainable_variables)
        new.apply([gradient], [alone])
    np.testing.assert_allclose(
        models.array(kernel.value), models.array(alone.value), atol=1e-6
    )


@pytest.mark.one_backend
def test_what_was_spared_weight_decay_still_is():
    def make():
        adam = keras.optimizers.AdamW(0.01, weight_decay=5.0)
        adam.exclude_from_weight_decay(var_names=["bias"])
        return adam

    dense = compiled(dense_model(), make())
    train(dense, 0)
    moe = upcycled(dense, 1)
    train(moe, 1)
    train(dense, 1)
    same_as_dense(moe, dense)
    for variable in moe.trainable_variables:
        decays = keras_internals.decays(moe.optimizer, variable)
        assert decays == (variable.name == "kernel")


def test_experts_slots_are_the_dense_blocks():
    dense = trained("adam")
    moe = upcycled(dense, 4, rescale_moments=False)
    old = keras_internals.optimizer_slots(dense.optimizer)
    new = keras_internals.optimizer_slots(moe.optimizer)
    for name in ("_momentums", "_velocities"):
        of_dense = {
            v.path: s
            for v, s in zip(dense.trainable_variables, old[name], strict=True)
        }
        found = dict(
            zip(
                (id(v) for v in moe.trainable_variables), new[name], strict=True
            )
        )
        up = mixture(moe).experts.expert_up
        for kind in ("kernel", "bias"):
            expected = models.array(of_dense[f"up/{kind}"].value)
            slot = models.array(found[id(getattr(up, kind))].value)
            for expert in slot.reshape(4, *expected.shape):
                np.testing.assert_array_equal(expert, expected)
        assert not models.array(
            found[id(mixture(moe).router.kernel)].value
        ).any()


def test_moments_are_rescaled_to_an_experts_share():
    dense = trained("adam")
    plain = keras_internals.optimizer_slots(
        upcycled(dense, 4, rescale_moments=False).optimizer
    )
    moe = upcycled(dense, 4)
    scaled = keras_internals.optimizer_slots(moe.optimizer)
    own = {id(v) for v in mixture(moe).experts.variables}
    for n, variable in enumerate(moe.trainable_variables):
        inside = id(variable) in own
        for name, factor in (("_momentums", 4), ("_velocities", 4 * 2)):
            np.testing.assert_allclose(
                models.array(scaled[name][n].value) * (factor if inside else 1),
                models.array(plain[name][n].value),
                rtol=1e-6,
            )


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["loss_scale", "muon"])
@pytest.mark.filterwarnings("ignore:Keras's Muon")
def test_a_dense_model_from_a_file_serves_and_the_sparse_one_saves(
    name, tmp_path
):
    dense = trained(name)
    dense.save(tmp_path / "dense.keras")
    moe = upcycled(keras.saving.load_model(tmp_path / "dense.keras"), 1)
    train(moe, 1)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    train(again, 2)
    train(dense, 1)
    train(dense, 2)
    same_as_dense(again, dense)


@pytest.mark.one_backend
@pytest.mark.parametrize("build", [models.vit_backbone, models.t5_backbone])
def test_kerashub_variables_are_paired_by_structure(build):
    dense = build()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(dense.trainable_variables)
    rng = np.random.default_rng(4)
    for slot in optimizer.momentums:
        slot.assign(rng.normal(size=slot.shape))
    # Values that say where they are, in weights and slots alike.
    for variable, slot in zip(
        dense.trainable_variables, optimizer.momentums, strict=True
    ):
        variable.assign(slot.value)
    moe = ku.upcycle_model(dense, 2)
    found = ku.upcycle_optimizer(optimizer, dense, moe, rescale_moments=False)
    routers = [layer.router.kernel for layer in models.mixtures(moe)]
    for variable, slot in zip(
        moe.trainable_variables, found.momentums, strict=True
    ):
        if any(variable is kernel for kernel in routers):
            assert not models.array(slot.value).any()
            continue
        np.testing.assert_array_equal(
            models.array(slot.value), models.array(variable.value)
        )


def test_muon_orthogonalises_expert_by_expert_and_says_so():
    dense = trained("muon")
    with pytest.warns(UserWarning, match="expert by expert"):
        moe = upcycled(dense, 3)
    slots = keras_internals.optimizer_slots(moe.optimizer)
    for variable, velocity in zip(
        moe.trainable_variables, slots["adam_velocities"], strict=True
    ):
        assert (velocity is None) == (variable.name == "kernel")


class Strange(keras.optimizers.SGD):
    """Keeps what belongs to variables where nobody would look."""

    def build(self, variables):
        super().build(variables)
        self.hidden = {"odd": self.add_variable((2, 2), name="odd")}


@pytest.mark.one_backend
def test_slots_that_cannot_be_placed_are_named():
    dense = dense_model()
    dense.compile(Strange(0.1), "mse")
    train(dense, 0)
    moe = ku.upcycle_model(dense, 2, layers="all")
    with pytest.raises(ku.UpcycleError, match=r"Strange .*Received: \[.*odd"):
        ku.upcycle_optimizer(dense.optimizer, dense, moe)


@pytest.mark.one_backend
def test_what_is_no_trained_optimizer_of_the_model_is_refused():
    dense, other = trained("adam"), trained("sgd")
    moe = ku.upcycle_model(dense, 2, layers="all")
    with pytest.raises(TypeError, match="must be a Keras optimizer"):
        ku.upcycle_optimizer("adam", dense, moe)
    with pytest.raises(ValueError, match="must have been built by"):
        ku.upcycle_optimizer(keras.optimizers.Adam(), dense, moe)
    with pytest.raises(ValueError, match="of which 8 are not in"):
        ku.upcycle_optimizer(other.optimizer, dense, moe)
    with pytest.raises(ku.UpcycleError, match="at least one MoE layer"):
        ku.upcycle_optimizer(dense.optimizer, dense, dense)
    multi = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    )
    with pytest.raises(ku.UpcycleError, match="MultiOptimizer"):
        ku.upcycle_optimizer(multi, dense, moe)


# New slots, the step kept.


@keras.saving.register_keras_serializable("test_optimizers")
class Falling(keras.optimizers.schedules.LearningRateSchedule):
    """Falls with the square root of the step, some steps on."""

    def __init__(self, steps=0):
        self.steps = steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        return 0.02 / keras.ops.sqrt(step + 1.0 + self.steps)

    def get_config(self):
        return {"steps": self.steps}


SCHEDULED = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
    "adamax": lambda rate: keras.optimizers.Adamax(rate),
    "nadam": lambda rate: keras.optimizers.Nadam(rate),
    "lamb": lambda rate: keras.optimizers.Lamb(rate),
    "adafactor": lambda rate: keras.optimizers.Adafactor(rate),
    "rmsprop": lambda rate: keras.optimizers.RMSprop(rate, momentum=0.5),
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adagrad": lambda rate: keras.optimizers.Adagrad(rate),
}


def random_gradients(variables, seed):
    rng = np.random.default_rng(seed)
    return [
        keras.ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32"))
        for v in variables
    ]


@pytest.mark.thinned
@pytest.mark.parametrize("name", SCHEDULED)
def test_new_slots_update_as_a_new_optimizer_at_the_rate_reached(name):
    dense = compiled(dense_model(), SCHEDULED[name](Falling()))
    train(dense, 0, steps=5)
    moe = upcycled(dense, 3, slots="new")
    assert int(moe.optimizer.iterations) == 5
    variables = moe.trainable_variables
    alone = [keras.Variable(v.value, name=v.name) for v in variables]
    new = SCHEDULED[name](Falling(5))
    if name in ("adafactor", "lamb"):
        # These look at whole variables, and at experts one by one.
        new = ku.per_expert(new)
        alone = [own_path(v) for v in variables]
    new.build(alone)
    for step in range(3):
        before = arrays(variables)
        gradients = random_gradients(variables, step)
        moe.optimizer.apply(gradients, variables)
        new.apply(gradients, alone)
        for old, found, expected in zip(
            before, arrays(variables), arrays(alone), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=2e-6)
            assert np.abs(found - old).max() > 1e-6
    assert int(moe.optimizer.iterations) == 8


def own_path(variable):
    with keras.name_scope("up"), keras.name_scope("expert_up"):
        inside = "/expert_" in variable.path
    names = variable.path.split("/")[-2:-1] if inside else ["other"]
    with keras.name_scope(names[0]):
        return keras.Variable(variable.value, name=variable.name)


@pytest.mark.one_backend
def test_carried_slots_would_not_do_as_new_ones():
    # That the test above can fail.
    dense = trained("adam", steps=5)
    found = []
    for slots in ("carry", "new"):
        moe = upcycled(dense, 3, slots=slots)
        variables = moe.trainable_variables
        before = arrays(variables)
        moe.optimizer.apply(random_gradients(variables, 0), variables)
        after = arrays(variables)
        found.append([b - a for a, b in zip(before, after, strict=True)])
    for a, b, v in zip(*found, variables, strict=True):
        assert np.allclose(a, b, atol=1e-5) == ("router" in v.path)


def test_new_slots_hold_nothing_of_the_dense_ones():
    dense = trained("average")
    moe = upcycled(dense, 2, slots="new")
    slots = keras_internals.optimizer_slots(moe.optimizer)
    averages = slots.pop("_model_variables_moving_average")
    for average, variable in zip(
        averages, moe.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(
            models.array(average.value), models.array(variable.value)
        )
    for variables in slots.values():
        assert not any(models.array(v.value).any() for v in variables)


def test_a_loss_scale_goes_on_with_new_slots():
    dense = trained("loss_scale", steps=2)
    scaled = upcycled(dense, 2, slots="new").optimizer
    assert float(models.array(scaled.dynamic_scale)) == 16.0
    inner = scaled.inner_optimizer
    assert int(inner.iterations) == 2
    for variables in keras_internals.optimizer_slots(inner).values():
        assert not any(models.array(v.value).any() for v in variables)


def test_gradients_that_wait_are_carried_with_new_slots():
    # Three batches: one step, and half of the next.
    dense = trained("accumulates", steps=3)
    moe = upcycled(dense, 1, slots="new")
    found = keras_internals.optimizer_slots(moe.optimizer)
    waiting = found["_accumulated_gradients"]
    old = keras_internals.optimizer_slots(dense.optimizer)
    total = [
        sum(np.abs(models.array(v.value)).sum() for v in variables)
        for variables in (waiting, old["_accumulated_gradients"])
    ]
    np.testing.assert_allclose(*total, rtol=1e-5)
    assert total[0] > 0
    assert not any(models.array(v.value).any() for v in found["_momentums"])


@pytest.mark.one_backend
def test_new_slots_are_still_new_from_a_file(tmp_path):
    dense = trained("adam", steps=5)
    moe = upcycled(dense, 3, slots="new")
    train(moe, 1)
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    for model in (moe, again):
        train(model, 2)
    for a, b in zip(models.weights(again), models.weights(moe), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.one_backend
def test_slots_are_checked():
    dense = trained("adam")
    moe = ku.upcycle_model(dense, 2, layers="all")
    with pytest.raises(ValueError, match=r"`slots`.*'carry', 'new'.*'fresh'"):
        ku.upcycle_optimizer(dense.optimizer, dense, moe, slots="fresh")
    with pytest.raises(ValueError, match=r"Leave one of them out"):
        ku.upcycle_optimizer(
            dense.optimizer, dense, moe, slots="new", rescale_moments=True
        )


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["adam", "adafactor", "lamb"])
def test_a_count_that_is_set_back_starts_all_slots_anew(name):
    """As a loop does that trains one compiled model again and again."""
    dense = trained(name)
    moe = upcycled(dense, 4)
    for variable in moe.optimizer.variables:
        if variable is not moe.optimizer._learning_rate:
            variable.assign(np.zeros(variable.shape, variable.dtype))
    other = keras.models.clone_model(moe)
    other.set_weights(moe.get_weights())
    compiled(other, ku.per_expert(OPTIMIZERS[name]()))
    for model in (moe, other):
        train(model, 1)
    for one, new in zip(
        arrays(moe.weights), arrays(other.weights), strict=True
    ):
        np.testing.assert_allclose(one, new, atol=1e-6)


@keras.saving.register_keras_serializable("test_optimizers")
class OwnAdam(keras.optimizers.Adam):
    """Counts steps, in a class that is not Keras's."""


@pytest.mark.one_backend
def test_a_class_of_ones_own_that_counts_steps_is_told_of():
    dense = compiled(dense_model(), OwnAdam(0.01))
    train(dense, 0)
    moe = ku.upcycle_model(dense, 2, layers="all")
    with pytest.raises(ku.UpcycleError, match=r"OwnAdam.*Pass slots='carry'"):
        ku.upcycle_optimizer(dense.optimizer, dense, moe, slots="new")
    with pytest.warns(UserWarning, match=r"Routers' slots.*OwnAdam.*step 3"):
        carried = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    assert type(carried) is OwnAdam

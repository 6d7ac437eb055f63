"""Values of a user's own: an `expert_init`, its values, router kernels."""

import functools

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import UpcycleError
from keras_upcycle.layers import expert_init, first_expert_values

pytestmark = pytest.mark.one_backend


def dense_model():
    return models.dense_pairs()


def stacked(value, num_experts, name):
    """A right one: copies, in NumPy."""
    del name
    return np.stack([models.array(value)] * num_experts)


def upcycle(init, dense=None, **more):
    dense = dense_model() if dense is None else dense
    given = {"router": "top_k", "layers": "all", **more}
    return ku.upcycle_model(dense, 2, expert_init=init, **given)


def refused(init, error, match, **more):
    dense = dense_model()
    before = models.weights(dense)
    with pytest.raises(error, match=match) as raised:
        upcycle(init, dense, **more)
    models.assert_same_weights(dense, before)
    return raised.value


class Own(ku.ExpertInit):
    """A user's method, one weight of which is spoilt."""

    def __init__(self, spoil, name="down_kernel"):
        self.spoil, self.name = spoil, name

    def values(self, block, router, num_experts, seed):
        made = {}
        for name, variable in block.kernels.items():
            dense = stacked(variable.value, num_experts, name)

            def value(shape, dtype=None, name=name, dense=dense):
                right = dense.reshape(shape)
                return self.spoil(right) if name == self.name else right

            made[name] = value
        return made


# Of a function: what is wrong with its values, the error, what it says.
SPOILT = {
    "nan": (lambda v: v * np.float32("nan"), UpcycleError, "finite.*NaN"),
    "inf": (lambda v: v + np.float32("inf"), UpcycleError, "finite.*NaN"),
    "one": (lambda v: _with_one(v), UpcycleError, "finite.*NaN"),
    "large": (lambda v: v + 1e300, UpcycleError, "finite.*too large"),
    "shape": (lambda v: v[:, :-1], UpcycleError, "shape.*Received: shape"),
    "turned": (
        lambda v: np.swapaxes(v, 0, 1),
        UpcycleError,
        "shape.*Received: shape",
    ),
    "flat": (lambda v: v.ravel(), UpcycleError, "shape.*Received: shape"),
    "scalar": (lambda v: np.float32(1), UpcycleError, "shape.*shape ()"),
    "complex": (lambda v: v + 1j, TypeError, "floats.*complex"),
    "words": (lambda v: v.astype(str), TypeError, "floats.*str"),
    "integers": (lambda v: v.astype(int), TypeError, "floats.*int64"),
    "flags": (lambda v: v > 0, TypeError, "floats.*bool"),
    "nothing": (lambda v: None, TypeError, "floats.*object"),
    "objects": (lambda v: v.astype(object), TypeError, "floats.*object"),
    "ragged": (lambda v: [[1.0], [1.0, 2.0]], TypeError, "floats.*object"),
}


def _with_one(value):
    value = value.copy()
    value.flat[-1] = np.nan
    return value


@pytest.mark.parametrize("how", list(SPOILT))
@pytest.mark.parametrize("weight", ["up_kernel", "down_bias"])
def test_a_functions_values_are_checked(how, weight):
    spoil, error, match = SPOILT[how]
    if how == "turned" and weight == "down_bias":
        pytest.skip("a bias turned has as many axes")

    def function(value, num_experts, name):
        right = stacked(value, num_experts, name)
        return spoil(right) if name == weight else right

    told = str(refused(function, error, match))
    assert "`expert_init`" in told
    assert repr(weight) in told
    assert "up_0 -> down_0" in told


@pytest.mark.parametrize("how", list(SPOILT))
def test_an_inits_values_are_checked(how):
    spoil, error, match = SPOILT[how]
    told = str(refused(Own(spoil), error, match))
    assert "`expert_init`" in told
    assert "'down_kernel' of block 'up_0 -> down_0'" in told


def test_what_experts_share_is_checked_too():
    def divided(value, num_experts, name):
        return stacked(value, num_experts, name) / np.float32(0)

    match = "`routed` must give finite.*up_0 -> down_0"
    refused(ku.SharedExperts(4, divided), UpcycleError, match)
    spoilt = Own(SPOILT["nan"][0])
    refused(ku.SharedExperts(4, spoilt), UpcycleError, match)


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda value: value,
        lambda value, num_experts: value,
        lambda value, num_experts, name, more: value,
        lambda value, num_experts, *, name: value,
        functools.partial(stacked, 3, 3),
        len,
    ],
)
def test_a_functions_arity_is_checked_before_anything(function, monkeypatch):
    monkeypatch.setattr(
        ku.MoEFeedForward, "__init__", lambda *a, **k: pytest.fail("built")
    )
    match = r"`expert_init` must be a function \(value, num_experts, name\)"
    refused(function, TypeError, match)
    with pytest.raises(TypeError, match=match):
        ku.estimate_upcycle(dense_model(), 2, expert_init=function)


def test_functions_of_every_kind_are_taken():
    class Callable:
        def __call__(self, value, num_experts, name="", *more, **others):
            return stacked(value, num_experts, name)

    dense = dense_model()
    expected = models.weights(upcycle("copy", dense, seed=0))
    for function in (
        Callable(),
        Callable().__call__,
        lambda *given: stacked(*given),
        lambda value, num_experts, name: stacked(
            value, num_experts, name
        ).tolist(),
        lambda value, num_experts, name: stacked(
            value, num_experts, name
        ).astype("float64"),
        lambda value, num_experts, name: expert_init.copy(
            value, num_experts, name
        ),
        Own(lambda value: value),
        Own(keras.ops.convert_to_tensor),
    ):
        moe = upcycle(function, dense, seed=0)
        models.assert_same_weights(moe, expected)


@pytest.mark.parametrize("error", [TypeError, KeyError, ZeroDivisionError])
def test_a_users_own_mistake_shows_as_it_is(error):
    def function(value, num_experts, name):
        raise error("user's own mistake")

    for init in (function, Own(lambda value: function(1, 2, 3))):
        raised = refused(init, error, "user's own mistake")
        (note,) = raised.__notes__
        assert "`expert_init`" in note
        assert "up_0 -> down_0" in note


class Values(ku.ExpertInit):
    def __init__(self, found):
        self.found = found

    def values(self, block, router, num_experts, seed):
        return self.found(block)


def zeros(shape, dtype=None):
    return keras.ops.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("found", "error", "match"),
    [
        (lambda block: None, TypeError, "mapping.*None of type NoneType"),
        (lambda block: [zeros], TypeError, "mapping.*of type list"),
        (
            lambda block: {"up_kernel": zeros},
            UpcycleError,
            r"each of the block's weights.*Received: \['up_kernel'\]",
        ),
        (
            lambda block: dict.fromkeys([*block.kernels, "up_kernle"], zeros),
            UpcycleError,
            "no others.*up_kernle",
        ),
        (
            lambda block: {n: np.zeros(3) for n in block.kernels},
            TypeError,
            "function.*ndarray",
        ),
    ],
)
def test_what_values_return_is_checked(found, error, match):
    told = str(refused(Values(found), error, match))
    assert "`expert_init`" in told
    assert "up_0 -> down_0" in told


class Kernel(ku.DropUpcycling):
    def __init__(self, initializer):
        super().__init__()
        self.initializer = initializer

    def router_kernel(self, initializer, num_experts):
        return self.initializer


@pytest.mark.parametrize(
    ("kernel", "error", "match"),
    [
        (lambda s, dtype=None: np.full(s, np.nan), UpcycleError, "finite"),
        (lambda s, dtype=None: np.zeros(3), UpcycleError, "shape"),
        (lambda s, dtype=None: np.zeros(s) + 1j, TypeError, "floats"),
        (3, TypeError, "initializer.*3 of type int"),
    ],
)
def test_a_router_kernel_is_checked(kernel, error, match):
    told = str(refused(Kernel(kernel), error, match))
    assert "router_kernel" in told
    assert "up_0 -> down_0" in told


def test_a_routers_own_initializer_is_checked():
    router = ku.TopKRouter(
        kernel_initializer=lambda shape, dtype=None: np.full(shape, np.inf)
    )
    match = r"kernel_initializer.*finite.*up_0 -> down_0"
    refused("copy", UpcycleError, match, router=router)


def test_two_blocks_do_not_share_what_they_were_given():
    """On torch a NumPy array's memory would be both weights'."""
    dense = dense_model()
    table = {}

    def shared(value, num_experts, name):
        made = stacked(value, num_experts, name)
        return table.setdefault(name, made)

    moe = upcycle(shared, dense)
    first, second = models.mixtures(moe)
    kernel = first.experts.expert_up.kernel
    before = models.array(second.experts.expert_up.kernel).copy()
    kept = table["up_kernel"].copy()
    kernel.assign(kernel.value + 1.0)
    np.testing.assert_array_equal(
        models.array(second.experts.expert_up.kernel), before
    )
    np.testing.assert_array_equal(table["up_kernel"], kept)


def test_the_donor_lives_on_after_its_own_arrays_were_handed_out():
    dense = dense_model()
    x = np.ones((4, *dense.input_shape[1:]), "float32")
    before = models.array(dense(x))
    moe = ku.upcycle_model(
        dense,
        1,
        layers="all",
        expert_init=lambda value, num_experts, name: value[None],
    )
    moe.compile("sgd", "mse")
    moe.fit(x, before + 1.0, verbose=0)
    np.testing.assert_array_equal(models.array(dense(x)), before)


def test_our_own_values_are_not_passed_over_once_more(monkeypatch):
    for module in (expert_init, first_expert_values):
        monkeypatch.setattr(
            module, "checked_tensor", lambda *a: pytest.fail("checked")
        )
    inits = ["copy", ku.DropUpcycling(), ku.SharedExperts(4)]
    for init in [*inits, ku.BranchTrainMix([dense_model()])]:
        upcycle(init)


def test_expert_weights_that_are_no_floats_are_refused():
    dense = dense_model()
    good = ku.ExpertWeights.from_model(dense)
    for spoil, match in (
        (lambda v: v + 1j, "complex"),
        (lambda v: v.astype(str), "floats"),
        (lambda v: v * np.nan, "finite"),
        (lambda v: v[:-1], "shapes"),
    ):
        blocks = [{n: spoil(v) for n, v in b.items()} for b in good.blocks]
        for make in (
            lambda blocks=blocks: ku.UpIT([ku.ExpertWeights(blocks)] * 2),
            lambda blocks=blocks: ku.BranchTrainMix(
                [ku.ExpertWeights(blocks)], other_weights="base"
            ),
        ):
            with pytest.raises((TypeError, ValueError), match=match):
                upcycle(make())

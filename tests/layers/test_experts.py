import gradients
import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_upcycle.layers import expert_files
from keras_upcycle.layers.experts import Experts

EXPERTS, ROWS, DIM, HIDDEN = 4, 8, 4, 6

SHAPES = {
    "plain": {"gated": False, "use_bias": True, "activation": "gelu"},
    "plain_biasless": {"gated": False, "use_bias": False, "activation": "relu"},
    "gated": {"gated": True, "use_bias": False, "activation": "gelu"},
    "gated_biased": {"gated": True, "use_bias": True, "activation": "relu"},
}
every_shape = pytest.mark.parametrize(
    "settings", SHAPES.values(), ids=SHAPES.keys()
)


def build(**settings):
    layer = Experts(
        EXPERTS,
        HIDDEN,
        kernel_initializer=gradients.normal(0.5),
        bias_initializer=gradients.normal(0.5, seed=1),
        **settings,
    )
    layer.build((EXPERTS, None, DIM))
    return layer


def random_slots(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(EXPERTS, ROWS, DIM)).astype("float32")


def in_tiles(layer, tiles, tile_experts, training=None):
    """Blocks through the experts, beside slots of one row each."""
    slots = ops.zeros((EXPERTS, 1, DIM))
    tile_experts = ops.convert_to_tensor(np.asarray(tile_experts, "int32"))
    used = ops.sum(ops.cast(tile_experts < EXPERTS, "int32"))
    return layer.apply_groups(slots, tiles, tile_experts, used, training)[1]


@every_shape
@pytest.mark.parametrize("remat", [False, True])
def test_all_as_one_equal_the_oracle_values_and_gradients(settings, remat):
    layer = build(**settings, remat=remat)
    rng = np.random.default_rng(3)
    tokens, shares, cotangent = (
        rng.normal(size=size).astype("float32")
        for size in ((ROWS, DIM), (ROWS, EXPERTS), (ROWS, DIM))
    )
    kernels = [v.value for v in layer.trainable_variables]

    def derivatives(run):
        def scalar(tokens, shares, *values):
            pairs = zip(layer.trainable_variables, values, strict=True)
            with keras.StatelessScope(state_mapping=list(pairs)):
                outputs = run(tokens, shares)
            return ops.sum(outputs * ops.convert_to_tensor(cotangent)), outputs

        return gradients.pull_back(scalar, tokens, shares, *kernels)[1:]

    def one_by_one(tokens, shares):
        slots = ops.broadcast_to(tokens[None], (EXPERTS, ROWS, DIM))
        outputs = layer.apply_slots(slots, training=True)
        return ops.einsum("etd,te->td", outputs, shares)

    found, by_arrays = derivatives(
        lambda *both: layer.apply_as_one(*both, training=True)
    )
    _, expected = derivatives(one_by_one)
    found, weights = gradients.as_float(found), gradients.weights_of(layer)
    for t in range(ROWS):
        row = sum(
            shares[t, e]
            * reference.expert(
                tokens[t].astype("float64"), weights, e, settings["activation"]
            )
            for e in range(EXPERTS)
        )
        np.testing.assert_allclose(found[t], row, atol=1e-5)
    for a, b in zip(by_arrays, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_drops_in_all_as_one(remat):
    layer = build(dropout=0.5, remat=remat)
    tokens = ops.ones((64, DIM))
    shares = ops.ones((64, EXPERTS))
    plain, dropped, other = (
        gradients.as_float(layer.apply_as_one(tokens, shares, training))
        for training in (False, True, True)
    )
    assert np.ptp(plain, axis=0).max() < 1e-5
    assert np.ptp(dropped, axis=0).min() > 1e-3
    assert np.abs(dropped - other).max() > 1e-3
    # What is left is scaled up: on average nothing changes.
    assert np.abs(dropped.mean(0) - plain[0]).max() < np.ptp(dropped)


def test_experts_are_narrow_by_their_hidden_units():
    def of(intermediate_dim):
        layer = Experts(2, intermediate_dim)
        layer.build((2, None, 8))
        return layer

    assert of(7).are_narrow
    assert not of(8).are_narrow
    layer = of(4)
    for projection in layer.projections.values():
        projection.quantize("int8")
    assert not layer.are_narrow


@every_shape
def test_slots_equal_the_oracle(settings):
    layer, x = build(**settings), random_slots()
    weights = gradients.weights_of(layer)
    found = ops.convert_to_numpy(layer(x))
    for e, n in np.ndindex(EXPERTS, ROWS):
        expected = reference.expert(
            x[e, n].astype("float64"), weights, e, settings["activation"]
        )
        np.testing.assert_allclose(found[e, n], expected, atol=1e-5)


@every_shape
def test_tiles_equal_slots_values_and_gradients(settings):
    layer, x = build(**settings), random_slots()
    tile_experts = np.array(
        [0, 2, 2, EXPERTS], "int32"
    )  # the last one is spare
    cotangent = random_slots(seed=1)
    cotangent[-1] = 0
    cotangent = ops.convert_to_tensor(cotangent)
    values = [v.value for v in layer.trainable_variables]

    def scalar(run):
        def total(x, *weights):
            pairs = zip(layer.trainable_variables, weights, strict=True)
            with keras.StatelessScope(state_mapping=list(pairs)):
                outputs = run(x)
            return ops.sum(outputs * cotangent), outputs

        return gradients.pull_back(total, x, *values)

    def by_slots(x):
        def one(rows, e):
            everywhere = ops.broadcast_to(rows, (EXPERTS, ROWS, DIM))
            return layer.apply_slots(everywhere)[min(e, EXPERTS - 1)]

        return ops.stack([one(x[n], e) for n, e in enumerate(tile_experts)])

    _, first, found = scalar(lambda x: in_tiles(layer, x, tile_experts))
    _, second, expected = scalar(by_slots)
    np.testing.assert_allclose(
        ops.convert_to_numpy(first)[:-1],
        ops.convert_to_numpy(second)[:-1],
        atol=1e-5,
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        if a.shape[0] == EXPERTS and a.shape != x.shape:
            assert not a[[1, 3]].any()  # nobody sent these anything


@every_shape
def test_weights_have_their_public_names_and_an_expert_axis(settings):
    layer = build(name="experts", **settings)
    roles = ["up", "gate", "down"] if settings["gated"] else ["up", "down"]
    kinds = ["kernel", "bias"] if settings["use_bias"] else ["kernel"]
    assert {v.path for v in layer.weights} == {
        f"experts/expert_{role}/{kind}" for role in roles for kind in kinds
    }
    assert {v.shape[0] for v in layer.weights} == {EXPERTS}


def test_experts_start_apart():
    kernel = ops.convert_to_numpy(build().expert_up.kernel)
    assert abs(kernel[0] - kernel[1]).max() > 1e-3


def test_start_from_fills_what_it_names_and_no_more():
    def sevens(shape, dtype=None):
        return ops.full(shape, 7.0, dtype)

    layer = Experts(EXPERTS, HIDDEN)
    layer.start_from({"up_kernel": sevens, "down_bias": sevens})
    layer.build((EXPERTS, None, DIM))
    assert (ops.convert_to_numpy(layer.expert_up.kernel) == 7).all()
    assert (ops.convert_to_numpy(layer.expert_down.bias) == 7).all()
    assert not ops.convert_to_numpy(layer.expert_up.bias).any()
    assert (ops.convert_to_numpy(layer.expert_down.kernel) != 7).all()
    # A copy of the layer starts from initializers, not from the donor.
    assert layer.expert_up.kernel_initializer is layer.kernel_initializer
    assert not layer._first_values


def test_start_from_refuses_a_built_layer():
    message = "before the layer is built. Received: layer 'bank', built. Assign"
    with pytest.raises(RuntimeError, match=message):
        build(name="bank").start_from({})


def test_config_round_trip_is_complete():
    layer = Experts(
        3,
        5,
        activation="relu",
        gated=True,
        use_bias=False,
        down_bias=False,
        dropout=0.25,
        remat=True,
        frozen_projections=["down"],
        kernel_initializer="he_normal",
        bias_initializer="ones",
        stream="shared_",
        quantization_configs={
            "up": keras.quantizers.Int8QuantizationConfig(
                activation_quantizer=None
            )
        },
        name="bank",
        dtype="mixed_bfloat16",
        trainable=False,
    )
    config = layer.get_config()
    assert Experts.from_config(config).get_config() == config
    defaults = Experts(4, 6).get_config()
    same = [key for key in config if config[key] == defaults[key]]
    assert same == ["format"]


@pytest.mark.parametrize("run", ["slots", "tiles"])
def test_dropout_drops_in_training_only(run):
    layer, x = build(dropout=0.5, use_bias=False), random_slots()

    def outputs(training):
        if run == "slots":
            return ops.convert_to_numpy(layer.apply_slots(x, training))
        return ops.convert_to_numpy(
            in_tiles(layer, x, range(EXPERTS), training)
        )

    np.testing.assert_array_equal(outputs(False), outputs(None))
    assert abs(outputs(True) - outputs(False)).max() > 1e-2


@pytest.mark.parametrize(
    ("policy", "compute", "variable"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float16", "float32"),
    ],
)
def test_tiles_follow_the_dtype_policy_as_slots_do(policy, compute, variable):
    layer, x = build(dtype=policy), random_slots()
    slots, tiles = gradients.compiled(
        lambda x: (layer(x), in_tiles(layer, x, range(EXPERTS)))
    )(ops.convert_to_tensor(x))
    for found in (slots, tiles):
        assert keras.backend.standardize_dtype(found.dtype) == compute
    assert {v.dtype for v in layer.weights} == {variable}
    np.testing.assert_allclose(
        gradients.as_float(slots), gradients.as_float(tiles), atol=0.05
    )


def test_names_of_the_kernels_are_what_lora_is_asked_for_by():
    layer = build(gated=True)
    names = [expert_files.UP, expert_files.GATE, expert_files.DOWN]
    assert names == [
        layer.expert_up.name,
        layer.expert_gate.name,
        layer.expert_down.name,
    ]

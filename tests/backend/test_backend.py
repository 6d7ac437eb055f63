import inspect
import sys
import types

import gradients
import keras
import numpy as np
import pytest
from keras import ops

import keras_upcycle
from keras_upcycle import backend
from keras_upcycle.backend import portable as portable_module
from keras_upcycle.backend import portable_devices

BACKEND = keras.backend.backend()
PRIMITIVES = (
    "top_k",
    "gather_rows",
    "scatter_add_rows",
    "to_slots",
    "from_slots",
    "multiply",
    "infer_slots",
    "grouped_feed_forward",
    "packing",
    "remat",
    "is_recorded",
    "lay_out",
    "num_replicas",
    "replica_number",
    "sum_over_replicas",
    # Compared by `tests/distribution`, on several devices.
    "to_experts",
    "to_groups",
    "on_each_device",
    "is_at_hand",
)
# Written out once, for the backend files to register.
GRADIENTS = ("to_slots_gradient", "from_slots_gradient")
# What a network is made of, for the backend files to put into loops.
PARTS = (
    "activated",
    "feed_forward",
    "groups_of_tiles",
    "hidden_layer",
    "hidden_roles",
    "project",
)


# Both files as one.
portable = types.SimpleNamespace(
    **{**vars(portable_devices), **vars(portable_module)}
)


def own_functions(module):
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_every_primitive_is_portable_and_compared_here():
    # A new function in `backend` needs its comparison in this file.
    found = own_functions(portable_module) | own_functions(portable_devices)
    assert found == {*PRIMITIVES, *GRADIENTS, *PARTS}
    assert own_functions(backend._chosen) <= set(PRIMITIVES)


def test_overrides_are_those_of_the_backend_that_runs():
    assert backend._chosen.__name__ == f"keras_upcycle.backend.{BACKEND}"
    for name in PRIMITIVES:
        expected = getattr(backend._chosen, name, getattr(portable, name))
        assert getattr(backend, name) is expected


both = pytest.mark.parametrize(
    "module", [backend, portable], ids=["chosen", "portable"]
)


@both
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 4), (1, 2, 8), (3, 2, 64), (4096, 2, 32), (64, 4, 4)]
)
def test_packing_has_rows_and_no_more_slots_than_a_fair_share(
    module, sizes, training
):
    # What is fastest is measured by `benchmarks.growth`.
    num_tokens, top_k, num_experts = sizes
    slots, rows = module.packing(*sizes, training=training)
    assert 0 <= slots <= num_tokens * top_k / num_experts
    assert rows in (1, 2, 4, 8, 16, 32, 64)
    if not training and num_tokens * top_k <= 4 * num_experts:
        assert slots == 0  # idle experts are not read
    if not training and num_tokens == 1:
        assert rows <= 4  # of which all but one are padding


@both
def test_outside_a_strategy_a_step_has_one_replica(module):
    # Of two: `mirrored_training.py`.
    assert module.num_replicas() == 1
    assert module.replica_number() == 0
    x = ops.convert_to_tensor([1.0, 2.0])
    assert module.sum_over_replicas(x) is x


@both
def test_what_runs_is_not_recorded(module):
    # What is: `test_export`, of torch's tracing.
    assert module.is_recorded() is False


@both
def test_a_first_value_is_laid_out_over_devices(module):
    """Over several devices: `test_first_values`, in a process of its own."""

    def make(shape, dtype):
        return ops.reshape(ops.arange(6, dtype=dtype), shape)

    layout = None
    if BACKEND == "jax" and module is backend:
        devices = keras.distribution.list_devices()[:1]
        mesh = keras.distribution.DeviceMesh((1,), ["model"], devices)
        layout = keras.distribution.TensorLayout(["model", None], mesh)
        distribution = keras.distribution.ModelParallel(
            layout_map=keras.distribution.LayoutMap(mesh)
        )
        with distribution.scope():
            value = module.lay_out(make, (2, 3), "float32", layout)
        assert value.sharding.spec == layout.backend_layout.spec
    else:
        value = module.lay_out(make, (2, 3), "float32", layout)
    expected = np.arange(6, dtype="float32").reshape(2, 3)
    np.testing.assert_array_equal(ops.convert_to_numpy(value), expected)


def tied_rows():
    rng = np.random.default_rng(0)
    return rng.integers(-2, 3, size=(2, 6, 8)).astype("float32")


@both
@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k_is_the_stable_sort(module, k):
    x = tied_rows()
    values, index = module.top_k(ops.convert_to_tensor(x), k)
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    assert ops.convert_to_numpy(index).dtype == "int32"
    np.testing.assert_array_equal(ops.convert_to_numpy(index), order)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(values), np.take_along_axis(x, order, axis=-1)
    )


@both
def test_top_k_of_equal_entries_is_the_first_of_them(module):
    # Long enough for an unstable sort to show.
    _, index = module.top_k(ops.zeros((1, 500)), 400)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(index)[0], np.arange(400)
    )


@both
def test_gradient_of_top_k_goes_to_the_entries_taken(module):
    x = tied_rows()
    cotangent = np.random.default_rng(1).normal(size=(2, 6, 3))
    cotangent = cotangent.astype("float32")
    _, _, (found,) = gradients.pull_back(
        lambda y: ops.sum(
            module.top_k(y, 3)[0] * ops.convert_to_tensor(cotangent)
        ),
        x,
    )
    expected = np.zeros_like(x)
    order = np.argsort(-x, axis=-1, kind="stable")[..., :3]
    np.put_along_axis(expected, order, cotangent, axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# Rows read twice, read never, read out of order.
INDEX = np.array([[3, 0, 3, 3, 1], [4, 4, 4, 4, 4]], "int32")


def rows_of(length, width=3):
    rng = np.random.default_rng(2)
    return rng.normal(size=(2, length, width)).astype("float32")


def gathered(rows):
    return np.stack([group[at] for group, at in zip(rows, INDEX, strict=True)])


def scattered(rows, length):
    out = np.zeros((2, length, rows.shape[-1]), rows.dtype)
    for g, n in np.ndindex(INDEX.shape):
        out[g, INDEX[g, n]] += rows[g, n]
    return out


@both
def test_gather_rows_equals_a_loop_values_and_gradients(module):
    rows, cotangent = rows_of(5), rows_of(5)
    index = ops.convert_to_tensor(INDEX)
    _, values, (found,) = gradients.pull_back(
        lambda x: (
            ops.sum(
                module.gather_rows(x, index) * ops.convert_to_tensor(cotangent)
            ),
            module.gather_rows(x, index),
        ),
        rows,
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(values), gathered(rows))
    np.testing.assert_allclose(found, scattered(cotangent, 5), atol=1e-6)


@both
def test_scatter_add_rows_equals_a_loop_values_and_gradients(module):
    rows, cotangent = rows_of(5), rows_of(7)
    index = ops.convert_to_tensor(INDEX)
    _, values, (found,) = gradients.pull_back(
        lambda x: (
            ops.sum(
                module.scatter_add_rows(x, index, 7)
                * ops.convert_to_tensor(cotangent)
            ),
            module.scatter_add_rows(x, index, 7),
        ),
        rows,
    )
    values = ops.convert_to_numpy(values)
    np.testing.assert_allclose(values, scattered(rows, 7), atol=1e-6)
    assert not values[:, 5:].any()
    np.testing.assert_allclose(found, gathered(cotangent), atol=1e-6)


@both
@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16"])
def test_rows_keep_their_dtype(module, dtype):
    rows = ops.cast(np.round(4 * rows_of(5)), dtype)
    index = ops.convert_to_tensor(INDEX)
    for found, expected in (
        (module.gather_rows(rows, index), gathered),
        (
            module.scatter_add_rows(rows, index, 6),
            lambda values: scattered(values, 6),
        ),
    ):
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        np.testing.assert_array_equal(
            gradients.as_float(found), expected(gradients.as_float(rows))
        )


# Seven slots, of which 2 and 5 are empty in the first group and all but one
# in the second; "7" is nowhere.
PLACE = np.array(
    [
        [[0, 4], [7, 1], [3, 7], [6, 7]],
        [[7, 7], [7, 2], [7, 7], [7, 7]],
    ],
    "int32",
)
SLOTS = 7


def source_and_filled():
    source = np.zeros((2, SLOTS), "int32")
    filled = np.zeros((2, SLOTS), bool)
    for g, s, k in np.ndindex(PLACE.shape):
        if PLACE[g, s, k] < SLOTS:
            source[g, PLACE[g, s, k]] = s
            filled[g, PLACE[g, s, k]] = True
    return source, filled


def test_to_slots_equals_a_loop_values_and_gradients():
    tokens, cotangent = rows_of(4), rows_of(SLOTS)
    source, filled = source_and_filled()
    places = [ops.convert_to_tensor(x) for x in (source, PLACE)]

    def scalar(module, upstream):
        def run(x):
            slots = module.to_slots(x, *places)
            return ops.sum(slots * ops.convert_to_tensor(upstream)), slots

        _, values, (found,) = gradients.pull_back(run, tokens)
        return ops.convert_to_numpy(values), found

    expected = np.zeros_like(tokens)
    for g, n in np.ndindex(source.shape):
        if filled[g, n]:
            expected[g, source[g, n]] += cotangent[g, n]
    read = np.where(filled[..., None], cotangent, 0)
    for module in (backend, portable):
        values, found = scalar(module, read)
        for g, n in np.argwhere(filled):
            np.testing.assert_array_equal(values[g, n], tokens[g, source[g, n]])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    if hasattr(backend._chosen, "to_slots"):
        # An empty slot gives the token it happens to hold no gradient.
        np.testing.assert_allclose(
            scalar(backend, cotangent)[1], expected, atol=1e-6
        )


@both
def test_from_slots_equals_a_loop_values_and_gradients(module):
    outputs, cotangent = rows_of(SLOTS), rows_of(4)
    source, _ = source_and_filled()
    weights = np.random.default_rng(3).uniform(0.2, 1, PLACE.shape)
    weights = np.where(PLACE < SLOTS, weights, 0).astype("float32")

    def run(x, w):
        tokens = module.from_slots(
            x, w, ops.convert_to_tensor(source), ops.convert_to_tensor(PLACE)
        )
        return ops.sum(tokens * ops.convert_to_tensor(cotangent)), tokens

    _, values, (by_outputs, by_weights) = gradients.pull_back(
        run, outputs, weights
    )
    expected = np.zeros_like(cotangent)
    expected_by_outputs = np.zeros_like(outputs)
    expected_by_weights = np.zeros_like(weights)
    for g, s, k in np.ndindex(PLACE.shape):
        n = PLACE[g, s, k]
        if n < SLOTS:
            expected[g, s] += weights[g, s, k] * outputs[g, n]
            expected_by_outputs[g, n] += weights[g, s, k] * cotangent[g, s]
            expected_by_weights[g, s, k] = outputs[g, n] @ cotangent[g, s]
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), expected, atol=1e-6
    )
    np.testing.assert_allclose(by_outputs, expected_by_outputs, atol=1e-6)
    np.testing.assert_allclose(by_weights, expected_by_weights, atol=1e-6)


@both
def test_from_slots_does_not_read_what_empty_slots_hold(module):
    source, filled = source_and_filled()
    outputs = np.where(filled[..., None], rows_of(SLOTS), np.nan)
    weights = (PLACE < SLOTS).astype("float32")

    def run(x, w):
        tokens = module.from_slots(
            x, w, ops.convert_to_tensor(source), ops.convert_to_tensor(PLACE)
        )
        return ops.sum(tokens), tokens

    _, values, (_, by_weights) = gradients.pull_back(
        run, outputs.astype("float32"), weights
    )
    assert np.isfinite(ops.convert_to_numpy(values)).all()
    assert np.isfinite(by_weights).all()


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stack"])
def test_multiply_equals_numpy_values_and_gradients(module, stack, dtype):
    rng = np.random.default_rng(6)
    # Few digits, so that every entry of a product and every sum is exact.
    rows, kernels, cotangent = (
        rng.integers(-3, 4, size=(*stack, *size)).astype("float32")
        for size in ((5, 8), (8, 6), (5, 6))
    )

    def run(rows, kernels):
        outputs = module.multiply(
            ops.cast(rows, dtype), ops.cast(kernels, dtype)
        )
        assert keras.backend.standardize_dtype(outputs.dtype) == dtype
        outputs = ops.cast(outputs, "float32")
        return ops.sum(outputs * ops.convert_to_tensor(cotangent)), outputs

    _, outputs, (by_rows, by_kernels) = gradients.pull_back(run, rows, kernels)
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), rows @ kernels)
    np.testing.assert_array_equal(by_rows, cotangent @ kernels.swapaxes(-1, -2))
    np.testing.assert_array_equal(by_kernels, rows.swapaxes(-1, -2) @ cotangent)


def test_gradients_of_many_tiles_add_up_in_more_digits_than_bfloat16():
    # 300 times 1: in bfloat16 a running sum stays at 256, where 1 is lost.
    def run(tiles, kernel, bias):
        weights = {
            "up_kernel": ops.ones((2, 3, 4), "bfloat16"),
            "up_bias": ops.zeros((2, 1, 4), "bfloat16"),
            "down_kernel": ops.cast(kernel, "bfloat16"),
            "down_bias": ops.cast(bias, "bfloat16"),
        }
        _, outputs = backend.grouped_feed_forward(
            ops.zeros((2, 0, 3), "bfloat16"),
            ops.cast(tiles, "bfloat16"),
            ops.ones((300,), "int32"),
            ops.convert_to_tensor(np.int32(300)),
            weights,
            ops.ones_like,
            training=True,
        )
        return ops.sum(ops.cast(outputs, "float32"))

    _, _, found = gradients.pull_back(
        run,
        np.ones((300, 1, 3), "float32"),
        np.ones((2, 4, 3), "float32"),
        np.zeros((2, 1, 3), "float32"),
    )
    for gradient in found[1:]:
        np.testing.assert_array_equal(gradient[0], 0.0)
        np.testing.assert_array_equal(gradient[1], 300.0)


def networks(rng, kind, experts=4, width=3, hidden=6):
    """Weights of some networks by name, each with an expert axis."""
    shapes = {
        "up_kernel": (experts, width, hidden),
        "down_kernel": (experts, hidden, width),
    }
    if kind != "plain":
        shapes["gate_kernel"] = shapes["up_kernel"]
    if kind != "gated":
        shapes |= {
            "up_bias": (experts, 1, hidden),
            "down_bias": (experts, 1, width),
        }
    if kind == "both":
        shapes["gate_bias"] = shapes["up_bias"]
    return {n: rng.normal(size=s).astype("float32") for n, s in shapes.items()}


def one_network(row, weights, expert, keep):
    """Row by row, as one would write it down."""

    def project(x, role):
        x = ops.matmul(x, weights[f"{role}_kernel"][expert])
        bias = weights.get(f"{role}_bias")
        return x if bias is None else x + bias[expert]

    if "gate_kernel" in weights:
        hidden = ops.tanh(project(row, "gate")) * project(row, "up")
    else:
        hidden = ops.tanh(project(row, "up"))
    return project(hidden if keep is None else hidden * keep, "down")


@both
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize(
    ("tile_experts", "kind", "dropped"),
    [
        ([0, 2, 2, 4, 4], "plain", False),
        ([1, 1, 3], "gated", True),
        ([4, 4], "both", False),
        ([], "plain", True),
        # Runs of tiles, which JAX and TensorFlow take four at a time.
        ([0] * 9 + [1] * 4 + [3] * 3 + [4] * 5, "both", True),
    ],
    ids=str,
)
def test_grouped_feed_forward_equals_a_loop_values_and_gradients(
    module, training, slots, tile_experts, kind, dropped
):
    rng = np.random.default_rng(5)
    tile_experts = np.array(tile_experts, "int32")
    used = int((tile_experts < 4).sum())

    def draw(*size):
        return rng.normal(size=size).astype("float32")

    weights = networks(rng, kind)
    arrays = [
        draw(4, slots, 3),
        draw(len(tile_experts), 8, 3),
        *weights.values(),
    ]
    keep = (None, None)
    if dropped:
        keep = tuple(
            ops.convert_to_tensor(draw(*a.shape[:2], 6)) for a in arrays[:2]
        )
    by_outputs = draw(4, slots, 3), draw(len(tile_experts), 8, 3)
    by_outputs[1][used:] = 0  # nobody reads what comes of spare tiles

    def total(outputs):
        pairs = zip(outputs, by_outputs, strict=True)
        return sum(ops.sum(out * ops.convert_to_tensor(c)) for out, c in pairs)

    def run(in_slots, tiles, *values):
        outputs = module.grouped_feed_forward(
            in_slots,
            tiles,
            ops.convert_to_tensor(tile_experts),
            ops.convert_to_tensor(np.int32(used)),
            dict(zip(weights, values, strict=True)),
            ops.tanh,
            keep,
            training,
        )
        return total(outputs), outputs

    def loop(in_slots, tiles, *values):
        given = dict(zip(weights, values, strict=True))

        def rows(stack, experts, keep):
            return [
                one_network(
                    stack[n], given, e, None if keep is None else keep[n]
                )
                for n, e in enumerate(experts)
            ]

        outputs = (
            ops.stack(rows(in_slots, range(4), keep[0])),
            ops.stack(
                [
                    *rows(tiles, tile_experts[:used].tolist(), keep[1]),
                    *(tiles[n] for n in range(used, len(tile_experts))),
                ]
            )
            if len(tile_experts)
            else tiles,
        )
        return total(outputs), outputs

    _, outputs, found = gradients.pull_back(run, *arrays)
    _, expected, by_arrays = gradients.pull_back(loop, *arrays)
    assert tuple(outputs[1].shape) == by_outputs[1].shape
    for a, b, real in zip(outputs, expected, (slots, used), strict=True):
        if real:
            cut = slice(None) if a is outputs[0] else slice(used)
            np.testing.assert_allclose(
                ops.convert_to_numpy(a)[cut],
                ops.convert_to_numpy(b)[cut],
                rtol=1e-6,
                atol=1e-5,
            )
    for n, (a, b) in enumerate(zip(found, by_arrays, strict=True)):
        cut = slice(used) if n == 1 else slice(None)
        np.testing.assert_allclose(
            a[cut], 0.0 if b is None else b[cut], rtol=1e-6, atol=1e-5
        )


def test_groups_of_tiles_are_whole_and_of_one_expert():
    tile_experts = np.array([0] * 9 + [1] * 4 + [3] * 3 + [5] * 8, "int32")
    starts, others = portable.groups_of_tiles(
        ops.convert_to_tensor(tile_experts), 5, 4
    )
    starts = np.flatnonzero(ops.convert_to_numpy(starts))
    others = np.flatnonzero(ops.convert_to_numpy(others))
    np.testing.assert_array_equal(starts, [0, 4, 9, 16, 20])
    np.testing.assert_array_equal(others, [8, 13, 14, 15])
    covered = [*(starts[:, None] + np.arange(4)).ravel(), *others]
    assert sorted(covered) == list(range(len(tile_experts)))


@both
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("kind", ["plain", "gated", "both"])
def test_infer_slots_equals_a_loop_values_and_gradients(
    module, kind, rows, experts
):
    """On JAX 64 rows of several experts are as many turns of a real loop."""
    rng = np.random.default_rng(9)
    weights = networks(rng, kind, experts)
    slots, by_outputs = rng.normal(size=(2, experts, rows, 3)).astype("float32")

    def scalar(network):
        def run(slots, *values):
            given = dict(zip(weights, values, strict=True))
            outputs = network(slots, given)
            return ops.sum(outputs * ops.convert_to_tensor(by_outputs)), outputs

        return gradients.pull_back(run, slots, *weights.values())

    _, outputs, found = scalar(
        lambda slots, given: module.infer_slots(slots, given, ops.tanh)
    )
    _, expected, by_arrays = scalar(
        lambda slots, given: ops.stack(
            [one_network(slots[e], given, e, None) for e in range(experts)]
        )
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs),
        ops.convert_to_numpy(expected),
        atol=1e-5,
    )
    for a, b in zip(found, by_arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@both
def test_remat_changes_neither_values_nor_gradients(module):
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=(3, 4)).astype("float32") for _ in range(3)]

    def scalar(wrap):
        def run(x, y, kernel):
            def network(x, y, *given):
                own = given[0] if given else kernel
                return ops.tanh(x * own), ops.tanh(y * own) * x

            # TensorFlow's `recompute_grad` differentiates by its arguments and
            # by variables, not by tensors that a function closes over.
            given = (kernel,) if BACKEND == "tensorflow" else ()
            first, second = wrap(network)(x, y, *given)
            return ops.sum(first * second), (first, second)

        return gradients.pull_back(run, *arrays)

    expected, found = scalar(lambda network: network), scalar(module.remat)
    for a, b in zip(expected[2], found[2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(expected[1], found[1], strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=1e-6
        )


@pytest.mark.skipif(BACKEND != "jax", reason="A ragged product of JAX's.")
@pytest.mark.parametrize(
    ("device", "installed", "chosen"),
    [
        ("cpu", True, None),
        ("gpu", False, None),
        ("gpu", True, "tokamax"),
        ("tpu", False, "lax"),
        ("tpu", True, "tokamax"),
    ],
)
def test_ragged_dot_runs_where_it_is_fast_and_gives_the_same(
    device, installed, chosen, monkeypatch
):
    import jax

    calls = []

    def tokamax_ragged_dot(*args):
        calls.append("tokamax")
        return lax_ragged_dot(*args)

    lax_ragged_dot = jax.lax.ragged_dot
    module = types.SimpleNamespace(ragged_dot=tokamax_ragged_dot)
    monkeypatch.setitem(sys.modules, "tokamax", module if installed else None)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    x = np.random.default_rng(4).normal(size=(2, 40, 4)).astype("float32")
    layer = keras_upcycle.MoEFeedForward(
        4, 6, router=keras_upcycle.TopKRouter(), dispatch="dropless"
    )
    found = ops.convert_to_numpy(layer(x))
    expected = {"tokamax": tokamax_ragged_dot, "lax": lax_ragged_dot}
    assert backend._chosen._ragged_dot() is expected.get(chosen)
    assert bool(calls) == (chosen == "tokamax")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    np.testing.assert_allclose(found, ops.convert_to_numpy(layer(x)), atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="A ragged product of JAX's.")
def test_rows_of_no_expert_may_come_back_as_anything(monkeypatch):
    """From a ragged product, and from its gradient."""
    import jax

    def spoiled(rows, counts):
        filled = np.arange(len(rows))[:, None] < jax.numpy.sum(counts)
        return jax.numpy.where(filled, rows, np.nan)

    @jax.custom_vjp
    def ragged_dot(rows, kernels, counts):
        return spoiled(jax.lax.ragged_dot(rows, kernels, counts), counts)

    def pull_back(saved, gradient):
        rows, kernels, counts = saved
        _, pull = jax.vjp(
            lambda *args: jax.lax.ragged_dot(*args, counts), rows, kernels
        )
        by_rows, by_kernels = pull(gradient)
        return spoiled(by_rows, counts), by_kernels, None

    ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), pull_back)
    x = np.random.default_rng(4).normal(size=(2, 40, 4)).astype("float32")
    mask = np.arange(40) < np.array([[25], [40]])
    layer = keras_upcycle.MoEFeedForward(
        4, 6, router=keras_upcycle.TopKRouter(), dispatch="dropless"
    )
    layer.build(x.shape)
    outputs, expected = gradients.of_layer(layer, x, x, mask=mask)
    monkeypatch.setattr(backend._chosen, "_ragged_dot", lambda: ragged_dot)
    again, found = gradients.of_layer(layer, x, x, mask=mask)
    np.testing.assert_allclose(again, outputs, atol=1e-5)
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            found[name], gradient, atol=1e-4, err_msg=name
        )


@pytest.mark.skipif(BACKEND != "torch", reason="A grouped product of torch's.")
def test_rows_that_a_grouped_product_leaves_out_are_zero(monkeypatch):
    """torch does not write them."""
    import torch

    def grouped_mm(a, b, offs):
        starts = [0, *offs.tolist()[:-1]]
        parts = [
            slice(*pair) for pair in zip(starts, offs.tolist(), strict=True)
        ]
        if b.ndim == 2:
            return torch.stack([a[:, part] @ b[part] for part in parts])
        rows = [a[part] @ kernel for part, kernel in zip(parts, b, strict=True)]
        rest = torch.full((len(a) - offs[-1], b.shape[2]), torch.nan)
        return torch.cat([*rows, rest])

    rng = np.random.default_rng(0)
    rows, kernels, by_outputs = (
        torch.tensor(rng.normal(size=shape), dtype=torch.float32)
        for shape in ((9, 3), (4, 3, 5), (9, 5))
    )
    counts = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    results = []
    for serves in (False, True):
        monkeypatch.setattr(
            backend._chosen, "_grouped_mm_serves", lambda *_, s=serves: s
        )
        monkeypatch.setattr(
            torch.nn.functional, "grouped_mm", grouped_mm, raising=False
        )
        given = [t.clone().requires_grad_() for t in (rows, kernels)]
        outputs = backend._chosen._GroupedRows.apply(*given, counts)
        found = torch.autograd.grad((outputs * by_outputs).sum(), given)
        results.append([t.detach().numpy() for t in (outputs, *found)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not results[1][0][6:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("slots", [0, 2])
def test_gradients_by_weights_have_their_dtype(dtype, slots):
    rng = np.random.default_rng(0)
    weights = networks(rng, "both", 4)
    given = [slots_of(rng, 4, slots), slots_of(rng, 6, 2), *weights.values()]
    given = [ops.cast(ops.convert_to_tensor(a), dtype) for a in given]
    tile_experts = ops.convert_to_tensor(np.array([0, 0, 0, 0, 1, 3], "int32"))

    def run(in_slots, tiles, *values):
        outputs = backend.grouped_feed_forward(
            in_slots,
            tiles,
            tile_experts,
            ops.convert_to_tensor(np.int32(6)),
            dict(zip(weights, values, strict=True)),
            ops.tanh,
            training=True,
        )
        return sum(ops.sum(ops.cast(part, "float32")) for part in outputs)

    for tensor, gradient in zip(given, raw_gradients(run, *given), strict=True):
        if gradient is not None:  # of no slots, on torch
            assert gradient.dtype == tensor.dtype


def slots_of(rng, count, rows):
    return rng.normal(size=(count, rows, 3)).astype("float32")


def raw_gradients(function, *tensors):
    """As the backend gives them, neither cast nor filled with zeros."""
    if BACKEND == "jax":
        import jax

        return jax.grad(function, argnums=range(len(tensors)))(*tensors)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = function(*tensors)
        return tape.gradient(total, tensors)
    import torch

    tensors = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, allow_unused=True)


@pytest.mark.parametrize("router", ["drops", "dropless", "expert_choice"])
def test_layer_is_the_same_on_portable_primitives(router, monkeypatch):
    x = np.random.default_rng(4).normal(size=(2, 8, 4)).astype("float32")
    kinds = {
        "drops": (
            keras_upcycle.TopKRouter(eval_capacity_factor=0.6),
            "capacity",
        ),
        "dropless": (keras_upcycle.TopKRouter(), "dropless"),
        "expert_choice": (keras_upcycle.ExpertChoiceRouter(), "capacity"),
    }
    router, engine = kinds[router]
    layer = keras_upcycle.MoEFeedForward(
        4,
        6,
        router=router,
        dispatch=engine,
        kernel_initializer=gradients.normal(0.5),
    )
    layer.build(x.shape)
    outputs, found = gradients.of_layer(layer, x, x)
    for name in PRIMITIVES:
        monkeypatch.setattr(backend, name, getattr(portable, name))
    expected_outputs, expected = gradients.of_layer(layer, x, x)
    np.testing.assert_allclose(outputs, expected_outputs, atol=1e-6)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5)


@pytest.mark.skipif(
    BACKEND != "jax", reason="only JAX exports with symbolic shapes"
)
def test_top_k_exports_without_the_primitive_tensorflow_cannot_run():
    import jax

    rows, columns = jax.export.symbolic_shape("b, n")
    exported = jax.export.export(jax.jit(lambda x: backend.top_k(x, 2)))(
        jax.ShapeDtypeStruct((rows, columns), "float32")
    )
    module = exported.mlir_module()
    assert "stablehlo.sort" in module
    assert "composite" not in module
    assert "chlo.top_k" not in module
    # The same two would be there for shapes that are known.
    known = jax.jit(lambda x: backend.top_k(x, 2)).lower(
        jax.ShapeDtypeStruct((3, 4), "float32")
    )
    assert "top_k(" in known.as_text()


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="only TensorFlow meets lengths unknown until run time",
)
def test_primitives_take_lengths_known_only_at_run_time():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, None, 8])])
    def run(x):
        _, index = backend.top_k(x[..., 0], tf.shape(x)[1] // 2)
        rows = backend.gather_rows(x, index)
        return backend.scatter_add_rows(rows, index, tf.shape(x)[1])

    x = tied_rows()
    order = np.argsort(-x[..., 0], axis=-1, kind="stable")[:, :3]
    expected = np.zeros_like(x)
    for g, n in np.ndindex(order.shape):
        expected[g, order[g, n]] = x[g, order[g, n]]
    np.testing.assert_array_equal(run(x).numpy(), expected)

"""Under `mixed_bfloat16` experts round where the dense block rounds."""

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_upcycle as ku

# How a model is run without a rewriting compiler, or with the same rewriting
# of both. JAX compiles experts that are called eagerly, TensorFlow's `predict`
# compiles all by XLA; both then keep more digits here and there, of the dense
# model too.
LIKE_FOR_LIKE = "compiled" if keras.backend.backend() == "jax" else "eager"


def flat(outputs):
    if not isinstance(outputs, dict):
        outputs = {"": outputs}
    return np.concatenate(
        [
            np.ravel(models.array(ops.convert_to_tensor(outputs[name])))
            for name in sorted(outputs)
        ]
    )


def gaps(dense, moe, x):
    """Of the two models run in one way, and of the dense one in two ways."""
    found = {}
    for name, run in (
        ("eager", lambda m: m(x, training=False)),
        ("compiled", lambda m: m.predict(x, verbose=0)),
    ):
        found[name] = [flat(run(model)) for model in (dense, moe)]
    size = np.abs(found["eager"][0]).max()
    own = np.abs(found["eager"][0] - found["compiled"][0]).max() / size
    of = {name: np.abs(a - b).max() / size for name, (a, b) in found.items()}
    return of, own


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("dispatch", ["auto", "dense"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_gated_t5_starts_as_the_dense_one(activation, dispatch):
    dense = models.t5_backbone(activation=activation, dtype="mixed_bfloat16")
    moe = ku.upcycle_model(
        dense,
        4,
        router="top_k",
        layers={"encoder": [1], "decoder": [1]},
        dispatch=dispatch,
    )
    x = models.t5_inputs(batch=4, source=32, target=32)
    of, own = gaps(dense, moe, x)
    assert of[LIKE_FOR_LIKE] == 0
    # bfloat16 has 8 digits: two roundings of a residual stream.
    assert max(of.values()) <= max(own, 2**-6)


class Llama(layers.Layer):
    """The feed-forward part of KerasHub's `LlamaTransformerDecoder`."""

    def build(self, shape):
        settings = {"use_bias": False, "dtype": self.dtype_policy}
        self.gate, self.up = (
            layers.Dense(models.HIDDEN, **settings) for _ in "ab"
        )
        self.down = layers.Dense(shape[-1], **settings)
        for layer in (self.gate, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], models.HIDDEN))

    def call(self, x):
        gate = ops.cast(self.gate(x), "float32")
        gate = ops.cast(ops.silu(gate), self.compute_dtype)
        return self.down(self.up(x) * gate)


@pytest.mark.thinned
@pytest.mark.parametrize("dispatch", ["auto", "capacity", "dropless", "dense"])
def test_experts_activate_in_float32_if_told_to(dispatch):
    inputs = keras.Input((40, models.WIDTH))
    block = Llama(dtype="mixed_bfloat16")
    dense = keras.Model(inputs, block(inputs))
    layer = ku.MoEFeedForward(
        4,
        models.HIDDEN,
        activation=ku.Float32Activation("silu"),
        gated=True,
        use_bias=False,
        dispatch=dispatch,
        dtype="mixed_bfloat16",
    )
    moe = keras.Model(inputs, layer(inputs))
    for role, projection in layer.experts.projections.items():
        kernel = models.array(getattr(block, role).kernel)
        projection.kernel.assign(np.stack([kernel] * 4))
    of, own = gaps(dense, moe, models.tokens(4, 40, models.WIDTH))
    assert of[LIKE_FOR_LIKE] <= own
    assert max(of.values()) <= max(own, 2**-7)


def test_it_is_computed_in_float32_and_comes_back_as_it_was():
    x = np.linspace(-4, 4, 257, dtype="float32")
    narrow = ops.cast(x, "bfloat16")
    rounded = models.array(narrow)
    received = ku.Float32Activation("silu")(narrow)
    assert keras.backend.standardize_dtype(received.dtype) == "bfloat16"
    exact = rounded / (1 + np.exp(-rounded))
    np.testing.assert_array_equal(
        models.array(received), models.array(ops.cast(exact, "bfloat16"))
    )


def test_files_and_the_way_back_keep_it(tmp_path):
    activation = ku.Float32Activation("gelu")
    assert activation == ku.Float32Activation("gelu")
    assert activation != ku.Float32Activation("silu")
    layer = ku.MoEFeedForward(2, 8, activation=activation)
    again = ku.MoEFeedForward.from_config(layer.get_config())
    assert again.activation == activation
    inputs = keras.Input((5, models.WIDTH))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    (loaded,) = models.mixtures(
        keras.saving.load_model(tmp_path / "model.keras")
    )
    assert loaded.experts.activation == activation

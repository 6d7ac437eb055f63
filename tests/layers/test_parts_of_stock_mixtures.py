"""What mixtures of others have: biases of logits, gates of shared networks,
activations of gate and up together.
"""

import gradients
import keras
import models
import numpy as np
import pytest
import reference
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers.activations import ClippedSwiGLU
from keras_upcycle.layers.dispatch import ENGINES

DIM, HIDDEN, SHARED, EXPERTS = 5, 6, 3, 4


def router(**settings):
    return ku.TopKRouter(
        2, capacity_factor=None, load_balance_loss=0.0, **settings
    )


def built(layer):
    """A layer whose every weight has a value of its own."""
    if not layer.built:
        layer.build((None, None, DIM))
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(scale=0.7, size=variable.shape))
    return layer


def networks(point):
    """Of weights by path: routed and shared, as `reference` names them."""
    found = {"experts": {}, "shared": {}}
    for path, value in point.items():
        owner = path.split("/")[0]
        if owner in found:
            found[owner][gradients.oracle_name(path)] = value
    return found["experts"], found["shared"]


def expected(point, inputs, mask, softmax, activation):
    """Token by token, in float64."""
    routed, shared = networks(point)
    kernel = point["router/kernel"]
    bias = point.get("router/logits_bias", 0.0)

    def route(logits, real):
        return reference.top_k(
            logits + bias, 2, mask=real, softmax_order=softmax
        )

    weights = {**routed, "router": kernel}
    outputs = reference.moe(inputs, weights, route, "batch", mask, activation)
    if shared:
        gate = point.get("shared_gate/kernel")
        for at in np.ndindex(mask.shape):
            if mask[at]:
                token = inputs[at].astype("float64")
                more = reference.expert(token, shared, 0, activation)
                if gate is not None:
                    more = more / (1.0 + np.exp(-(token @ gate)))
                outputs[at] += more
    return outputs


CASES = {
    "bias": ({}, {"use_bias": True}, "relu"),
    "bias_after": ({}, {"use_bias": True, "softmax": "after_top_k"}, "relu"),
    "shared_gate": (
        {"shared_intermediate_dim": SHARED, "shared_gate": True},
        {},
        "relu",
    ),
    "clipped_swiglu": ({"gated": True}, {}, "clipped_swiglu"),
    "all": (
        {
            "gated": True,
            "shared_intermediate_dim": SHARED,
            "shared_gate": True,
        },
        {"use_bias": True, "softmax": "after_top_k"},
        "clipped_swiglu",
    ),
}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_gradients_are_those_of_the_oracle(case, engine):
    settings, of_router, activation = CASES[case]
    layer = built(
        ku.MoEFeedForward(
            EXPERTS,
            HIDDEN,
            router(**of_router),
            activation=ClippedSwiGLU()
            if activation == "clipped_swiglu"
            else activation,
            dispatch=engine,
            **settings,
        )
    )
    rng = np.random.default_rng(3)
    # Some beyond the limits of 7.
    inputs = 3 * rng.normal(size=(2, 7, DIM)).astype("float32")
    cotangent = rng.normal(size=inputs.shape).astype("float32")
    mask = np.arange(7) < np.array([[4], [6]])
    outputs, found = gradients.of_layer(
        layer, inputs, cotangent, mask=mask, training=True
    )
    point = {
        v.path.split("/", 1)[1]: models.array(v).astype("float64")
        for v in layer.trainable_variables
    }
    softmax = of_router.get("softmax", "before_top_k")

    def outputs_at(weights):
        return expected(weights, inputs, mask, softmax, activation)

    scale = np.abs(outputs_at(point)).max()
    np.testing.assert_allclose(outputs, outputs_at(point), atol=3e-6 * scale)
    for name in point:
        direction = {name: rng.normal(size=point[name].shape)}
        slope = reference.slope(
            lambda at: np.sum(outputs_at(at) * cotangent), point, direction
        )
        np.testing.assert_allclose(
            np.sum(found[name] * direction[name]),
            slope,
            rtol=2e-4,
            atol=1e-4 * scale,
            err_msg=name,
        )
    again = ku.MoEFeedForward.from_config(layer.get_config())
    again.build((None, None, DIM))
    for source, target in zip(layer.weights, again.weights, strict=True):
        target.assign(source)
    np.testing.assert_array_equal(
        models.array(again(inputs, mask=ops.convert_to_tensor(mask))),
        models.array(layer(inputs, mask=ops.convert_to_tensor(mask))),
    )


@pytest.mark.one_backend
def test_one_expert_of_a_clipped_swiglu_is_stock_layers():
    layer = built(
        ku.MoEFeedForward(
            EXPERTS, HIDDEN, router(), activation=ClippedSwiGLU(), gated=True
        )
    )
    x = 3 * models.tokens(2, 4, DIM)
    one = ku.extract_expert(layer, 2)
    token = models.array(x)[1, 3].astype("float64")
    weights, _ = networks(
        {
            v.path.split("/", 1)[1]: models.array(v).astype("float64")
            for v in layer.trainable_variables
        }
    )
    np.testing.assert_allclose(
        models.array(one(x))[1, 3],
        reference.expert(token, weights, 2, "clipped_swiglu"),
        rtol=1e-5,
    )


@pytest.mark.one_backend
def test_fewer_experts_keep_their_logits_biases_and_the_gate():
    inputs = keras.Input((4, DIM))
    layer = ku.MoEFeedForward(
        EXPERTS,
        HIDDEN,
        router(use_bias=True),
        shared_intermediate_dim=SHARED,
        shared_gate=True,
        name="moe",
    )
    model = keras.Model(inputs, layer(inputs))
    built(layer)
    smaller, _ = ku.prune_experts(model, keep={"moe": [0, 3]})
    left = smaller.get_layer("moe")
    np.testing.assert_array_equal(
        models.array(left.router.logits_bias),
        models.array(layer.router.logits_bias)[[0, 3]],
    )
    np.testing.assert_array_equal(
        models.array(left.shared_gate.kernel),
        models.array(layer.shared_gate.kernel),
    )


@pytest.mark.one_backend
def test_a_gate_of_no_shared_network_is_refused():
    with pytest.raises(ValueError, match="shared_intermediate_dim=None"):
        ku.MoEFeedForward(EXPERTS, HIDDEN, shared_gate=True)


@pytest.mark.one_backend
def test_freezing_experts_freezes_the_gate():
    layer = built(
        ku.MoEFeedForward(
            EXPERTS,
            HIDDEN,
            shared_intermediate_dim=SHARED,
            shared_gate=True,
            trainable_experts=False,
        )
    )
    assert not layer.shared_gate.trainable
    assert [v.path.split("/", 1)[1] for v in layer.trainable_variables] == [
        "router/kernel"
    ]

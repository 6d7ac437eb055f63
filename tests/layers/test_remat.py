"""Rematerialisation: less is kept for the backward pass, nothing else differs.

Routing, losses, noise and dropout are the same by construction, so weights
after training are too.
"""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

WIDTH, HIDDEN, EXPERTS = 8, 64, 4


def noisy_top_2():
    return ku.TopKRouter(2, noise_stddev=0.1, z_loss=0.01)


def built(remat, scope=None, router=noisy_top_2, **settings):
    """A model with one mixture, the same from call to call."""
    keras.utils.set_random_seed(7)
    settings = {
        "router": router(),
        "dropout": 0.25,
        "output_dropout": 0.25,
        **settings,
    }
    inputs = keras.Input((None, WIDTH))
    with keras.RematScope(scope):
        mixture = ku.MoEFeedForward(EXPERTS, HIDDEN, remat=remat, **settings)
    return keras.Model(inputs, mixture(inputs))


def fitted(model, steps=2):
    """Losses and weights after a few steps of `fit`."""
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = models.tokens(4 * steps, 6, WIDTH)
    y = models.tokens(4 * steps, 6, WIDTH, seed=1)
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return history.history["loss"], trainable(model)


def trainable(model):
    return [models.array(v.value) for v in model.trainable_variables]


@pytest.mark.parametrize(
    "settings",
    [
        {"dispatch": "capacity"},
        {"dispatch": "dropless", "gated": True, "use_bias": False},
        {"dispatch": "dense"},
        {"router": ku.ExpertChoiceRouter, "gated": True},
    ],
    ids=lambda settings: settings.get("dispatch", "expert_choice"),
)
def test_training_is_the_same(settings):
    losses, weights = fitted(built(False, **settings))
    again, same = fitted(built(True, **settings))
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    start = trainable(built(False, **settings))
    for value, other, first in zip(weights, same, start, strict=True):
        np.testing.assert_allclose(other, value, atol=1e-6)
        assert np.any(value != first)


def test_inference_is_the_same():
    x = models.tokens(2, 6, WIDTH)
    np.testing.assert_array_equal(
        models.output(built(True), x), models.output(built(False), x)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"gated": True}], ids=["plain", "gated"]
)
def test_less_is_kept(settings):
    """By what the backend itself says that it keeps."""
    kept = {
        remat: _bytes_kept(built(remat, **settings).layers[-1])
        for remat in (False, True)
    }
    slots = 4 * 64 * 2 * HIDDEN  # bytes of the hidden layer's rows, undropped
    assert kept[True] <= kept[False] - slots


def _bytes_kept(layer):
    backend = keras.backend.backend()
    x = keras.ops.convert_to_tensor(models.tokens(4, 16, WIDTH))
    if backend == "jax":
        import jax

        frozen = [v.value for v in layer.non_trainable_variables]

        def loss(trainable, x):
            out, _ = layer.stateless_call(trainable, frozen, x, training=True)
            return keras.ops.sum(out)

        trainable = [v.value for v in layer.trainable_variables]
        _, pull_back = jax.vjp(loss, trainable, x)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    if backend == "torch":
        import torch

        sizes = []

        def keep(tensor):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            layer(x.requires_grad_(), training=True)
        return sum(sizes)
    pytest.skip("TensorFlow's tape does not say what it keeps")


@pytest.mark.parametrize("mode", ["full", "activations", "larger_than"])
def test_a_remat_scope_turns_it_on(mode):
    model = built(False, scope=mode)
    assert model.layers[-1].remat
    losses, weights = fitted(model)
    expected_losses, expected = fitted(built(True))
    np.testing.assert_array_equal(losses, expected_losses)
    for received, value in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(received, value)


@pytest.mark.one_backend
def test_a_scope_for_other_layers_leaves_it_off():
    with keras.RematScope("list_of_layers", layer_names=["another"]):
        assert not ku.MoEFeedForward(EXPERTS, HIDDEN).remat
    with keras.RematScope("list_of_layers", layer_names=["mine"]):
        assert ku.MoEFeedForward(EXPERTS, HIDDEN, name="mine").remat


def test_it_may_be_turned_on_later():
    model = built(False)
    model.layers[-1].remat = True
    losses, _ = fitted(model)
    np.testing.assert_array_equal(losses, fitted(built(True))[0])


@pytest.mark.thinned
@pytest.mark.parametrize("build", [models.vit_backbone, models.t5_backbone])
def test_upcycled_models_have_it_where_asked_and_keep_it(build, tmp_path):
    moe = ku.upcycle_model(build(), EXPERTS, remat=True)
    assert [layer.remat for layer in models.mixtures(moe)].count(False) == 0
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert all(layer.remat for layer in models.mixtures(again))
    plain = ku.upcycle_model(build(), EXPERTS)
    assert not any(layer.remat for layer in models.mixtures(plain))


@pytest.mark.one_backend
def test_an_upcycled_vit_trains_the_same():
    def trained(remat):
        keras.utils.set_random_seed(3)
        dense = models.vit_classifier()
        moe = ku.upcycle_model(dense, EXPERTS, seed=0, remat=remat)
        moe.compile("sgd", "sparse_categorical_crossentropy")
        moe.fit(models.images(), models.labels(), verbose=0)
        return trainable(moe)

    for value, expected in zip(trained(True), trained(False), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Only XLA on JAX shows its plan."
)
def test_a_deep_model_plans_for_less_memory():
    import jax

    def planned(remat):
        mixtures = [built(remat, dispatch="capacity") for _ in range(6)]
        weights = [[v.value for v in m.trainable_variables] for m in mixtures]
        others = [
            [v.value for v in m.non_trainable_variables] for m in mixtures
        ]

        def loss(weights, x):
            for mixture, own, other in zip(
                mixtures, weights, others, strict=True
            ):
                x, _ = mixture.stateless_call(own, other, x, training=True)
            return x.sum()

        program = jax.jit(jax.grad(loss)).lower(
            weights, models.tokens(8, 64, WIDTH)
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert planned(True) < 0.6 * planned(False)

"""Steps of training add up to nothing that a step should not know."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

ROUTERS = {
    "t5": {"decoder": ku.TopKRouter(top_k=2, capacity_factor=None)},
    "vit": ku.ExpertChoiceRouter(),
}


def learner(kind):
    """A sparse task without dropout, and a batch for it."""
    if kind == "vit":
        dense = models.vit_classifier(preprocessor=None)
        batch = (models.images(), models.labels())
    else:
        dense = models.t5_lm(models.t5_backbone(dropout=0.0))
        inputs = models.t5_inputs()
        batch = (inputs, inputs["decoder_token_ids"])
    moe = ku.upcycle_model(dense, 4, router=ROUTERS[kind], seed=0)
    moe.compile(
        optimizer=keras.optimizers.SGD(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return moe, batch


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_step_depends_on_weights_and_batch_alone(kind):
    moe, (x, y) = learner(kind)
    first = models.weights(moe)
    moe.fit(x, y, batch_size=len(y), verbose=0)
    once = models.weights(moe)
    moe.set_weights(first)
    moe.fit(x, y, batch_size=len(y), verbose=0)
    moved = 0.0
    for again, expected, before in zip(
        models.weights(moe), once, first, strict=True
    ):
        np.testing.assert_allclose(again, expected, atol=1e-6)
        moved = max(moved, np.max(np.abs(expected - before), initial=0.0))
    assert moved > 1e-4


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="only torch keeps gradients beside the weights",
)
def test_a_stock_task_on_torch_forgets_to_clear_gradients():
    """A reminder: drop `ClearsGradients` once Keras finds all parameters."""
    dense = models.t5_lm()
    known = {id(parameter) for parameter in dense.parameters()}
    missed = [v for v in dense.trainable_variables if id(v.value) not in known]
    assert missed


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="only torch keeps parameters beside the variables",
)
@pytest.mark.parametrize(
    "build",
    [
        models.vit_backbone,
        models.t5_backbone,
        models.vit_classifier,
        models.t5_lm,
    ],
)
def test_torch_finds_all_parameters_each_once(build):
    moe = ku.upcycle_model(build(), 2)
    named = list(moe.named_parameters())
    assert len({name for name, _ in named}) == len(named)
    training = [id(p) for _, p in named if p.requires_grad]
    assert len(set(training)) == len(training)
    assert set(training) == {id(v.value) for v in moe.trainable_variables}
    ku.freeze(moe, "dense")
    trains = {id(p) for p in moe.parameters() if p.requires_grad}
    assert trains == {id(v.value) for v in moe.trainable_variables}

"""A frozen part stays as it is; the rest trains as if nothing were frozen."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import keras_internals

EXPERTS = 3


def upcycled(build=models.dense_pairs, **kwargs):
    router = ku.TopKRouter(top_k=2, load_balance_loss=0.0)
    return models.set_routers(
        ku.upcycle_model(build(), EXPERTS, router=router, **kwargs)
    )


def parts(model):
    """Ids of the variables of each part that can be trained."""
    mixtures = models.mixtures(model)
    router = [v for layer in mixtures for v in layer.router.weights]
    experts = [v for layer in mixtures for v in layer.experts.weights]
    known = {id(v) for v in [*router, *experts]}
    dense = [
        v
        for layer in keras_internals.all_layers(model)
        for v in keras_internals.made_to_train(layer)
        if id(v) not in known
    ]
    return {"router": ids(router), "experts": ids(experts), "dense": ids(dense)}


def ids(variables):
    return {id(v) for v in variables}


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


@pytest.mark.thinned
@pytest.mark.parametrize(
    "build",
    [
        models.vit_classifier,
        models.transfer_model,
        models.dense_pairs,
        models.sequential,
        models.t5_lm,
    ],
)
def test_each_part_is_frozen_and_unfrozen_alone(build):
    moe = upcycled(build)
    of_part = parts(moe)
    everything = ids(moe.trainable_variables)
    assert set.union(*of_part.values()) == everything
    for part, own in of_part.items():
        wanted = count(v for v in moe.weights if id(v) in own)
        assert ku.freeze(moe, part) == wanted > 0
        assert ids(moe.trainable_variables) == everything - own
        assert ku.freeze(moe, part) == 0
        assert ku.unfreeze(moe, part) == wanted
        assert ids(moe.trainable_variables) == everything
        assert ku.unfreeze(moe, part) == 0


@pytest.mark.thinned
@pytest.mark.parametrize("build", [models.vit_classifier, models.dense_pairs])
def test_of_a_frozen_model_only_what_is_asked_for_trains(build):
    moe = upcycled(build)
    of_part = parts(moe)
    moe.trainable = False
    ku.unfreeze(moe, "router")
    assert ids(moe.trainable_variables) == of_part["router"]
    ku.unfreeze(moe, ["experts", "dense"])
    assert ids(moe.trainable_variables) == set.union(*of_part.values())


@pytest.mark.one_backend
def test_what_was_frozen_by_hand_stays_so():
    moe = upcycled()
    moe.get_layer("head").trainable = False
    head = ids(moe.get_layer("head").weights)
    everything = ids(moe.trainable_variables)
    ku.freeze(moe, "experts")
    ku.unfreeze(moe, "experts")
    assert ids(moe.trainable_variables) == everything
    assert not head & everything
    ku.unfreeze(moe, "dense")
    assert head <= ids(moe.trainable_variables)


@pytest.mark.one_backend
def test_of_a_model_loaded_frozen_only_what_is_asked_for_trains(tmp_path):
    moe = upcycled()
    moe.trainable = False
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert again.trainable_variables == []
    ku.unfreeze(again, "experts")
    assert ids(again.trainable_variables) == parts(again)["experts"]


@pytest.mark.one_backend
def test_base_kernels_under_lora_stay_frozen():
    moe = upcycled(models.vit_backbone)
    moe.enable_lora(2, ["expert_up", "expert_down"])
    names = sorted(v.name for v in moe.trainable_variables)
    ku.freeze(moe, "experts")
    ku.unfreeze(moe, "experts")
    assert sorted(v.name for v in moe.trainable_variables) == names
    experts = models.mixtures(moe)[0].experts
    assert not keras_internals.own_variables(experts.expert_up)[0].trainable


def train(model, optimizer, steps=3):
    quick = "auto" if keras.backend.backend() == "jax" else False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=quick)
    x, y = models.tokens(4 * steps, models.WIDTH), models.labels(4 * steps)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return {v.path: models.array(v.value) for v in model.weights}


@pytest.mark.parametrize("part", ["router", "experts", "dense"])
def test_one_step_moves_the_rest_as_if_nothing_were_frozen(part):
    """So the gradients of the rest are the same; after one step, all may."""
    frozen = models.fixed(upcycled())
    start = {v.path: models.array(v.value) for v in frozen.weights}
    ku.freeze(frozen, part)
    own = parts(frozen)[part]
    still = {v.path for v in frozen.weights if id(v) in own}
    found = train(frozen, keras.optimizers.SGD(0.1), steps=1)
    plain = models.fixed(upcycled())
    expected = train(plain, keras.optimizers.SGD(0.1), steps=1)
    for path, value in found.items():
        wanted = start[path] if path in still else expected[path]
        np.testing.assert_allclose(value, wanted, atol=1e-6)
        assert path in still or np.any(value != start[path])
        if path in still:
            np.testing.assert_array_equal(value, wanted)


@pytest.mark.one_backend
def test_a_trained_model_asks_to_be_compiled_again():
    moe = upcycled()
    before = train(moe, "sgd", steps=1)
    x, y = models.tokens(4, models.WIDTH), models.labels()
    ku.freeze(moe, "router")
    with pytest.raises(ValueError, match=r"call `compile\(\)`"):
        moe.fit(x, y, verbose=0)
    after = train(moe, "sgd", steps=1)
    kernel = models.mixtures(moe)[0].router.kernel.path
    np.testing.assert_array_equal(after[kernel], before[kernel])
    assert np.any(after["head/kernel"] != before["head/kernel"])
    ku.freeze(moe, "router")  # changes nothing
    moe.fit(x, y, verbose=0)


@pytest.mark.one_backend
def test_a_model_that_is_only_compiled_need_not_be_again():
    moe = upcycled()
    moe.compile("sgd", "mse", jit_compile=False)
    kernel = models.mixtures(moe)[0].router.kernel
    before = models.array(kernel.value)
    ku.freeze(moe, "router")
    x, y = models.tokens(4, models.WIDTH), models.tokens(4, models.CLASSES)
    moe.fit(x, y, verbose=0)
    np.testing.assert_array_equal(models.array(kernel.value), before)


def by_name(model):
    """What trains, by the ends of paths, which a file keeps."""
    return sorted(
        "/".join(v.path.split("/")[-3:])
        for layer in models.mixtures(model)
        for v in layer.weights
        if v.trainable
    )


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("build", "part"),
    [
        (models.dense_pairs, "router"),
        (models.dense_pairs, "experts"),
        (models.vit_classifier, "router"),
        (models.vit_classifier, "experts"),
        (models.t5_backbone, "experts"),
    ],
)
def test_files_remember_frozen_routers_and_experts(build, part, tmp_path):
    moe = upcycled(build)
    ku.freeze(moe, part)
    assert (
        0
        < len(by_name(moe))
        < sum(len(layer.weights) for layer in models.mixtures(moe))
    )
    moe.save(tmp_path / "moe.keras")
    again = keras.saving.load_model(tmp_path / "moe.keras")
    assert by_name(again) == by_name(moe)
    ku.unfreeze(again, part)
    ku.unfreeze(moe, part)
    assert by_name(again) == by_name(moe)


@pytest.mark.thinned
@pytest.mark.parametrize("build", [models.vit_backbone, models.t5_backbone])
def test_a_frozen_backbone_comes_back_frozen_in_all_its_parts(build):
    """KerasHub's own ViT forgets that: the flag would not reach its blocks."""
    moe = upcycled(build)
    moe.trainable = False
    again = type(moe).from_config(moe.get_config())
    assert not any(v.trainable for v in again.weights)


@pytest.mark.one_backend
def test_a_layer_made_frozen_is_frozen_in_all_its_parts():
    layer = ku.MoEFeedForward(EXPERTS, models.HIDDEN, trainable=False)
    layer.build((None, models.WIDTH))
    assert not any(v.trainable for v in layer.weights)
    assert not layer.router.trainable
    assert not layer.experts.trainable


@pytest.mark.one_backend
def test_bad_input_is_named():
    moe = upcycled()
    with pytest.raises(ValueError, match="Received: part='routers'"):
        ku.freeze(moe, "routers")
    with pytest.raises(ValueError, match=r"one of \['router', 'experts'"):
        ku.unfreeze(moe, ["experts", "norms"])
    assert len(moe.trainable_variables) == len(moe.weights)
    with pytest.raises(ku.UpcycleError, match="'pairs' with none"):
        ku.freeze(models.dense_pairs(), "router")
    with pytest.raises(TypeError, match="Received: model='moe' of type str"):
        ku.freeze("moe", "router")

"""A deeper dense model: which block stands where, and what it computes."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku

ORDERS = {"interleaved": [0, 1, 0, 1], "blocked": [0, 0, 1, 1]}
every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.mark.thinned
@every_order
def test_a_vit_of_twice_the_depth(order):
    dense = models.randomized(models.vit_backbone())
    before = models.weights(dense)
    deep = ku.tile_depth(dense, 2, order=order)
    assert type(deep) is type(dense)
    assert deep.num_layers == 4
    images = models.images()
    # The blocks of the shallow model, one after the other by hand.
    embed = keras.Model(dense.input, dense.layers[1].output)
    encoder = dense.get_layer("vit_encoder")
    x = embed(images)
    for number in ORDERS[order]:
        x = encoder.encoder_layers[number](x)
    expected = models.array(encoder.layer_norm(x))
    np.testing.assert_allclose(models.array(deep(images)), expected, atol=1e-5)
    models.assert_same_weights(dense, before)


@pytest.mark.one_backend
@every_order
def test_a_t5_of_twice_the_depth(order):
    dense = models.randomized(models.t5_backbone())
    deep = ku.tile_depth(dense, 2, order=order)
    assert deep.num_layers == 4
    for stack in ("encoder_transformer_layers", "decoder_transformer_layers"):
        old, new = getattr(dense, stack), getattr(deep, stack)
        assert len(new) == 4
        for number, source in enumerate(ORDERS[order]):
            for part in ("input_projector", "gate_projector"):
                np.testing.assert_array_equal(
                    models.array(getattr(new[number], part).kernel),
                    models.array(getattr(old[source], part).kernel),
                )
            np.testing.assert_array_equal(
                models.array(new[number].self_attention.query_projector.kernel),
                models.array(old[source].self_attention.query_projector.kernel),
            )
        bias = new[0].self_attention.relative_attention_bias
        np.testing.assert_array_equal(
            models.array(bias),
            models.array(old[0].self_attention.relative_attention_bias),
        )
    assert np.isfinite(models.output(deep, models.t5_inputs())[0]).all()


@pytest.mark.one_backend
def test_once_is_a_copy():
    for dense, inputs in (
        (models.vit_classifier(), models.images()),
        (models.t5_lm(), models.t5_inputs()),
    ):
        again = ku.tile_depth(dense, 1)
        assert type(again) is type(dense)
        models.assert_same_weights(again, dense)
        np.testing.assert_allclose(
            models.array(again(inputs)), models.array(dense(inputs)), atol=1e-6
        )


def test_a_task_keeps_its_head_and_trains_apart_from_the_dense_one():
    dense = models.vit_classifier()
    dense.compile("sgd", "sparse_categorical_crossentropy")
    deep = ku.tile_depth(dense, 2)
    before = models.weights(dense)
    np.testing.assert_array_equal(
        models.array(deep.output_dense.kernel),
        models.array(dense.output_dense.kernel),
    )
    deep.fit(models.images(), models.labels(), verbose=0)
    models.assert_same_weights(dense, before)
    assert isinstance(deep.optimizer, keras.optimizers.SGD)


@pytest.mark.one_backend
def test_frozen_blocks_stay_frozen():
    dense = models.vit_backbone()
    dense.get_layer("vit_encoder").encoder_layers[1].trainable = False
    deep = ku.tile_depth(dense, 2)
    blocks = deep.get_layer("vit_encoder").encoder_layers
    assert [b.trainable for b in blocks] == [True, False, True, False]
    assert not blocks[3].trainable_variables


def test_the_deeper_model_is_upcycled():
    deep = ku.tile_depth(models.vit_backbone(), 2)
    assert len(models.mixtures(ku.upcycle_model(deep, 2))) == 2


@pytest.mark.one_backend
def test_refusals():
    dense = models.vit_backbone()
    with pytest.raises(ValueError, match="`times` must be at least 1"):
        ku.tile_depth(dense, 0)
    with pytest.raises(ValueError, match=r"`order`.*'interleaved'.*'abab'"):
        ku.tile_depth(dense, 2, order="abab")
    moe = ku.upcycle_model(dense, 2)
    with pytest.raises(ku.UpcycleError, match="Tile the dense model"):
        ku.tile_depth(moe, 2)
    pairs = models.dense_pairs()
    with pytest.raises(
        ku.UpcycleError, match=r"'pairs'.*deeper model yourself"
    ):
        ku.tile_depth(pairs, 2)


@pytest.mark.one_backend
def test_what_the_optimizer_was_told_of_a_block_holds_for_its_copies():
    dense = models.vit_backbone()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    kernel = dense.get_layer("vit_encoder").encoder_layers[1].mlp.dense_1.kernel
    optimizer.exclude_from_weight_decay(var_list=[kernel])
    dense.compile(optimizer, "mse")
    deep = ku.tile_depth(dense, 2)
    assert deep.optimizer is not optimizer
    decays = [
        deep.optimizer._use_weight_decay(block.mlp.dense_1.kernel)
        for block in deep.get_layer("vit_encoder").encoder_layers
    ]
    assert decays == [True, False, True, False]

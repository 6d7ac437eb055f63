"""A ViT task is exported to a SavedModel that serves any batch size."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="KerasHub's dense ViT cannot be exported on torch either",
)


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_a_saved_model_serves_any_batch_size(router, tmp_path):
    import tensorflow as tf

    moe = models.fixed(
        keras_upcycle.upcycle_model(models.vit_classifier(), 4, router=router)
    )
    path = str(tmp_path / "served")
    moe.export(path, format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(path)
    for batch in (1, 3):
        images = models.images(batch)
        received = np.asarray(served.serve(images))
        expected = models.output(moe, images)
        assert received.shape == (batch, models.CLASSES)
        np.testing.assert_allclose(received, expected, atol=1e-5, rtol=1e-5)

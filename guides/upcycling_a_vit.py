"""
Title: Upcycling a Vision Transformer
Author: keras_upcycle contributors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Turn a trained dense ViT into a mixture of experts and train on.
Accelerator: None
"""

"""
## Introduction

A dense Transformer spends the same weights on every token. A mixture of
experts holds several feed-forward networks in a block and sends each token to
a few of them: more parameters at almost the same cost for a token.

*Sparse Upcycling* ([Komatsuzaki et al.,
2022](https://arxiv.org/abs/2212.05055)) does not train such a model from
scratch. It takes a dense model that is trained already, puts copies of a
block's feed-forward network in its place, adds a router, and trains on. The
training that the dense model has had is not lost.

This guide does so with a small ViT from KerasHub: it finds the feed-forward
blocks, estimates the cost, converts the model, checks the result, trains it
with `fit`, saves it and loads it again. Last, it looks at the two choices to
make: the router and the layers.
"""

"""
## Setup

`keras_upcycle` is imported first: it chooses the JAX backend if
`KERAS_BACKEND` is not set and JAX is there.
"""

import keras_upcycle

# isort: split
import os
import tempfile

import keras
import keras_hub
import numpy as np

IMAGE_SIZE = 16
NUM_CLASSES = 8
TRAIN_IMAGES = 2048
TEST_IMAGES = 512
NOISE = 1.0
WIDTH = 32
NUM_BLOCKS = 4
NUM_EXPERTS = 8
DENSE_EPOCHS = 6
MORE_EPOCHS = 3
BATCH_SIZE = 64

keras.utils.set_random_seed(0)

"""
## Data

To need no download, the images are made here: stripes in much noise. The class
is the direction of the stripes.
"""


def make_images(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=count)
    angles = (np.pi * labels / NUM_CLASSES)[:, None, None]
    phases = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    along = columns * np.cos(angles) + rows * np.sin(angles)
    images = np.sin(along + phases)
    images = images + NOISE * rng.normal(size=images.shape)
    return images[..., None].astype("float32"), labels.astype("int32")


x_train, y_train = make_images(TRAIN_IMAGES, seed=1)
x_test, y_test = make_images(TEST_IMAGES, seed=2)

"""
## A dense model

A ViT classifier as KerasHub makes it. Yours would come from
`keras_hub.models.ViTImageClassifier.from_preset`, or from a training run.
(KerasHub's tasks keep arrays in their order; `shuffle=False` says what happens
anyway.)
"""

dense = keras_hub.models.ViTImageClassifier(
    keras_hub.models.ViTBackbone(
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1),
        patch_size=4,
        num_layers=NUM_BLOCKS,
        num_heads=4,
        hidden_dim=WIDTH,
        mlp_dim=2 * WIDTH,
        use_class_token=False,
    ),
    num_classes=NUM_CLASSES,
    pooling="gap",
)
dense.compile(
    optimizer=keras.optimizers.Adam(1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
dense.fit(
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=DENSE_EPOCHS,
    validation_data=(x_test, y_test),
    shuffle=False,
    verbose=2,
)

"""
## What can be converted

`find_feed_forwards` lists the feed-forward blocks. With `explain=True` it also
prints every candidate and why it was taken or turned down, which helps with a
model of your own.
"""

sites = keras_upcycle.find_feed_forwards(dense, explain=True)

"""
## What it will cost

`estimate_upcycle` takes `router`, `layers`, `expert_init` and `recipe` as the
conversion does, and builds nothing. The parameters in memory grow with the
number of experts. The arithmetic for a token does not, though reading more
kernels takes time. Gradients, as large as the weights that train, and
activations come on top of the memory that it names.
"""

print(keras_upcycle.estimate_upcycle(dense, NUM_EXPERTS))

"""
## The conversion

The result is a classifier of the same kind, with the same head. By default the
last half of the blocks becomes sparse, as in the paper. The dense model is not
changed and shares no weights with the result. As it was compiled, so is the
result, with a new optimizer of the same settings.
"""

sparse = keras_upcycle.upcycle_model(dense, NUM_EXPERTS, seed=0)
print(
    f"{dense.count_params():,} parameters became {sparse.count_params():,}; "
    "still a ViTImageClassifier: "
    f"{isinstance(sparse, keras_hub.models.ViTImageClassifier)}"
)

"""
## Checking the result

Before any training every expert is the block it came from, so a token that
meets an expert gets what the dense model gave it. `verify_upcycle` measures
that, block by block, and says how many tokens met no expert.

The default router for a ViT is *Expert Choice*: each expert picks its tokens,
and a token that nobody picks goes by on the residual branch alone. That is
where the two models differ at first.
"""

report = keras_upcycle.verify_upcycle(
    dense, sparse, keras.ops.convert_to_tensor(x_test[:64])
)
print(report)

"""
## Training on

Nothing new: `fit`. Auxiliary losses, where a router has one, are added by its
layer.
"""

print("Before:", sparse.evaluate(x_test, y_test, verbose=0, return_dict=True))
sparse.fit(
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=MORE_EPOCHS,
    validation_data=(x_test, y_test),
    shuffle=False,
    verbose=2,
)

"""
Is it better than the dense model? Compare it with the dense model trained on
at the same cost, not with the one it started from: more training alone would
have helped. And expect a gain only where the dense model is near its plateau
and there are data to fill the new parameters. `examples/vit_cifar10.py` makes
that comparison.

## Saving and loading

A sparse model is saved like any Keras model. Wherever it is loaded,
`keras_upcycle` must be imported first, which makes its layers known.
"""

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "sparse.keras")
    sparse.save(path)
    loaded = keras.models.load_model(path, compile=False)

outputs = [
    keras.ops.convert_to_numpy(model(x_test[:64], training=False))
    for model in (sparse, loaded)
]
print("Largest difference:", float(np.max(np.abs(outputs[0] - outputs[1]))))

"""
## Choosing the router

Two routers come with the package:

- `ExpertChoiceRouter`: each expert picks its tokens, so all experts have the
  same load. For images and for encoders. A larger `capacity_factor` leaves
  fewer tokens without an expert and costs more.
- `TopKRouter`: each token picks its experts. For decoders, and wherever a
  prediction must not depend on the other tokens. No token is left out at
  inference, so the sparse model computes at first what the dense one computes.
  A load-balancing loss keeps the experts busy.

A router's settings are those of the whole conversion; each block gets a copy.
"""

candidates = {
    f"Expert Choice, capacity_factor={factor}": (
        keras_upcycle.ExpertChoiceRouter(capacity_factor=factor)
    )
    for factor in (1.0, 2.0, 3.0)
}
candidates["Top-K, top_k=2"] = keras_upcycle.TopKRouter(top_k=2)

for name, router in candidates.items():
    candidate = keras_upcycle.upcycle_model(
        dense, NUM_EXPERTS, router=router, seed=0
    )
    report = keras_upcycle.verify_upcycle(
        dense, candidate, keras.ops.convert_to_tensor(x_test[:64])
    )
    unrouted = max(layer.unrouted_fraction for layer in report.layers)
    print(
        f"{name}: {unrouted:.1%} unrouted in one block, relative difference "
        f"{report.relative_difference:.1e}"
    )

"""
## Choosing the layers

`layers` is `"last_half"`, `"every_other"`, `"all"`, `"all_but_first"`, a list
of block numbers (negative ones count from the end), or a function of a
`FeedForwardSite`. No default converts the first block, since the paper found
that it tends to be problematic; ask for it, with `"all"` or by its number, and
you get it with a warning.
"""

for layers in ("last_half", "every_other", [-1]):
    estimate = keras_upcycle.estimate_upcycle(dense, NUM_EXPERTS, layers=layers)
    ratio = estimate.flops_ratio
    print(
        f"layers={layers!r}: {len(estimate.layers)} blocks, "
        f"{estimate.total_params:,} parameters, {ratio:.2f} times the cost"
    )

"""
## What next

- `examples/vit_cifar10.py` compares dense and sparse training at equal
  compute.
- `keras-upcycle demo` does so in minutes, with scikit-learn's digits.
- `MoEFeedForward` is a layer like any other, for models built sparse from the
  start.
- `register_family` teaches the conversion a model it does not know.
"""

"""
Title: Watching and tuning an upcycled model
Author: keras_upcycle contributors
Date created: 2026/11/25
Last modified: 2026/11/25
Description: See what the routers do while `fit` runs, and what to do about it.
Accelerator: None
"""

"""
## Introduction

A mixture of experts can train badly without saying so. The loss falls, and
yet one expert does all the work, tokens find their experts full and are left
out, or all experts stay the same. `RouterMonitor` is a callback of `fit` that
counts what the routers do inside the compiled training step, and says in words
when something is wrong.

This guide trains a small sparse ViT with it, reads what it says, breaks the
routers on purpose, and goes through what helps: losses, balancing without a
loss, learning rates of their own for routers and experts, freezing.
"""

"""
## Setup
"""

import keras_upcycle as ku

# isort: split
import os
import tempfile
import warnings

import keras
import keras_hub
import numpy as np

IMAGE_SIZE = 16
NUM_CLASSES = 8
TRAIN_IMAGES = 2048
WIDTH = 32
NUM_BLOCKS = 4
NUM_EXPERTS = 8
DENSE_EPOCHS = 4
MORE_EPOCHS = 3
BATCH_SIZE = 64
READ_EVERY = 4

keras.utils.set_random_seed(0)
folder = tempfile.mkdtemp()

"""
## Data and a dense model

Stripes in noise; the class is their direction.
"""


def make_images(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=count)
    angles = (np.pi * labels / NUM_CLASSES)[:, None, None]
    phases = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    along = columns * np.cos(angles) + rows * np.sin(angles)
    images = np.sin(along + phases)
    images = images + rng.normal(size=images.shape)
    return images[..., None].astype("float32"), labels.astype("int32")


images, labels = make_images(TRAIN_IMAGES, seed=1)

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


def compiled(model, optimizer=None):
    model.compile(
        optimizer=optimizer or keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def train(model, epochs, callbacks=()):
    return model.fit(
        images,
        labels,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        shuffle=False,
        verbose=2,
        callbacks=list(callbacks),
    )


train(compiled(dense), DENSE_EPOCHS)

"""
## Train with a monitor

At the end of each epoch the logs hold a few numbers that begin with `moe_`.
Every loss of the routers is among them, so that the share of `loss` which is
not the task's can be seen (`moe_loss`). With `dense` and `inputs` it also
compares the two models before the first step, and with `log` it keeps every
reading in a CSV file, block by block; `keras-upcycle report` prints it.
"""

router = ku.TopKRouter(top_k=2, z_loss=1e-3)
moe = ku.upcycle_model(dense, NUM_EXPERTS, router=router, seed=0)
monitor = ku.RouterMonitor(
    every=READ_EVERY,
    log=os.path.join(folder, "routers.csv"),
    dense=dense,
    inputs=images[:16],
)
history = train(compiled(moe), MORE_EPOCHS, [monitor]).history
print(monitor.step_0)
print(f"Part of the loss that routers added: {history['moe_loss'][-1]:.4f}")

"""
`print(monitor)` is a table of the latest reading of every block:

* **busiest**: load of the busiest expert, as a multiple of a fair share. 1 is
  balance; with Top-K anything below 1.5 is fine.
* **dead**: experts that processed nothing.
* **dropped**: assignments that found their expert full. In training Top-K has
  a `capacity_factor` of 1.25; some drops are normal at the start.
* **unrouted**: tokens that no expert processed.
* **entropy**: 1 is a router that does not care, 0 one that is sure. It starts
  near 1 and should fall slowly.
"""

print(monitor)

"""
## Pictures

How the load moved, and which experts process which class. Experts of an
upcycled model start equal, so the second picture starts without structure;
what structure there is later, the router has learned.
"""

ku.plot_expert_load(monitor.readings, os.path.join(folder, "load.png"))
shares = ku.expert_assignments(moe, images[:256], labels[:256])
ku.plot_expert_assignments(shares, os.path.join(folder, "classes.png"))
for name, share in shares.items():
    print(f"{name}: at most {np.nanmax(share):.0%} of a class at one expert")

"""
## When it goes wrong

Here is a router that only ever wants two experts, and no loss that would stop
it. The monitor says so.
"""


def lopsided(shape, dtype=None):
    # One direction decides, for the first expert or for the second.
    direction = 10 * np.random.default_rng(0).normal(size=(shape[0], 1))
    liking = np.zeros((1, shape[1]))
    liking[0, :2] = 1, -1
    return keras.ops.convert_to_tensor(direction * liking, "float32")


def trained_with(router, optimizer=None):
    model = ku.upcycle_model(dense, NUM_EXPERTS, router=router, seed=0)
    watching = ku.RouterMonitor(every=READ_EVERY)
    compiled(model, optimizer and optimizer(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(model, MORE_EPOCHS, [watching]).history
    told = [str(w.message) for w in caught if "xpert" in str(w.message)]
    return history, told


broken = {"top_k": 1, "normalize": False, "kernel_initializer": lopsided}
history, told = trained_with(ku.TopKRouter(**broken, load_balance_loss=0.0))
print(f"Busiest expert: {history['moe_max_load'][-1]:.1f} x a fair share")
for text in told:
    print(f"Told: {text}")

"""
## What helps

**A load-balancing loss** is on by default for Top-K (0.01). Its value in the
logs, `moe_load_balance`, is 1 where all experts have equal shares. `importance`
and `load` are V-MoE's two losses for the same end.

**Balancing without a loss** (`bias_update_rate`) adds a number to each expert's
score that rises while the expert has too little to do. It puts no gradient
beside the task's.

**Expert Choice** is balanced by design; it is the default for a ViT and for
T5's encoder, and no choice for a causal decoder.
"""

remedies = {
    "load-balancing loss of 0.1": ku.TopKRouter(
        **broken, load_balance_loss=0.1
    ),
    "bias_update_rate of 0.01": ku.TopKRouter(
        **broken, load_balance_loss=0.0, bias_update_rate=0.01
    ),
    "Expert Choice": ku.ExpertChoiceRouter(kernel_initializer=lopsided),
}
for name, router in remedies.items():
    history, _ = trained_with(router)
    print(
        f"{name}: busiest {history['moe_max_load'][-1]:.1f} x, "
        f"{history['moe_dead_experts'][-1]:.0f} dead, "
        f"loss {history['loss'][-1] - history.get('moe_loss', [0])[-1]:.3f}"
    )

"""
## Learning rates of their own, and freezing

`scale_learning_rate` gives parts of a model another learning rate, by regular
expressions on the paths of weights. It scales the update; scaling the gradient
(`scale_gradients`) does nothing to Adam, which divides by its size.

`freeze` and `unfreeze` keep a part from training: `"router"`, `"experts"`, or
`"dense"`, which is all the rest. Compile after it.
"""

slow_routers, _ = trained_with(
    ku.TopKRouter(top_k=2),
    lambda model: ku.scale_learning_rate(
        keras.optimizers.Adam(1e-3), {"router/kernel": 0.1}
    ),
)
print(f"Slow routers: entropy {slow_routers['moe_entropy'][-1]:.3f}")

ku.freeze(moe, "dense")
print(f"Trainable with the rest frozen: {len(moe.trainable_variables)} weights")

"""
## The largest difference

A monitor changes nothing in the model, and nothing of it is in a file.
"""

path = os.path.join(folder, "moe.keras")
moe.save(path)
loaded = keras.models.load_model(path, compile=False)
difference = np.max(
    np.abs(
        keras.ops.convert_to_numpy(loaded(images[:16]))
        - keras.ops.convert_to_numpy(moe(images[:16]))
    )
)
print(f"Largest difference: {difference}")

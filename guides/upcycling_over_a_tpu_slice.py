"""
Title: Upcycling over a TPU slice
Author: keras_upcycle contributors
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Spread the experts of a mixture over several devices.
Accelerator: None
"""

"""
## Introduction

Eight experts of a 7B model fit on no single device. *Expert parallelism*
([GShard](https://arxiv.org/abs/2006.16668), section 3) gives each device some
of the experts and a share of the batch: tokens travel to their experts and
back, kernels stay where they are.

`ku.distribution.ExpertParallel` does it for Keras on JAX. It is one call before
the model is made; conversion, `fit`, files and generation are those of one
device, and so are the numbers. This guide runs on eight virtual devices of a
CPU, as it is. On a TPU slice or several GPUs, leave out the two lines that make
them.
"""

"""
## Setup

The virtual devices must be asked for before JAX starts.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import keras_upcycle as ku

# isort: split
import tempfile
from pathlib import Path

import keras
import keras_hub
import numpy as np

VOCABULARY = 64
LENGTH = 32
WIDTH = 32
NUM_EXPERTS = 8
BATCH_SIZE = 64
DENSE_EPOCHS = 4
MORE_EPOCHS = 2
EXAMPLES = 1024

"""
## What fits where

`estimate_upcycle` says what a device would hold and send, for every way to lay
out so many devices, before anything is built. It needs no device, and no
weights: of a function that makes the model, only shapes are made.
"""


def llama_7b():
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32000,
        num_layers=32,
        num_query_heads=32,
        num_key_value_heads=32,
        hidden_dim=4096,
        intermediate_dim=11008,
    )


estimate = ku.estimate_upcycle(
    llama_7b, NUM_EXPERTS, mesh=64, tokens_per_device=2048, shard_dense=True
)
for mesh in estimate.meshes:
    print(
        f"data {mesh.data_devices} x expert {mesh.expert_devices}: "
        f"{mesh.bytes_per_device / 2**30:.0f} GiB a device, "
        f"{mesh.sent_bytes / 2**30:.0f} GiB sent a step"
    )

"""
The same is `keras-upcycle inspect MODEL --devices 64 --tokens-per-device 2048`.

## A mesh, and a distribution

A mesh gives the devices names: here two rows of four. Experts are spread over
the axis `"expert"`, two on each device; the examples of a batch over both axes.
The distribution must be set before the model, and its optimizer, are made.
"""

mesh = keras.distribution.DeviceMesh(
    (2, 4), ["data", "expert"], keras.distribution.list_devices()
)
distribution = ku.distribution.ExpertParallel(mesh)
keras.distribution.set_distribution(distribution)

"""
## A dense model

A small Llama that learns to count upwards from any number.
"""

keras.utils.set_random_seed(0)
dense = keras_hub.models.LlamaCausalLM(
    keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
    )
)
first = np.random.default_rng(0).integers(0, VOCABULARY, (EXAMPLES, 1))
ids = ((first + np.arange(LENGTH + 1)) % VOCABULARY).astype("int32")
x = {
    "token_ids": ids[:, :-1],
    "padding_mask": np.ones((EXAMPLES, LENGTH), "int32"),
}
y = ids[:, 1:]
dense.compile(
    keras.optimizers.Adam(3e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
# A batch is a multiple of the eight devices that share it.
dense.fit(x, y, batch_size=BATCH_SIZE, epochs=DENSE_EPOCHS, verbose=2)

"""
## Conversion on the mesh

Nothing else changes. Each expert is made on the devices that will hold it: no
device, and not the host, ever has all of them.
"""

moe = ku.upcycle_model(dense, NUM_EXPERTS, layers="all")
optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
moe.compile(
    optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
)

kernel = moe.backbone.transformer_layers[0]._feedforward_gate_dense
kernel = kernel.experts.expert_up.kernel
shard = kernel.value.addressable_shards[0].data
print(f"A kernel of shape {tuple(kernel.shape)} lies as {shard.shape}.")

"""
It starts as the dense model, and trains on.
"""

some = {name: value[:8] for name, value in x.items()}
report = ku.verify_upcycle(dense, moe, some)
print(f"Largest difference at the start: {report.max_difference:.1e}")

moe.fit(x, y, batch_size=BATCH_SIZE, epochs=MORE_EPOCHS, verbose=2)

"""
## Files

A file says nothing of the mesh: what eight devices saved, one loads.
"""

spread = keras.Model.predict(moe, some, verbose=0)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "moe.weights.h5"
    moe.save_weights(path)
    keras.distribution.set_distribution(None)
    alone = ku.upcycle_model(dense, NUM_EXPERTS, layers="all")
    alone.load_weights(path)
single = keras.Model.predict(alone, some, verbose=0)
gap = float(np.abs(spread - single).max())
print(f"Eight devices and one differ by {gap:.1e}.")

"""
## Several processes

On a slice of several hosts one process runs on each. Three things differ.

*Start.* `keras.distribution.initialize()` before the mesh is made;
`list_devices()` then lists the devices of all hosts.

*Data.* Keras splits a `tf.data.Dataset` among processes. Anything else makes
its own part: `ExpertParallel(mesh, auto_shard_dataset=False)`, and a
`keras.utils.PyDataset` whose batch is this process's slice of the whole one.

```python
class OwnPart(keras.utils.PyDataset):
    def __getitem__(self, index):
        x, y = whole_batch(index)  # the same on every process
        own = len(y) // jax.process_count()
        start = jax.process_index() * own
        return x[start:start + own], y[start:start + own]
```

*Checkpoints.* `model.save` needs a process that has all of the model.
`keras.callbacks.OrbaxCheckpoint` lets each process write its own part, and
`ku.distribution.load_checkpoint` restores it, onto another mesh if need be; it
checks the three conditions that Orbax is silent about.

What T5 XL and Llama 7B need on named hardware is worked out in
[`guides/meshes.md`](meshes.md).

## What to know

* A batch must be a multiple of the devices that share it, the last one too:
  `drop_remainder=True`.
* `TopKRouter(group="batch")`, the default of causal models, takes the tokens of
  one device for a group, so which tokens are *dropped* in training depends on
  the mesh. An integer as `group`, a number of examples, does not.
* At inference nothing is dropped: tokens are gathered by the devices that share
  experts, and their results scattered back. A causal model stays causal.
* `shard_dense=True` cuts what is no expert as well, for more exchange.
  `layout_map=` takes a KerasHub backbone's own `get_layout_map(mesh)`, for
  tensor parallelism in the dense part.
* On TensorFlow `tf.distribute.MirroredStrategy` works as for any Keras model:
  each replica routes and balances its own examples. On torch wrap the model in
  `DistributedDataParallel` once it has met a batch, and train in a loop of your
  own, with `sum(moe.losses)` added to the loss. Neither spreads experts.
"""

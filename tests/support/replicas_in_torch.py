"""torch's `DistributedDataParallel` over two processes; run as a script.

`replicas_in_torch.py PROCESS PORT`, once for each of two processes that start
together. The first trains by itself as well, and prints the largest difference
of the weights.
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from keras import layers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import keras_upcycle as ku

PROCESS, PORT, PROCESSES, BATCH, STEPS = *map(int, sys.argv[1:]), 2, 8, 3


def sparse_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 16))
    hidden = layers.Dense(24, activation="gelu", name="up")(inputs)
    x = inputs + layers.Dense(16, name="down")(hidden)
    x = layers.GlobalAveragePooling1D()(x)
    dense = keras.Model(inputs, layers.Dense(3, name="head")(x))
    # What routers add and count is of one process's examples.
    router = ku.TopKRouter(2, group="example", load_balance_loss=0.0)
    return ku.upcycle_model(dense, 4, router=router, layers="all", seed=0)


def batch(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(BATCH, 6, 16)).astype("float32")
    return torch.from_numpy(x), torch.from_numpy(rng.integers(0, 3, BATCH))


def train(moe, module, part):
    optimizer = torch.optim.SGD(moe.parameters(), 0.1)
    loss = torch.nn.CrossEntropyLoss()
    for step in range(STEPS):
        x, y = (each[part] for each in batch(step))
        optimizer.zero_grad()
        total = loss(module(x, training=True), y)
        total = total + sum(moe.losses, torch.tensor(0.0))
        total.backward()
        optimizer.step()


def main():
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{PORT}",
        rank=PROCESS,
        world_size=PROCESSES,
    )
    moe = sparse_model()
    moe(batch(0)[0])  # a KerasHub task has no parameters before
    own = BATCH // PROCESSES
    part = slice(PROCESS * own, (PROCESS + 1) * own)
    train(moe, DistributedDataParallel(moe), part)
    if not PROCESS:
        alone = sparse_model()
        train(alone, alone, slice(None))
        gaps = [
            float((a.value - b.value).abs().max())
            for a, b in zip(
                moe.trainable_weights, alone.trainable_weights, strict=True
            )
        ]
        moved = float(
            (moe.weights[0].value - sparse_model().weights[0].value).abs().max()
        )
        print(max(gaps), moved)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

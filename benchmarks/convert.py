"""What a conversion costs: ViT-B/16, T5 1.1 Base, a Llama or a Gemma.

    KERAS_BACKEND=jax python -m benchmarks.convert
    KERAS_BACKEND=jax python -m benchmarks.convert --model t5_base
    KERAS_BACKEND=jax python -m benchmarks.convert --model llama_1b \
        --num-experts 4

ViT-B/16 becomes sparse in its last 6 blocks (0.96 billion parameters), T5 1.1
Base in every other block of both stacks (2.00 billion, 9 GB with the dense
model), to 32 experts each. The Llama-shaped and Gemma-shaped models have 1.1
billion parameters before. Time is compared with a plain NumPy broadcast copy of
the same bytes, in the same process; peak memory with the bytes of the dense and
the sparse model together. The built model's parameter count is compared with
the estimate, to the unit.
"""

import argparse
import json
import mmap
import time

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np

from benchmarks import timing
from keras_upcycle import tables


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="vit_b16")
    parser.add_argument("--num-experts", type=int, default=32)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    # Warm: imports, and what a backend sets up for its first variables.
    ku.upcycle_model(MODELS[args.model](2, 16, 32), 2)

    # From before there is a dense model, so that what its making leaves
    # behind, and the conversion uses again, counts too.
    with timing.PeakMemory() as memory:
        num_layers = args.num_layers or NUM_LAYERS.get(args.model, 12)
        dense = MODELS[args.model](num_layers)
        estimate = ku.estimate_upcycle(dense, args.num_experts)
        start = time.perf_counter()
        moe = ku.upcycle_model(dense, args.num_experts)
        seconds = time.perf_counter() - start
    if moe.count_params() != estimate.total_params:
        raise RuntimeError(
            f"The estimate says {estimate.total_params:,} parameters, the "
            f"model has {moe.count_params():,}."
        )
    peak = memory.rise
    both = estimate.dense_weight_bytes + estimate.weight_bytes
    del moe
    copy_seconds = numpy_copy(estimate.weight_bytes)

    figures = {
        "backend": keras.backend.backend(),
        "dense_params": estimate.dense_params,
        "total_params": estimate.total_params,
        "seconds": seconds,
        "numpy_copy_seconds": copy_seconds,
        "time_ratio": seconds / copy_seconds,
        "peak_bytes": peak,
        "dense_and_sparse_bytes": both,
        "memory_ratio": peak / both,
    }
    print(
        f"{figures['backend']}: {tables.count(estimate.dense_params)} to "
        f"{estimate.total_params:,} parameters, as estimated"
    )
    print(
        tables.markdown(
            ("", "measured", "yardstick", "ratio"),
            [
                (
                    "seconds, against a NumPy copy",
                    f"{seconds:.1f}",
                    f"{copy_seconds:.1f}",
                    f"{seconds / copy_seconds:.2f}",
                ),
                (
                    "peak memory, against dense + sparse",
                    tables.size(peak),
                    tables.size(both),
                    f"{peak / both:.2f}",
                ),
            ],
        )
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


def vit_b16(num_layers, hidden_dim=768, intermediate_dim=3072):
    """The dense backbone, or a smaller one."""
    return keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=num_layers,
        num_heads=max(hidden_dim // 64, 1),
        hidden_dim=hidden_dim,
        mlp_dim=intermediate_dim,
    )


def t5_base(num_layers, hidden_dim=768, intermediate_dim=2048):
    """T5 1.1's shape, or a smaller one."""
    return keras_hub.models.T5Backbone(
        vocabulary_size=32128,
        num_layers=num_layers,
        num_heads=max(hidden_dim // 64, 1),
        hidden_dim=hidden_dim,
        intermediate_dim=intermediate_dim,
        activation="gelu",
        tie_embedding_weights=False,
    )


def llama_1b(num_layers, hidden_dim=2048, intermediate_dim=8192):
    """The shape of Llama 3.2 1B, with two embeddings and fewer words."""
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32000,
        num_layers=num_layers,
        num_query_heads=8,
        num_key_value_heads=2,
        hidden_dim=hidden_dim,
        intermediate_dim=intermediate_dim,
    )


def gemma_1b(num_layers, hidden_dim=1536, intermediate_dim=12288):
    """Gemma's proportions; its config says twice the network's width."""
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=64000,
        num_layers=num_layers,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=hidden_dim,
        intermediate_dim=2 * intermediate_dim,
        head_dim=256,
    )


MODELS = {
    "vit_b16": vit_b16,
    "t5_base": t5_base,
    "llama_1b": llama_1b,
    "gemma_1b": gemma_1b,
}
# Bytes of the yardstick that are copied at a time.
PART = 2**30
# Where twelve are not what makes the size.
NUM_LAYERS = {"llama_1b": 16, "gemma_1b": 16}


def numpy_copy(size: int) -> float:
    """Seconds to broadcast one 32nd of that many bytes to all of them.

    Into memory that nobody had before, as a model's is, and a part at a time:
    beside the model there may be no room for as many bytes again.
    """
    seconds = 0.0
    for start in range(0, size, PART):
        count = min(PART, size - start) // 4 // 32
        source = np.ones((1, count), "float32")
        begin = time.perf_counter()
        with mmap.mmap(-1, 32 * count * 4) as memory:
            target = np.frombuffer(memory, "float32").reshape(32, count)
            target[...] = source
            seconds += time.perf_counter() - begin
            del target  # else the memory could not be given back
    return seconds


if __name__ == "__main__":
    main()

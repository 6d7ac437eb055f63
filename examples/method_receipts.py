"""What each recipe changes before any training: the README's table.

    python examples/method_receipts.py

A small KerasHub ViT with random weights is upcycled to 8 experts (64 slices
for Qwen2's cut) by every recipe that needs the dense model alone, by
Branch-Train-MiX from two models that differ from it by a little noise, and by
carving on the images that it is tested on. `verify_upcycle` measures the start.
"""

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np

from keras_upcycle import tables
from keras_upcycle.conversion.recipe import RECIPES

EXPERTS, BLOCKS = 8, 4
# Qwen2's cut makes experts of an eighth of a block, of which 8 run: of 8, all.
OTHERWISE = {"qwen2_moe": 64}


def main() -> None:
    """Prints a Markdown table."""
    dense = model(0)
    images = np.random.default_rng(0).normal(size=(32, 32, 32, 3))
    images = keras.ops.convert_to_tensor(images.astype("float32"))
    rows = []
    for name in RECIPES:
        more = {}
        if name == "upit":
            continue  # needs checkpoints of a training run
        if name == "branch_train_mix":
            more["expert_init"] = ku.BranchTrainMix([moved(1), moved(2)])
        if name == "carving":
            more["expert_init"] = ku.Carving(images)
        count = OTHERWISE.get(name, EXPERTS)
        moe = ku.upcycle_model(dense, count, recipe=name, seed=0, **more)
        report = ku.verify_upcycle(dense, moe, images)
        rows.append(
            (
                f"`{name}`",
                str(count),
                f"{len(report.layers)} of {BLOCKS}",
                f"{report.relative_difference:.0e}"
                if report.relative_difference < 1e-3
                else f"{report.relative_difference:.2f}",
                f"{mean(report, 'intact_neurons'):.0%}",
                f"{mean(report, 'expert_cosine'):.2f}",
                f"{mean(report, 'active_share'):.0%}",
                f"{moe.count_params() / dense.count_params():.1f}",
            )
        )
    print(
        tables.markdown(
            (
                "recipe",
                "experts",
                "sparse blocks",
                "change at step 0",
                "neurons left whole",
                "cosine of experts",
                "active of a block",
                "parameters, x dense",
            ),
            rows,
        )
    )


def model(seed: int) -> keras.Model:
    """A backbone of four blocks, its weights drawn from a seed."""
    keras.utils.set_random_seed(seed)
    return keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=BLOCKS,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    )


def moved(seed: int) -> keras.Model:
    """The dense model with noise, as if tuned a little."""
    result = model(0)
    rng = np.random.default_rng(seed)
    result.set_weights(
        [w + 0.01 * rng.normal(size=w.shape) for w in result.get_weights()]
    )
    return result


def mean(report: ku.UpcycleReport, name: str) -> float:
    """Of a figure of all blocks."""
    return float(np.mean([getattr(block, name) for block in report.layers]))


if __name__ == "__main__":
    main()

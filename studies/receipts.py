"""What each method changes before any training, measured.

    python -m studies.receipts

A small KerasHub ViT with random weights is upcycled to 8 experts (64 slices
for Qwen2's cut) by every recipe that needs the dense model alone, by
Branch-Train-MiX from two models that differ from it by a little noise, by
carving on the pictures that it is tested on, and by the options that are no
recipes. `verify_upcycle` measures the start. Written to
`benchmarks/results/receipts.json`, from which `python -m studies.pages` makes
the table of methods.
"""

import json
import pathlib
from typing import Any

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import keras_hub
import numpy as np

from keras_upcycle import atomic_files, tables
from keras_upcycle.conversion.recipe import RECIPES

PATH = pathlib.Path(__file__).parent.parent / "benchmarks/results/receipts.json"
EXPERTS, BLOCKS = 8, 4
# Qwen2's cut makes experts of an eighth of a block, of which 8 run: of 8, all.
OTHERWISE = {"qwen2_moe": 64}
# What is no recipe; of all blocks.
OPTIONS: dict[str, Any] = {
    "copies, Top-2": lambda: {},
    "DenseMixer": lambda: {
        "router": ku.TopKRouter(
            2, capacity_factor=None, router_gradient="dense_mixer"
        )
    },
    "temperature from 4 to 1": lambda: {
        "router": ku.TopKRouter(
            2,
            capacity_factor=None,
            temperature=keras.optimizers.schedules.PolynomialDecay(
                4.0, 400, 1.0
            ),
        )
    },
    "low-rank experts": lambda: {"experts": ku.LowRankExperts(8)},
    "random noise": lambda: {"expert_init": "random_noise"},
    "random experts": lambda: {"expert_init": "random"},
    "attention heads": lambda: {"attention": True},
    "copied attention": lambda: {"attention": ku.CopiedAttention(4)},
    "attention heads, half of them": lambda: {
        "attention": ku.AttentionExperts(ku.TopKRouter(2, capacity_factor=None))
    },
}


def main() -> None:
    """Measures everything, prints a Markdown table, and writes it down."""
    found = measure()
    text = json.dumps(found, indent=1) + "\n"
    atomic_files.replace(PATH, lambda draft: draft.write_text(text))
    print(shown(found))


def measure() -> dict[str, dict[str, Any]]:
    """From a recipe or an option to what was measured of it."""
    dense, x = model(0), pictures()
    found = {}
    for name in RECIPES:
        if name == "upit":
            continue  # needs checkpoints of a training run
        found[name] = receipt(dense, x, name, {"recipe": name, **needs(name)})
    top_2 = {"router": ku.TopKRouter(2, capacity_factor=None), "layers": "all"}
    for name, make in OPTIONS.items():
        found[name] = receipt(dense, x, name, {**top_2, **make()})
    return found


def needs(name: str) -> dict[str, Any]:
    """What a recipe must be given besides the dense model."""
    if name == "branch_train_mix":
        return {"expert_init": ku.BranchTrainMix([moved(1), moved(2)])}
    if name == "carving":
        return {"expert_init": ku.Carving(pictures())}
    return {}


def receipt(dense, x, name, settings) -> dict[str, Any]:
    """Of one conversion."""
    count = OTHERWISE.get(name, EXPERTS)
    moe = ku.upcycle_model(dense, count, seed=0, **settings)
    report = ku.verify_upcycle(dense, moe, x)
    return {
        "experts": count,
        "blocks": len(report.layers),
        "change": report.relative_difference,
        "intact": mean(report, "intact_neurons"),
        "cosine": mean(report, "expert_cosine"),
        "active": mean(report, "active_share"),
        "size": moe.count_params() / dense.count_params(),
    }


def shown(found: dict[str, dict[str, Any]]) -> str:
    """What was measured, as a table."""
    return tables.markdown(
        (
            "method",
            "experts",
            "sparse blocks",
            "change at step 0",
            "neurons left whole",
            "cosine of experts",
            "active of a block",
            "parameters, x dense",
        ),
        [
            (
                name,
                str(one["experts"]),
                f"{one['blocks']} of {BLOCKS}",
                change(one),
                f"{one['intact']:.0%}",
                f"{one['cosine']:.2f}",
                f"{one['active']:.0%}",
                f"{one['size']:.1f}",
            )
            for name, one in found.items()
        ],
    )


def change(one: dict[str, Any]) -> str:
    """The change at step 0: `exact` where it is rounding."""
    found = one["change"]
    return "exact" if found < 1e-5 else f"{found:.2f}"


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


def pictures() -> Any:
    """A batch of noise."""
    images = np.random.default_rng(0).normal(size=(32, 32, 32, 3))
    return keras.ops.convert_to_tensor(images.astype("float32"))


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

"""What T5 XL and Llama 7B need on named hardware, from the cost model.

    python -m benchmarks.meshes             # prints the tables
    python -m benchmarks.meshes --write     # into guides/meshes.md

No weights are made and no device is needed; `tests/distribution` compares the
cost model with a compiled step.
"""

import argparse
import pathlib
import re
from typing import NamedTuple

import keras_upcycle as ku

# isort: split
import keras_hub

from keras_upcycle import tables

PAGE = pathlib.Path(__file__).parent.parent / "guides" / "meshes.md"
MARK = re.compile(r"(<!-- meshes -->\n).*?(\n<!-- end -->)", re.DOTALL)
GIB = 2**30
BUSY = 0.4  # share of its peak that a device reaches


class Hardware(NamedTuple):
    """A device, by its maker's figures.

    Attributes:
        name: Of the device.
        memory: Bytes.
        flops: Peak operations a second, bfloat16.
        link: Bytes a second to other devices, one way.
    """

    name: str
    memory: float
    flops: float
    link: float


class Model(NamedTuple):
    """What is upcycled.

    Attributes:
        name: Of the model.
        make: A function that makes it.
        num_experts: Of each MoE layer.
        tokens: Of a device's share of a batch.
    """

    name: str
    make: object
    num_experts: int
    tokens: int


HARDWARE = (
    Hardware("TPU v5e", 16 * GIB, 197e12, 200e9),
    Hardware("TPU v5p", 95 * GIB, 459e12, 600e9),
    Hardware("H100 SXM", 80 * GIB, 989e12, 450e9),
)


def t5_xl():
    """T5 1.1 XL."""
    return keras_hub.models.T5Backbone(
        vocabulary_size=32128,
        num_layers=24,
        num_heads=32,
        hidden_dim=2048,
        intermediate_dim=5120,
        key_value_dim=64,
        activation="gelu",
        use_gated_activation=True,
        tie_embedding_weights=False,
        dtype="mixed_bfloat16",
    )


def llama_7b():
    """Llama 2 7B."""
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32000,
        num_layers=32,
        num_query_heads=32,
        num_key_value_heads=32,
        hidden_dim=4096,
        intermediate_dim=11008,
        dtype="mixed_bfloat16",
    )


MODELS = (
    Model("T5 XL, 32 experts", t5_xl, 32, 1024),
    Model("Llama 7B, 8 experts", llama_7b, 8, 1024),
)
DEVICES = (32, 64, 128, 256)


def rows(model: Model) -> list[tuple[str, ...]]:
    """The quickest mesh that fits, for each device and number of them."""
    found = []
    for hardware in HARDWARE:
        for devices in DEVICES:
            meshes = [
                mesh
                for shard_dense in (False, True)
                for mesh in ku.estimate_upcycle(
                    model.make,
                    model.num_experts,
                    mesh=devices,
                    tokens_per_device=model.tokens,
                    shard_dense=shard_dense,
                ).meshes
                if mesh.bytes_per_device <= hardware.memory
            ]
            name = f"{devices} x {hardware.name}"
            if not meshes:
                found.append((name, "none fits", "", "", ""))
                continue
            speed = hardware.flops * BUSY, hardware.link
            best = min(meshes, key=lambda mesh: mesh.step_seconds(*speed))
            found.append(
                (
                    name,
                    f"{best.data_devices} x {best.expert_devices}"
                    + (", shard_dense" if best.shard_dense else ""),
                    tables.size(best.bytes_per_device),
                    tables.size(best.sent_bytes),
                    f"{best.step_seconds(*speed):.2f} s",
                )
            )
    return found


def text() -> str:
    """The tables, as Markdown."""
    header = ("devices", "data x expert", "a device", "sent a step", "a step")
    return "\n\n".join(
        f"### {model.name}, {model.tokens:,} tokens a device\n\n"
        f"{tables.markdown(header, rows(model))}"
        for model in MODELS
    )


def filled(page: str) -> str:
    """A page with the tables as they are now."""
    made = text()
    return MARK.sub(lambda match: f"{match[1]}{made}{match[2]}", page)


def main() -> None:
    """Prints the tables, or writes them into the guide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print(text())


if __name__ == "__main__":
    main()

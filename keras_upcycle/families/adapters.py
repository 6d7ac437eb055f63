"""Files of low-rank adapters alone, as KerasHub's backbones write them."""

import os

import h5py

from keras_upcycle.layers.moe_layers import moe_layers_in

_KERNEL = "lora_kernel_a"


class ChecksAdapters:
    """Mixed into a sparse backbone: adapters of other mixtures are refused.

    KerasHub would enable adapters, load those before the first that does not
    fit, and then say that a shape differs.
    """

    name: str

    def load_lora_weights(self, filepath: str | os.PathLike) -> None:
        """As KerasHub's, once it is known that the adapters can fit.

        Raises:
            ValueError: For adapters of another number of experts. Nothing was
                changed then.
        """
        own = {
            networks.num_experts
            for mixture in moe_layers_in(self)
            for networks in mixture.networks
        }
        others = sorted(_experts_in(filepath) - own)
        if others:
            raise ValueError(
                "Adapters must come from a model with the same mixtures. "
                f"Received: {filepath}, with adapters of num_experts={others}, "
                f"for {self.name!r}, whose networks have num_experts="
                f"{sorted(own)}. Load them into a model made as theirs was."
            )
        super().load_lora_weights(filepath)  # type: ignore[misc]


def _experts_in(filepath) -> set[int]:
    """How many experts the stacked adapters of a file are for."""
    found = set()

    def look(name, entry):
        stacked = isinstance(entry, h5py.Dataset) and len(entry.shape) == 3
        if stacked and name.rpartition("/")[2] == _KERNEL:
            found.add(int(entry.shape[0]))

    with h5py.File(filepath, "r") as file:
        file.visititems(look)
    return found

"""Files of low-rank adapters alone, as KerasHub's backbones write them."""

import os

import h5py

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.expert_projection import ExpertProjection
from keras_upcycle.layers.moe_layers import moe_layers_in

_KERNEL = "lora_kernel_a"


class ChecksAdapters:
    """Mixed into a sparse backbone: adapters of other mixtures are refused.

    KerasHub would enable adapters, load those before the first that does not
    fit, and then say that a shape differs.
    """

    name: str

    def enable_lora(self, rank, target_layer_names=None):
        """As KerasHub's, unless attention's experts are meant.

        Raises:
            UpcycleError: If one of the names is that of a projection which is
                several now. Nothing was changed then.
        """
        names = target_layer_names
        if names is None:
            names = self.default_lora_layer_names()  # type: ignore[attr-defined]
        for layer in keras_internals.all_layers(self):  # type: ignore[arg-type]
            if (
                isinstance(layer, ExpertProjection)
                and layer.stands_for in names
            ):
                raise UpcycleError(
                    "Attention's experts take no adapters. Received: "
                    f"target_layer_names={list(names)}, of which "
                    f"{layer.stands_for!r} is {layer.num_experts} experts at "
                    f"{layer.path!r}. Pass names of other layers."
                )
        super().enable_lora(rank, target_layer_names)  # type: ignore[misc]

    def load_lora_weights(self, filepath: str | os.PathLike) -> None:
        """As KerasHub's, once it is known that the adapters can fit.

        Raises:
            ValueError: For adapters of another number of experts. Nothing was
                changed then.
        """
        experts = {
            id(projection): networks.num_experts
            for mixture in moe_layers_in(self)
            for networks in mixture.networks
            for projection in networks.projections.values()
        }
        # KerasHub tells layers by their number among those with weights.
        layers = self._with_weights()  # type: ignore[attr-defined]
        others = sorted(
            found
            for number, found in _stacked_in(filepath).items()
            if number < len(layers)
            and found != experts.get(id(layers[number]), found)
        )
        if others:
            raise ValueError(
                "Adapters must come from a model with the same mixtures. "
                f"Received: {filepath}, with adapters of num_experts="
                f"{sorted(set(others))}, for {self.name!r}, whose networks "
                f"have num_experts={sorted(set(experts.values()))}. Load them "
                "into a model made as theirs was."
            )
        super().load_lora_weights(filepath)  # type: ignore[misc]


def _stacked_in(filepath) -> dict[int, int]:
    """From a layer's number to the first axis of its adapter's three.

    Of experts that is their number; attention's adapters have three as well.
    """
    found = {}

    def look(name, entry):
        stacked = isinstance(entry, h5py.Dataset) and len(entry.shape) == 3
        if stacked and name.rpartition("/")[2] == _KERNEL:
            number = next(part for part in name.split("/") if part.isdigit())
            found[int(number)] = int(entry.shape[0])

    with h5py.File(filepath, "r") as file:
        file.visititems(look)
    return found

"""Files of adapters that hold all that was trained with them."""

import warnings

import h5py
import numpy as np
from keras import ops

_BIASES = "keras_upcycle_biases"


class KeepsBiasesOfAdapters:
    """Mixed into a KerasHub backbone, for its files of adapters.

    `enable_lora` leaves the biases of the layers that it names trainable, and
    the stock `save_lora_weights` writes the adapters alone: a fresh model that
    loads them is not the one that was trained. Here the biases go into the
    same file, where the stock reader does not look.
    """

    def save_lora_weights(self, filepath):
        """Writes the adapters and the biases that train with them.

        Args:
            filepath: Must end in `".lora.h5"`.

        Warns if more than that trains, a router for one: the file has none of
        it, and `save_weights` has.
        """
        super().save_lora_weights(filepath)
        adapted = self._adapted()
        with h5py.File(filepath, "a") as file:
            for index, layer in adapted.items():
                if _has_trained_bias(layer):
                    file[f"{_BIASES}/{index}"] = np.asarray(
                        ops.convert_to_numpy(ops.cast(layer.bias, "float32"))
                    )
        held = {
            id(variable)
            for layer in adapted.values()
            for variable in layer.trainable_variables
        }
        others = [v for v in self.trainable_variables if id(v) not in held]
        if others:
            warnings.warn(
                "A file of adapters holds adapters and the biases of their "
                f"layers; {len(others)} more variables train, among them "
                f"{others[0].path!r}, and are not in it. Call `save_weights` "
                "for all of them.",
                stacklevel=2,
            )

    def load_lora_weights(self, filepath):
        """Reads what `save_lora_weights` wrote.

        Adapters are enabled where the file has them, if none are.

        Args:
            filepath: Of a model of the same structure.

        Warns if the file holds no biases where the model's train: KerasHub
        wrote it, or a version that left them out.
        """
        with h5py.File(filepath, "r") as file:
            if not getattr(self, "_lora_enabled_layers", []):
                self._enable_where(file)
            super().load_lora_weights(filepath)
            biases = file.get(_BIASES, {})
            lost = []
            for index, layer in self._adapted().items():
                if str(index) in biases:
                    layer.bias.assign(biases[str(index)][()])
                elif _has_trained_bias(layer):
                    lost.append(layer.bias.path)
        if lost:
            warnings.warn(
                f"The file {str(filepath)!r} holds adapters alone, while "
                f"{len(lost)} biases of adapted layers train as well, among "
                f"them {lost[0]!r}: they are as they were. Write the file "
                "with `save_lora_weights` of this model class, or load "
                "weights of the whole model.",
                stacklevel=2,
            )

    def _enable_where(self, file):
        layers = self._with_weights()
        names = {layers[int(i)].name for i in file["lora"] if i.isdigit()}
        self.enable_lora(int(file["lora/vars/rank"][()]), sorted(names))

    def _adapted(self):
        """From the number that KerasHub gives a layer to it."""
        layers = self._with_weights()
        return {index: layers[index] for index in self._lora_enabled_layers}

    def _with_weights(self):
        layers = self._flatten_layers(include_self=False)
        return [layer for layer in layers if layer.weights]


def _has_trained_bias(layer):
    bias = getattr(layer, "bias", None)
    return bias is not None and bias.trainable

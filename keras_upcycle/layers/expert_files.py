"""What files tell of experts beside their weights: a format, and sizes.

Kernels of another MoE layer may have the very same names, and shapes. Files say
what they are of, so that they are refused in words of MoE layers.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_upcycle import backend, keras_internals
from keras_upcycle.errors import UpcycleError

# The stacked layers' names, in files and for `enable_lora`.
UP = "expert_up"
GATE = "expert_gate"
DOWN = "expert_down"
# Under which a file has what `Experts.sizes` says.
_SIZES = "sizes"
_FORMAT = "format"

# Of what files hold. 1: the linear kernel of a gated unit was called gate.
FORMAT = 2


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer from a config, if their names mean the same.

    Args:
        config: With a `"format"`; one without is of format 1.

    Raises:
        UpcycleError: For gated experts of format 1: kernels have the same
            names and shapes, and would be taken for each other.
    """
    arguments = dict(config)
    found = arguments.pop("format", 1)
    if found != FORMAT and arguments.get("gated"):
        raise _other_format(found)
    return arguments


def _other_format(found):
    return UpcycleError(
        f"Gated experts are read from files of format {FORMAT}, in which the "
        "activated kernel is called gate and the linear one up. Received: "
        f"format {found}, in which they are the other way round, so that they "
        "would be exchanged without a word. Convert the dense model again, or "
        "load the file with the version of keras_upcycle that wrote it. "
        f'(Settings written by hand say "format": {FORMAT}.)'
    )


class FilesOfExperts:
    """Writes the record beside an `Experts`' weights, and asks it first."""

    # A file that was refused, and why.
    _refused_file, _refusal = None, ""

    def save_own_variables(self, store):
        for variable in self.weights if self.built else ():
            if not backend.is_at_hand(variable.value):
                raise ValueError(
                    "A file must be written by a process that has all of it. "
                    f"Received: experts of layer {self.path!r}, some of which "
                    "lie in other processes. Save with "
                    "`keras.callbacks.OrbaxCheckpoint`, in which each process "
                    "writes its own, or on a mesh whose expert axis stays "
                    "within a process."
                )
        super().save_own_variables(store)
        if self.built:
            store[_SIZES] = np.array(list(self.sizes().values()), "int64")
        # What a file of weights alone has no config to say.
        if self.gated:
            store[_FORMAT] = np.array(FORMAT, "int32")

    def load_own_variables(self, store):
        keys = list(store.keys())
        # Before the kernels are asked: of them Keras would say that a shape
        # differs, and nothing of what the file has and the layer has not.
        if self.built:
            sizes = store[_SIZES] if _SIZES in keys else None
            problem = _other_sizes(self, self.sizes(), sizes)
            if sizes is None and keras_internals.file_holds(store, DOWN):
                # Of before there were sizes: the kernels are asked. But a
                # gate's file would fill a plain network in silence.
                problem = None
                if keras_internals.file_holds(store, GATE):
                    problem = str(_other_format(1))
            if not problem and keys and self.gated and _FORMAT not in keys:
                problem = str(_other_format(1))
            again = self._refused_file and self._refused_file() is store
            if again and not keys:
                # Keras comes again to what was refused, by each attribute
                # that leads here, with nothing; the last error is what it
                # tells.
                problem = self._refusal
            if problem:
                self._refused_file = _reference(store)
                self._refusal = problem
                raise ValueError(problem)
        ours = (_SIZES, _FORMAT)
        super().load_own_variables({k: store[k] for k in keys if k not in ours})


def _reference(store):
    """A weak reference; `None` where there is none, as to a `dict`."""
    try:
        return weakref.ref(store)
    except TypeError:
        return None


def _other_sizes(layer, expected, received):
    """Why weights of these sizes are another MoE layer's, or `None`."""
    received = [] if received is None else np.asarray(received).tolist()
    if len(received) in (7, 8):
        # Of before a shared network could have a gate, or experts a rank.
        received += [0] * (len(expected) - len(received))
    if len(received) != len(expected):
        return (
            "Weights of an MoE layer must come from an MoE layer, saved by "
            "this version. Received: a file that holds none for "
            f"{layer.path!r}, an MoE layer of {_experts(layer.num_experts)}. "
            "Of a dense model's weights `upcycle_model` makes those of MoE "
            "layers: load them into the dense model first."
        )
    if received == list(expected.values()):
        return None
    both = {
        name: (here, there)
        for (name, here), there in zip(expected.items(), received, strict=True)
        if here != there
    }
    differ = ", ".join(
        f"{name}={_shown(name, there)} in the file and "
        f"{name}={_shown(name, here)} in the layer"
        for name, (here, there) in both.items()
    )
    remedy = (
        "Make the model as the saved one was made, with these arguments, and "
        "load into that."
    )
    if "num_experts" in both:
        remedy += " `prune_experts` then makes one of fewer experts."
    return (
        "Weights must come from an MoE layer of the same sizes. Received: "
        f"weights of {_experts(received[0])} for {layer.path!r}, an MoE layer "
        f"of {_experts(layer.num_experts)}: {differ}. {remedy}"
    )


def _experts(count):
    return f"{count} expert" if count == 1 else f"{count} experts"


def _shown(name, value):
    if name in ("gated", "use_bias", "output_bias", "shared_gate"):
        return bool(value)
    return value or None

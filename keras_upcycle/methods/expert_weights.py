"""The feed-forward weights of a whole dense model: what makes one expert.

An expert of a pool is no single block. It is what one model holds at all of
its feed-forward blocks, so that expert 2 of every MoE layer comes from one
source.
"""

import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import atomic_files, checks, families, keras_internals
from keras_upcycle.conversion import model_checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import FeedForwardSite
from keras_upcycle.layers.moe_layers import moe_layers_in

_FORMAT = "keras_upcycle.ExpertWeights/2"
# The same, but for gated blocks, whose gate and up were the other way round.
_BEFORE_GATE = "keras_upcycle.ExpertWeights/1"


class ExpertWeights:
    """What one dense model holds at its feed-forward blocks.

    Blocks are told apart by their number, `FeedForwardSite.index`, as paths of
    KerasHub's models may collide.

    Args:
        blocks: List of mappings, one for each feed-forward block, inputs first,
            from `"up_kernel"` `(D, F)`, `"down_kernel"` `(F, D)` and so on, as
            in `FeedForwardSite.kernels`, to float arrays.
        others: List of float arrays, all other float weights of the model, in
            the order of its layers; `None` (default) where they were not kept.
        description: String, where the weights come from, for people. Defaults
            to `""`.

    Raises:
        TypeError: If a weight is no array of floats, or for what is no list.
        ValueError: If there is no block, or one without kernels.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> expert = ExpertWeights.from_model(dense)
        >>> expert.blocks[0]["up_kernel"].shape
        (8, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     expert.save(f"{folder}/expert.npz")
        ...     again = ExpertWeights.load(f"{folder}/expert.npz")
        >>> bool((again.blocks[0]["up_kernel"]
        ...       == expert.blocks[0]["up_kernel"]).all())
        True
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Any]],
        others: Sequence[Any] | None = None,
        description: str = "",
    ):
        checks.check_instance(
            "blocks", blocks, list | tuple, "a list of mappings"
        )
        if not blocks:
            raise ValueError(
                "`blocks` must hold at least one feed-forward block. "
                f"Received: blocks={blocks!r}. `ExpertWeights.from_model` "
                "takes them from a model."
            )
        for block in blocks:
            checks.check_instance(
                "blocks", block, Mapping, "a list of mappings"
            )
            missing = {"up_kernel", "down_kernel"} - set(block)
            if missing:
                raise ValueError(
                    "Each of `blocks` must have an 'up_kernel' and a "
                    f"'down_kernel'. Received: {sorted(map(str, block))}. "
                    "Name them as `FeedForwardSite.kernels` does."
                )
        if others is not None:
            checks.check_instance(
                "others", others, list | tuple, "a list of arrays, or `None`"
            )
        checks.check_instance("description", description, str, "a string")
        self.blocks = tuple(dict(block) for block in blocks)
        self.others = None if others is None else tuple(others)
        for key, value in self.items():
            dtype = checks.dtype_name(value)
            if "float" not in dtype:
                raise TypeError(
                    "The weights of an expert must be floats. Received: "
                    f"dtype {dtype} for {'/'.join(map(str, key))}. Pass "
                    'arrays such as `value.astype("float32")`.'
                )
        self.description = description

    def __repr__(self) -> str:
        what = f", {self.description}" if self.description else ""
        return f"<ExpertWeights of {len(self.blocks)} blocks{what}>"

    @classmethod
    def from_model(
        cls,
        model: keras.Model,
        *,
        other_weights: bool = False,
        description: str = "",
    ) -> "ExpertWeights":
        """Copies the weights of a dense model, as float32.

        Args:
            model: A Keras model, dense and built, of a kind that
                `upcycle_model` takes.
            other_weights: Boolean, whether to keep what is in no feed-forward
                block too, for an average over several models. Defaults to
                `False`.
            description: String, where the weights come from, for people.
                Defaults to `""`.

        Raises:
            TypeError, UpcycleError: As `find_feed_forwards`; also if the
                model is sparse, quantized, holds LoRA adapters, or has no
                feed-forward block.
        """
        checks.check_flag("other_weights", other_weights)
        seen = cls.view(model)
        return cls(
            [
                {name: array(value) for name, value in block.items()}
                for block in seen.blocks
            ],
            [array(value) for value in seen.others or ()]
            if other_weights
            else None,
            description,
        )

    @classmethod
    def view(cls, model: keras.Model) -> "ExpertWeights":
        """The same, of the model's own variables: nothing is copied."""
        sites = dense_sites(model)
        inside = {
            id(keras_internals.shown(v))
            for site in sites
            for v in site.kernels.values()
        }
        others = [v for _, v in float_weights(model) if id(v) not in inside]
        return cls([site.kernels for site in sites], others)

    def items(self) -> Iterator[tuple[tuple, Any]]:
        """Every weight with a key that other models of the kind share."""
        for index, block in enumerate(self.blocks):
            for name, value in block.items():
                yield ("block", index, name), value
        for number, value in enumerate(self.others or ()):
            yield ("other", number), value

    def check_fits(self, sites: Sequence[FeedForwardSite], name: str) -> None:
        """Raises `UpcycleError` unless made of a model with such blocks.

        Args:
            sites: List of `FeedForwardSite`, the blocks of a dense model.
            name: String, what this is to the caller, such as `"Donor 0"`.
        """
        self.check_like(ExpertWeights([s.kernels for s in sites]), name)

    def check_like(self, model: "ExpertWeights", name: str) -> None:
        """Raises `UpcycleError` unless both come from models of one kind.

        Args:
            model: An `ExpertWeights`, what a model holds.
            name: String, what this is to the caller, such as `"Donor 0"`.
        """
        if len(self.blocks) != len(model.blocks):
            raise UpcycleError(
                f"{name} must have the {len(model.blocks)} feed-forward "
                f"blocks of the model. Received: {len(self.blocks)} blocks. "
                "Take weights of models of one architecture."
            )
        pairs = zip(model.blocks, self.blocks, strict=True)
        for index, both in enumerate(pairs):
            expected, received = (
                {n: tuple(v.shape) for n, v in sorted(block.items())}
                for block in both
            )
            if received != expected:
                raise UpcycleError(
                    f"{name} must have kernels of the model's shapes. "
                    f"Received: {received} for block {index}, expected "
                    f"{expected}. Take weights of models of one architecture."
                )
        for key, value in self.items():
            if not np.isfinite(array(value)).all():
                raise UpcycleError(
                    f"{name}'s weights must be finite. Received: NaN or "
                    f"infinity in {'/'.join(map(str, key))}. Go back to a "
                    "checkpoint from before the training diverged."
                )

    def save(self, path: str | os.PathLike) -> None:
        """Writes one `.npz` file, whole or not at all.

        Args:
            path: Path of the file; one that is there is replaced.

        Raises:
            TypeError: If `path` is no path.
            OSError: If it is a folder, or in none.
        """
        path = pathlib.Path(checks.check_output("path", path))
        about: dict[str, Any] = {
            "format": _FORMAT,
            "description": self.description,
        }
        about["others"] = None if self.others is None else len(self.others)
        arrays = {"/".join(map(str, k)): array(v) for k, v in self.items()}

        def write(draft):
            with draft.open("wb") as file:
                np.savez(file, about=np.array(json.dumps(about)), **arrays)

        atomic_files.replace(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExpertWeights":
        """Reads what `save` wrote.

        Args:
            path: Path of the file.

        Raises:
            TypeError: If `path` is no path.
            FileNotFoundError: If there is none.
            ValueError: If it is another kind of file.
        """
        checks.check_file("path", path, "`ExpertWeights.save` writes one.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            known = about["format"] == _FORMAT or (
                about["format"] == _BEFORE_GATE
                and not any(name.endswith("gate_kernel") for name in arrays)
            )
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
            known = False
        if not known:
            raise ValueError(
                "The weights of an expert are read from a file that "
                f"`ExpertWeights.save` wrote. Received: {path}, which is "
                "another kind of file, or of another version. Write it anew."
            )
        blocks: dict[int, dict[str, np.ndarray]] = {}
        others = {}
        for key, value in arrays.items():
            kind, number, *name = key.split("/")
            if kind == "block":
                blocks.setdefault(int(number), {})[name[0]] = value
            else:
                others[int(number)] = value
        return cls(
            [blocks[index] for index in sorted(blocks)],
            None
            if about["others"] is None
            else [others[number] for number in sorted(others)],
            about["description"],
        )


def as_pool(experts: Any) -> list[ExpertWeights]:
    """`experts` as a list, one alone among them.

    Raises:
        TypeError: Unless all are `ExpertWeights`.
    """
    if isinstance(experts, ExpertWeights):
        return [experts]
    if isinstance(experts, str) or not isinstance(experts, Iterable):
        raise TypeError(
            "`experts` must be a list of `ExpertWeights`, such as "
            f"`ExpertCheckpoints.experts`. Received: experts={experts!r} of "
            f"type {type(experts).__name__}."
        )
    pool = list(experts)
    for number, expert in enumerate(pool):
        if not isinstance(expert, ExpertWeights):
            raise TypeError(
                "`experts` must be `ExpertWeights`, such as "
                "`ExpertCheckpoints` collects. Received: number "
                f"{number} of type {type(expert).__name__}. Make them with "
                "`ExpertWeights.from_model`."
            )
    return pool


def array(value: Any) -> np.ndarray:
    """A float32 copy of a variable, tensor or array."""
    value = getattr(value, "value", value)
    # A copy: a backend's array may be a view of what training writes to.
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32")))


def dense_sites(model: keras.Model) -> list[FeedForwardSite]:
    """The feed-forward blocks of a dense model.

    Raises:
        TypeError, UpcycleError: As `find_feed_forwards`; also if the model is
            sparse, quantized, holds LoRA adapters, or has no block.
    """
    family = families.family_of(model)
    if moe_layers_in(model):
        raise UpcycleError(
            "The weights of an expert come from a dense model. Received: "
            f"{model.name!r}, which holds MoE layers. Take the dense "
            "model that it came from, or `extract_expert`."
        )
    model_checks.check_floats(model, "A model that makes an expert", "Use")
    sites = family.find(model).sites
    if not sites:
        raise UpcycleError(
            "A model must have a feed-forward block to take an expert from. "
            f"Received: {model.name!r} ({type(model).__name__}) with none. "
            "`find_feed_forwards(model, explain=True)` says why."
        )
    return sites


def float_weights(
    model: keras.Layer,
) -> list[tuple[keras.Layer, keras.Variable]]:
    """Float variables with their layers, each once, in the model's order.

    Two models that were made alike list them alike; names and paths would
    not do, as KerasHub numbers its norm layers automatically.
    """
    found: dict[int, tuple[keras.Layer, keras.Variable]] = {}
    for layer in keras_internals.all_layers(model):
        for variable in keras_internals.own_variables(layer):
            if keras.backend.is_float_dtype(variable.dtype):
                found.setdefault(id(variable), (layer, variable))
    return list(found.values())

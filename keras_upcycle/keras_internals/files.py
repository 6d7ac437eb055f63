"""What layers write into files, and what files hold."""

from typing import Any

import keras

# How KerasHub finds a preset's files; see `preset_class`.
from keras_hub.src.utils import preset_utils

# Write variables that `own_variables` lists, and nothing else. `BaseConv` is
# not exported; Keras 3.15.
_WRITE_VARIABLES_ONLY = (
    keras.Layer,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.Conv1D.__mro__[1],
)
_SAVING = (
    "save_own_variables",
    "load_own_variables",
    "save_assets",
    "load_assets",
)


def saves_more_than_variables(layer: keras.Layer) -> bool:
    """Whether a class of the layer's has methods of its own for its files.

    A class that sets `writes_variables_only` has them, and says that they
    write nothing but what `own_variables` lists.
    """
    return any(
        name in vars(each)
        for each in type(layer).__mro__
        if each not in _WRITE_VARIABLES_ONLY
        and not vars(each).get("writes_variables_only")
        for name in _SAVING
    )


def file_holds(store, name: str) -> bool:
    """Whether a file of weights has something of a layer's sub-layer.

    Args:
        store: What `load_own_variables` of the layer is given.
        name: The attribute that holds the sub-layer.

    `H5IOStore.h5_file` and `._h5_entry_path`, Keras 3.15; `False` for stores
    of another kind, which do not tell.
    """
    file = getattr(store, "h5_file", None)
    path = getattr(store, "_h5_entry_path", None)
    return file is not None and bool(path) and f"{path}/{name}" in file


def preset_class(preset: str, file: str) -> Any:
    """The class that a file of a preset describes.

    The public `from_preset` asks for a class first, and nothing public tells
    which task, or whether any, a preset holds. `preset_utils` reads folders
    and names alike. KerasHub 0.32.

    Args:
        preset: A folder, or a name as KerasHub takes it.
        file: Of the preset, such as `"task.json"`.

    Returns:
        The registered class; `None` if there is no such file, or if it is
        another library's, for a preset may be in another format.

    Raises:
        ValueError: If no class is registered under the name in the file.
    """
    if not preset_utils.check_file_exists(preset, file):
        return None
    config = preset_utils.load_json(preset, file)
    if "registered_name" not in config:
        return None
    return preset_utils.check_config_class(config)

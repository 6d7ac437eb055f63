"""The one folder that may import jax, torch or tensorflow.

`portable` and `portable_devices` are complete and define what is right; a file
named after a backend replaces those of their functions that the backend does
faster or, for `top_k`, must do differently to break ties alike. Deleting the
three files leaves every result as it is, up to rounding (ties on torch aside).
"""

import importlib

import keras

from keras_upcycle.backend import portable, portable_devices

_OVERRIDES = ("jax", "tensorflow", "torch")

_name = keras.backend.backend()
_chosen = (
    importlib.import_module(f"keras_upcycle.backend.{_name}")
    if _name in _OVERRIDES
    else portable
)
_PORTABLE = {**vars(portable_devices), **vars(portable)}


def _pick(name):
    return getattr(_chosen, name, _PORTABLE[name])


top_k = _pick("top_k")
gather_rows = _pick("gather_rows")
scatter_add_rows = _pick("scatter_add_rows")
to_slots = _pick("to_slots")
from_slots = _pick("from_slots")
multiply = _pick("multiply")
activated = _pick("activated")
infer_slots = _pick("infer_slots")
grouped_feed_forward = _pick("grouped_feed_forward")
packing = _pick("packing")
is_recorded = _pick("is_recorded")
remat = _pick("remat")
lay_out = _pick("lay_out")
to_experts = _pick("to_experts")
to_groups = _pick("to_groups")
on_each_device = _pick("on_each_device")
is_at_hand = _pick("is_at_hand")
num_replicas = _pick("num_replicas")
replica_number = _pick("replica_number")
sum_over_replicas = _pick("sum_over_replicas")

"""The methods, a file a paper: what experts start from, how tokens choose.

A file says its names itself, by `named` and `add_recipe`; this list is what
makes them known.
"""

from keras_upcycle.methods import branch_train_mix as branch_train_mix
from keras_upcycle.methods import carving as carving
from keras_upcycle.methods import default_moe as default_moe
from keras_upcycle.methods import drop_upcycling as drop_upcycling
from keras_upcycle.methods import ds_moe as ds_moe
from keras_upcycle.methods import feed_forward_slices as feed_forward_slices
from keras_upcycle.methods import low_rank_experts as low_rank_experts
from keras_upcycle.methods import qwen2_moe as qwen2_moe
from keras_upcycle.methods import random_experts as random_experts
from keras_upcycle.methods import shared_experts as shared_experts
from keras_upcycle.methods import skywork as skywork
from keras_upcycle.methods import sparse_upcycling as sparse_upcycling
from keras_upcycle.methods import virtual_groups as virtual_groups
from keras_upcycle.methods.upit import recipe as upit_recipe  # noqa: F401

"""The only folder that touches private attributes of Keras and KerasHub.

Each function wraps one of them and says why and with which versions it was
checked; its tests fail loudly when Keras changes.
"""

from keras_upcycle.keras_internals.dropout import add_dropout as add_dropout
from keras_upcycle.keras_internals.dropout import (
    attention_rate as attention_rate,
)
from keras_upcycle.keras_internals.dropout import (
    set_attention_rate as set_attention_rate,
)
from keras_upcycle.keras_internals.dropout import set_rate as set_rate
from keras_upcycle.keras_internals.dropout import (
    uses_flash_attention as uses_flash_attention,
)
from keras_upcycle.keras_internals.files import file_holds as file_holds
from keras_upcycle.keras_internals.files import preset_class as preset_class
from keras_upcycle.keras_internals.files import (
    saves_more_than_variables as saves_more_than_variables,
)
from keras_upcycle.keras_internals.graphs import Functional as Functional
from keras_upcycle.keras_internals.graphs import output_shapes as output_shapes
from keras_upcycle.keras_internals.graphs import (
    sequential_as_functional as sequential_as_functional,
)
from keras_upcycle.keras_internals.graphs import tracked_nodes as tracked_nodes
from keras_upcycle.keras_internals.layers import TRAINING as TRAINING
from keras_upcycle.keras_internals.layers import all_layers as all_layers
from keras_upcycle.keras_internals.layers import (
    base_attributes as base_attributes,
)
from keras_upcycle.keras_internals.layers import build_inside as build_inside
from keras_upcycle.keras_internals.layers import freeze_tree as freeze_tree
from keras_upcycle.keras_internals.layers import lambda_like as lambda_like
from keras_upcycle.keras_internals.layers import made_to_train as made_to_train
from keras_upcycle.keras_internals.layers import (
    named_sublayers as named_sublayers,
)
from keras_upcycle.keras_internals.layers import own_methods as own_methods
from keras_upcycle.keras_internals.layers import (
    plain_settings as plain_settings,
)
from keras_upcycle.keras_internals.layers import (
    policy_of_tree as policy_of_tree,
)
from keras_upcycle.keras_internals.layers import (
    remat_is_asked_for as remat_is_asked_for,
)
from keras_upcycle.keras_internals.layers import (
    replace_sublayer as replace_sublayer,
)
from keras_upcycle.keras_internals.layers import set_attribute as set_attribute
from keras_upcycle.keras_internals.layers import (
    set_trainable_alone as set_trainable_alone,
)
from keras_upcycle.keras_internals.layers import sublayers as sublayers
from keras_upcycle.keras_internals.layers import torch_tensors as torch_tensors
from keras_upcycle.keras_internals.layers import unlocked as unlocked
from keras_upcycle.keras_internals.layers import wrap_sublayer as wrap_sublayer
from keras_upcycle.keras_internals.layouts import (
    LayoutOfTuples as LayoutOfTuples,
)
from keras_upcycle.keras_internals.layouts import axes_of as axes_of
from keras_upcycle.keras_internals.layouts import (
    kernel_variable as kernel_variable,
)
from keras_upcycle.keras_internals.losses import (
    LossesByReplica as LossesByReplica,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    AdafactorOfExperts as AdafactorOfExperts,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    FactorsByVariable as FactorsByVariable,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    FreshSlots as FreshSlots,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    GradientMeter as GradientMeter,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    LambOfExperts as LambOfExperts,
)
from keras_upcycle.keras_internals.optimizer_classes import (
    MuonOfExperts as MuonOfExperts,
)
from keras_upcycle.keras_internals.optimizers import (
    compiled_with as compiled_with,
)
from keras_upcycle.keras_internals.optimizers import (
    copy_decay_exclusions as copy_decay_exclusions,
)
from keras_upcycle.keras_internals.optimizers import decays as decays
from keras_upcycle.keras_internals.optimizers import (
    learning_rate_of as learning_rate_of,
)
from keras_upcycle.keras_internals.optimizers import (
    not_built_for_training as not_built_for_training,
)
from keras_upcycle.keras_internals.optimizers import (
    optimizer_of_step as optimizer_of_step,
)
from keras_upcycle.keras_internals.optimizers import (
    optimizer_scalars as optimizer_scalars,
)
from keras_upcycle.keras_internals.optimizers import (
    optimizer_slots as optimizer_slots,
)
from keras_upcycle.keras_internals.optimizers import (
    optimizer_targets as optimizer_targets,
)
from keras_upcycle.keras_internals.optimizers import (
    optimizers_by_path as optimizers_by_path,
)
from keras_upcycle.keras_internals.optimizers import (
    spared_from_decay as spared_from_decay,
)
from keras_upcycle.keras_internals.optimizers import whole as whole
from keras_upcycle.keras_internals.optimizers import (
    without_rate as without_rate,
)
from keras_upcycle.keras_internals.optimizers import (
    wrapped_function as wrapped_function,
)
from keras_upcycle.keras_internals.quantization import has_lora as has_lora
from keras_upcycle.keras_internals.quantization import (
    look_before_quantizing as look_before_quantizing,
)
from keras_upcycle.keras_internals.quantization import (
    rows_of_quantized as rows_of_quantized,
)
from keras_upcycle.keras_internals.state import DrawnSeed as DrawnSeed
from keras_upcycle.keras_internals.state import StepState as StepState
from keras_upcycle.keras_internals.state import UnsavedState as UnsavedState
from keras_upcycle.keras_internals.state import attach_state as attach_state
from keras_upcycle.keras_internals.state import (
    drop_compiled_inference as drop_compiled_inference,
)
from keras_upcycle.keras_internals.state import (
    drop_compiled_training as drop_compiled_training,
)
from keras_upcycle.keras_internals.state import seed_of as seed_of
from keras_upcycle.keras_internals.state import seed_states as seed_states
from keras_upcycle.keras_internals.state import step_states as step_states
from keras_upcycle.keras_internals.state import sync_state as sync_state
from keras_upcycle.keras_internals.variables import Reshaped as Reshaped
from keras_upcycle.keras_internals.variables import (
    draw_first_values as draw_first_values,
)
from keras_upcycle.keras_internals.variables import has_value as has_value
from keras_upcycle.keras_internals.variables import (
    lost_variables as lost_variables,
)
from keras_upcycle.keras_internals.variables import (
    metric_variables as metric_variables,
)
from keras_upcycle.keras_internals.variables import (
    own_variables as own_variables,
)
from keras_upcycle.keras_internals.variables import (
    set_first_value as set_first_value,
)
from keras_upcycle.keras_internals.variables import shown as shown
from keras_upcycle.keras_internals.variables import values_kept as values_kept
from keras_upcycle.keras_internals.variables import (
    without_values as without_values,
)

"""Experts spread over several devices: `keras.distribution` for mixtures.

JAX alone spreads variables; on other backends the names are here, and say so.
"""

from keras_upcycle.distribution.checkpoints import (
    load_checkpoint as load_checkpoint,
)
from keras_upcycle.distribution.expert_parallel import (
    ExpertParallel as ExpertParallel,
)
from keras_upcycle.distribution.layouts import (
    expert_layout_map as expert_layout_map,
)

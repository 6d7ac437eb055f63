"""Which tokens meet which experts, with which weights: routers and losses.

A router makes its name known where it is written, so both are imported here.
"""

from keras_upcycle.routing import expert_choice_router as expert_choice_router
from keras_upcycle.routing import top_k_router as top_k_router

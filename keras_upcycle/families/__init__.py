"""Where a model's feed-forward blocks are, and how layers are exchanged.

A new kind of model is a `Family` (`base`) and a line in `registry`.
"""

from keras_upcycle.families.attention_sites import (
    AttentionSite as AttentionSite,
)
from keras_upcycle.families.base import Family as Family
from keras_upcycle.families.base import FeedForwardSite as FeedForwardSite
from keras_upcycle.families.base import Findings as Findings
from keras_upcycle.families.registered_blocks import (
    register_block as register_block,
)
from keras_upcycle.families.registry import family_of as family_of
from keras_upcycle.families.registry import known_families as known_families
from keras_upcycle.families.registry import mixtures_known as mixtures_known
from keras_upcycle.families.registry import register_family as register_family
from keras_upcycle.families.registry import taken_apart as taken_apart
from keras_upcycle.families.surgery import is_plain_model as is_plain_model

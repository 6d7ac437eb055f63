"""Inner classes of KerasHub 0.32's models, which it does not export."""

from keras_hub.src.models.t5.t5_transformer_layer import (
    T5TransformerLayer as T5TransformerLayer,
)
from keras_hub.src.models.vit.vit_layers import ViTEncoder as ViTEncoder
from keras_hub.src.models.vit.vit_layers import (
    ViTEncoderBlock as ViTEncoderBlock,
)

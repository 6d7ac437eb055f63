"""Inner classes of KerasHub 0.32's models, which it does not export."""

from keras_hub.src.models.t5.t5_transformer_layer import T5TransformerLayer
from keras_hub.src.models.vit.vit_layers import MLP as ViTMLP
from keras_hub.src.models.vit.vit_layers import ViTEncoder, ViTEncoderBlock

__all__ = ["T5TransformerLayer", "ViTEncoder", "ViTEncoderBlock", "ViTMLP"]

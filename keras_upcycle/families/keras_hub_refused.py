"""Backbones of KerasHub that are not converted, and why.

Data for messages, `find_feed_forwards(model, explain=True)` and the docs.
"""

_CONVOLUTIONS = (
    "it is made of convolutions and has no feed-forward block, which an expert "
    "could be a copy of. Upcycle a Vision Transformer, such as `ViTBackbone`"
)

# By name of the class.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("MiTBackbone", "SegFormerBackbone"),
        "a depthwise convolution stands between its projections, so a token "
        "needs its neighbours' hidden layer, while an expert sees one token. "
        "Upcycle `SwinTransformerBackbone` or `ViTBackbone` instead",
    ),
    "FluxBackbone": (
        "one kernel of its single blocks makes query, key, value and hidden "
        "layer, and one takes attention and hidden layer: there is no block "
        "to take out. Upcycle `MMDiT` instead"
    ),
    "StableDiffusion3Backbone": (
        "it is a pipeline of models around one Transformer, and cannot be made "
        "anew as a whole. Upcycle its `diffuser`, an `MMDiT`"
    ),
    "SAM3PromptableConceptBackbone": (
        "its blocks have not been tried with experts. Upcycle `SAMBackbone`, "
        "or teach the class with `keras_upcycle.register_family`"
    ),
    "RQVAEBackbone": (
        "it is stacks of `Dense` layers and has no block that returns to its "
        "width. Functional models of `Dense` pairs are converted"
    ),
    **dict.fromkeys(
        (
            *("BASNetBackbone", "CSPNetBackbone", "DeepLabV3Backbone"),
            *("DenseNetBackbone", "EfficientNetBackbone", "HGNetV2Backbone"),
            *("MobileNetBackbone", "MobileNetV5Backbone", "ResNetBackbone"),
            *("RetinaNetBackbone", "VAEBackbone", "VGGBackbone"),
            *("XceptionBackbone", "FeaturePyramidBackbone"),
        ),
        _CONVOLUTIONS,
    ),
}

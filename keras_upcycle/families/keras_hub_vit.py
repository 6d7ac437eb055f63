"""KerasHub's Vision Transformer: `ViTBackbone` and `ViTImageClassifier`.

KerasHub pairs tasks, preprocessors and converters with backbones through
`backbone_cls`, so a sparse backbone comes with one registered subclass of
each: then every stock `from_preset` finds them.
"""

import keras
import keras_hub

from keras_upcycle import keras_internals
from keras_upcycle.families import plain_layers, surgery
from keras_upcycle.families.adapter_biases import KeepsBiasesOfAdapters
from keras_upcycle.families.adapters import ChecksAdapters
from keras_upcycle.families.base import (
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
)
from keras_upcycle.families.keras_hub_fixes import (
    ClearsGradients,
    TakesPyDataset,
)
from keras_upcycle.keras_internals.keras_hub import (
    ViTEncoder,
    ViTEncoderBlock,
    ViTMLP,
)
from keras_upcycle.layers.expert_files import read_settings
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.state.random_state import KeepsRandomState

_PACKAGE = "keras_upcycle"
_ENCODER = "vit_encoder"


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledViTEncoder(ViTEncoder):
    """A `ViTEncoder` some of whose blocks hold experts.

    Carries the experts' settings in its config, so that a clone of it is
    sparse too and never silently dense.

    Args:
        experts: From a block's number, as a string, to the arguments of its
            `MoEFeedForward` or to the layer itself, unbuilt.
        **kwargs: Of `ViTEncoder`.
    """

    def __init__(self, *args, experts=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.given_experts = experts or {}

    def build(self, input_shape):
        super().build(input_shape)
        self.install(self.given_experts)

    def install(self, experts):
        """Puts experts into the blocks of a built encoder."""
        for number, layer in experts.items():
            block = self.encoder_layers[int(number)]
            if not isinstance(layer, MoEFeedForward):
                layer = MoEFeedForward(
                    **read_settings(layer),
                    dtype=self.dtype_policy,
                    name="moe",
                )
            keras_internals.build_inside(
                block.path, layer, (None, None, self.hidden_dim)
            )
            keras_internals.replace_sublayer(block, "mlp", layer)
        self.given_experts = {}

    @property
    def experts(self):
        """From block number to the arguments of its `MoEFeedForward`."""
        if not self.built:
            return self.given_experts
        return {
            str(number): block.mlp.saved_settings()
            for number, block in enumerate(self.encoder_layers)
            if isinstance(block.mlp, MoEFeedForward)
        }

    def get_config(self):
        return {**super().get_config(), "experts": self.experts}


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledViTBackbone(
    ChecksAdapters,
    KeepsBiasesOfAdapters,
    ClearsGradients,
    KeepsRandomState,
    keras_hub.models.ViTBackbone,
):
    """A `keras_hub.models.ViTBackbone` some of whose blocks hold experts.

    Made by `upcycle_model`; loads and saves as any backbone does.

    Args:
        experts: From a block's number, as a string, to the arguments of its
            `MoEFeedForward`.
        **kwargs: Of `keras_hub.models.ViTBackbone`.

    Example:
        >>> backbone = UpcycledViTBackbone(
        ...     experts={"1": {"num_experts": 4, "intermediate_dim": 16}},
        ...     image_shape=(8, 8, 3), patch_size=4, num_layers=2,
        ...     num_heads=2, hidden_dim=8, mlp_dim=16,
        ... )
        >>> tuple(backbone(keras.ops.ones((1, 8, 8, 3))).shape)
        (1, 5, 8)
    """

    def __init__(self, *, experts, **kwargs):
        super().__init__(**kwargs)
        encoder = self.get_layer(_ENCODER)
        # `ViTBackbone.__init__` names the stock class; the graph holds this
        # very object, so it is the object that becomes ours.
        encoder.__class__ = UpcycledViTEncoder
        encoder.install(experts)
        if not self.trainable:
            keras_internals.freeze_tree(self)  # what came after, too

    @property
    def experts(self):
        """From block number to the arguments of its `MoEFeedForward`."""
        return self.get_layer(_ENCODER).experts

    def get_config(self):
        # The stock config leaves `data_format` out.
        return {
            **super().get_config(),
            "data_format": self.data_format,
            "experts": self.experts,
        }


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledViTImageConverter(keras_hub.layers.ViTImageConverter):
    """The stock converter, found for presets of `UpcycledViTBackbone`."""

    backbone_cls = UpcycledViTBackbone


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledViTImageClassifierPreprocessor(
    keras_hub.models.ViTImageClassifierPreprocessor
):
    """The stock preprocessor, found for presets of `UpcycledViTBackbone`."""

    backbone_cls = UpcycledViTBackbone
    image_converter_cls = UpcycledViTImageConverter


@keras.saving.register_keras_serializable(package=_PACKAGE)
class UpcycledViTImageClassifier(
    TakesPyDataset, KeepsRandomState, keras_hub.models.ViTImageClassifier
):
    """A `keras_hub.models.ViTImageClassifier` on a sparse backbone.

    Made by `upcycle_model`; every stock entry point, such as
    `keras_hub.models.ImageClassifier.from_preset`, finds it. `fit`, `evaluate`
    and `predict` also take a `keras.utils.PyDataset`.
    """

    backbone_cls = UpcycledViTBackbone
    preprocessor_cls = UpcycledViTImageClassifierPreprocessor

    # `backbone` and `num_classes` must be named: `clone_model` takes a class
    # of bare `*args` for a plain functional model and calls it as one.
    def __init__(self, backbone, num_classes, head_dtype=None, **kwargs):
        super().__init__(backbone, num_classes, head_dtype=head_dtype, **kwargs)
        self.head_dtype = head_dtype

    def get_config(self):
        # The stock config leaves `head_dtype` out.
        config = super().get_config()
        if self.head_dtype is not None:
            config["head_dtype"] = keras.dtype_policies.serialize(
                keras.dtype_policies.get(self.head_dtype)
            )
        return config


class ViTFamily(Family):
    """See the module's docstring."""

    name = "ViTBackbone"
    inner_classes = (ViTEncoder,)

    def find(self, model):
        findings = Findings()
        backbone = _backbone(model)
        policy = backbone.get_layer(_ENCODER).dtype_policy
        for block in _blocks(backbone):
            path = f"{_ENCODER}/{block.name}/mlp"
            if (
                type(block) is not ViTEncoderBlock
                or type(block.mlp) is not ViTMLP
            ):
                findings.rejected.append(
                    (
                        path,
                        f"it is a {type(block).__name__} with a "
                        f"{type(block.mlp).__name__}, not the stock block "
                        "with its MLP",
                    )
                )
                continue
            reason = _why_not_stock(block.mlp, policy)
            if reason is not None:
                findings.rejected.append((path, reason))
                continue
            index = len(findings.sites)
            findings.sites.append(_site(index, path, block.mlp))
        return findings

    def rebuild(self, model, sites, replacements):
        numbers = {site.index: _number(model, site) for site in sites}
        experts = {
            str(numbers[index]): layer for index, layer in replacements.items()
        }
        replaced = [
            site.layers[0] for site in sites if site.index in replacements
        ]
        old = _backbone(model)
        with keras_internals.without_values():
            new = _sparse_backbone(old, experts)
        surgery.copy_state(
            old, new, replaced, list(experts.values()), from_config=True
        )
        keras_internals.draw_first_values(new)
        if model is old:
            return new
        return _classifier(model, new)

    def current_layers(self, model, sites):
        blocks = {b.name: b for b in _blocks(_backbone(model))}
        return [blocks[site.path.split("/")[-2]].mlp for site in sites]

    def blocks(self, model):
        return {ENCODER: _blocks(_backbone(model))}

    def build_dense(self, model, **changes):
        old = _backbone(model)
        config = {**_config(old), **changes}
        config.pop("experts", None)
        with keras_internals.without_values():
            new = keras_hub.models.ViTBackbone(**config)
        if model is old:
            return new
        # A task on torch reads the values of what it is made of.
        keras_internals.draw_first_values(new)
        return keras_hub.models.ViTImageClassifier(
            **_task_arguments(model, new, dense=True)
        )


def _config(backbone):
    """What makes an equal backbone; the stock config lacks `data_format`."""
    config = {**backbone.get_config(), "data_format": backbone.data_format}
    config["dtype"] = keras.dtype_policies.get(config["dtype"])
    return config


def _sparse_backbone(old, experts):
    config = _config(old)
    if not experts:
        return type(old)(**config)
    return UpcycledViTBackbone(experts=experts, **config)


def _classifier(old, backbone):
    """The task around a new backbone, its head and preprocessor kept."""
    dense_head = old.output_dense
    new = UpcycledViTImageClassifier(
        **_task_arguments(old, backbone, dense=False)
    )
    surgery.copy_state(dense_head, new.output_dense)
    if old.intermediate_dim is not None:
        surgery.copy_state(old.intermediate_layer, new.intermediate_layer)
    surgery.copy_state(
        old.get_layer("output_dropout"), new.get_layer("output_dropout")
    )
    return new


def _task_arguments(old, backbone, dense):
    return {
        "backbone": backbone,
        "num_classes": old.num_classes,
        "preprocessor": _preprocessor(old.preprocessor, dense),
        "pooling": old.pooling,
        "intermediate_dim": old.intermediate_dim,
        "activation": old.activation,
        "dropout": old.dropout,
        "head_dtype": _own_policy(old.output_dense, old.backbone),
        "name": old.name,
    }


def _own_policy(head, backbone):
    """The head's policy where it is not the backbone's, else `None`.

    A head that follows its backbone must go on doing so when the model is
    loaded with another `dtype`.
    """
    if head.dtype_policy.name == backbone.dtype_policy.name:
        return None
    return head.dtype_policy


def _preprocessor(old, dense):
    """The stock preprocessor as our class or back, anything else as it is.

    Sharing is safe: a preprocessor holds settings and is never trained.
    """
    preprocessors = [
        keras_hub.models.ViTImageClassifierPreprocessor,
        UpcycledViTImageClassifierPreprocessor,
    ]
    converters = [
        keras_hub.layers.ViTImageConverter,
        UpcycledViTImageConverter,
    ]
    if dense:
        preprocessors.reverse()
        converters.reverse()
    if type(old) is not preprocessors[0]:
        return old
    config = {**old.get_config()}
    converter = old.image_converter
    if type(converter) is converters[0]:
        converter = converters[1].from_config(converter.get_config())
    config["image_converter"] = converter
    return preprocessors[1].from_config(config)


def _why_not_stock(mlp, policy):
    """What an `MLP` does that its class does not say, or `None`."""
    layers = (mlp.dense_1, mlp.dropout, mlp.dense_2)
    return (
        plain_layers.why_not_plain(mlp, layers)
        or plain_layers.why_not_network(
            mlp.dense_1, mlp.dense_2, dropout=mlp.dropout
        )
        or plain_layers.why_not_policy(mlp.dense_1, policy)
    )


def _site(index, path, mlp):
    kernels = {
        "up_kernel": mlp.dense_1.kernel,
        "down_kernel": mlp.dense_2.kernel,
    }
    if mlp.dense_1.bias is not None:
        kernels["up_bias"] = mlp.dense_1.bias
        kernels["down_bias"] = mlp.dense_2.bias
    return FeedForwardSite(
        index=index,
        path=path,
        stack=ENCODER,
        layers=(mlp,),
        kernels=kernels,
        activation=mlp.dense_1.activation,
        dropout=mlp.dropout.rate,
        output_dropout=mlp.dropout.rate,
        default_router="expert_choice",
        modality="vision",
    )


def _backbone(model):
    return getattr(model, "backbone", model)


def _blocks(backbone):
    return backbone.get_layer(_ENCODER).encoder_layers


def _number(model, site):
    """The number of the block that holds the site."""
    for number, block in enumerate(_blocks(_backbone(model))):
        if block.mlp is site.layers[0]:
            return number
    raise ValueError(
        f"Site {site.path!r} is not a block of {model.name!r}. Pass the "
        "sites that `find` gave for this very model."
    )

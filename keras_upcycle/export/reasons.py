"""Whether a model can be said in a format of others, and why not."""

from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import target_reasons
from keras_upcycle.conversion.targets import TARGETS, Target
from keras_upcycle.errors import UpcycleError
from keras_upcycle.export import hugging_face_names
from keras_upcycle.families.keras_hub_classes import stock_class
from keras_upcycle.families.keras_hub_family import (
    KerasHubFamily,
    backbone_of,
)
from keras_upcycle.layers import moe_layers

KERAS_HUB, HUGGING_FACE = "keras_hub", "hugging_face"
FORMATS = (KERAS_HUB, HUGGING_FACE)


@dataclass(frozen=True)
class ExportCheck:
    """What `can_export` found; true if the model can be exported.

    Attributes:
        format: String, as asked.
        target: String, the kind of mixture that the format would call it;
            `None` where none is near.
        reasons: Tuple of strings, why not, each with what would allow it.
    """

    format: str
    target: str | None
    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        what = f"{self.format} ({self.target or 'no target'})"
        if self:
            return f"can be exported to {what}"
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        return f"cannot be exported to {what}:{lines}"


def check(
    model: keras.Model,
    format: str,
    target: str | None = None,
    untie_embeddings: bool = False,
) -> ExportCheck:
    """See `can_export`, and `export_model` for the arguments."""
    checks.check_instance("model", model, keras.Model, "a Keras model")
    format = checks.check_choice("format", format, FORMATS)
    if target is not None:
        target = checks.check_choice("target", target, tuple(TARGETS))
    found = _target(model, target)
    if isinstance(found, str):
        return ExportCheck(format, target, (found,))
    reasons = _reasons(model, format, found, untie_embeddings)
    return ExportCheck(format, found.name, tuple(dict.fromkeys(reasons)))


def require(
    model: keras.Model,
    format: str,
    target: str | None,
    untie_embeddings: bool,
) -> Target:
    """The target, if the model can be exported.

    Raises:
        UpcycleError: With all reasons, if it cannot.
    """
    found = check(model, format, target, untie_embeddings)
    if found:
        return TARGETS[found.target]  # type: ignore[index]
    raise UpcycleError(
        "`model` must be one that the format can say. Received: "
        f"{model.name!r}, which {found}\n`upcycle_model(..., "
        "target=...)` chooses settings that can be exported."
    )


def _target(model, name) -> Target | str:
    """The target, or why there is none."""
    family = families.family_of(model)
    known = [t.name for t in TARGETS.values()]
    if not isinstance(family, KerasHubFamily):
        return (
            f"it is no model of KerasHub's, but a {type(model).__name__}; the "
            f"targets {known} are"
        )
    kind = stock_class(type(backbone_of(model))).__name__
    fitting = [
        target
        for target in TARGETS.values()
        if kind == target.backbone or kind in target.sources
    ]
    if name is not None:
        fitting = [each for each in fitting if each.name == name]
    if fitting:
        return fitting[0]
    sources = {
        source: each.name
        for each in TARGETS.values()
        for source in each.sources
    }
    return (
        f"a {kind} is not what {name or 'any target'} can be made from. "
        f"Targets of dense models: {sources}; KerasHub's own mixtures go back "
        "to their class"
    )


def _reasons(model, format, target, untie):
    backbone = backbone_of(model)
    kind = stock_class(type(backbone)).__name__
    for layer in keras_internals.all_layers(model):
        if layer.quantization_mode is not None:
            yield (
                f"{layer.path!r} is quantized to {layer.quantization_mode!r}. "
                "Export the model from before it was"
            )
            return
        if keras_internals.has_lora(layer):
            yield (
                f"{layer.path!r} holds LoRA adapters. Merge them first: "
                "`save_weights` writes merged kernels, which a model without "
                "adapters loads"
            )
            return
    yield from target.why_not_backbone(kind, backbone)
    tied = getattr(backbone.token_embedding, "tie_weights", False)
    if tied and not target.ties and not untie:
        yield (
            "its embeddings are tied, and the target's are not. Use "
            "untie_embeddings=True, which writes them twice"
        )
    copied = moe_layers.attention_mixtures_in(model)
    if copied:
        yield (
            f"{copied[0].path!r} is of attention that is several experts, "
            "which no such format has. Convert without `attention`"
        )
        return
    routed = moe_layers.routed_heads_in(model)
    if routed:
        yield (
            f"{routed[0].path!r} routes attention heads, which no such format "
            "has. Convert without `attention`"
        )
        return
    layers = moe_layers.moe_layers_in(model)
    if any(layer.low_rank is not None for layer in layers):
        yield "its experts are low-rank. Use merge_experts first"
        return
    if not layers:
        own = families.family_of(model).mixtures(model)
        first = "adopt_model" if own else "upcycle_model"
        yield f"it holds no MoE layer. Use {first} first"
        return
    yield from target_reasons.why_not_all(
        target, layers, len(backbone.transformer_layers)
    )
    if format == HUGGING_FACE:
        yield from _of_hugging_face(backbone, target)


def _of_hugging_face(backbone: Any, target):
    known = hugging_face_names.TARGETS
    if target.name not in known:
        yield (
            f"folders of Hugging Face are written for {' and '.join(known)}, "
            f"not for {target.name}. Use format='keras_hub'"
        )
        return
    for name in ("rope_scaling_factor", "rope_position_scaling_factor"):
        factor = getattr(backbone, name, 1.0)
        if factor != 1.0:
            yield (
                f"its rotary embedding is scaled ({name}={factor}). Use "
                f"{name}=1.0"
            )

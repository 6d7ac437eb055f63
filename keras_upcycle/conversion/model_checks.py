"""Whether a model can be converted: said before anything changes."""

import keras
from keras import ops

from keras_upcycle import families, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers import (
    attention_mixture,
    moe_feed_forward,
    routed_heads,
)

# Of what was turned down, in an error.
_SHOWN = 8


def check_donor(
    model: keras.Model, whose: str = "The donor", action: str = "Upcycle"
) -> None:
    """Raises `UpcycleError` for weights that must not be copied.

    Adapters and integer kernels would not survive the copy, and one NaN would
    spread to every expert.

    Args:
        model: A dense model.
        whose: What it is to the caller.
        action: What the caller does with it.
    """
    check_floats(model, whose, action)
    for variable in model.weights:
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        if not bool(ops.all(ops.isfinite(variable.value))):
            raise UpcycleError(
                f"{whose}'s weights must be finite. Received: "
                f"{variable.path!r} of shape {tuple(variable.shape)} with NaN "
                "or infinity. Go back to a checkpoint from before the "
                "training diverged."
            )


def check_floats(layer: keras.Layer, whose: str, action: str) -> None:
    """Raises `UpcycleError` for integer kernels and for LoRA adapters.

    Args:
        layer: A layer or model.
        whose: What it is to the caller, such as `"The donor"`.
        action: What the caller does with it, such as `"Upcycle"`.
    """
    for below in keras_internals.all_layers(layer):
        mode = below.quantization_mode
        if mode is not None:
            raise UpcycleError(
                f"{whose}'s weights must be floats. Received: layer "
                f"{below.path!r}, quantized to {mode!r}. {action} the model "
                f"before it is quantized, then call `quantize({mode!r})` on "
                "the result."
            )
        if getattr(below, "low_rank", None) is not None:
            raise UpcycleError(
                f"{whose} must not hold low-rank experts. Received: layer "
                f"{below.path!r} with low_rank={below.low_rank}. Make them "
                "whole first: `merge_experts(model)`."
            )
        if keras_internals.has_lora(below):
            raise UpcycleError(
                f"{whose} must not hold LoRA adapters. Received: layer "
                f"{below.path!r} with adapters enabled. Merge them first: "
                "`model.save_weights(path)` writes merged kernels, which "
                "`load_weights(path)` reads into a fresh model of the same "
                "structure."
            )


def check_not_upcycled(model):
    """Raises `UpcycleError` for a model that is sparse already."""
    for layer in keras_internals.all_layers(model):
        if isinstance(layer, routed_heads.RoutedHeads):
            raise UpcycleError(
                "`model` must be dense. Received: "
                f"{model.name!r}, whose {layer.path or layer.name!r} routes "
                "attention heads already. Upcycle the dense model that it came "
                "from, with `attention=` for its heads."
            )
        if isinstance(layer, attention_mixture.AttentionMixture):
            raise UpcycleError(
                "`model` must be dense. Received: "
                f"{model.name!r}, whose {layer.path or layer.name!r} is of "
                "attention that is several experts already. Upcycle the dense "
                "model that it came from, with `attention=` for its attention."
            )
        if isinstance(layer, moe_feed_forward.MoEFeedForward):
            raise UpcycleError(
                "`model` must be dense. Received: "
                f"{model.name!r}, whose layer {layer.path or layer.name!r} is "
                f"an MoE layer of {layer.num_experts} experts already. Upcycle "
                "the dense model that it came from."
            )


def nothing_found(model, findings):
    """The error for a model without a block to convert, with the reasons."""
    inside = families.taken_apart(model)
    if inside and families.is_plain_model(model):
        hint = (
            f"Layer {inside[0].name!r} belongs to a backbone whose graph was "
            "extended from `backbone.output`, which Keras itself can neither "
            "clone nor reload. Call the backbone as a layer instead: "
            "`keras.Model(inputs, head(backbone(inputs)))`."
        )
    else:
        hint = (
            "Looked for a known backbone, for known Transformer blocks, and "
            "for two `Dense` layers in a row whose second one returns to the "
            "width of the first one's input. Name a block of your own with "
            "`keras_upcycle.register_block`, or register your model with "
            "`keras_upcycle.register_family`; "
            "`keras_upcycle.find_feed_forwards(model, explain=True)` prints "
            "why each candidate was turned down "
            f"({len(findings.rejected)} here)"
        )
        shown = findings.rejected[:_SHOWN]
        if shown:
            hint += ": " + "; ".join(f"{path}: {why}" for path, why in shown)
        rest = len(findings.rejected) - len(shown)
        hint += f"; and {rest} more." if rest else "."
    return UpcycleError(
        f"No feed-forward block found in model {model.name!r} "
        f"({type(model).__name__}, {len(model.layers)} layers). Known "
        f"families: {', '.join(families.known_families())}. {hint}"
    )


def check_site(site):
    """Raises `UpcycleError` for a block whose weights do not fit together."""
    shapes = {
        name: tuple(variable.shape) for name, variable in site.kernels.items()
    }
    missing = {"up_kernel", "down_kernel"} - set(shapes)
    known = {
        f"{role}_{part}"
        for role in ("gate", "up", "down")
        for part in ("kernel", "bias")
    }
    problem = None
    if missing:
        problem = f"{sorted(missing)} missing"
    elif set(shapes) - known:
        problem = f"unknown names {sorted(set(shapes) - known)}"
    elif len(shapes["up_kernel"]) != 2:
        problem = "an up kernel that is no matrix"
    else:
        wide, hidden = shapes["up_kernel"]
        expected = {"up_kernel": (wide, hidden), "down_kernel": (hidden, wide)}
        if site.gated:
            expected["gate_kernel"] = (wide, hidden)
        if any(name.endswith("bias") for name in shapes):
            expected |= {"up_bias": (hidden,), "down_bias": (wide,)}
            if site.gated:
                expected["gate_bias"] = (hidden,)
        if shapes != expected:
            problem = f"kernels that do not fit together, expected {expected}"
    if problem:
        raise UpcycleError(
            "A family must describe a block by kernels (D, F) up and (F, D) "
            f"down. Received for block {site.path!r}: {problem}; got "
            f"{shapes}. This is a mistake in the family that found it."
        )

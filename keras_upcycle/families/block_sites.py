"""A block of a row as a `FeedForwardSite`, or why it is none."""

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import block_networks, plain_layers, surgery
from keras_upcycle.families.base import DECODER, ENCODER, FeedForwardSite
from keras_upcycle.families.rows import Stack

_NO_WEIGHTS = (keras.layers.Activation, keras.layers.InputLayer)


def looked_at(block, row):
    """The network of a block, and why it is none that experts could be."""
    if row is None:
        return None, f"it is in a {type(block).__name__}, not the stock block"
    found = block_networks.found_in(block, row)
    if isinstance(found, str):
        return None, found
    return found, _why_not(block, row, found)


def _why_not(block, row, found):
    network, roles = found.network, found.roles
    dropouts = block_networks.dropouts_of(found)
    for dropout in dropouts:
        reason = plain_layers.why_not_dropout(dropout)
        if reason is not None:
            return reason
    reason = None
    if row.whole is not None:
        beside = [
            below
            for below in keras_internals.sublayers(found.holder)
            if isinstance(below, _NO_WEIGHTS) or surgery.is_plain_model(below)
        ]
        reason = plain_layers.why_not_plain(
            found.holder, (*roles.values(), *dropouts, *beside)
        )
    policy = block.dtype_policy
    if network.follows_global_dtype:
        policy = keras.config.dtype_policy()
    return (
        reason
        or plain_layers.why_not_network(
            found.first,
            roles["down"],
            gate=_linear(found),
            masks=False,
        )
        or plain_layers.why_not_activation(
            found.activation, found.first.kernel.shape[-1]
        )
        or plain_layers.why_not_policy(found.first, policy)
    )


def _linear(found):
    """The projection that multiplies the activated one, where there is one."""
    return found.roles["up"] if "gate" in found.roles else None


def site_of(index, path, stack, number, block, row, found):
    """What experts are told of a block, which `looked_at` has found fit."""
    kernels = {}
    for role, layer in found.roles.items():
        kernels[f"{role}_kernel"] = plain_layers.kernel_of(layer)
        if layer.bias is not None:
            kernels[f"{role}_bias"] = layer.bias
    network = found.network
    layers = block_networks.old_layers(block, row, found)
    if row.whole is None:
        layers = layers[: len(found.roles)]
    # Of models of their own people have few blocks, perhaps one.
    half = stack.modality == "vision" or (row.alone and stack.modality is None)
    return FeedForwardSite(
        index=index,
        path=path,
        stack=stack.name,
        number=number,
        layers=tuple(layers),
        kernels=kernels,
        activation=found.activation,
        dropout=_rate(found, network.dropout),
        output_dropout=_rate(found, network.output_dropout),
        causal=stack.causal,
        default_router="top_k" if stack.causal else "expert_choice",
        default_layers="last_half" if half else "every_other",
        protects_first=not (row.alone and stack.modality is None),
        modality=stack.modality,
    )


def stack_of(row):
    """The stack of a block that stands in somebody's own model."""
    name = DECODER if row.causal else ENCODER
    return Stack(name, "", causal=row.causal, modality=None)


def last_name(row):
    """What a block's network is called in a path."""
    return "feed_forward" if row is None or not row.whole else row.whole


def _rate(found, name):
    layer = found.dropout(name)
    return 0.0 if layer is None else layer.rate


def path_of(stack, number, block, row, findings):
    """Where a block's network is, for people; no two are alike."""
    *above, _ = stack.path.split(".")
    place = "/".join(each for each in above if each != "*")
    last = last_name(row)
    path = "/".join(each for each in (place, block.name, last) if each)
    taken = {site.path for site in findings.sites}
    taken |= {rejected for rejected, _ in findings.rejected}
    if path not in taken:
        return path
    return "/".join(filter(None, (place, f"{block.name}_{number}", last)))

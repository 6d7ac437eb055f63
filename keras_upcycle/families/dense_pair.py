"""`Dense -> Dense` pairs in any functional or `Sequential` model.

A pair is a feed-forward block if the second layer returns to the first's
input width and nothing else sees the hidden tensor. An activation and a
`Dropout` may stand between, and each layer is called once.
"""

from collections import Counter

import keras

from keras_upcycle import keras_internals, surgery
from keras_upcycle.families.base import (
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
)

# Layers that attend causally without saying so in the call.
_CAUSAL_LAYERS = ("TransformerDecoder", "CachedMultiHeadAttention")


class DensePairFamily(Family):
    """See the module's docstring.

    The router defaults to Top-K: nothing in a `Dense` says whether later
    positions may be looked at, and with `(batch, D)` inputs a token is an
    example.
    """

    name = "DensePair"

    def find(self, model):
        findings = Findings()
        graph = _Graph(model)
        taken = set()
        for operation in graph.order:
            if type(operation) is not keras.layers.Dense:
                continue
            if id(operation) in taken:
                continue
            pair = graph.pair_from(operation)
            if isinstance(pair, str):
                findings.rejected.append((operation.name, pair))
                continue
            taken.update(id(layer) for layer in pair)
            index = len(findings.sites)
            findings.sites.append(_site(index, pair, graph.causal))
        return findings

    def rebuild(self, model, sites, replacements):
        places = {}
        for site in sites:
            if site.index in replacements:
                first, *others = site.layers
                places[id(first)] = replacements[site.index]
                places.update({id(other): surgery.REMOVED for other in others})
        return surgery.copy_model(model, lambda layer: places.get(id(layer)))

    def places(self, model, sites):
        by_name = {layer.name: layer for layer in model.layers}
        return [
            by_name.get(site.replacement) or by_name[site.layers[0].name]
            for site in sites
        ]

    def exchange(self, model, replacements):
        return surgery.copy_model(model, replacements.get)


class _Graph:
    """Who calls what, from Keras's own record of the graph."""

    def __init__(self, model):
        if isinstance(model, keras.Sequential):
            model = keras_internals.sequential_as_functional(model)
        self.calls = list(keras_internals.tracked_nodes(model))
        self.order = list(
            {id(call[0]): call[0] for call in self.calls}.values()
        )
        self.times = Counter(id(call[0]) for call in self.calls)
        self.outputs = {id(tensor) for tensor in model.outputs}
        self.readers = {}
        self.by_operation = {}
        self.causal = False
        for operation, inputs, outputs, kwargs in self.calls:
            self.by_operation[id(operation)] = (inputs, outputs)
            for tensor in inputs:
                self.readers.setdefault(id(tensor), []).append(operation)
            if kwargs.get("use_causal_mask"):
                self.causal = True
            if type(operation).__name__ in _CAUSAL_LAYERS:
                self.causal = True

    def pair_from(self, up):
        """The layers of the pair that starts at `up`, or why there is none."""
        width = self.by_operation[id(up)][0][0].shape[-1]
        chain = [up]
        while True:
            if self.times[id(chain[-1])] > 1:
                return f"{chain[-1].name!r} is called more than once"
            (hidden,) = self.by_operation[id(chain[-1])][1]
            readers = self.readers.get(id(hidden), [])
            if id(hidden) in self.outputs or not readers:
                return "its output is an output of the model"
            if len(readers) > 1:
                return (
                    f"the hidden tensor after {chain[-1].name!r} has "
                    f"{len(readers)} consumers"
                )
            reader = readers[0]
            chain.append(reader)
            if type(reader) is keras.layers.Dense:
                break
            if (
                not isinstance(reader, keras.layers.Dropout)
                and _activation(reader) is None
            ):
                return (
                    f"its output goes to {reader.name!r} "
                    f"({type(reader).__name__}), which is neither a Dense, an "
                    "activation nor a Dropout"
                )
        down = chain[-1]
        if self.times[id(down)] > 1:
            return f"{down.name!r} is called more than once"
        if down.units != width:
            return (
                f"{down.name!r} gives width {down.units}, not the input's "
                f"{width}"
            )
        return _obstacle(chain) or tuple(chain)


def _obstacle(chain):
    """Why experts could not do what the chain does, or `None`."""
    up, down = chain[0], chain[-1]
    between = [a for a in map(_activation, chain[1:-1]) if a is not None]
    if between and not _is_linear(up.activation):
        return f"{up.name!r} has an activation and another one follows"
    if len(between) > 1:
        return "more than one activation stands between the two"
    if len(chain) - 2 - len(between) > 1:
        return "more than one Dropout stands between the two"
    if between and len(chain) == 4 and _activation(chain[1]) is None:
        return "its Dropout stands before the activation, not after it"
    if not _is_linear(down.activation):
        return f"{down.name!r} has an activation, which experts have not"
    if up.use_bias != down.use_bias:
        return "one of the two has a bias and the other has none"
    if up.dtype_policy.name != down.dtype_policy.name:
        return "the two have different dtype policies"
    for layer in (up, down):
        for part in ("kernel", "bias"):
            for kind in ("regularizer", "constraint"):
                if getattr(layer, f"{part}_{kind}") is not None:
                    return (
                        f"{layer.name!r} has a {part}_{kind}, which experts "
                        "do not carry"
                    )
        if layer.activity_regularizer is not None:
            return f"{layer.name!r} has an activity_regularizer"
    return None


def _site(index, chain, causal):
    up, down = chain[0], chain[-1]
    activation, dropout = up.activation, 0.0
    for layer in chain[1:-1]:
        if isinstance(layer, keras.layers.Dropout):
            dropout = layer.rate
        else:
            activation = _activation(layer)
    kernels = {"up_kernel": up.kernel, "down_kernel": down.kernel}
    if up.use_bias:
        kernels |= {"up_bias": up.bias, "down_bias": down.bias}
    return FeedForwardSite(
        index=index,
        path=f"{up.name} -> {down.name}",
        stack=ENCODER,
        layers=tuple(chain),
        kernels=kernels,
        activation=activation,
        dropout=dropout,
        causal=causal,
        protects_first=False,
        # In a flat graph the name tells where the layer came from.
        replacement=f"{up.name}_moe",
    )


def _activation(layer):
    """The function of an activation layer, `None` for any other layer."""
    if type(layer) is keras.layers.Activation:
        return layer.activation
    if type(layer) is keras.layers.ReLU:
        plain = (
            layer.max_value is None
            and not layer.negative_slope
            and not layer.threshold
        )
        return keras.activations.relu if plain else None
    return None


def _is_linear(activation):
    return activation is None or activation is keras.activations.linear

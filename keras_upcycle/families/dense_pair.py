"""`Dense -> Dense` pairs in any functional or `Sequential` model.

A pair is a feed-forward block if the second layer returns to the first's
input width and nothing else sees the hidden tensor. An activation and a
`Dropout` may stand between, and each layer is called once. A layer that does
more than experts would do in its place keeps the pair dense, with a reason.
Plain models inside the model are entered, at any depth; one that is called
several times holds blocks that are.
"""

import dataclasses
from collections import Counter

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import plain_layers, surgery, why_not_converted
from keras_upcycle.families.base import (
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
)
from keras_upcycle.families.plain_layers import named

_DROPS = "while experts drop single values, as a Dropout does"
_OTHER_NOISE = "which is noise of another kind than a Dropout's"
_OF_ITS_OWN = (
    "an activation with settings of its own, which experts cannot be told. "
    "Give the Dense a function: `activation=`"
)
# What is said of layers between the two that only look like known ones.
_BETWEEN = {
    keras.layers.SpatialDropout1D: f"which drops whole channels, {_DROPS}",
    keras.layers.SpatialDropout2D: f"which drops whole channels, {_DROPS}",
    keras.layers.SpatialDropout3D: f"which drops whole channels, {_DROPS}",
    keras.layers.GaussianDropout: _OTHER_NOISE,
    keras.layers.GaussianNoise: _OTHER_NOISE,
    keras.layers.AlphaDropout: _OTHER_NOISE,
    keras.layers.ReLU: _OF_ITS_OWN,
    keras.layers.LeakyReLU: _OF_ITS_OWN,
    keras.layers.ELU: _OF_ITS_OWN,
    keras.layers.Softmax: _OF_ITS_OWN,
    keras.layers.PReLU: (
        "an activation with weights of its own, which experts do not have"
    ),
}

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
        graphs = _graphs(model)
        sharing = plain_layers.Sharing(model)
        taken = set()
        others = []
        for place, graph, operation in _operations(model, graphs):
            if type(operation) is not keras.layers.Dense:
                reason = why_not_converted.why_unread(operation)
                if reason is None:
                    others.append((place, operation))
                else:
                    findings.rejected.append((place, reason))
                continue
            if id(operation) in taken:
                continue
            pair = graph.pair_from(operation, sharing)
            if isinstance(pair, str):
                findings.rejected.append((place, pair))
                continue
            taken.update(id(layer) for layer in pair)
            site = _site(len(findings.sites), pair, graph.causal)
            inside = place.removesuffix(operation.name)
            findings.sites.append(
                dataclasses.replace(site, path=inside + site.path)
            )
        if not findings.sites:
            findings.rejected += [
                (place, reason)
                for place, operation in others
                for reason in [why_not_converted.why_no_candidate(operation)]
                if reason is not None
            ]
        return findings

    def rebuild(self, model, sites, replacements):
        places = {}
        for site in sites:
            if site.index in replacements:
                first, *others = site.layers
                places[id(first)] = replacements[site.index]
                places.update({id(other): surgery.REMOVED for other in others})
        return surgery.copy_model(model, lambda layer: places.get(id(layer)))

    def current_layers(self, model, sites):
        found = []
        for site in sites:
            owner = model
            for name in site.path.split("/")[:-1]:
                owner = owner.get_layer(name)
            by_name = {layer.name: layer for layer in owner.layers}
            first = site.layers[0].name
            found.append(by_name.get(site.replacement) or by_name[first])
        return found

    def replace_moe_layers(self, model, replacements):
        return surgery.copy_model(model, replacements.get)


def _graphs(model):
    """From the model and every plain model inside it, by id, to its graph.

    A layer that stands in two of them is called more than once, and where
    one of them is causal all of them are taken to be.
    """
    graphs = {}

    def enter(plain):
        if id(plain) in graphs:
            return
        graphs[id(plain)] = graph = _Graph(plain)
        for operation in graph.order:
            if surgery.is_plain_model(operation):
                enter(operation)

    enter(model)
    times = sum((graph.times for graph in graphs.values()), Counter())
    causal = any(graph.causal for graph in graphs.values())
    for graph in graphs.values():
        graph.times, graph.causal = times, causal
    return graphs


def _operations(model, graphs, inside="", seen=None):
    """`(place, graph, operation)` of all graphs, inputs first, each once.

    A place is a path of names: of the models entered, then the operation's.
    """
    seen = set() if seen is None else seen
    graph = graphs[id(model)]
    for operation in graph.order:
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        place = f"{inside}{operation.name}"
        if surgery.is_plain_model(operation):
            yield from _operations(operation, graphs, f"{place}/", seen)
        else:
            yield place, graph, operation


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
        self.keywords = {}
        self.causal = False
        for operation, inputs, outputs, kwargs in self.calls:
            self.by_operation[id(operation)] = (inputs, outputs)
            self.keywords[id(operation)] = kwargs
            for tensor in inputs:
                self.readers.setdefault(id(tensor), []).append(operation)
            if kwargs.get("use_causal_mask"):
                self.causal = True
            if type(operation).__name__ in _CAUSAL_LAYERS:
                self.causal = True

    def pair_from(self, up, sharing):
        """The layers of the pair that starts at `up`, or why there is none."""
        (entry, *_) = self.by_operation[id(up)][0]
        width = entry.shape[-1]
        if getattr(entry, "sparse", False):
            return "its input is a sparse tensor, which experts do not take"
        chain = [up]
        while True:
            if self.times[id(chain[-1])] > 1:
                return _called_again(chain[-1])
            (hidden,) = self.by_operation[id(chain[-1])][1]
            readers = self.readers.get(id(hidden), [])
            if id(hidden) in self.outputs or not readers:
                return "its output is an output of the model"
            if len(readers) > 1:
                names = ", ".join(map(named, readers))
                return (
                    f"the hidden tensor after {chain[-1].name!r} has "
                    f"{len(readers)} consumers: {names}. Only a `Dense` that "
                    "nothing else reads along with can become experts"
                )
            reader = readers[0]
            chain.append(reader)
            if type(reader) is keras.layers.Dense:
                break
            reason = _why_not_between(reader)
            if reason is not None:
                return (
                    f"its output goes to {reader.name!r} "
                    f"({type(reader).__name__}), {reason}"
                )
        down = chain[-1]
        if self.times[id(down)] > 1:
            return _called_again(down)
        if down.units != width:
            return (
                f"{down.name!r} gives width {down.units}, not the input's "
                f"{width}, while a block of experts keeps the width"
            )
        return (
            _obstacle(chain, len(entry.shape))
            or self._why_not_called_so(chain)
            or next(filter(None, map(sharing.why, chain)), None)
            or tuple(chain)
        )

    def _why_not_called_so(self, chain):
        """Arguments of a call that a mixture's call would not have."""
        for layer in chain:
            inputs, _ = self.by_operation[id(layer)]
            given = {
                name: value
                for name, value in self.keywords[id(layer)].items()
                if value is not None and value is not False
            }
            if len(inputs) > 1 or given:
                said = ", ".join(f"{k}={v!r}" for k, v in given.items())
                return (
                    f"{named(layer)} is called with more than its input: "
                    f"{said or 'several tensors'}. Experts follow the model's "
                    "own `training` and mask"
                )
        return None


def _obstacle(chain, rank):
    """Why experts could not do what the chain does, or `None`."""
    up, *between, down = chain
    activations = [layer for layer in between if not _is_dropout(layer)]
    dropouts = [layer for layer in between if _is_dropout(layer)]
    if activations and not _is_linear(up.activation):
        return (
            f"{up.name!r} has an activation and another one follows, "
            f"{named(activations[0])}"
        )
    if len(activations) > 1:
        return "more than one activation stands between the two"
    if len(dropouts) > 1:
        return "more than one Dropout stands between the two"
    if activations and dropouts and between[0] is dropouts[0]:
        return "its Dropout stands before the activation, not after it"
    if not _is_linear(down.activation):
        return f"{down.name!r} has an activation, which experts have not"
    reasons = [plain_layers.why_not_dense(layer) for layer in (up, down)]
    reasons += [plain_layers.why_not_dropout(layer) for layer in dropouts]
    for layer in activations:
        reasons.append(plain_layers.why_not_plain(layer))
        reasons.append(plain_layers.why_no_mask(layer))
    for reason in reasons:
        if reason is not None:
            return reason
    if (up.bias is None) != (down.bias is None):
        return "one of the two has a bias and the other has none"
    for layer in chain:
        if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
            return (
                f"{named(layer)} has a DTypePolicyMap, which goes by the path "
                "of a layer, and experts have a path of their own. Give the "
                "layer one policy"
            )
    activation = up.activation
    if activations:
        activation = _activation(activations[0])
    return plain_layers.why_not_one_dtype(
        chain
    ) or plain_layers.why_not_activation(activation, up.kernel.shape[-1], rank)


def _why_not_between(layer):
    """Why experts could not do what a layer between the two does."""
    if _is_dropout(layer) or _activation(layer) is not None:
        return None
    if not isinstance(layer, keras.Layer):
        return (
            "which is an operation, neither a Dense, an activation nor a "
            "Dropout. An activation can be given to the Dense: `activation=`"
        )
    for kind, reason in _BETWEEN.items():
        if type(layer) is kind:
            return reason
    for kind in (
        keras.layers.Dense,
        keras.layers.Dropout,
        keras.layers.Activation,
        keras.layers.ReLU,
    ):
        if isinstance(layer, kind):
            return f"which {plain_layers.not_exactly(layer, kind)}"
    return "which is neither a Dense, an activation nor a Dropout"


def _called_again(layer):
    return (
        f"{layer.name!r} is called more than once: experts in its place would "
        "serve one call alone. Give each call a layer of its own"
    )


def _site(index, chain, causal):
    up, down = chain[0], chain[-1]
    activation, dropout = up.activation, 0.0
    for layer in chain[1:-1]:
        if _is_dropout(layer):
            dropout = layer.rate
        else:
            activation = _activation(layer)
    kernels = {"up_kernel": up.kernel, "down_kernel": down.kernel}
    if up.bias is not None:
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


def _is_dropout(layer):
    return type(layer) is keras.layers.Dropout


def _is_linear(activation):
    return activation is None or activation is keras.activations.linear

"""`Dense -> Dense` pairs in any functional or `Sequential` model.

A pair is a feed-forward block if the second layer returns to the first's
input width and nothing else sees the hidden tensor; so is a gated unit, two
layers whose product goes to a third. An activation and a `Dropout` may stand
between, and each layer is called once. A layer that does
more than experts would do in its place keeps the pair dense, with a reason.
Plain models inside the model are entered, at any depth; one that is called
several times holds blocks that are.
"""

import dataclasses

from keras_upcycle.families import plain_layers, surgery, why_not_converted
from keras_upcycle.families.base import (
    ENCODER,
    Family,
    FeedForwardSite,
    Findings,
)
from keras_upcycle.families.pair_graph import graphs_of, operations_of
from keras_upcycle.families.pairs import pair_from, projection


class DensePairFamily(Family):
    """See the module's docstring.

    The router defaults to Top-K: nothing in a `Dense` says whether later
    positions may be looked at, and with `(batch, D)` inputs a token is an
    example.
    """

    name = "DensePair"

    def find(self, model):
        findings = Findings()
        graphs = graphs_of(model)
        sharing = plain_layers.Sharing(model)
        taken = set()
        others = []
        for place, graph, operation in operations_of(model, graphs):
            if projection(operation) is None:
                reason = why_not_converted.why_unread(operation)
                if reason is None:
                    others.append((place, operation))
                else:
                    findings.rejected.append((place, reason))
                continue
            if id(operation) in taken:
                continue
            pair = pair_from(graph, operation, sharing)
            if isinstance(pair, str):
                findings.rejected.append((place, pair))
                continue
            taken.update(id(layer) for layer in pair.layers)
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
                gone = (*others, *site.operations)
                places.update({id(other): surgery.REMOVED for other in gone})
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


def _site(index, pair, causal):
    kernels = {}
    for role in ("gate", "up", "down"):
        if role in pair.roles:
            kernels[f"{role}_kernel"] = plain_layers.kernel_of(pair.roles[role])
    if pair.roles["up"].bias is not None:
        kernels |= {f"{r}_bias": layer.bias for r, layer in pair.roles.items()}
    first, last = pair.layers[0], pair.layers[-1]
    return FeedForwardSite(
        index=index,
        path=f"{first.name} -> {last.name}",
        stack=ENCODER,
        layers=pair.layers,
        operations=pair.operations,
        kernels=kernels,
        activation=pair.activation,
        dropout=pair.dropout,
        causal=causal,
        protects_first=False,
        # In a flat graph the name tells where the layer came from.
        replacement=f"{first.name}_moe",
    )

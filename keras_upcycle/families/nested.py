"""A user's functional model that holds known backbones or blocks as layers.

The usual shape of transfer learning: inputs, perhaps augmentation, a backbone,
a head. Blocks are the backbones' own; everything around them is copied.
"""

import collections
import dataclasses

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import surgery
from keras_upcycle.families.base import (
    AttentionFindings,
    Family,
    Findings,
    layers_flops,
)
from keras_upcycle.families.known_block import BlockFamily


class NestedFamily(Family):
    """See the module's docstring.

    Args:
        family_of: From a layer to the family that knows it, or `None`.
    """

    name = "a functional model around a known backbone"

    def __init__(self, family_of):
        self.family_of = family_of

    def backbones(self, model):
        """`(family, backbone)` of each known backbone, plain models entered."""
        return [found[1:] for found in self._placed(model)]

    def _placed(self, model):
        """`(place, family, backbone)`, each backbone once.

        A place is a path of names: of the models entered, then its own.
        """
        found = {}
        for place, layer in _leaves(model):
            family = self.family_of(layer)
            if family is not None:
                found.setdefault(id(layer), (place, family, layer))
        return list(found.values())

    def find(self, model):
        findings = Findings()
        alone = collections.Counter()
        for place, family, backbone in self._placed(model):
            inner = family.find(backbone)
            for site in inner.sites:
                stack, number = f"{place}/{site.stack}", site.number
                if isinstance(family, BlockFamily):
                    # Blocks of one kind are a stack, in their order.
                    stack, number = site.stack, alone[site.stack]
                    alone[site.stack] += 1
                findings.sites.append(
                    dataclasses.replace(
                        site,
                        index=len(findings.sites),
                        path=f"{place}/{site.path}",
                        stack=stack,
                        number=number,
                    )
                )
            findings.rejected += [
                (f"{place}/{path}", reason) for path, reason in inner.rejected
            ]
        for place, layer in _leaves(model):
            if type(layer) is keras.layers.Dense:
                findings.rejected.append(
                    (
                        place,
                        "the model holds a known backbone, whose blocks are "
                        "the ones considered",
                    )
                )
        return findings

    def rebuild(self, model, sites, replacements):
        places = {}
        for family, backbone, outer, inner in self._split(model, sites):
            chosen = {
                i.index: replacements[o.index]
                for o, i in zip(outer, inner, strict=True)
                if o.index in replacements
            }
            places[id(backbone)] = family.rebuild(backbone, inner, chosen)
        return self._copy(model, places)

    def find_attention(self, model):
        findings = AttentionFindings()
        for place, family, backbone in self._placed(model):
            inner = family.find_attention(backbone)
            findings.sites += [
                dataclasses.replace(
                    site,
                    index=len(findings.sites) + at,
                    path=f"{place}/{site.path}",
                    stack=f"{place}/{site.stack}",
                )
                for at, site in enumerate(inner.sites)
            ]
            findings.rejected += [
                (f"{place}/{path}", reason) for path, reason in inner.rejected
            ]
        return findings

    def attention_layers(self, model):
        return {
            f"{place}/{path}": layer
            for place, family, backbone in self._placed(model)
            for path, layer in family.attention_layers(backbone).items()
        }

    def causal_heads(self, model):
        return [
            routed
            for family, backbone in self.backbones(model)
            for routed in family.causal_heads(backbone)
        ]

    def copy_for_heads(self, model):
        places = {
            id(backbone): family.copy_for_heads(backbone)
            for family, backbone in self.backbones(model)
            if family.find_attention(backbone).sites
        }
        return self._copy(model, places)

    def route_heads(self, model, heads):
        for place, family, backbone in self._placed(model):
            mine = {
                dataclasses.replace(
                    site,
                    path=site.path.removeprefix(f"{place}/"),
                    stack=site.stack.removeprefix(f"{place}/"),
                ): arguments
                for site, arguments in heads.items()
                if site.path.startswith(f"{place}/")
            }
            if mine:
                family.route_heads(backbone, mine)

    def current_layers(self, model, sites):
        found = []
        for place, family, backbone in self._placed(model):
            mine = [
                # As the family itself numbered and named them.
                dataclasses.replace(
                    site,
                    path=site.path.removeprefix(f"{place}/"),
                    stack=site.stack.removeprefix(f"{place}/"),
                )
                for site in sites
                if site.path.startswith(f"{place}/")
            ]
            found += family.current_layers(backbone, mine)
        return found

    def build_dense(self, model):
        places = {
            id(backbone): family.build_dense(backbone)
            for family, backbone in self.backbones(model)
        }
        kept = {
            id(block)
            for family, block in self.backbones(model)
            if isinstance(family, BlockFamily)
        }
        if any(new is None and at not in kept for at, new in places.items()):
            return None
        # What blocks hold is brought by who asked for a dense model.
        return surgery.copy_model(model, lambda layer: places.get(id(layer)))

    def replace_moe_layers(self, model, replacements):
        places = dict(replacements)
        for family, backbone in self.backbones(model):
            places[backbone] = family.replace_moe_layers(backbone, replacements)
            if places[backbone] is None and not isinstance(family, BlockFamily):
                return None
        return self._copy(model, {id(k): new for k, new in places.items()})

    def _copy(self, model, places):
        """A copy of the model; what blocks hold follows, once it is there."""
        new = surgery.copy_model(model, lambda layer: places.get(id(layer)))
        for family, block in self.backbones(model):
            if isinstance(family, BlockFamily):
                family.finish(block, places.get(id(block)))
        return new

    def matmul_flops(self, model):
        found = {}
        for place, family, backbone in self._placed(model):
            for stack, flops in family.matmul_flops(backbone).items():
                # What is done once an example has no stack.
                key = None if stack is None else f"{place}/{stack}"
                if isinstance(family, BlockFamily):
                    key = stack
                found[key] = found.get(key, 0) + flops
        everything = layers_flops(keras_internals.all_layers(model))
        rest = everything - sum(found.values())
        return {**found, None: found.get(None, 0) + rest}

    def _split(self, model, sites):
        """The sites of each backbone, as numbered outside and inside."""
        sites = list(sites)
        for family, backbone in self.backbones(model):
            inner = family.find(backbone).sites
            outer, sites = sites[: len(inner)], sites[len(inner) :]
            yield family, backbone, outer, inner


def _leaves(model, inside=""):
    """`(place, layer)` of the layers, plain models entered."""
    for layer in model.layers:
        place = f"{inside}{layer.name}"
        if surgery.is_plain_model(layer):
            yield from _leaves(layer, f"{place}/")
        else:
            yield place, layer

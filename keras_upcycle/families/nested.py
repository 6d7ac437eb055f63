"""A user's functional model that holds known backbones as layers.

The usual shape of transfer learning: inputs, perhaps augmentation, a backbone,
a head. Blocks are the backbones' own; everything around them is copied.
"""

import dataclasses

import keras

from keras_upcycle import keras_internals, surgery
from keras_upcycle.families.base import Family, Findings, layers_flops


class NestedFamily(Family):
    """See the module's docstring.

    Args:
        family_of: From a layer to the family that knows it, or `None`.
    """

    name = "a functional model around a known backbone"

    def __init__(self, family_of):
        self.family_of = family_of

    def backbones(self, model):
        """`(family, backbone)` of each known backbone, nested models entered.

        Also what a user's plain models nested in `model` hold.
        """
        found = {}
        for layer in model.layers:
            if surgery.is_plain_model(layer):
                found.update({id(b): (f, b) for f, b in self.backbones(layer)})
                continue
            family = self.family_of(layer)
            if family is not None:
                found[id(layer)] = (family, layer)
        return list(found.values())

    def find(self, model):
        findings = Findings()
        for family, backbone in self.backbones(model):
            inner = family.find(backbone)
            for site in inner.sites:
                findings.sites.append(
                    dataclasses.replace(
                        site,
                        index=len(findings.sites),
                        path=f"{backbone.name}/{site.path}",
                        stack=f"{backbone.name}/{site.stack}",
                    )
                )
            findings.rejected += [
                (f"{backbone.name}/{path}", reason)
                for path, reason in inner.rejected
            ]
        for layer in model.layers:
            if type(layer) is keras.layers.Dense:
                findings.rejected.append(
                    (
                        layer.name,
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
        return surgery.copy_model(model, lambda layer: places.get(id(layer)))

    def places(self, model, sites):
        found = []
        for family, backbone in self.backbones(model):
            mine = [s for s in sites if s.path.startswith(f"{backbone.name}/")]
            found += family.places(backbone, mine)
        return found

    def skeleton(self, model):
        places = {
            id(backbone): family.skeleton(backbone)
            for family, backbone in self.backbones(model)
        }
        if None in places.values():
            return None
        return surgery.rebuild(model, lambda layer: places.get(id(layer)))[0]

    def exchange(self, model, replacements):
        places = dict(replacements)
        for family, backbone in self.backbones(model):
            places[backbone] = family.exchange(backbone, replacements)
            if places[backbone] is None:
                return None
        return surgery.copy_model(model, places.get)

    def matmul_flops(self, model):
        found = {}
        for family, backbone in self.backbones(model):
            for stack, flops in family.matmul_flops(backbone).items():
                found[f"{backbone.name}/{stack}"] = flops
        everything = layers_flops(keras_internals.all_layers(model))
        return {**found, None: everything - sum(found.values())}

    def _split(self, model, sites):
        """The sites of each backbone, as numbered outside and inside."""
        sites = list(sites)
        for family, backbone in self.backbones(model):
            inner = family.find(backbone).sites
            outer, sites = sites[: len(inner)], sites[len(inner) :]
            yield family, backbone, outer, inner

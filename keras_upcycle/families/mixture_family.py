"""KerasHub's models that are sparse as they come."""

from dataclasses import dataclass

from keras_upcycle import keras_internals
from keras_upcycle.families import keras_hub_mixtures, sparse_blocks
from keras_upcycle.families.base import Findings
from keras_upcycle.families.block_sites import path_of
from keras_upcycle.families.keras_hub_classes import blocks_of
from keras_upcycle.families.keras_hub_family import KerasHubFamily, backbone_of
from keras_upcycle.families.stock_mixtures import FoundMixture, mixture_in

REASON = (
    "it is sparse already: its blocks choose among experts. "
    "`keras_upcycle.adopt_model` makes them MoE layers of this package, which "
    "run the chosen experts alone; or upcycle the dense model that it came from"
)


@dataclass(frozen=True, eq=False)
class MixtureSite:
    """A mixture of KerasHub's own in a model; the first four as of a
    `FeedForwardSite`.
    """

    index: int
    path: str
    stack: str
    number: int
    found: FoundMixture


class MixtureFamily(KerasHubFamily):
    """A backbone of KerasHub that is sparse as it comes, and its tasks."""

    def find(self, model):
        reason = keras_hub_mixtures.DENSE.get(self.name)
        if reason is None or self._is_sparse(model):
            reason = REASON
        return Findings(rejected=[(model.name, reason)])

    def _is_sparse(self, model):
        layers = keras_internals.all_layers(model)
        return bool(self.mixtures(model)) or any(
            sparse_blocks.is_sparse(layer) for layer in layers
        )

    def mixtures(self, model):
        backbone = backbone_of(model)
        found, named = [], Findings()
        for stack in self.row.stacks:
            for number, block in enumerate(blocks_of(backbone, stack)):
                row = sparse_blocks.row_of(block)
                mixture = None if row is None else mixture_in(block, row)
                if mixture is None:
                    continue
                path = path_of(stack, number, block, row, named)
                named.rejected.append((path, ""))
                site = MixtureSite(
                    len(found), path, stack.name, number, mixture
                )
                found.append(site)
        return found

    def places(self, model):
        return self.mixtures(model)

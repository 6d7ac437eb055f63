"""What `verify_upcycle` found, for people."""

from dataclasses import dataclass

import numpy as np

from keras_upcycle import tables
from keras_upcycle.conversion import differences

# Relative differences of outputs that rounding makes, and of equal weights
# that were once written in another precision.
SMALL, EQUAL = 1e-4, 1e-6
NAMED = 5


@dataclass(frozen=True)
class LayerReport:
    """One converted block, on the tokens that reached it.

    Attributes:
        path: Where the block was in the dense model.
        max_difference: Largest absolute difference from the dense block's
            output on the same input, over routed tokens.
        relative_difference: The same, divided by the largest absolute value
            of the dense block's output.
        unrouted_fraction: Share of real tokens that no expert processed; the
            residual branch alone carries them.
        mean_combine_weight: Mean over real tokens of the sum of combine
            weights: the factor on the dense output. 1 preserves it.
        intact_neurons: Share of the experts' hidden neurons that are whole
            dense neurons, up to a factor; `None` for integer kernels.
        expert_cosine: Mean cosine between two experts; `None` as above.
        active_share: Parameters that a token meets on average, as a share of
            the block's: experts, what is shared, and the router.
        tokens: How many real tokens reached the block; with none, what is
            measured on tokens is 0 and means nothing.
        expert_difference: Largest absolute difference of an expert's weights
            from the dense block's, divided by the largest of those; `None`
            for experts of another width, beside a shared one, or of integer
            kernels.
        slices: Experts, where they are parts of the block that are added as
            they are, as by `Carving`, so that combine weights do not sum to 1;
            `None` where they are not.
        slices_met: How many of them a real token meets on average. With all it
            meets the dense block.
    """

    path: str
    max_difference: float
    relative_difference: float
    unrouted_fraction: float
    mean_combine_weight: float
    intact_neurons: float | None
    expert_cosine: float | None
    active_share: float
    tokens: int = 0
    expert_difference: float | None = None
    slices: int | None = None
    slices_met: float | None = None

    def missing_slices(self) -> float:
        """How many parts of the block a token does not meet, on average."""
        if not self.tokens or self.slices is None:
            return 0.0
        return self.slices - (self.slices_met or 0.0)

    def missing_weight(self) -> float:
        """By how much the mean combine weight of routed tokens is not 1.

        0 for slices, whose weights are to be 1 each.
        """
        if not self.tokens or self.slices is not None:
            return 0.0
        return abs(1.0 - self.unrouted_fraction - self.mean_combine_weight)


@dataclass(frozen=True)
class UpcycleReport:
    """What `verify_upcycle` measured. Print it.

    Attributes:
        max_difference: Largest absolute difference of the models' outputs.
        relative_difference: The same, divided by the largest absolute output
            of the dense model.
        layers: A `LayerReport` for each converted block.
        changed: The layers outside converted blocks that hold something else
            than the dense model's.
        observations: What else was measured, where the outputs differ: which
            values are not finite, blocks that no token reached, a dense model
            that gives another output when it runs again, the precision.

    Example:
        >>> print(UpcycleReport(0.5, 0.25, layers=()))
        Output: max |difference| 5.0e-01, relative 2.5e-01.
        ...
    """

    max_difference: float
    relative_difference: float
    layers: tuple[LayerReport, ...]
    changed: tuple[differences.LayerDifference, ...] = ()
    observations: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (
                layer.path,
                f"{layer.max_difference:.1e}",
                f"{layer.relative_difference:.1e}",
                f"{layer.unrouted_fraction:.1%}",
                f"{layer.mean_combine_weight:.3f}",
                share(layer.intact_neurons),
                "-"
                if layer.expert_cosine is None
                else f"{layer.expert_cosine:.3f}",
                share(layer.active_share),
            )
            for layer in self.layers
        ]
        table = tables.text(
            (
                "converted block",
                "max |diff|",
                "relative",
                "unrouted",
                "mean weight",
                "intact",
                "cosine",
                "active",
            ),
            rows,
        )
        return (
            f"Output: max |difference| {self.max_difference:.1e}, relative "
            f"{self.relative_difference:.1e}.\n{self._verdict()}\n{table}\n"
            "intact: the experts' neurons that are whole dense neurons; "
            "cosine: between two\nexperts, mean of all pairs; active: the "
            "block's parameters that a token meets."
        )

    def _verdict(self):
        if not np.isfinite(self.relative_difference):
            return (
                "An output is not a finite number: "
                f"{'; '.join(self.observations)}."
            )
        causes = [*self._routing_causes(), *self._weight_causes()]
        if self.relative_difference < SMALL:
            causes = self._routing_causes()
            note = f" Yet {'; and '.join(causes)}." if causes else ""
            return f"The sparse model computes what the dense one does.{note}"
        causes += self._block_causes() + list(self.observations)
        if causes:
            return f"The output differs because {'; and '.join(causes)}."
        return (
            "The output differs, and nothing that was measured tells why: "
            "every block gives on the same input what the dense block gives, "
            "and what layers outside hold is equal as far as it can be "
            "compared."
        )

    def _routing_causes(self):
        met = [layer for layer in self.layers if layer.tokens]
        causes = []
        unrouted = max((layer.unrouted_fraction for layer in met), default=0.0)
        if unrouted > 0.0:
            causes.append(
                f"up to {unrouted:.1%} of a block's tokens meet no expert "
                "(raise `capacity_factor`, or route by Top-K)"
            )
        cut = [layer for layer in met if layer.missing_slices() > 0.0]
        if cut:
            worst = max(cut, key=LayerReport.missing_slices)
            causes.append(
                f"a token meets {worst.slices_met:.2f} of the "
                f"{worst.slices} slices of {worst.path!r} on average, as was "
                "asked for (`top_k` is how many; all of them are the dense "
                "block)"
            )
        off = max(met, key=LayerReport.missing_weight, default=None)
        if off is not None and off.missing_weight() > 0.001:
            causes.append(
                f"combine weights sum to {off.mean_combine_weight:.3f} on "
                "average in one block (`normalize=True` makes that 1 for "
                "every routed token)"
            )
        return causes

    def _weight_causes(self):
        causes = []
        moved = [
            layer
            for layer in self.layers
            if (layer.expert_difference or 0.0) > EQUAL
        ]
        if moved:
            worst = max(moved, key=lambda layer: layer.expert_difference)
            causes.append(
                f"experts of {blocks(moved)} have other weights than the "
                f"dense block, by up to {worst.expert_difference:.1e} of its "
                f"largest in {worst.path!r}"
            )
        weights = [c for c in self.changed if (c.difference or 0.0) > EQUAL]
        if weights:
            causes.append(
                "weights outside the blocks differ: "
                + named([f"{c.path!r} by {c.difference:.1e}" for c in weights])
            )
        others = [c for c in self.changed if c.difference is None]
        if others:
            causes.append(
                "layers outside the blocks hold something else: "
                + named([f"{c.path!r} ({', '.join(c.holds)})" for c in others])
            )
        return causes

    def _block_causes(self):
        """Blocks that differ on the same input, if nothing above says why."""
        differ = [
            layer
            for layer in self.layers
            if layer.relative_difference >= SMALL
            and layer.missing_weight() <= 0.001
            and not layer.missing_slices()
            and (layer.expert_difference or 0.0) <= EQUAL
        ]
        if not differ:
            return []
        worst = max(differ, key=lambda layer: layer.relative_difference)
        why = (
            "with the dense block's weights in all its experts"
            if worst.expert_difference is not None
            else "with experts that cannot be compared with it weight by "
            "weight (of another width, quantized, or beside a shared one)"
        )
        return [
            f"{blocks(differ)} of itself differs from the dense one on the "
            f"same input, by {worst.relative_difference:.1e} in "
            f"{worst.path!r}, {why}"
        ]


def blocks(layers):
    """How many blocks, in words."""
    return "1 block" if len(layers) == 1 else f"{len(layers)} blocks"


def named(words):
    """The first few of a list, and how many more there are."""
    shown = ", ".join(words[:NAMED])
    more = len(words) - NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def share(value):
    """A share as a percentage; a dash for none."""
    return "-" if value is None else f"{value:.1%}"

"""What `prune_experts` removed, for people."""

from dataclasses import dataclass

from keras_upcycle import tables


@dataclass(frozen=True)
class LayerPruning:
    """What was removed from one MoE layer.

    Attributes:
        name: Of the block, as in a `RouterReading`.
        num_experts: How many experts it had.
        kept: Old numbers of those that are left, ascending: the first is
            expert 0 now.
        shares: What each of the old experts did on the inputs; see
            `prune_experts`. `None` where no inputs were given.
    """

    name: str
    num_experts: int
    kept: tuple[int, ...]
    shares: tuple[float, ...] | None

    @property
    def removed(self) -> tuple[int, ...]:
        """Old numbers of the experts that are gone, ascending."""
        return tuple(sorted(set(range(self.num_experts)) - set(self.kept)))

    @property
    def removed_share(self) -> float | None:
        """Share of the removed experts together."""
        if self.shares is None:
            return None
        return sum(self.shares[number] for number in self.removed)


@dataclass(frozen=True)
class PruneReport:
    """What `prune_experts` did. Print it.

    Attributes:
        parameters_before: Parameters of the model that was given.
        parameters_after: Of the one that came back.
        layers: A `LayerPruning` for each MoE layer, inputs first.

    Example:
        >>> print(PruneReport(1152, 576, layers=()))
        576 parameters in place of 1,152: 50.0% fewer.
        block ...
    """

    parameters_before: int
    parameters_after: int
    layers: tuple[LayerPruning, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{len(layer.kept)} of {layer.num_experts}",
                ", ".join(map(str, layer.removed)) or "none",
                "not measured"
                if layer.shares is None
                else f"{layer.removed_share:.1%}",
            )
            for layer in self.layers
        ]
        table = tables.text(("block", "kept", "removed", "their share"), rows)
        spared = 1 - self.parameters_after / self.parameters_before
        return (
            f"{self.parameters_after:,} parameters in place of "
            f"{self.parameters_before:,}: {spared:.1%} fewer.\n{table}"
        )

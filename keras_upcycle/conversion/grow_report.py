"""What `grow_experts` copied, for people."""

from collections import Counter
from dataclasses import dataclass

from keras_upcycle import tables


@dataclass(frozen=True)
class LayerGrowth:
    """What was copied in one MoE layer.

    Attributes:
        name: Of the block, as in a `RouterReading`.
        num_experts: How many experts it had.
        copied_from: For each expert that it has now, which one it was.
    """

    name: str
    num_experts: int
    copied_from: tuple[int, ...]

    @property
    def copies(self) -> tuple[int, ...]:
        """How many there are now of each expert that there was."""
        count = Counter(self.copied_from)
        return tuple(count[number] for number in range(self.num_experts))


@dataclass(frozen=True)
class GrowthReport:
    """What `grow_experts` did. Print it.

    Attributes:
        parameters_before: Parameters of the model that was given.
        parameters_after: Of the one that came back.
        layers: A `LayerGrowth` for each MoE layer, inputs first.

    Example:
        >>> print(GrowthReport(1152, 2304, layers=()))
        2,304 parameters in place of 1,152: 2.0 times as many.
        block ...
    """

    parameters_before: int
    parameters_after: int
    layers: tuple[LayerGrowth, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{len(layer.copied_from)} of {layer.num_experts}",
                ", ".join(map(str, layer.copies)),
            )
            for layer in self.layers
        ]
        table = tables.text(("block", "experts", "copies of each"), rows)
        times = self.parameters_after / self.parameters_before
        return (
            f"{self.parameters_after:,} parameters in place of "
            f"{self.parameters_before:,}: {times:.1f} times as many.\n{table}"
        )

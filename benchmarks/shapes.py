"""What a benchmark of one layer runs on: sizes, and which of them to sweep."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One configuration of a layer.

    Attributes:
        tokens: `T`, all in one example.
        hidden_dim: `D`.
        intermediate_dim: `F`.
        num_experts: `E`.
        top_k: `K`, experts a token.
        gated: SiLU-gated without biases, as the peers are, or plain GELU with
            biases.
        dtype: Policy of the weights and of the arithmetic.
        capacity_factor: Of the rows that have buffers.
    """

    tokens: int = 4096
    hidden_dim: int = 512
    intermediate_dim: int = 2048
    num_experts: int = 32
    top_k: int = 2
    gated: bool = False
    dtype: str = "float32"
    capacity_factor: float = 1.0

    def __str__(self):
        kind = "gated" if self.gated else "plain"
        return (
            f"T={self.tokens} D={self.hidden_dim} F={self.intermediate_dim} "
            f"E={self.num_experts} K={self.top_k} C={self.capacity_factor:g} "
            f"{kind} {self.dtype}"
        )


def add_options(parser, names) -> None:
    """Options of the command line for some settings, by their defaults."""
    for field in dataclasses.fields(Shape):
        if field.name not in names:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=field.type, default=field.default)


def of_options(args) -> Shape:
    """The shape that the command line asks for."""
    names = {f.name for f in dataclasses.fields(Shape)} & vars(args).keys()
    return Shape(**{name: getattr(args, name) for name in names})


# The values of each setting; a sweep changes one at a time, `product` all.
SWEPT = {
    "tokens": (64, 512, 4096, 16384),
    "num_experts": (4, 8, 32, 128),
    "top_k": (1, 2, 4),
    "gated": (False, True),
    "dtype": ("float32", "bfloat16"),
}


def one_at_a_time(base: Shape) -> list[Shape]:
    """`base`, and each neighbour that differs in one swept setting."""
    found = [base]
    for name, values in SWEPT.items():
        found += [dataclasses.replace(base, **{name: v}) for v in values]
    return list(dict.fromkeys(found))


def product(base: Shape) -> list[Shape]:
    """Every combination of the swept settings."""
    found = [base]
    for name, values in SWEPT.items():
        found = [
            dataclasses.replace(shape, **{name: value})
            for shape in found
            for value in values
        ]
    return found

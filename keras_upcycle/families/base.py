"""What a family answers: where the feed-forward blocks of a model are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras


@dataclass(frozen=True, eq=False)
class FeedForwardSite:
    """One dense feed-forward block found in a model.

    Attributes:
        index: Its number among the model's blocks, from 0, inputs first.
        path: Where it is, for people, like `"vit_encoder/3/mlp"`.
        stack: The stack it belongs to; a model with one stack calls it
            `"encoder"`. Defaults for layers are applied stack by stack.
        layers: Its layers in calling order: applied one after the other they
            are the block.
        kernels: Its variables: `"up_kernel"` `(D, F)`, `"down_kernel"`
            `(F, D)`, `"gate_kernel"` `(D, F)` where gated, and with biases
            `"up_bias"` `(F,)`, `"down_bias"` `(D,)`, `"gate_bias"` `(F,)`.
        activation: Activation of the hidden layer, as Keras takes it.
        dropout: Rate of the dropout on the hidden layer.
        output_dropout: Rate of the dropout on the output.
        causal: Whether it stands in a causal decoder, where Expert Choice
            would let a token see later ones.
        default_router: `"top_k"`, `"expert_choice"` or a `Router`.
    """

    index: int
    path: str
    stack: str
    layers: tuple[keras.Layer, ...]
    kernels: Mapping[str, keras.Variable]
    activation: Any
    dropout: float = 0.0
    output_dropout: float = 0.0
    causal: bool = False
    default_router: Any = "top_k"

    @property
    def gated(self) -> bool:
        """Whether a second hidden kernel gates the first."""
        return "gate_kernel" in self.kernels

    @property
    def use_bias(self) -> bool:
        """Whether the kernels have biases."""
        return "up_bias" in self.kernels

    @property
    def hidden_dim(self) -> int:
        """`D`."""
        return int(self.kernels["up_kernel"].shape[0])

    @property
    def intermediate_dim(self) -> int:
        """`F`."""
        return int(self.kernels["up_kernel"].shape[1])

    @property
    def dtype_policy(self) -> Any:
        """Policy of the block's first layer."""
        return self.layers[0].dtype_policy

    def __call__(self, x: Any) -> Any:
        """The dense block's own output, as at inference."""
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class Findings:
    """What a family found in a model, and what it turned down.

    Attributes:
        sites: The blocks, inputs first.
        rejected: `(path, reason)` of what looked like one and is none.
    """

    sites: list[FeedForwardSite] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


class Family:
    """Knows one kind of model. Derive from it and register the result.

    A family says where blocks are and puts layers in their place. It never
    looks at the values of weights and never hears of experts.

    Attributes:
        name: For messages.
        default_layers: Which blocks are converted unless asked otherwise:
            `"last_half"`, `"every_other"` or `"all"`.
        protects_first: Whether the first block is converted only when asked
            for by index, since sparsifying it "tends to be problematic"
            (Sparse Upcycling, arXiv 2212.05055, appendix B.4).
    """

    name = "family"
    default_layers = "last_half"
    protects_first = True

    def find(self, model: keras.Model) -> Findings:
        """The model's feed-forward blocks, and what was turned down."""
        raise NotImplementedError(f"{type(self).__name__} must define `find`.")

    def rebuild(
        self,
        model: keras.Model,
        sites: list[FeedForwardSite],
        replacements: Mapping[int, keras.Layer],
    ) -> keras.Model:
        """A new model with new layers in place of some blocks.

        Args:
            model: The model that `find` was given. It is not changed.
            sites: What `find` gave.
            replacements: From `site.index` to an unbuilt layer `(..., D)` to
                `(..., D)`; blocks not named are copied.

        Returns:
            A built model, all other weights and flags copied.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `rebuild`."
        )

    def places(
        self, model: keras.Model, sites: list[FeedForwardSite]
    ) -> list[keras.Layer]:
        """What stands at each site's place in another model of this kind.

        Args:
            model: The dense model, or what `rebuild` made of it, reloaded
                perhaps.
            sites: All that `find` gave for the dense model.

        Returns:
            Site by site, the block's first layer where it is still dense,
            else the layer that took its place.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `places`."
        )

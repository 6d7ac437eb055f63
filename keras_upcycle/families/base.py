"""What a family answers: where the feed-forward blocks of a model are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, keras_internals
from keras_upcycle.families import attention_sites, surgery
from keras_upcycle.families.attention_sites import AttentionSite

ENCODER, DECODER = "encoder", "decoder"
_MATMUL_LAYERS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
)


@dataclass(frozen=True, eq=False)
class FeedForwardSite:
    """One dense feed-forward block found in a model.

    Attributes:
        index: Its number among the model's blocks, from 0, inputs first.
        path: Where it is, for people, like `"vit_encoder/3/mlp"`.
        stack: The stack it belongs to; a model with one stack calls it
            `"encoder"`. Defaults for layers are applied stack by stack.
        number: Its block's number in the stack, from 0.
        layers: Its layers in calling order, the one whose place the mixture
            takes first.
        operations: What goes with them and is no layer, such as a product in
            a functional model.
        kernels: Its variables: `"up_kernel"` `(D, F)`, `"down_kernel"`
            `(F, D)`, `"gate_kernel"` `(D, F)` where gated, and with biases
            `"up_bias"` `(F,)`, `"down_bias"` `(D,)`, `"gate_bias"` `(F,)`.
            The gate is what the activation is applied to: a gated block is
            `down(activation(gate(x)) * up(x))`, a plain one
            `down(activation(up(x)))`.
        activation: Activation of the hidden layer, as Keras takes it; a
            `Float32Activation` where the block casts what it activates to
            float32, as KerasHub's Llama does.
        dropout: Rate of the dropout on the hidden layer.
        output_dropout: Rate of the dropout on the output.
        causal: Whether it stands in a causal decoder, where Expert Choice
            would let a token see later ones.
        default_router: `"top_k"`, `"expert_choice"` or a `Router`.
        default_layers: Which blocks of its stack are converted unless asked
            otherwise: `"last_half"`, `"every_other"`, `"all"` or
            `"all_but_first"`.
        protects_first: Whether the first block of its stack is converted only
            when asked for, by the caller or a recipe, since sparsifying it
            "tends to be problematic" (Sparse Upcycling, arXiv 2212.05055,
            appendix B.4).
        modality: `"language"` or `"vision"`, for recipes; `None` where the
            model does not say.
        replacement: Name of the layer that takes the block's place.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> (site,) = keras_upcycle.find_feed_forwards(dense)
        >>> site.hidden_dim, site.intermediate_dim, site.gated
        (8, 16, False)
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
    default_layers: str = "last_half"
    protects_first: bool = True
    modality: str | None = None
    replacement: str = "moe"
    number: int = 0
    operations: tuple[Any, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether an activated projection multiplies a linear one."""
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
        """The dense block's own output, as at inference: `(..., D)`."""
        dtype = self.layers[0].compute_dtype
        x = ops.cast(x, dtype)

        def project(x, role):
            x = ops.matmul(x, ops.cast(self.kernels[f"{role}_kernel"], dtype))
            if not self.use_bias:
                return x
            return x + ops.cast(self.kernels[f"{role}_bias"], dtype)

        activation = keras.activations.get(self.activation)
        gate = project(x, "gate") if self.gated else None
        hidden = backend.activated(activation, project(x, "up"), gate)
        return project(hidden, "down")


@dataclass
class Findings:
    """What a family found in a model, and what it turned down.

    Attributes:
        sites: The blocks, inputs first.
        rejected: `(path, reason)` of what looked like one and is none.
    """

    sites: list[FeedForwardSite] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class AttentionFindings:
    """Self-attention layers found in a model, and what was turned down.

    Attributes:
        sites: Those whose heads can be routed, inputs first.
        rejected: `(path, reason)` of the others.
    """

    sites: list[AttentionSite] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


class Family:
    """Knows one kind of model. Derive from it and register the result.

    A family says where blocks are and puts layers in their place. It never
    looks at the values of weights and never hears of experts.

    Attributes:
        name: For messages.
        inner_classes: Layers that stand only inside the family's models, so
            that one found elsewhere tells of a model taken apart.

    Example:
        >>> class MyFamily(Family):
        ...     name = "mine"
        ...     def find(self, model): ...
        ...     def rebuild(self, model, sites, replacements): ...
        ...     def current_layers(self, model, sites): ...
        >>> MyFamily().compile_arguments(keras.Sequential())
        {}
    """

    name = "family"
    inner_classes: tuple[type, ...] = ()

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
            model: A Keras model, the one that `find` was given. It is not
                changed.
            sites: List of `FeedForwardSite`, what `find` gave.
            replacements: Mapping from `site.index` to an unbuilt layer
                `(..., D)` to `(..., D)`; blocks not named are copied.

        Returns:
            A built model, all other weights and flags copied.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `rebuild`."
        )

    def current_layers(
        self, model: keras.Model, sites: list[FeedForwardSite]
    ) -> list[keras.Layer]:
        """What stands at each site's place in another model of this kind.

        Args:
            model: A Keras model, the dense one, or what `rebuild` made of it,
                reloaded perhaps.
            sites: List of `FeedForwardSite`, all that `find` gave for the dense
                model.

        Returns:
            Site by site, the block's first layer where it is still dense,
            else the layer that took its place.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `current_layers`."
        )

    # What follows has an answer that suits most models.

    def find_attention(self, model: keras.Model) -> AttentionFindings:
        """The self-attention layers whose heads can be routed.

        Args:
            model: A Keras model, dense or sparse.
        """
        return AttentionFindings(
            rejected=[
                (layer.path or layer.name, "it is in no known backbone")
                for layer in keras_internals.all_layers(model)
                if attention_sites.stock_attention(layer) is not None
            ]
        )

    def attention_layers(self, model: keras.Model) -> dict[str, keras.Layer]:
        """Self-attention layers, whatever was done to them, by their paths."""
        return {}

    def causal_heads(self, model: keras.Model) -> list[keras.Layer]:
        """The `RoutedHeads` that stand in causal stacks of a model."""
        return []

    def copy_for_heads(self, model: keras.Model) -> keras.Model:
        """A copy of a model, dense or sparse, whose heads may be routed."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `copy_for_heads`."
        )

    def route_alike(self, model: keras.Model, new: keras.Model) -> None:
        """Routes the heads of `new`, in place, that `model` routes."""

    def route_heads(
        self, model: keras.Model, heads: Mapping[AttentionSite, dict[str, Any]]
    ) -> None:
        """Routes heads of what `rebuild` or `copy_for_heads` made, in place.

        Args:
            model: A Keras model.
            heads: Mapping from sites, of the model that it was made of, to
                arguments of `RoutedHeads` or an `AttentionMixture`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `route_heads`."
        )

    def mixtures(self, model: keras.Model) -> list[Any]:
        """Mixtures of experts that are not ours, which `adopt_model` takes."""
        return []

    def places(self, model: keras.Model) -> list[Any]:
        """Where a model of those that `build_dense` makes takes MoE layers."""
        return self.find(model).sites

    def blocks(
        self, model: keras.Model
    ) -> Mapping[str, list[keras.Layer]] | None:
        """The Transformer blocks stack by stack, inputs first.

        `None` where their number is no setting, `num_layers`, of the model.
        """
        return None

    def build_dense(
        self, model: keras.Model, **changes: Any
    ) -> keras.Model | None:
        """A dense model of the structure that a sparse one came from.

        Args:
            model: A Keras model, what `rebuild` made, reloaded perhaps.
            **changes: Keyword arguments, settings that differ, such as
                `num_layers`, of a model that has `blocks`.

        Returns:
            A new built model of a class that is not sparse. Its values are
            nobody's, and some variables may have none yet. `None` where the
            sparse model does not tell.
        """
        return None

    def replace_moe_layers(
        self,
        model: keras.Model,
        replacements: Mapping[keras.Layer, keras.Layer],
    ) -> keras.Model | None:
        """A copy of a sparse model with other layers where it is sparse.

        Args:
            model: A Keras model, what `rebuild` made, reloaded perhaps. It is
                not changed.
            replacements: Mapping from every layer that took a block's place to
                the unbuilt layer that now takes its.

        Returns:
            A built model of the same kind, all other weights and flags
            copied; `None` where `build_dense` does not tell the structure.
        """
        dense = self.build_dense(model)
        if dense is None:
            return None
        keras_internals.draw_first_values(dense)
        sites = self.places(dense)
        places = zip(sites, self.current_layers(model, sites), strict=True)
        chosen = {
            site.index: replacements[layer]
            for site, layer in places
            if layer in replacements
        }
        new = self.rebuild(dense, sites, chosen)
        self.route_alike(model, new)
        surgery.copy_state(
            model, new, replacements.keys(), replacements.values()
        )
        return new

    def matmul_flops(self, model: keras.Model) -> dict[str, int]:
        """What a token costs: forward operations of its matrix products.

        Attention scores, which depend on the sequence length, are not in.

        Returns:
            Stack by stack, for one token of it. What does not belong to a
            stack and is done once an example stands under `None`.
        """
        return {ENCODER: layers_flops(keras_internals.all_layers(model))}

    def compile_arguments(self, model: keras.Model) -> dict[str, Any]:
        """Arguments of `compile` that Keras's own record leaves out."""
        return {}

    def check_inputs(self, model: keras.Model, inputs: Any) -> None:
        """Raises `ValueError` for inputs that would silently give nonsense."""

    def real_positions(self, model: keras.Model, inputs: Any) -> Any:
        """Which positions of the outputs are real, not padding.

        Args:
            model: A Keras model of this family.
            inputs: Array, tensor or structure of them: a batch as the model is
                called on.

        Returns:
            Masks in the structure of the model's outputs, each of the shape
            of its output less the last axis; `None` where all are real.
        """
        return None


def layers_flops(layers: Iterable[keras.Layer]) -> int:
    """Forward operations of the layers' matrix products, for one token."""
    return 2 * sum(
        math.prod(layer.kernel.shape)
        for layer in layers
        if isinstance(layer, _MATMUL_LAYERS)
    )

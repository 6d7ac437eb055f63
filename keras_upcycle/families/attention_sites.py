"""Where the heads of a block's self-attention are."""

import functools
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import keras_hub_attention
from keras_upcycle.families.plain_layers import (
    why_not_plain,
    why_not_weights,
)
from keras_upcycle.families.rows import Stack
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.routed_heads import RoutedHeads

_CROSS = "cross"
# The attribute of an attention layer that is several experts.
MIXTURE = "attention_mixture"


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One self-attention layer found in a model.

    Attributes:
        index: Its number among the model's, from 0, inputs first.
        path: Where it is, for people, like `"decoder/3/_self_attention"`.
        stack: The stack of its block.
        number: Its block's number in the stack, from 0.
        place: Where it is in its block, by names of attributes.
        layer: The attention layer.
        output: Name of its output projection.
        num_heads: Query heads (`H`).
        num_key_value_heads: Key-value heads (`G`).
        hidden_dim: `D`.
        causal: Whether it stands in a causal stack.
        modality: `"language"` or `"vision"`; `None` where the model does not
            say.
        default_layers: Which blocks of its stack are meant by default.

    Example:
        >>> backbone = keras_hub.models.ViTBackbone(
        ...     image_shape=(8, 8, 3), patch_size=4, num_layers=1,
        ...     num_heads=2, hidden_dim=8, mlp_dim=16,
        ... )
        >>> (site,) = keras_upcycle.find_attention(backbone)
        >>> site.num_heads, site.hidden_dim
        (2, 8)
    """

    index: int
    path: str
    stack: str
    number: int
    place: str
    layer: keras.Layer
    output: str
    num_heads: int
    num_key_value_heads: int
    hidden_dim: int
    causal: bool = False
    modality: str | None = None
    default_layers: str = "all"
    protects_first: bool = False


@functools.cache
def _rows() -> dict[type, keras_hub_attention.Attention]:
    return keras_hub_attention.known()


def stock_attention(layer: keras.Layer) -> keras_hub_attention.Attention | None:
    """The row of an attention layer, dense or with routed heads."""
    kind = getattr(layer, "stock_attention", type(layer))
    return _rows().get(kind)


def places_in(block: keras.Layer) -> dict[str, keras.Layer]:
    """Self-attention layers of a block, by names of attributes."""
    found: dict[str, keras.Layer] = {}
    seen = {id(block)}

    def walk(layer, names):
        for name, value in keras_internals.named_sublayers(layer).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            if _CROSS in name:
                continue
            if stock_attention(value) is not None:
                found[".".join((*names, name))] = value
            else:
                walk(value, (*names, name))

    walk(block, ())
    return found


def heads_of(layer: keras.Layer) -> tuple[int, int]:
    """Query and key-value heads of an attention layer."""
    row: Any = stock_attention(layer)
    heads = int(getattr(layer, row.heads))
    if row.key_value_heads is None:
        return heads, heads
    return heads, int(getattr(layer, row.key_value_heads))


def why_not(layer: keras.Layer) -> str | None:
    """Why the heads of a dense attention layer cannot be routed."""
    row: Any = stock_attention(layer)
    projection = getattr(layer, row.output, None)
    if projection is None:
        return "it is not built"
    if isinstance(projection, RoutedHeads):
        return "its heads are routed already"
    if mixture_of(layer) is not None:
        return "it is several experts already"
    if type(projection) not in (keras.layers.Dense, keras.layers.EinsumDense):
        return f"its output projection is a {type(projection).__name__}"
    if projection.quantization_mode is not None:
        return "its output projection is quantized"
    if keras_internals.has_lora(projection):
        return "its output projection holds LoRA adapters"
    heads, _ = heads_of(layer)
    rows = projection.kernel.shape[0]
    if len(projection.kernel.shape) == 2:
        fits = rows % heads == 0
    else:
        fits = rows == heads
    if not fits:
        return (
            f"its output projection has a kernel {projection.kernel.shape}, "
            f"which {heads} heads do not divide"
        )
    return None


def mixture_of(layer: keras.Layer) -> AttentionMixture | None:
    """What weighs the experts that an attention layer is, if it is some."""
    found = getattr(layer, MIXTURE, None)
    return found if isinstance(found, AttentionMixture) else None


def projections_of(
    layer: keras.Layer, shared_key_values: bool
) -> dict[str, Any]:
    """By role the projections that each expert has; none where they are one."""
    row: Any = stock_attention(layer)
    names = row.projections(shared_key_values)
    return {role: getattr(layer, name) for role, name in names.items()}


def why_not_copied(layer: keras.Layer, shared_key_values: bool) -> str | None:
    """Why a dense attention layer, one of a site, cannot become experts."""
    row: Any = stock_attention(layer)
    if row.inputs is None:
        return "one kernel holds its queries, keys and values"
    for projection in projections_of(layer, shared_key_values).values():
        kind = type(projection)
        if kind not in (keras.layers.Dense, keras.layers.EinsumDense):
            return f"its projection {projection.name!r} is a {kind.__name__}"
        reason = why_not_plain(projection) or why_not_weights(projection)
        if reason is not None:
            return reason
    return None


def site_of(
    index: int,
    path: str,
    stack: Stack,
    number: int,
    place: str,
    layer: keras.Layer,
) -> AttentionSite:
    """A layer that `why_not` has nothing against, as a site."""
    row: Any = stock_attention(layer)
    heads, key_value_heads = heads_of(layer)
    return AttentionSite(
        index=index,
        path=path,
        stack=stack.name,
        number=number,
        place=place,
        layer=layer,
        output=row.output,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        hidden_dim=int(getattr(layer, row.output).kernel.shape[-1]),
        causal=stack.causal,
        modality=stack.modality,
    )

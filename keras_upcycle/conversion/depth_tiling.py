"""A deeper dense model from a trained one: the baseline of depth tiling."""

import keras
from keras import ops

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.conversion import compile_settings, model_checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import copy_checks, surgery
from keras_upcycle.layers.moe_layers import moe_layers_in
from keras_upcycle.state import half_precision, layer_state

INTERLEAVED, BLOCKED = "interleaved", "blocked"
# The relative attention bias, which T5's first block holds for its stack.
_OF_FIRST_BLOCK = "embeddings"


def tile_depth(
    model: keras.Model, times: int, *, order: str = INTERLEAVED
) -> keras.Model:
    """A dense model `times` as deep, its blocks copies of the model's.

    The dense warm start that Sparse Upcycling compares itself with (arXiv
    2212.05055, figure 5): Transformer blocks are repeated as in Rae et al.
    (arXiv 2112.11446, "depth tiling"), all else is copied, and training goes
    on. The result does not compute what the model computes: each block now
    acts several times.

    The model is not changed and shares no weights with the result.

    Args:
        model: A Keras model, dense and built: a KerasHub `ViTBackbone`,
            `ViTImageClassifier`, `T5Backbone` or `T5Seq2SeqLM`.
        times: Integer, at least 1: `L` blocks of a stack become `L * times`.
        order: String, `"interleaved"` (default), `a, b, a, b`, or `"blocked"`,
            `a, a, b, b`. The papers do not say which they used.

    Returns:
        A built stock model of the same class with a larger `num_layers`,
        compiled as the model is, with a new optimizer. T5's relative
        attention bias, which the first block of a stack holds for all, is
        held once.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If the model is sparse, quantized, holds LoRA adapters,
            is of a kind whose depth is no setting, or has settings that were
            changed on a layer inside a block.

    Example:
        >>> dense = keras_hub.models.ViTBackbone(
        ...     image_shape=(16, 16, 3), patch_size=8, num_layers=2,
        ...     num_heads=2, hidden_dim=8, mlp_dim=16)
        >>> tile_depth(dense, 3).num_layers
        6
    """
    family = families.family_of(model)
    times = checks.check_count("times", times)
    checks.check_choice("order", order, (INTERLEAVED, BLOCKED))
    if moe_layers_in(model):
        raise UpcycleError(
            "`tile_depth` repeats the blocks of a dense model. Received: "
            f"{model.name!r}, which holds MoE layers. Tile the dense "
            "model, then upcycle the result."
        )
    blocks = family.blocks(model)
    if blocks is None:
        raise UpcycleError(
            "`tile_depth` takes a model whose number of blocks is a setting: "
            "a KerasHub ViT or T5, backbone or task. Received: "
            f"{model.name!r} ({type(model).__name__}). Tile the backbone and "
            "build what stands around it again, or write the deeper model "
            "yourself."
        )
    model_checks.check_donor(model)
    depths = {len(of_stack) for of_stack in blocks.values()}
    (depth,) = depths
    new = family.build_dense(model, num_layers=depth * times)
    keras_internals.draw_first_values(new)
    deeper = family.blocks(new) or {}
    inside = {
        id(block)
        for of_model in (blocks, deeper)
        for of_stack in of_model.values()
        for block in of_stack
    }
    pairs: list[tuple[keras.Variable, keras.Variable]] = []
    _copy_around(model, new, inside, pairs)
    for stack, of_stack in deeper.items():
        for number, block in enumerate(of_stack):
            source = number % depth if order == INTERLEAVED else number // times
            pairs += _copy_block(blocks[stack][source], block)
    compile_settings.carry(family, model, new, lambda: pairs)
    half_precision.warn_of_training(model)
    return new


def _copy_around(old, new, inside, pairs):
    """All but the blocks; adds `(new, old)` for each weight to `pairs`.

    What holds blocks is not the same layer as before: its settings, such as
    the number of blocks, stay.
    """
    within = {id(layer) for layer in keras_internals.all_layers(old)}
    if not within & inside:
        surgery.copy_state(old, new)
        pairs += zip(new.weights, old.weights, strict=True)
        return
    new.trainable = old.trainable
    pairs += _copy_own(old, new)
    below = [
        [
            layer
            for layer in keras_internals.sublayers(owner)
            if id(layer) not in inside
        ]
        for owner in (old, new)
    ]
    for pair in zip(*below, strict=True):
        _copy_around(*pair, inside, pairs)


def _copy_own(old, new):
    """A layer's own weights, but for what only a first block holds."""
    source = keras_internals.own_variables(old)
    target = keras_internals.own_variables(new)
    if len(source) != len(target):
        source = [v for v in source if v.name != _OF_FIRST_BLOCK]
        target = [v for v in target if v.name != _OF_FIRST_BLOCK]
    pairs = list(zip(target, source, strict=True))
    for b, a in pairs:
        # A copy: on JAX training one model would take the other's buffer.
        b.assign(ops.copy(a.value))
        layer_state.copy_flag(a, b)
    return pairs


def _copy_block(old, new):
    """As `surgery.copy_state`, but for what only a first block holds.

    Returns:
        `(new, old)` for each of the new block's weights.
    """
    new.trainable = old.trainable
    own = [len(keras_internals.own_variables(each)) for each in (old, new)]
    if own[0] == own[1]:  # else one of them is a first block's
        copy_checks.check_settings(old, new)
    pairs = _copy_own(old, new)
    below = zip(
        keras_internals.sublayers(old),
        keras_internals.sublayers(new),
        strict=True,
    )
    for pair in below:
        pairs += _copy_block(*pair)
    return pairs

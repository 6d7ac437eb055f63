"""What Hugging Face calls each weight of a Mixtral or a Qwen3-MoE.

From how KerasHub's own converters read these files.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_upcycle.conversion.targets import Target
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import sparse_blocks


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: In the file.
        shape: Of the tensor.
        dtype: Of the variable, as Keras calls it.
        read: Gives the values, float, of that shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class _Experts(NamedTuple):
    """Names within a block: `{}` is the expert's number."""

    router: str
    gate: str
    up: str
    down: str


_EXPERTS = {
    "mixtral": _Experts(
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
        "block_sparse_moe.experts.{}.w2.weight",
    ),
    "qwen3_moe": _Experts(
        "mlp.gate.weight",
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    ),
}


# Of which targets there are folders.
TARGETS = tuple(_EXPERTS)


def _as_it_is(array):
    return array


def _transposed(array):
    return array.T


def _from_heads(array):
    """`(D, H, d)` to `(H * d, D)`."""
    return array.reshape(array.shape[0], -1).T


def _to_width(array):
    """`(H, d, D)` to `(D, H * d)`."""
    return array.reshape(-1, array.shape[-1]).T


_BLOCK = r"transformer_layer_(\d+)/(?:.*/)?"
# From the end of a variable's path to its name, and what is done to it.
_RULES: tuple[tuple[str, str, Callable], ...] = (
    (r"token_embedding/embeddings", "model.embed_tokens.weight", _as_it_is),
    (r"token_embedding/reverse_embeddings", "lm_head.weight", _transposed),
    (r"sequence_output_layernorm/scale", "model.norm.weight", _as_it_is),
    *(
        (_BLOCK + path, f"model.layers.{{}}.{name}.weight", how)
        for path, name, how in (
            (r"self_attention/query/kernel", "self_attn.q_proj", _from_heads),
            (r"self_attention/key/kernel", "self_attn.k_proj", _from_heads),
            (r"self_attention/value/kernel", "self_attn.v_proj", _from_heads),
            (
                r"self_attention/attention_output/kernel",
                "self_attn.o_proj",
                _to_width,
            ),
            (
                r"self_attention/query_dense_layernorm/scale",
                "self_attn.q_norm",
                _as_it_is,
            ),
            (
                r"self_attention/key_dense_layernorm/scale",
                "self_attn.k_norm",
                _as_it_is,
            ),
            (r"self_attention_layernorm/scale", "input_layernorm", _as_it_is),
            (
                r"feedforward_layernorm/scale",
                "post_attention_layernorm",
                _as_it_is,
            ),
            (r"feedforward_gate_dense/kernel", "mlp.gate_proj", _transposed),
            (
                r"feedforward_intermediate_dense/kernel",
                "mlp.up_proj",
                _transposed,
            ),
            (r"feedforward_output_dense/kernel", "mlp.down_proj", _transposed),
        )
    ),
)


def tensors(backbone: Any, target: Target) -> Iterator[Tensor]:
    """All tensors of the file, each weight of the model in one of them.

    Raises:
        UpcycleError: For a weight that has no name there.
    """
    inside: set[int] = set()
    for number, block in enumerate(backbone.transformer_layers):
        if not sparse_blocks.is_sparse(block):
            continue
        layer = block.moe_layer
        inside |= {id(v) for v in layer.weights}
        yield from _of_experts(f"model.layers.{number}.", layer, target)
    tied = True
    for variable in backbone.weights:
        if id(variable) in inside or not keras.backend.is_float_dtype(
            variable.dtype
        ):
            continue
        name, how = _named(variable)
        tied = tied and name != "lm_head.weight"
        yield _tensor(name, variable, how)
    if tied and not target.ties:
        yield _tensor(
            "lm_head.weight", backbone.token_embedding.embeddings, _as_it_is
        )


def _named(variable):
    for path, name, how in _RULES:
        match = re.search(rf"(?:^|/){path}$", variable.path)
        if match:
            return name.format(*match.groups()), how
    raise UpcycleError(
        "Every weight must have a name in the format. Received: "
        f"{variable.path!r}, which has none. This is a bug of the format; "
        "please report it."
    )


def _of_experts(prefix, layer, target):
    names = _EXPERTS[target.name]
    router = layer.router

    def divided(kernel):
        return _transposed(kernel) / np.float32(
            router.setting_now("temperature")
        )

    yield _tensor(prefix + names.router, router.kernel, divided)
    for role, projection in layer.experts.projections.items():
        kernel = projection.kernel
        for number in range(layer.num_experts):
            name = prefix + getattr(names, role).format(number)
            yield _tensor(name, kernel, _transposed, number)


def _tensor(name, variable, how, number=None):
    shape = tuple(variable.shape if number is None else variable.shape[1:])
    # Of the right shape and no size: what is done to it gives its own shape.
    shown = how(np.broadcast_to(np.float32(0), shape)).shape

    def read():
        value = variable.value if number is None else variable.value[number]
        return how(ops.convert_to_numpy(ops.cast(value, "float32")))

    dtype = keras.backend.standardize_dtype(variable.dtype)
    return Tensor(name, shown, dtype, read)

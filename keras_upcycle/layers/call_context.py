"""Around calls of our layers: masks, tokens, outputs held back, a record."""

import contextlib
import contextvars
import math
from typing import Any, NamedTuple

import keras

from keras_upcycle.types import Routing, Tensor


class LayerCall(NamedTuple):
    """One call of a `MoEFeedForward`, as `record_calls` keeps it.

    `inputs` and `outputs` have the layer's shape; `mask` and `routing` are
    grouped, `(G, S)` and as in `types`, and `length` is `S`. Groups may have
    more places than there are tokens: those at the end are nobody's.
    """

    layer: keras.Layer
    inputs: Tensor
    outputs: Tensor
    mask: Tensor | None
    routing: Routing
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the inputs, padding included."""
        return math.prod(self.inputs.shape[:-1])


_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "keras_upcycle_record", default=None
)
_PADDING_MASK: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar(
    "keras_upcycle_padding_mask", default=None
)
_HELD: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "keras_upcycle_held", default=None
)


_ATTENDED: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar(
    "keras_upcycle_attended", default=None
)
_EXPERT: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "keras_upcycle_expert_of_attention", default=None
)


class HeadsCall(NamedTuple):
    """One call of a `RoutedHeads` or an `AttentionMixture`.

    `factors` `(G, S, N)`, what each expert counts; `mask` `(G, S)`.
    """

    layer: keras.Layer
    factors: Tensor
    mask: Tensor | None


_HEADS: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "keras_upcycle_heads", default=None
)


@contextlib.contextmanager
def _during(variable: contextvars.ContextVar, value: Any):
    """Inside, the variable holds the value, which is handed out."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def record_heads():
    """Keeps what every `RoutedHeads` decides, as `record_calls` does.

    Returns:
        A context of a list that fills with `HeadsCall`s.
    """
    calls: list[HeadsCall] = []
    return _during(_HEADS, calls)


def note_heads(layer: keras.Layer, factors: Tensor, mask: Tensor | None):
    """Keeps a call of a `RoutedHeads`, where someone records."""
    record = _HEADS.get()
    if record is not None:
        record.append(HeadsCall(layer, factors, mask))


def attention_inputs(tokens: Tensor):
    """Tells the `RoutedHeads` inside what their attention layer was given.

    Args:
        tokens: `(batch, ..., D)`.
    """
    return _during(_ATTENDED, tokens)


def attended_tokens() -> Tensor | None:
    """What the nearest `attention_inputs` says; `None` outside of any."""
    return _ATTENDED.get()


def expert_of_attention(number: int):
    """Tells the `ExpertProjection`s inside whose weights are meant."""
    return _during(_EXPERT, number)


def attention_expert() -> int | None:
    """What the nearest `expert_of_attention` says; `None` outside of any."""
    return _EXPERT.get()


def padding_mask(mask: Tensor | None):
    """Hands a mask down to the `MoEFeedForward`s called inside the block.

    For blocks that call their feed-forward network with the tokens alone, as
    KerasHub's T5 does: a mask on the tensor is lost in the normalisation
    before it.

    Args:
        mask: `(batch, ...)`, nonzero at real tokens, or `None`.
    """
    return _during(_PADDING_MASK, mask)


def held_outputs(held: bool = True):
    """Lets each `MoEFeedForward` called inside hand its tokens on.

    For blocks whose own `call` activates, multiplies and drops what their
    first projections give: the MoE layer stands at the first projection and
    has applied all that already, so what the block does next is done to the
    tokens and thrown away, until the last projection's place, where
    `take_held` brings the output out.

    Args:
        held: Whether outputs are held back; if not, they are not, whatever
            holds around.
    """
    return _during(_HELD, [] if held else None)


def hand_on(inputs: Tensor, outputs: Tensor) -> Tensor:
    """What a MoE layer returns: its outputs, or its inputs if those wait."""
    held = _HELD.get()
    if held is None:
        return outputs
    held.append(outputs)
    return inputs


def take_held() -> Tensor:
    """The output that the last `MoEFeedForward` held back.

    Raises:
        RuntimeError: If there is none: the block was entered by another way
            than those that its row names.
    """
    held = _HELD.get()
    if not held:
        raise RuntimeError(
            "The place of a block's last projection was reached, and no "
            "`MoEFeedForward` of the block has run before it. A sparse block "
            "must be called as a layer; its parts cannot be called one by one."
        )
    return held.pop()


def record_calls():
    """Keeps what every `MoEFeedForward` sees and decides, in call order.

    For eager calls, `model(x)`; a compiled step would leave traced values in
    the list.

    Returns:
        A context of a list that fills with `LayerCall`s.
    """
    calls: list[LayerCall] = []
    return _during(_RECORD, calls)


def outer_mask() -> Tensor | None:
    """The mask of the nearest `padding_mask`; `None` outside of any."""
    return _PADDING_MASK.get()


def fitting_mask(tokens: Tensor) -> Tensor | None:
    """A mask of exactly these tokens; blocks may cut them into windows."""
    mask = outer_mask()
    if mask is None or len(mask.shape) != len(tokens.shape) - 1:
        return None
    for one, other in zip(mask.shape, tokens.shape[:-1], strict=True):
        if None not in (one, other) and one != other:
            return None
    return mask


def note_call(call: LayerCall) -> None:
    """Keeps a call, where someone records."""
    record = _RECORD.get()
    if record is not None:
        record.append(call)

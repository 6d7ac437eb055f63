"""Which hidden neurons of dense blocks are active together, on some tokens."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_upcycle import backend, families
from keras_upcycle.conversion import pairing, upcycle
from keras_upcycle.families import FeedForwardSite
from keras_upcycle.layers.moe_layers import calls_of
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import Tensor

# Tokens whose hidden layers are computed at once.
_AT_ONCE = 1024
# What a norm of zeros is taken for.
_LEAST = 1e-12


class Patterns(NamedTuple):
    """What a block's hidden neurons did.

    Attributes:
        tokens: How many real tokens reached the block.
        rates: float64 `(F,)`, the share of the tokens in which a neuron was
            among the most active.
        marks: bool `(N, F)`, whether it was, for some of the tokens.
    """

    tokens: int
    rates: np.ndarray
    marks: np.ndarray


def recorded(
    model: keras.Model,
    inputs: Any,
    sites: Sequence[FeedForwardSite],
    active_neurons: Sequence[int],
    *,
    normalize: bool,
    max_tokens: int,
) -> list[Patterns]:
    """Runs a dense model and looks into the hidden layers of some blocks.

    Padding is left out where the model's blocks are told of it.

    Args:
        model: The dense model.
        inputs: A batch as the model is called on, or a list or iterator of
            batches.
        sites: Blocks of the model.
        active_neurons: For each block, how many neurons a token marks.
        normalize: Of `hidden`.
        max_tokens: Of how many tokens, spread evenly over all, each block's
            marks are kept.

    Returns:
        The `Patterns` of each block.

    Raises:
        TypeError, ValueError: For inputs that the model cannot take, without a
            token for one of the blocks, or with which an activation is not
            finite.
    """
    kept = [_Kept(max_tokens) for _ in sites]
    number = {site.index: place for place, site in enumerate(sites)}
    for site, tokens in _tokens_of(model, inputs, sites):
        place = number[site.index]
        for start in range(0, len(tokens), _AT_ONCE):
            part = tokens[start : start + _AT_ONCE]
            sizes = np.abs(_array(hidden(site, part, normalize)))
            if not np.isfinite(sizes).all():
                raise ValueError(
                    "`inputs` must give finite activations. Received: NaN or "
                    f"infinity in the hidden layer of block {site.path!r}. "
                    "Look for such values in the inputs or the weights."
                )
            kept[place].add(most_active(sizes, active_neurons[place]))
    missed = [
        site.path
        for site, own in zip(sites, kept, strict=True)
        if not own.tokens
    ]
    if missed:
        raise ValueError(
            "`inputs` must send tokens to every block that is converted. "
            f"Received: no batch, or none that sends any to {missed}. Pass a "
            "batch as the model is called on, or a list of batches: an "
            "iterator gives its batches once."
        )
    return [own.patterns() for own in kept]


def hidden(site: FeedForwardSite, tokens: Any, normalize: bool) -> Tensor:
    """A dense block's hidden layer, in float32: `(T, F)`.

    Args:
        site: The block.
        tokens: `(T, D)`.
        normalize: Whether what the activation is applied to, and what it is
            multiplied with, is divided by the norms of the token and of the
            neuron's weights, as CMoE's code does.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> (site,) = keras_upcycle.find_feed_forwards(dense)
        >>> x = keras.ops.ones((2, 8))
        >>> found = hidden(site, x, normalize=False)
        >>> bool(keras.ops.all(found == dense.layers[0](x)))
        True
    """
    tokens = ops.cast(tokens, "float32")

    def project(role):
        kernel = ops.cast(site.kernels[f"{role}_kernel"].value, "float32")
        result = ops.matmul(tokens, kernel)
        if site.use_bias:
            bias = site.kernels[f"{role}_bias"].value
            result = result + ops.cast(bias, "float32")
        if normalize:
            result = result / (norms(tokens, -1) * norms(kernel, 0))
        return result

    activation = keras.activations.get(site.activation)
    gate = project("gate") if site.gated else None
    return ops.stop_gradient(backend.activated(activation, project("up"), gate))


def norms(values: Tensor, axis: int) -> Tensor:
    """Euclidean norms along an axis, which stays with length 1; never 0."""
    squares = ops.sum(ops.square(values), axis=axis, keepdims=True)
    return ops.maximum(ops.sqrt(squares), _LEAST)


def most_active(sizes: np.ndarray, count: int) -> np.ndarray:
    """Marks each token's largest activations; 0 is not active.

    Args:
        sizes: Float `(T, F)`, absolute values.
        count: How many of a token at most, in `[1, F]`.

    Returns:
        bool `(T, F)`.

    Example:
        >>> most_active(np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 1.0]]), 2)
        array([[ True, False,  True],
               [False, False,  True]])
    """
    largest = np.argpartition(-sizes, count - 1, axis=1)[:, :count]
    marks = np.zeros(sizes.shape, bool)
    np.put_along_axis(marks, largest, True, axis=1)
    return marks & (sizes > 0)


class _Kept:
    """Counts marks of all tokens, and keeps those of some, evenly spread."""

    def __init__(self, most):
        self.most = most
        self.tokens, self.counts = 0, 0
        self.stride, self.parts = 1, []

    def add(self, marks):
        self.counts = self.counts + marks.sum(axis=0)
        first = -self.tokens % self.stride
        self.parts.append(marks[first :: self.stride])
        self.tokens += len(marks)
        if sum(map(len, self.parts)) > self.most:
            # Every other one: what is kept stays spread over all tokens.
            whole = np.concatenate(self.parts)
            while len(whole) > self.most:
                whole = whole[::2]
                self.stride *= 2
            self.parts = [whole]

    def patterns(self):
        return Patterns(
            self.tokens,
            self.counts / self.tokens,
            np.concatenate(self.parts),
        )


def _tokens_of(model, inputs, sites) -> Iterator[tuple[Any, np.ndarray]]:
    """Site and its real tokens, float32 `(T, D)`, call by call.

    From a sparse copy with one expert, which computes what the dense model
    does: its layers are told which tokens are padding.
    """
    family = families.family_of(model)
    copy = _with_one_expert(model, sites)
    _, places = pairing.converted(model, copy)
    site_of = {id(layer): site for site, layer in places}

    def prepared(batch):
        family.check_inputs(model, batch)
        return keras.tree.map_structure(ops.convert_to_tensor, batch)

    for call in calls_of(copy, inputs, prepared):
        width = call.inputs.shape[-1]
        tokens = _array(ops.reshape(call.inputs, (-1, width)))
        if call.mask is not None:
            real = ops.convert_to_numpy(call.mask).reshape(-1)
            tokens = tokens[real[: len(tokens)].astype(bool)]
        if len(tokens):
            yield site_of[id(call.layer)], tokens


def _with_one_expert(model, sites):
    found = families.family_of(model).find(model).sites
    chosen = {site.index for site in sites}
    stacks: dict[str, list[FeedForwardSite]] = {}
    for site in found:
        stacks.setdefault(site.stack, []).append(site)
    numbers = {
        stack: [n for n, s in enumerate(own) if s.index in chosen] or None
        for stack, own in stacks.items()
    }
    router = TopKRouter(
        1, normalize=False, capacity_factor=None, load_balance_loss=0.0
    )
    with warnings.catch_warnings():
        # The first block, compile settings: of the result, not of this.
        warnings.simplefilter("ignore")
        return upcycle.upcycle_model(
            model, 1, router=router, layers=numbers, seed=0
        )


def _array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))

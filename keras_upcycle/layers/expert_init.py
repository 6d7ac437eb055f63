"""Dense kernels to expert kernels: what experts hold when they start.

A method of its own is a class that derives from `ExpertInit`, in a file of its
own.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.layers.user_values import checked_tensor, telling_where
from keras_upcycle.named import Named
from keras_upcycle.state import first_values
from keras_upcycle.types import Tensor

# (value, num_experts, name) -> expert values with a leading axis `E`. `name`
# is "up_kernel" `(D, F)`, "up_bias" `(F,)`, "gate_...", "down_kernel"
# `(F, D)` or "down_bias" `(D,)`.
InitFunction: TypeAlias = Callable[[Tensor, int, str], Tensor]
# As Keras's initializers are: (shape, dtype) -> value.
FirstValue: TypeAlias = Callable[..., Tensor]
# Before the names of the network that all tokens meet.
SHARED = "shared_"


class ExpertInit:
    """How the experts of a block start. Derive from it for a method of yours.

    `values` must be written; the rest has an answer that suits copies. A
    `block` is a `FeedForwardSite`, of which `kernels` holds the dense weights.

    Example:
        >>> class Halved(ExpertInit):
        ...     def values(self, block, router, num_experts, seed):
        ...         def halved(variable):
        ...             return lambda shape, dtype=None: ops.broadcast_to(
        ...                 0.5 * ops.cast(variable, dtype), shape
        ...             )
        ...         return {k: halved(v) for k, v in block.kernels.items()}
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, 4, expert_init=Halved())
        >>> kernel = moe.layers[0].experts.expert_up.kernel
        >>> bool(ops.all(kernel[3] == 0.5 * dense.layers[0].kernel))
        True
    """

    def __repr__(self) -> str:
        given = [
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def prepare(self, model: keras.Model) -> None:
        """Looks at the whole dense model, and raises if it does not suit."""

    def advice(self) -> str | None:
        """What `upcycle_model` warns of, in one line; `None` for nothing."""
        return None

    def layout(self, num_experts: int, intermediate_dim: int) -> tuple:
        """How many experts a block gets, and how wide each is.

        Args:
            num_experts: Integer, how many experts were asked of
                `upcycle_model`.
            intermediate_dim: Integer, the hidden width of the dense block.

        Returns:
            `E` and `F` of the new layer.
        """
        return num_experts, intermediate_dim

    def check(self, block: Any, router: Any, num_experts: int) -> None:
        """Raises `ValueError` where the router does not suit the experts.

        Args:
            block: A `FeedForwardSite`, the dense block.
            router: A `Router`, the one that is to choose.
            num_experts: Integer, how many experts `layout` said.
        """

    def router_settings(self, block: Any, router: Any) -> dict[str, Any]:
        """Settings of the block's router that follow from the block.

        Args:
            block: A `FeedForwardSite`, the dense block.
            router: A `Router`, the one that was asked for.
        """
        del block, router
        return {}

    def start_router(
        self, block: Any, router: Any, num_experts: int, seed: int | None
    ) -> None:
        """Tells a router that is no kernel alone what it starts from.

        Args:
            block: A `FeedForwardSite`, the dense block.
            router: A `Router`, the unbuilt one of the new layer.
            num_experts: Integer, how many experts `layout` said.
            seed: Integer or `None`, the seed of this block alone.
        """

    def values(
        self, block: Any, router: Any, num_experts: int, seed: int | None
    ) -> Mapping[str, FirstValue]:
        """What the new weights hold.

        Args:
            block: A `FeedForwardSite`, the dense block.
            router: A `Router`, the one that is to choose; read its settings.
            num_experts: Integer, how many experts `layout` said.
            seed: Integer or `None`, the seed of this block alone, for
                `generator`; `None` draws one.

        Returns:
            From `"up_kernel"` `(E, D, F)`, `"up_bias"` `(E, 1, F)`,
            `"down_kernel"` and so on, one for each of the block's, to
            functions `(shape, dtype)`, called one at a time when the weight is
            built. What they give must be finite floats of that shape. With the
            layer setting `output_bias` there is no `"down_bias"`, but
            `"output_bias"` `(D,)`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `values(block, router, "
            "num_experts, seed)`."
        )

    def router_kernel(self, initializer: Any, num_experts: int) -> Any:
        """The initializer of the router's kernel `(D, E)`.

        Args:
            initializer: A Keras initializer, the router's own, seeded.
            num_experts: Integer, how many experts `layout` said.
        """
        del num_experts
        return initializer

    def layer_settings(self, block: Any) -> dict[str, Any]:
        """More arguments of the block's `MoEFeedForward`.

        `shared_intermediate_dim` and `output_bias`; sizes are counted by them.
        """
        del block
        return {}

    def finish(self, dense: keras.Model, moe: keras.Model) -> None:
        """Changes the sparse model once it is whole."""


def copy(value: Tensor, num_experts: int, name: str) -> Tensor:
    """Every expert is the dense block: Sparse Upcycling, figure 1.

    Args:
        value: A kernel or bias of the dense block, any shape.
        num_experts: Integer, `E`.
        name: Which one; not used.

    Returns:
        `(E, *value.shape)`.

    Example:
        >>> tuple(copy(keras.ops.ones((8, 16)), 4, "up_kernel").shape)
        (4, 8, 16)
    """
    shape = (num_experts, *value.shape)
    return first_values.Copies(value).of(value, shape, value.dtype)


# From a name to what makes one with its defaults.
INITS: Named[Callable[[], ExpertInit]] = Named(
    "expert_init",
    ", an `ExpertInit`, or a function (value, num_experts, name) -> expert "
    "values",
)


def named(name: str) -> Callable[[type], type]:
    """Decorates an `ExpertInit` so that `expert_init=name` means it.

    Args:
        name: As users write it.

    Example:
        ```python
        @named("halves")
        class Halves(ExpertInit):
            def values(self, block, router, num_experts, seed): ...
        ```
    """
    return INITS.named(name)


def get_init(identifier: Any) -> ExpertInit:
    """An expert initialisation from its name, a function, or itself.

    Args:
        identifier: A key of `INITS`, an `InitFunction`, or an `ExpertInit`.

    Returns:
        An `ExpertInit`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither.

    Example:
        >>> get_init("copy").function is copy
        True
    """
    if isinstance(identifier, ExpertInit):
        return identifier
    if isinstance(identifier, str):
        return INITS.find(identifier)()
    checks.check_no_class("expert_init", identifier, "`ExpertInit`")
    if callable(identifier) and not isinstance(identifier, keras.Layer):
        return FromFunction(identifier)
    raise INITS.refusal(identifier)


def whole(variable: Any) -> FirstValue:
    """A first value that is all of a dense block's weight."""

    def value(shape, dtype=None):
        # A copy: a reshape may give the donor's buffer.
        return ops.reshape(ops.cast(ops.copy(variable.value), dtype), shape)

    return value


def generator(seed: int | None) -> np.random.Generator:
    """What to draw from: NumPy's, so that all backends draw the same.

    Without a seed it follows `keras.utils.set_random_seed`, which seeds NumPy.
    """
    seed = checks.check_seed("seed", seed)
    if seed is None:
        seed = int(np.random.randint(2**31))
    return np.random.default_rng(seed)


class FromFunction(ExpertInit):
    """Experts from a function, kernel by kernel.

    Args:
        function: `(value, num_experts, name) -> expert values`.
        argument: As what the user gave it.

    Raises:
        TypeError: If the function takes other arguments; when used, for
            values that are no floats.
        UpcycleError: When used, for values of another shape, or that are not
            finite.
    """

    def __init__(self, function: InitFunction, argument: str = "expert_init"):
        checks.check_takes(
            argument,
            function,
            "value, num_experts, name",
            " It gets a dense weight, how many experts there are and the "
            "weight's name, and returns the experts' values, stacked in front.",
        )
        self.function = function
        self._argument = argument

    def values(self, block, router, num_experts, seed):
        del router, seed
        return {
            name: self._first_value(name, variable, num_experts, block)
            for name, variable in block.kernels.items()
        }

    def _first_value(self, name, variable, num_experts, block):
        if self.function is copy:
            return first_values.Copies(variable)

        def value(shape, dtype=None):
            stacked = (num_experts, *variable.shape)
            place = f"{name!r} of block {block.path!r}"
            with telling_where(self._argument, place):
                result = self.function(variable.value, num_experts, name)
            return checked_tensor(
                result, {stacked, shape}, dtype, shape, self._argument, place
            )

        return value


INITS.add("copy", lambda: FromFunction(copy))

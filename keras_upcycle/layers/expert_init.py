"""Dense kernels to expert kernels: what experts hold when they start.

A method of its own is a class that derives from `ExpertInit`, in a file of its
own.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.errors import UpcycleError
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
            num_experts: As asked of `upcycle_model`.
            intermediate_dim: Of the dense block.

        Returns:
            `E` and `F` of the new layer.
        """
        return num_experts, intermediate_dim

    def check(self, block: Any, router: Any, num_experts: int) -> None:
        """Raises `ValueError` where the router does not suit the experts.

        Args:
            block: The dense block.
            router: The `Router` that is to choose.
            num_experts: What `layout` said.
        """

    def values(
        self, block: Any, router: Any, num_experts: int, seed: int | None
    ) -> Mapping[str, FirstValue]:
        """What the new weights hold.

        Args:
            block: The dense block.
            router: The `Router` that is to choose; read its settings.
            num_experts: What `layout` said.
            seed: Of this block alone, for `generator`; `None` to draw one.

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
            initializer: The router's own, seeded.
            num_experts: What `layout` said.
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
    value = ops.expand_dims(value, 0)
    if num_experts == 1:
        # A tiling of one may be the same buffer, which training the result
        # would then donate, and the donor would be gone.
        return ops.copy(value)
    return ops.tile(value, (num_experts,) + (1,) * (len(value.shape) - 1))


# From a name to what makes one with its defaults.
INITS: dict[str, Callable[[], ExpertInit]] = {}


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

    def add(made: type) -> type:
        INITS[name] = made
        return made

    return add


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
        if identifier not in INITS:
            raise ValueError(
                f"`expert_init` must be one of {sorted(INITS)}, an "
                "`ExpertInit`, or a function. Received: "
                f"expert_init={identifier!r}."
            )
        return INITS[identifier]()
    checks.check_no_class("expert_init", identifier, "`ExpertInit`")
    if callable(identifier):
        return FromFunction(identifier)
    raise TypeError(
        "`expert_init` must be a name, an `ExpertInit`, or a function (value, "
        "num_experts, name) -> expert values. Received: "
        f"expert_init={identifier!r} of type {type(identifier).__name__}."
    )


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
        def value(shape, dtype=None):
            if self.function is copy:
                result = copy(variable.value, num_experts, name)
                return ops.reshape(ops.cast(result, dtype), shape)
            stacked = (num_experts, *variable.shape)
            place = f"{name!r} of block {block.path!r}"
            with _named(self._argument, place):
                result = self.function(variable.value, num_experts, name)
            return _checked(
                result, {stacked, shape}, dtype, shape, self._argument, place
            )

        return value


INITS["copy"] = lambda: FromFunction(copy)


def first_values(
    init: ExpertInit,
    block: Any,
    router: Any,
    num_experts: int,
    seed: int | None,
    argument: str = "expert_init",
) -> Mapping[str, FirstValue]:
    """`init.values(...)`, of which what is not ours is checked.

    Our own methods take values that were found to be finite and give values
    that are; a pass over all of them would be one more.

    Args:
        init: A user's, or one of ours.
        block: As for `ExpertInit.values`, and so the next three.
        router: As there.
        num_experts: As there.
        seed: As there.
        argument: As what the user gave `init`.

    Raises:
        TypeError, UpcycleError: For what is no mapping from the block's
            weights to functions; when these are called, for values that are no
            finite floats of the shape asked for.
    """
    if type(init).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return init.values(block, router, num_experts, seed)
    what = f"`{argument}`, a `{type(init).__name__}`,"
    with _named(argument, f"block {block.path!r}"):
        found = init.values(block, router, num_experts, seed)
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{what} must have `values` that are a mapping from the names of "
            "weights to functions (shape, dtype) -> value. Received: "
            f"{found!r} of type {type(found).__name__} for block "
            f"{block.path!r}."
        )
    names = set(block.kernels)
    if "output_bias" in found:  # beside the experts, in the place of theirs
        names = (names - {"down_bias"}) | {"output_bias"}
    given = {name for name in found if not str(name).startswith(SHARED)}
    if given != names:
        raise UpcycleError(
            f"{what} must give values for each of the block's weights, "
            f"{sorted(names)}, and no others. Received: {sorted(given)} for "
            f"block {block.path!r}. A weight without a value would be drawn at "
            "random."
        )
    return {
        name: _checked_value(value, name, block, argument)
        for name, value in found.items()
    }


def check_router_kernel(
    initializer: Any, shape: tuple[int, int], block: Any
) -> None:
    """Raises unless a router can start from what an initializer gives.

    Keras's own are not asked: what they give is finite.

    Args:
        initializer: Of the router's kernel.
        shape: `(D, E)`.
        block: The dense block whose place the router's layer takes.

    Raises:
        TypeError, UpcycleError: For values that are no finite floats of that
            shape.
    """
    ours = ("keras", __name__.partition(".")[0])
    if type(initializer).__module__.partition(".")[0] in ours:
        return
    place = f"the router's kernel of block {block.path!r}"
    argument = "router_kernel` of `expert_init`, or `kernel_initializer"
    if not callable(initializer):
        raise TypeError(
            f"`{argument}` must be an initializer (shape, dtype) -> value. "
            f"Received: {initializer!r} of type "
            f"{type(initializer).__name__} for {place}."
        )
    with _named(argument, place):
        value = initializer(shape, dtype="float32")
    _checked(value, {shape}, "float32", shape, argument, place)


def _checked_value(value, name, block, argument):
    place = f"{name!r} of block {block.path!r}"
    if not callable(value):
        raise TypeError(
            f"`{argument}` must give a function (shape, dtype) -> value for "
            f"each weight. Received: {type(value).__name__} for {place}. Wrap "
            "it: `lambda shape, dtype=None: value`."
        )

    def checked(shape, dtype=None):
        with _named(argument, place):
            result = value(shape, dtype=dtype)
        return _checked(result, {tuple(shape)}, dtype, shape, argument, place)

    return checked


def _checked(value, shapes, dtype, shape, argument, place):
    """A user's value as a tensor of our own; raises unless it can be one."""
    received = checks.dtype_name(value)
    if "float" not in received:  # "bfloat16" too
        raise TypeError(
            f"`{argument}` must give floats. Received: values of dtype "
            f"{received} for {place}. Return an array such as "
            '`values.astype("float32")`.'
        )
    if not hasattr(value, "shape"):
        value = np.asarray(value)
    got = tuple(value.shape)
    shapes = {tuple(each) for each in shapes}
    if got not in shapes:
        wanted = " or ".join(str(each) for each in sorted(shapes, key=len))
        raise UpcycleError(
            f"`{argument}` must give values of shape {wanted}, a leading axis "
            f"for the experts. Received: shape {got} for {place}."
        )
    # A copy: two blocks may be given one array, the donor's own among them,
    # and on torch a NumPy array's memory would be the weight's.
    made = ops.copy(ops.reshape(ops.cast(value, dtype), shape))
    if not bool(ops.all(ops.isfinite(made))):
        raise UpcycleError(
            f"`{argument}` must give finite values. Received: NaN or infinity "
            f"in {place}, which is finite in the dense model. Look for a "
            "division by zero, or for values too large for "
            f"{keras.backend.standardize_dtype(made.dtype)}."
        )
    return made


@contextlib.contextmanager
def _named(argument, place):
    """Says of an error of the user's own where it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by `{argument}` for {place}.")
        raise

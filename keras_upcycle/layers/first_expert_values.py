"""What new weights hold: asked of an `ExpertInit`, and checked."""

from collections.abc import Mapping
from typing import Any

from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.expert_init import SHARED, ExpertInit, FirstValue
from keras_upcycle.layers.user_values import checked_tensor, telling_where


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
    with telling_where(argument, f"block {block.path!r}"):
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
            f"{type(initializer).__name__} for {place}. Return one of "
            "`keras.initializers`, or a function."
        )
    with telling_where(argument, place):
        value = initializer(shape, dtype="float32")
    checked_tensor(value, {shape}, "float32", shape, argument, place)


def _checked_value(value, name, block, argument):
    place = f"{name!r} of block {block.path!r}"
    if not callable(value):
        raise TypeError(
            f"`{argument}` must give a function (shape, dtype) -> value for "
            f"each weight. Received: {type(value).__name__} for {place}. Wrap "
            "it: `lambda shape, dtype=None: value`."
        )

    def checked(shape, dtype=None):
        with telling_where(argument, place):
            result = value(shape, dtype=dtype)
        return checked_tensor(
            result, {tuple(shape)}, dtype, shape, argument, place
        )

    return checked

"""Shared experts: a part of the dense block that every token goes on meeting.

Routed experts repeat what all tokens need. DeepSeekMoE takes it out: a shared
expert runs for every token, without a router, beside the routed ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.conversion.recipe import ANY, Choice, Recipe, add_recipe
from keras_upcycle.layers import expert_init, first_expert_values
from keras_upcycle.layers.expert_init import ExpertInit, FromFunction
from keras_upcycle.methods import hidden_slices
from keras_upcycle.methods.hidden_slices import BIAS, neuron_axis
from keras_upcycle.routing.top_k_router import TopKRouter
from keras_upcycle.types import Tensor


@expert_init.named("shared_experts")
class SharedExperts(ExpertInit):
    """A shared expert from some of the dense neurons, experts from the others.

    The first `intermediate_dim` hidden neurons of a dense block become the
    network that every token meets, with the output bias; the experts start
    from those that are left, as `routed` says. Where `routed` cuts slices, the
    output bias is neither's and added once beside both. Where combine weights
    sum to 1 and experts are copies the two add up to the dense block. A token
    that no expert processes keeps the shared part.

    A token meets `intermediate_dim + K * (F - intermediate_dim)` hidden
    neurons. Several shared experts are one as wide as all of them: there is
    no gate between them, as in DeepSeekMoE.

    References: Dai et al., DeepSeekMoE (arXiv 2401.06066), section 3.2. They
    train from scratch; cutting a dense block is ours. NVIDIA saw no gain from
    shared experts when upcycling (arXiv 2410.07524).

    Args:
        intermediate_dim: Integer, at least 1 and below the dense block's width,
            or `None`: hidden neurons of the shared expert. `None` (default)
            takes half of them.
        routed: An `ExpertInit` or callable `(value, num_experts, name)`: how
            the experts start from the neurons that are left. Defaults to
            `None`: copies.

    Raises:
        TypeError, ValueError: For a setting outside its range; when used, for
            a width not above `intermediate_dim`, and as `routed` does.
        UpcycleError: When used, for an activation of which a hidden unit
            depends on others, such as softmax.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, expert_init=SharedExperts(4),
        ... )
        >>> moe.layers[0].shared_intermediate_dim
        4
        >>> report = keras_upcycle.verify_upcycle(
        ...     dense, moe, keras.ops.ones((2, 8)),
        ... )
        >>> report.relative_difference < 1e-5
        True
    """

    def __init__(self, intermediate_dim: int | None = None, routed: Any = None):
        if intermediate_dim is not None:
            intermediate_dim = checks.check_count(
                "intermediate_dim", intermediate_dim
            )
        if routed is None:
            routed = expert_init.copy
        if not isinstance(routed, ExpertInit):
            checks.check_no_class("routed", routed, "`ExpertInit`")
            if not callable(routed):
                raise TypeError(
                    "`routed` must be an `ExpertInit` or a function (value, "
                    "num_experts, name) -> expert values. Received: routed="
                    f"{routed!r} of type {type(routed).__name__}."
                )
            routed = FromFunction(routed, "routed")
        self.intermediate_dim = intermediate_dim
        self.routed = routed

    def prepare(self, model):
        self.routed.prepare(model)

    def advice(self):
        return self.routed.advice()

    def layout(self, num_experts, intermediate_dim):
        left = intermediate_dim - self._width(intermediate_dim)
        return self.routed.layout(num_experts, left)

    def check(self, block, router, num_experts):
        hidden_slices.check(block)
        self.routed.check(self._rest(block), router, num_experts)

    def values(self, block, router, num_experts, seed) -> Mapping[str, Any]:
        found = dict(
            first_expert_values.first_values(
                self.routed,
                self._rest(block),
                router,
                num_experts,
                seed,
                "routed",
            )
        )
        width = self._width(block.intermediate_dim)
        outside = found.pop("output_bias", None) is not None
        for name, variable in block.kernels.items():
            if outside and name == BIAS:
                # Experts that are slices: one bias beside all networks.
                found["output_bias"] = expert_init.whole(variable)
            else:
                found[expert_init.SHARED + name] = _first_of(
                    variable, name, width
                )
        return found

    def router_kernel(self, initializer, num_experts):
        return self.routed.router_kernel(initializer, num_experts)

    def layer_settings(self, block):
        more = self.routed.layer_settings(self._rest(block))
        width = self._width(block.intermediate_dim)
        return {**more, "shared_intermediate_dim": width}

    def finish(self, dense, moe):
        self.routed.finish(dense, moe)

    def _width(self, dense_width: int) -> int:
        own = self.intermediate_dim
        if own is None:
            own = dense_width // 2
        if not 0 < own < dense_width:
            raise ValueError(
                "The shared expert must have neurons and leave some for the "
                f"others. Received: intermediate_dim={self.intermediate_dim} "
                f"for a block with {dense_width}. Pass a number between, or "
                "leave it out."
            )
        return own

    def _rest(self, block):
        """The dense block without the neurons that are shared."""
        width = self._width(block.intermediate_dim)
        rest = {
            name: _Part(variable, name, width)
            for name, variable in block.kernels.items()
        }
        return dataclasses.replace(block, kernels=rest)


class _Part:
    """A weight's neurons from some number on, cut out when they are read.

    The output bias is the shared expert's; what is left of it is 0.
    """

    def __init__(self, variable: keras.Variable, name: str, start: int):
        self._variable, self._name, self._start = variable, name, start
        self._axis = neuron_axis(name)
        shape = list(variable.shape)
        if self._axis is not None:
            shape[self._axis] -= start
        self.shape = tuple(shape)
        self.dtype = variable.dtype
        self.trainable = variable.trainable

    @property
    def value(self) -> Tensor:
        if self._axis is None:
            return ops.zeros_like(self._variable.value)
        return _cut(self._variable.value, self._name, self._start, None)


def _first_of(variable, name, width):
    def value(shape, dtype=None):
        part = _cut(variable.value, name, 0, width)
        # A cut of all may be the same buffer.
        return ops.reshape(ops.cast(ops.copy(part), dtype), shape)

    return value


def _cut(value, name, start, stop):
    """Some of the hidden neurons; all of what belongs to none."""
    axis = neuron_axis(name)
    if axis is None:
        return value
    place = [slice(None)] * len(value.shape)
    place[axis] = slice(start, stop)
    return value[tuple(place)]


RECIPE = Recipe(
    name="shared_experts",
    paper="Dai et al., DeepSeekMoE, arXiv 2401.06066",
    changes="a part of each block runs for every token, beside routed parts",
    costs="the shared part always runs",
    fails=(
        "Nemotron's study (arXiv 2410.07524) found no gain in shared experts"
    ),
    choices={
        ANY: (
            Choice(
                "expert_init",
                SharedExperts(),
                "ours: half of the dense neurons are shared, the others are "
                "each expert's; the paper trains from scratch",
            ),
            Choice(
                "router",
                (
                    TopKRouter,
                    {
                        "top_k": 2,
                        "capacity_factor": None,
                        "load_balance_loss": 0.01,
                    },
                ),
                "the paper, 2B: expert-level balance factor 0.01 of a loss a "
                "layer whose least value is 1, as ours; dropless; renormalised "
                "is ours, for the exact start",
            ),
            Choice(
                "layers",
                "all",
                "the paper, 2B: every block; its 16B keeps the first one "
                'dense (layers="all_but_first")',
            ),
        ),
    },
)
add_recipe(RECIPE)

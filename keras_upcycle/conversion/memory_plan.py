"""What fits into so much memory: the same model with more or fewer experts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras

from keras_upcycle import checks, tables
from keras_upcycle.errors import UpcycleError

ALL, EXPERTS = "all", "experts"
TRAINABLE = (ALL, EXPERTS)
WHOLE, LOW_RANK = "whole", "low_rank"
# Tried where none are asked for, most first.
COUNTS = (128, 64, 32, 16, 8, 4, 2)
# Of those that do not fit, this many are shown: the nearest.
_SHOWN = 4


@dataclass(frozen=True)
class MemoryOption:
    """One way to upcycle a model, and what a step of training holds.

    Attributes:
        num_experts: Integer, of each converted block.
        experts: String, `"whole"`, or `"low_rank"` for `LowRankExperts()`.
        blocks: Integer, how many are converted.
        total_params: Integer, of the sparse model.
        weight_bytes: Integer, of all weights.
        gradient_bytes: Integer, of gradients, all at once.
        optimizer_bytes: Integer, of the optimizer's slots.
        activation_bytes: Integer, of what the forward pass keeps; 0 without a
            batch.
        reason: String, why it does not fit and what would help; empty if it
            fits.
    """

    num_experts: int
    experts: str
    blocks: int
    total_params: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    reason: str = ""

    @property
    def total_bytes(self) -> int:
        """All that a step holds."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
        )

    @property
    def fits(self) -> bool:
        """Whether the budget holds it."""
        return not self.reason


@dataclass(frozen=True)
class MemoryPlan:
    """What `estimate_upcycle(model, budget=...)` found.

    Attributes:
        budget: Integer, bytes.
        options: Tuple of `MemoryOption`s: those that fit, largest first, then
            those that do not, smallest first.
    """

    budget: int
    options: tuple[MemoryOption, ...]

    @property
    def best(self) -> MemoryOption | None:
        """The largest that fits, `None` if none does."""
        return next((each for each in self.options if each.fits), None)

    def __str__(self) -> str:
        fits = [each for each in self.options if each.fits]
        others = [each for each in self.options if not each.fits][:_SHOWN]
        size = tables.size
        text = tables.text(
            (
                *("experts", "kind", "blocks", "parameters", "weights"),
                *("gradients", "slots", "activations", "in all", ""),
            ),
            [
                (
                    str(each.num_experts),
                    each.experts,
                    str(each.blocks),
                    tables.count(each.total_params),
                    size(each.weight_bytes),
                    size(each.gradient_bytes),
                    size(each.optimizer_bytes),
                    size(each.activation_bytes),
                    size(each.total_bytes),
                    "fits" if each.fits else "too large",
                )
                for each in (*fits, *others)
            ],
        )
        head = (
            f"{len(fits)} of {len(self.options)} fit into {size(self.budget)}."
        )
        reasons = "".join(
            f"\n{each.num_experts} {each.experts} experts in {each.blocks} "
            f"blocks: {each.reason}"
            for each in others
        )
        return f"{head}\n{text}\n{reasons}".rstrip()


def slots_of(optimizer: Any) -> float:
    """Numbers that an optimizer keeps for each parameter of a large kernel.

    Found by letting one of it look at a kernel.

    Args:
        optimizer: String or optimizer, as `compile` takes it.

    Raises:
        TypeError, ValueError: For what is no optimizer.
    """
    made = checks.check_known(
        "optimizer", optimizer, keras.optimizers.get, "an optimizer"
    )
    if not isinstance(made, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be the name of an optimizer of Keras's, or one. "
            f"Received: optimizer={optimizer!r}."
        )
    fresh = type(made).from_config(made.get_config())
    side = 256
    kernel = keras.Variable(keras.ops.zeros((side, side)), name="kernel")
    fresh.build([kernel])
    held = sum(math.prod(v.shape) for v in fresh.variables if v.shape)
    return held / side**2


def make(
    sizes: Callable[..., Any],
    num_experts: int | None,
    *,
    budget: Any,
    optimizer: Any,
    trainable: Any,
    kinds: Sequence[str],
) -> MemoryPlan:
    """All options, largest first.

    Args:
        sizes: From `num_experts` and a kind to a tuple: blocks, parameters,
            bytes of weights, of what trains by `"all"` and `"experts"`, and of
            activations by the same; raises `UpcycleError` or `ValueError`
            where a model cannot have so many.
        num_experts: The one to try; `None` for several.
        budget: As of `estimate_upcycle`.
        optimizer: As there.
        trainable: As there.
        kinds: `WHOLE`, `LOW_RANK` or both.

    Raises:
        TypeError, ValueError: For a bad argument.
        UpcycleError: If nothing can be converted at all.
    """
    room = checks.check_bytes("budget", budget)
    slots = slots_of(optimizer)
    trainable = checks.check_choice("trainable", trainable, TRAINABLE)
    counts = COUNTS if num_experts is None else (num_experts,)
    options, error = [], None
    for count in counts:
        for kind in kinds:
            try:
                found = sizes(count, kind)
            except (UpcycleError, ValueError) as refusal:
                error = refusal
                continue
            blocks, params, weights, trained, kept = found
            option = MemoryOption(
                count,
                kind,
                blocks,
                params,
                weights,
                gradient_bytes=trained[trainable],
                optimizer_bytes=round(slots * trained[trainable]),
                activation_bytes=round(kept[trainable]),
            )
            options.append(_judged(option, room, trained, trainable))
    if not options and error is not None:
        raise error
    fits = sorted(
        (each for each in options if each.fits),
        key=lambda each: -each.total_params,
    )
    others = sorted(
        (each for each in options if not each.fits),
        key=lambda each: each.total_bytes,
    )
    return MemoryPlan(room, (*fits, *others))


def _judged(option, room, trained, trainable):
    if option.total_bytes <= room:
        return option
    size = tables.size
    over = size(option.total_bytes - room)
    if option.weight_bytes > room:
        reason = (
            f"its weights alone take {size(option.weight_bytes)}. Use fewer "
            "experts, fewer `layers`, or LowRankExperts"
        )
    elif option.weight_bytes + option.activation_bytes > room:
        reason = (
            f"{over} too much: activations take "
            f"{size(option.activation_bytes)}. Use a smaller `batch`"
        )
    else:
        help_ = "an optimizer of fewer slots, such as 'lion' or 'sgd'"
        if trainable == ALL and trained[EXPERTS] < trained[ALL]:
            help_ = f"`trainable={EXPERTS!r}`, or {help_}"
        reason = (
            f"{over} too much: gradients and slots take "
            f"{size(option.gradient_bytes + option.optimizer_bytes)}. Use "
            f"{help_}"
        )
    return replace(option, reason=reason)

"""What a router did, in numbers: counted in a training step, read outside.

One small vector a router. A step adds to it; whoever reads it divides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from keras import ops

from keras_upcycle import backend, keras_internals
from keras_upcycle.routing import functional
from keras_upcycle.types import Routing, Tensor, TokenChoice

# Sums over steps, of one number each. Then come `load` and `requested`, of one
# number an expert, and the losses.
_SCALARS = ("steps", "tokens", "unrouted", "entropy", "confidence", "weight")


@dataclass(frozen=True)
class RouterReading:
    """What one router did over some training steps.

    Shares and means are over real tokens; padding is in none of them.

    Attributes:
        step: `optimizer.iterations` when it was read.
        layer: Where the router is, such as `"vit_encoder/block_3"`.
        steps: Batches that were counted: training steps, or with
            `gradient_accumulation_steps` parts of them.
        tokens: Real tokens in them.
        load: Float `(E,)`, the share of all processed assignments that each
            expert had; they sum to 1, and `1 / E` each is balance.
        dropped: Share of the assignments asked for that found no slot.
        unrouted: Share of the tokens that no expert processed.
        entropy: Mean entropy of a token's probabilities, divided by that of
            the uniform distribution: 1 is undecided, 0 is sure.
        confidence: Mean of a token's largest probability.
        weight: Mean of a token's combine weights' sum; 1 preserves the dense
            block's scale.
        losses: From a loss's name to its mean over steps, not weighted.
        weighted_loss: What the router added to `loss` on average.
        scheduled: From `temperature` and `noise_stddev`, where a schedule gives
            them, to what it gave when the router was read. A log file does not
            hold it.

    Example:
        >>> reading = RouterReading(
        ...     step=50, layer="moe", steps=50, tokens=600,
        ...     load=np.array([0.5, 0.25, 0.25, 0.0]), dropped=0.1,
        ...     unrouted=0.0, entropy=0.9, confidence=0.4, weight=1.0,
        ...     losses={"load_balance": 1.5}, weighted_loss=0.015,
        ... )
        >>> reading.max_load, reading.dead
        (2.0, (3,))
    """

    step: int
    layer: str
    steps: int
    tokens: int
    load: np.ndarray
    dropped: float
    unrouted: float
    entropy: float
    confidence: float
    weight: float
    losses: Mapping[str, float]
    weighted_loss: float
    scheduled: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """`E`."""
        return len(self.load)

    @property
    def max_load(self) -> float:
        """Load of the busiest expert as a multiple of a fair share."""
        return float(np.max(self.load) * self.num_experts)

    @property
    def dead(self) -> tuple[int, ...]:
        """Numbers of the experts that processed nothing."""
        return tuple(int(e) for e in np.flatnonzero(self.load == 0.0))


class RouterStatistics(keras_internals.UnsavedState):
    """The counters of one router.

    Args:
        num_experts: `E`.
        losses: From the names of the router's losses to their weights.
    """

    def __init__(self, num_experts: int, losses: Mapping[str, float]):
        self.num_experts = num_experts
        self.losses = dict(losses)
        # By replica and name; another one may run before `add` does.
        self._noted: dict[tuple[int, str], Tensor] = {}
        size = len(_SCALARS) + 2 * num_experts + len(self.losses)
        super().__init__((size,), "router_statistics")

    def note_loss(self, name: str, loss: Tensor) -> None:
        """Keeps a loss of the step that `add` is about to count."""
        self._noted[backend.replica_number(), name] = loss

    def add(self, chosen: Routing, logits: Tensor, mask: Tensor | None) -> None:
        """Counts one step.

        Args:
            chosen: The routing.
            logits: float32 `(G, S, E)`.
            mask: bool `(G, S)`, `True` at real tokens, or `None`.
        """
        # What replicas assign is averaged, which suits steps and losses.
        replicas = float(backend.num_replicas())
        scalars, *counts = _sums(chosen, logits, mask)
        if replicas > 1:
            per_scalar = [1.0] + [replicas] * (len(_SCALARS) - 1)
            scalars = scalars * ops.convert_to_tensor(per_scalar, "float32")
            counts = [replicas * count for count in counts]
        parts = [scalars, *counts]
        if self.losses:
            own = backend.replica_number()
            losses = [self._noted.pop((own, n), 0.0) for n in self.losses]
            parts.append(ops.stack([ops.cast(v, "float32") for v in losses]))
        row = ops.stop_gradient(ops.concatenate(parts, axis=0))
        self.state.assign(self.state + row)

    def read(self) -> np.ndarray:
        """The sums so far; they start again at 0."""
        sums = ops.convert_to_numpy(self.state.value).astype("float64")
        self.state.assign(ops.zeros(self.state.shape))
        return sums

    def reading(
        self,
        sums: np.ndarray,
        *,
        step: int,
        layer: str,
        scheduled: Mapping[str, float] | None = None,
    ) -> RouterReading | None:
        """Shares and means from sums; `None` where nothing was counted."""
        scalars = dict(zip(_SCALARS, sums, strict=False))
        if not scalars["tokens"]:
            return None
        counts = sums[len(_SCALARS) :]
        load, requested, losses = np.split(
            counts, [self.num_experts, 2 * self.num_experts]
        )
        means = losses / scalars["steps"]
        by_name = dict(zip(self.losses, means.tolist(), strict=True))
        return RouterReading(
            step=step,
            layer=layer,
            steps=int(scalars["steps"]),
            tokens=int(scalars["tokens"]),
            load=load / max(load.sum(), 1.0),
            dropped=1.0 - float(load.sum() / max(requested.sum(), 1.0)),
            unrouted=float(scalars["unrouted"] / scalars["tokens"]),
            entropy=float(scalars["entropy"] / scalars["tokens"]),
            confidence=float(scalars["confidence"] / scalars["tokens"]),
            weight=float(scalars["weight"] / scalars["tokens"]),
            losses=by_name,
            weighted_loss=sum(self.losses[n] * v for n, v in by_name.items()),
            scheduled=scheduled or {},
        )


def _sums(chosen, logits, mask) -> Iterable[Tensor]:
    """The scalars `(6,)`, the loads `(E,)` and what was requested `(E,)`."""
    length, num_experts = ops.shape(logits)[1], logits.shape[-1]
    probabilities = functional.probabilities(logits)
    entropy = -ops.sum(
        probabilities * ops.log(ops.maximum(probabilities, 1e-30)), axis=-1
    )
    if num_experts > 1:
        entropy = entropy / float(np.log(num_experts))
    processed = functional.experts_per_token(chosen, length, num_experts)
    load = functional.expert_load(chosen, num_experts)
    requested = load
    if isinstance(chosen, TokenChoice):
        requested = ops.sum(
            functional.membership(chosen.requested, num_experts), axis=(0, 1, 2)
        )

    def total(values):
        # Padding may hold anything: 0 times NaN would still be NaN.
        return ops.sum(values if mask is None else ops.where(mask, values, 0.0))

    yield ops.stack(
        [
            ops.ones(()),
            total(ops.ones_like(processed)),
            total(ops.cast(processed == 0.0, "float32")),
            total(entropy),
            total(ops.max(probabilities, axis=-1)),
            total(functional.token_weights(chosen, length)),
        ]
    )
    yield load
    yield requested

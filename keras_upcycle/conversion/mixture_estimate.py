"""`estimate_mixture`: what a mixture that is there costs."""

from dataclasses import dataclass

import keras

from keras_upcycle import checks, tables
from keras_upcycle.conversion import counts
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import named_mixtures


@dataclass(frozen=True)
class MixtureLayerEstimate:
    """One MoE layer in numbers.

    Attributes:
        name: Of the block, as in a `RouterReading`.
        num_experts: Integer, its experts.
        experts_per_token: Float, of which a token meets so many on average.
        total_params: Integer, router and shared network included.
        active_params: Integer, that a token meets.
        flops_per_token: Integer, forward operations of the products, router
            included, without empty slots of buffers.
        every_expert_flops: Integer, those of running every expert on every
            token, as KerasHub's own mixtures do.
    """

    name: str
    num_experts: int
    experts_per_token: float
    total_params: int
    active_params: int
    flops_per_token: int
    every_expert_flops: int


@dataclass(frozen=True)
class MixtureEstimate:
    """What `estimate_mixture` found. Print it.

    Attributes:
        total_params: Integer, of the model.
        active_params: Integer, that a token meets.
        weight_bytes: Integer, of all weights.
        gradient_bytes: Integer, of what trains as flags are now.
        layers: A `MixtureLayerEstimate` for each MoE layer, inputs first.

    Example:
        >>> print(MixtureEstimate(2304, 1152, 9216, 9216, layers=()))
        2.3k parameters, of which a token meets 1.15k: 50.0%. Weights take ...
        block ...
    """

    total_params: int
    active_params: int
    weight_bytes: int
    gradient_bytes: int
    layers: tuple[MixtureLayerEstimate, ...]

    def __str__(self) -> str:
        count, size = tables.count, tables.size
        rows = [
            (
                each.name,
                f"{each.experts_per_token:g} of {each.num_experts}",
                count(each.total_params),
                count(each.active_params),
                count(each.flops_per_token),
                f"{each.every_expert_flops / each.flops_per_token:.1f} x",
            )
            for each in self.layers
        ]
        head = (
            "block",
            "experts a token",
            "parameters",
            "active",
            "FLOPs a token",
            "every expert",
        )
        share = self.active_params / self.total_params
        return (
            f"{count(self.total_params)} parameters, of which a token meets "
            f"{count(self.active_params)}: {share:.1%}. Weights take "
            f"{size(self.weight_bytes)}, gradients of what trains "
            f"{size(self.gradient_bytes)}, Adam's slots "
            f"{size(2 * self.gradient_bytes)}.\n{tables.text(head, rows)}"
        )


def estimate_mixture(moe: keras.Model) -> MixtureEstimate:
    """What a sparse model holds, and what of it a token meets.

    Of a model that is sparse already, upcycled, adopted or loaded;
    `estimate_upcycle` tells it of a dense one before it is converted. Nothing
    runs.

    Args:
        moe: A Keras model with MoE layers, built.

    Returns:
        A `MixtureEstimate`.

    Raises:
        TypeError: If `moe` is no Keras model.
        UpcycleError: If it holds no MoE layer.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> estimate = estimate_mixture(moe)
        >>> estimate.total_params, estimate.active_params
        (1152, 592)
    """
    checks.check_instance("moe", moe, keras.Model, "a Keras model")
    layers = tuple(
        _layer(name, layer) for name, layer in named_mixtures(moe).items()
    )
    total = moe.count_params()
    idle = sum(each.total_params - each.active_params for each in layers)
    return MixtureEstimate(
        total_params=total,
        active_params=total - idle,
        weight_bytes=sum(map(counts.bytes_of, moe.weights)),
        gradient_bytes=sum(map(counts.bytes_of, moe.trainable_variables)),
        layers=layers,
    )


def _layer(name: str, layer: MoEFeedForward) -> MixtureLayerEstimate:
    count = layer.num_experts
    met = layer.router.average_experts_per_token(count)
    return MixtureLayerEstimate(
        name=name,
        num_experts=count,
        experts_per_token=met,
        total_params=layer.count_params(),
        active_params=round(met * counts.expert_params(layer))
        + counts.always_params(layer),
        flops_per_token=round(counts.flops(layer, met)),
        every_expert_flops=round(counts.flops(layer, count)),
    )

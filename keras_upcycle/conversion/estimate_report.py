"""What `estimate_upcycle` returns, and how it reads."""

from dataclasses import dataclass

from keras_upcycle import tables
from keras_upcycle.conversion import mesh_estimate
from keras_upcycle.conversion.mesh_estimate import MeshEstimate


@dataclass(frozen=True)
class LayerEstimate:
    """One block to be converted.

    Attributes:
        path: Where it is.
        dense_params: Parameters of the dense block.
        total_params: Of its experts and router together.
        active_params: Of what an average token meets, router included.
        dense_flops_per_token: Floating-point operations of the dense block's
            matrix products, forward, for one token.
        flops_per_token: The same for the MoE layer in training, router and
            the empty slots of its experts' buffers included.
    """

    path: str
    dense_params: int
    total_params: int
    active_params: int
    dense_flops_per_token: int
    flops_per_token: int

    @property
    def flops_ratio(self) -> float:
        """Cost of the MoE layer as a multiple of the dense block's."""
        return self.flops_per_token / self.dense_flops_per_token


@dataclass(frozen=True)
class UpcycleEstimate:
    """What `estimate_upcycle` worked out. Print it.

    Attributes:
        num_experts: `E`.
        dense_params: Parameters of the dense model.
        total_params: Of the sparse model.
        active_params: Of what an average token meets in the sparse model.
        dense_weight_bytes: Bytes of the dense weights.
        weight_bytes: Bytes of the sparse weights.
        adam_bytes: Bytes of Adam's two slots for the sparse trainable
            weights.
        dense_flops_per_token: Floating-point operations, forward, of the
            dense model's matrix products, each counted once for a token.
            Attention scores, which depend on the sequence length, are not in.
        flops_per_token: The same for the sparse model in training: a buffer's
            empty slot takes as long as a full one, so Top-2 with
            `capacity_factor=1.25` counts as 2.5 experts. At inference, where
            Top-K has no buffers by default, it takes less.
        dense_flops_per_example: With `sequence_length`, the operations of
            the dense model's matrix products for one example, each stack's
            as often as it has tokens; `None` without.
        flops_per_example: The same for the sparse model, with slots rounded
            up as they are.
        layers: A `LayerEstimate` for each block to be converted.
        meshes: With `mesh`, a `MeshEstimate` for it, or for each that so many
            devices make.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> estimate = estimate_upcycle(dense, num_experts=4)
        >>> estimate.active_params < estimate.total_params
        True
    """

    num_experts: int
    dense_params: int
    total_params: int
    active_params: int
    dense_weight_bytes: int
    weight_bytes: int
    adam_bytes: int
    dense_flops_per_token: int
    flops_per_token: int
    layers: tuple[LayerEstimate, ...]
    dense_flops_per_example: int | None = None
    flops_per_example: int | None = None
    meshes: tuple[MeshEstimate, ...] = ()

    @property
    def flops_ratio(self) -> float:
        """Cost as a multiple of the dense model's.

        Of an example where `sequence_length` was given, else of a token.
        """
        if self.flops_per_example is not None:
            return self.flops_per_example / (self.dense_flops_per_example or 1)
        return self.flops_per_token / max(self.dense_flops_per_token, 1)

    def __str__(self) -> str:
        count, size = tables.count, tables.size
        summary = tables.text(
            ("", "dense", "upcycled"),
            [
                (
                    "parameters",
                    count(self.dense_params),
                    count(self.total_params),
                ),
                (
                    "active for a token",
                    count(self.dense_params),
                    count(self.active_params),
                ),
                (
                    "weights",
                    size(self.dense_weight_bytes),
                    size(self.weight_bytes),
                ),
                ("Adam's slots", "", size(self.adam_bytes)),
                (
                    "FLOPs for a token",
                    count(self.dense_flops_per_token),
                    self._with_ratio(
                        self.flops_per_token, self.dense_flops_per_token
                    ),
                ),
                *self._example_rows(),
            ],
        )
        layers = tables.text(
            ("block", "dense params", "params", "active", "FLOPs"),
            [
                (
                    layer.path,
                    count(layer.dense_params),
                    count(layer.total_params),
                    count(layer.active_params),
                    f"{layer.flops_ratio:.2f}x",
                )
                for layer in self.layers
            ],
        )
        text = (
            f"{len(self.layers)} blocks to {self.num_experts} experts each.\n"
            f"{summary}\n\n{layers}"
        )
        if self.meshes:
            text += f"\n\n{mesh_estimate.table(self.meshes)}"
        return text

    def _example_rows(self):
        if self.flops_per_example is None:
            return []
        return [
            (
                "FLOPs for an example",
                tables.count(self.dense_flops_per_example),
                self._with_ratio(
                    self.flops_per_example, self.dense_flops_per_example
                ),
            )
        ]

    @staticmethod
    def _with_ratio(sparse, dense):
        return f"{tables.count(sparse)} ({sparse / max(dense, 1):.2f}x)"

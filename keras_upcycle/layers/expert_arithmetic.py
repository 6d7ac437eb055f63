"""What experts compute: on slots, on tiles of rows, or all as one network."""

from typing import Any

import keras
from keras import ops

from keras_upcycle import backend, keras_internals
from keras_upcycle.layers import activations
from keras_upcycle.routing import functional
from keras_upcycle.types import Tensor


class ExpertArithmetic(keras.layers.Layer):
    """The arithmetic of an `Experts`, which has the weights and settings."""

    def apply_slots(self, slots: Tensor, training: Any = None) -> Tensor:
        """Expert `e` on `slots[e]`.

        Args:
            slots: `(E, N, D)`.
            training: Whether dropout drops.

        Returns:
            `(E, N, D)`.
        """
        if training or self.are_quantized:
            return self._feed_forward((slots,), training, _on_slots)[0]
        slots = ops.cast(slots, self.compute_dtype)
        return backend.infer_slots(
            slots, self.weights_by_name(), self.activation
        )

    def apply_groups(
        self,
        slots: Tensor,
        tiles: Tensor,
        tile_experts: Tensor,
        used: Tensor,
        training: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Expert `e` on `slots[e]`, and expert `tile_experts[n]` on `tiles[n]`.

        Args:
            slots: `(E, C, D)`; `C` may be 0.
            tiles: `(N, M, D)`; `N` may be 0.
            tile_experts: int32 `(N,)`, ascending, each in `[0, E]`.
            used: int32 scalar. Tiles from there on are spare, of expert `E`,
                and what comes of them is not to be read.
            training: Whether dropout drops.

        Returns:
            `(E, C, D)` and `(N, M, D)`.
        """
        count = tiles.shape[0]
        few = isinstance(count, int) and count < self.num_experts
        if self.are_quantized and few and slots.shape[1] == 0:

            def on_tiles(layer, groups):
                return (_on_quantized(layer, *groups, tile_experts),)

            (outputs,) = self._feed_forward((tiles,), training, on_tiles)
            return ops.zeros_like(slots), outputs
        remat = self.remat and training
        seeds = [self.dropout_seed(training, remat) for _ in range(2)]

        def compute(*groups):
            return backend.grouped_feed_forward(
                *groups,
                tile_experts,
                used,
                self.weights_by_name(),
                self.activation,
                tuple(
                    self._kept(group, seed)
                    for group, seed in zip(groups, seeds, strict=True)
                ),
                bool(training),
            )

        if remat:
            compute = backend.remat(compute)
        return compute(
            ops.cast(slots, self.compute_dtype),
            ops.cast(tiles, self.compute_dtype),
        )

    @property
    def are_narrow(self) -> bool:
        """Whether `apply_as_one` serves: fewer hidden units than a token has.

        What all experts put out would then be larger than their hidden
        layers. int8 kernels are multiplied by their own layers, and an
        activation such as softmax is of one expert's hidden layer.
        """
        return (
            self.intermediate_dim < self._hidden_dim
            and not self.are_quantized
            and activations.is_known_elementwise(self.activation)
        )

    def apply_as_one(
        self, tokens: Tensor, weights: Tensor, training: Any = None
    ) -> Tensor:
        """Every expert on every token, as one network of `E * F` hidden units.

        A token's weights go into the hidden layer, so that outputs are added
        up by the product with all output kernels.

        Args:
            tokens: `(T, D)`.
            weights: float32 `(T, E)`.
            training: Whether dropout drops.

        Returns:
            `(T, D)`, the sum of all experts' outputs times their weights.
        """
        remat = self.remat and training
        seed = self.dropout_seed(training, remat)
        count, inner = self.num_experts, self.intermediate_dim

        def compute(tokens, weights):
            own = self.weights_by_name()
            width = tokens.shape[-1]

            def hidden(role):
                kernel = ops.transpose(own[f"{role}_kernel"], (1, 0, 2))
                kernel = ops.reshape(kernel, (width, count * inner))
                rows = backend.multiply(tokens, kernel)
                rows = ops.reshape(rows, (-1, count, inner))
                bias = own.get(f"{role}_bias")
                return rows if bias is None else rows + bias[:, 0]

            gate = hidden("gate") if self.gated else None
            rows = self._hidden(gate, hidden("up"), seed)
            # Products in float32, so that a weight is not rounded first.
            wide = ops.cast(rows, "float32") * ops.expand_dims(weights, -1)
            rows = ops.cast(wide, rows.dtype)
            outputs = backend.multiply(
                ops.reshape(rows, (-1, count * inner)),
                ops.reshape(own["down_kernel"], (count * inner, width)),
            )
            bias = own.get("down_bias")
            if bias is None:
                return outputs
            biases = ops.matmul(weights, ops.cast(bias[:, 0], "float32"))
            return outputs + ops.cast(biases, outputs.dtype)

        if remat:
            compute = backend.remat(compute)
        return compute(
            ops.cast(tokens, self.compute_dtype), ops.cast(weights, "float32")
        )

    def _feed_forward(self, groups, training, apply):
        """The network on each array of rows.

        `apply(kernel, groups)` multiplies all of them.
        """
        remat = self.remat and training
        seeds = [self.dropout_seed(training, remat) for _ in groups]

        def compute(*groups):
            gates = [None] * len(groups)
            if self.gated:
                gates = apply(self.expert_gate, groups)
            ups = apply(self.expert_up, groups)
            hidden = [
                self._hidden(*each)
                for each in zip(gates, ups, seeds, strict=True)
            ]
            return apply(self.expert_down, hidden)

        if remat:
            compute = backend.remat(compute)
        return compute(*(ops.cast(g, self.compute_dtype) for g in groups))

    def _hidden(self, gate, up, seed):
        """The hidden layer from what leads to it.

        `gate` and `seed` are `None` where nothing gates or drops.
        """
        rows = backend.activated(self.activation, up, gate)
        if seed is None:
            return rows
        return keras.random.dropout(rows, self.dropout, seed=seed)

    @property
    def are_quantized(self) -> bool:
        """Whether a kernel of the experts is of integers."""
        return any(
            layer.quantization_mode is not None
            for layer in self.projections.values()
        )

    def weights_by_name(self) -> dict[str, Tensor]:
        """All kernels and biases by name, in the dtype of the arithmetic.

        int8 kernels as floats.
        """
        found = {}
        for role, layer in self.projections.items():
            if layer.quantization_mode is None:
                kernel = layer.kernel
            else:
                kernel = keras_internals.rows_of_quantized(
                    layer, ops.arange(self.num_experts, dtype="int32")
                )
            found[f"{role}_kernel"] = kernel
            if layer.bias is not None:
                found[f"{role}_bias"] = layer.bias
        return {n: ops.cast(w, self.compute_dtype) for n, w in found.items()}

    def dropout_seed(self, training: Any, drawn: Any) -> Any:
        """What the hidden dropout draws from; `None` where none drops.

        What is computed twice must drop the same, and a seed's state must not
        change inside a function that JAX rematerialises or maps over devices.

        Args:
            training: Whether dropout drops.
            drawn: Whether the seed is drawn here.
        """
        if not self.dropout or not training:
            return None
        generator = self.hidden_dropout.seed_generator
        return keras_internals.DrawnSeed(generator) if drawn else generator

    def _kept(self, rows, seed):
        """The factors of the hidden dropout, of the shape of its layer."""
        if seed is None:
            return None
        shape = (*ops.shape(rows)[:2], self.intermediate_dim)
        ones = ops.ones(shape, self.compute_dtype)
        return keras.random.dropout(ones, self.dropout, seed=seed)


def _on_slots(layer, groups):
    """One stacked `EinsumDense` on slots, expert by expert.

    The layer's own call serves quantized kernels; for floats it is an einsum,
    which TensorFlow runs a little slower than the same product.
    """
    (slots,) = groups
    if layer.quantization_mode is not None:
        return (layer(slots),)
    outputs = backend.multiply(slots, ops.cast(layer.kernel, slots.dtype))
    return (_add_bias(layer, outputs),)


def _on_quantized(layer, tiles, tile_experts):
    """One stacked int8 layer on tiles, whose experts' kernels become floats."""
    outputs = ops.matmul(
        tiles, keras_internals.rows_of_quantized(layer, tile_experts)
    )
    if layer.bias is None:
        return outputs
    # A product, not `take`, whose gradient would be sparse on TensorFlow.
    owned = functional.membership(
        tile_experts, layer.bias.shape[0], outputs.dtype
    )
    bias = ops.matmul(owned, ops.cast(layer.bias[:, 0], outputs.dtype))
    return outputs + ops.expand_dims(bias, 1)


def _add_bias(layer, outputs):
    if layer.bias is None:
        return outputs
    return outputs + ops.cast(layer.bias, outputs.dtype)

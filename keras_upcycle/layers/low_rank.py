"""Experts that share a frozen network and differ by a low rank each."""

import keras
from keras import ops

from keras_upcycle.layers.experts import Experts
from keras_upcycle.routing import functional
from keras_upcycle.state import first_values
from keras_upcycle.types import Tensor


@keras.saving.register_keras_serializable(package="keras_upcycle")
class FrozenDense(keras.layers.Dense):
    """A `Dense` whose weights never train, whatever its flag says."""

    def add_weight(self, *args, **kwargs):
        kwargs["trainable"] = False
        return super().add_weight(*args, **kwargs)

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras refuses subclasses, which may compute otherwise; this does not.
        super().quantize(mode, type_check=False, config=config)


def float_kernel(dense: keras.layers.Dense) -> Tensor:
    """The float32 kernel of a `Dense`; of integers what they stand for."""
    kernel = ops.cast(dense.kernel, "float32")
    if dense.quantization_mode is None:
        return kernel
    # A kernel of integers is divided by its scales again.
    return kernel / dense.kernel_scale


@keras.saving.register_keras_serializable(package="keras_upcycle")
class LowRankProjection(keras.layers.Layer):
    """`x @ W + b + alpha / rank * (x @ A_e) @ B_e`: `W` and `b` are everyone's.

    LoRA (arXiv 2106.09685), section 4.1, with a pair `A_e`, `B_e` for each
    expert; `B` starts at 0.

    Args:
        num_experts: Integer, `E`.
        units: Integer, the width that comes out.
        rank: Integer.
        alpha: Float.
        use_bias: Whether there is a `b`.
        kernel_initializer: Initializer of `W`.
        bias_initializer: Initializer of `b`.
        **kwargs: Of `keras.layers.Layer`.

    Input shape:
        `(E, N, in)`: slots, expert by expert.

    Output shape:
        `(E, N, units)`.
    """

    def __init__(
        self,
        num_experts,
        units,
        rank,
        alpha,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.units = units
        self.rank = rank
        self.alpha = alpha
        self.base = FrozenDense(
            units,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            dtype=self.dtype_policy,
            name="base",
        )

    def build(self, input_shape):
        width = input_shape[-1]
        self.base.build((None, width))
        he = keras.initializers.HeUniform()
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(self.num_experts, width, self.rank),
            initializer=first_values.by_expert(he, f"{self.name}/lora_a"),
        )
        self.lora_b = self.add_weight(
            name="lora_b",
            shape=(self.num_experts, self.rank, self.units),
            initializer="zeros",
        )
        self.built = True

    def call(self, inputs):
        down = ops.matmul(inputs, ops.cast(self.lora_a, inputs.dtype))
        return self.base(inputs) + self.scale * ops.matmul(
            down, ops.cast(self.lora_b, inputs.dtype)
        )

    def on_tiles(self, tiles: Tensor, tile_experts: Tensor) -> Tensor:
        """Rows of which each tile is of one expert.

        Args:
            tiles: `(N, M, in)`.
            tile_experts: int32 `(N,)`, in `[0, E]`; what is `E` is not read.

        Returns:
            `(N, M, units)`.
        """
        # A product, not `take`, whose gradient would be sparse on TensorFlow.
        owned = functional.membership(
            tile_experts, self.num_experts, tiles.dtype
        )

        def of_tiles(variable):
            _, *shape = variable.shape
            flat = ops.reshape(
                ops.cast(variable, tiles.dtype), (self.num_experts, -1)
            )
            return ops.reshape(ops.matmul(owned, flat), (-1, *shape))

        down = ops.matmul(tiles, of_tiles(self.lora_a))
        return self.base(tiles) + self.scale * ops.matmul(
            down, of_tiles(self.lora_b)
        )

    @property
    def kernel_initializer(self):
        """That of `W`, which `Experts` sets when it is built."""
        return self.base.kernel_initializer

    @kernel_initializer.setter
    def kernel_initializer(self, value):
        self.base.kernel_initializer = value

    @property
    def bias_initializer(self):
        """That of `b`."""
        return self.base.bias_initializer

    @bias_initializer.setter
    def bias_initializer(self, value):
        self.base.bias_initializer = value

    @property
    def scale(self) -> float:
        """What the product of `A` and `B` is multiplied by."""
        return self.alpha / self.rank

    @property
    def kernel(self) -> Tensor:
        """What each expert computes with, `(E, in, units)`; made when asked."""
        product = ops.matmul(
            ops.cast(self.lora_a, "float32"), ops.cast(self.lora_b, "float32")
        )
        merged = float_kernel(self.base) + self.scale * product
        return ops.cast(merged, self.variable_dtype)

    @property
    def bias(self) -> Tensor | None:
        """`(E, 1, units)`, all the same; `None` where there is none."""
        if self.base.bias is None:
            return None
        return ops.broadcast_to(
            ops.convert_to_tensor(self.base.bias),
            (self.num_experts, 1, self.units),
        )

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the network that all share; adapters stay floats."""
        del type_check
        self.base.quantize(mode, config=config)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "units": self.units,
            "rank": self.rank,
            "alpha": self.alpha,
            "use_bias": self.base.use_bias,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
        }


@keras.saving.register_keras_serializable(package="keras_upcycle")
class LowRankNetworks(Experts):
    """`Experts` of which each is one shared network and a low rank of its own.

    The shared network is frozen, in floats or int8; adapters train.
    `start_from` takes its weights as a dense block has them: `"up_kernel"`
    `(D, F)`, `"up_bias"` `(F,)`.

    Args:
        num_experts: Integer, `E`.
        intermediate_dim: Integer, `F`.
        rank: Integer, of each difference.
        alpha: Float, the scale of the differences times `rank`; `None` for
            `rank`, a scale of 1.
        **kwargs: Of `Experts`.

    Example:
        >>> experts = LowRankNetworks(4, 16, rank=2)
        >>> tuple(experts(ops.ones((4, 3, 8))).shape)
        (4, 3, 8)
        >>> len(experts.trainable_variables)
        4
    """

    # Its kernels are nowhere whole, so nothing is laid out by experts.
    placement = None
    are_narrow = False

    def __init__(
        self, num_experts, intermediate_dim, *, rank, alpha=None, **kwargs
    ):
        super().__init__(num_experts, intermediate_dim, **kwargs)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)

    @property
    def are_quantized(self):
        return any(
            layer.base.quantization_mode is not None
            for layer in self.projections.values()
        )

    @property
    def quantization_configs(self):
        """Of the shared network, which its own sub-layers tell a file."""
        return {}

    def apply_slots(self, slots, training=None):
        return self._feed_forward(
            (slots,), training, lambda layer, groups: (layer(*groups),)
        )[0]

    def apply_groups(self, slots, tiles, tile_experts, used, training=None):
        del used

        def apply(layer, groups):
            by_expert, by_tile = groups
            return layer(by_expert), layer.on_tiles(by_tile, tile_experts)

        return tuple(self._feed_forward((slots, tiles), training, apply))

    def sizes(self):
        return {**super().sizes(), "rank": self.rank}

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self.rank,
            "alpha": self.alpha,
        }

    def _kernel(self, name, role, units):
        first = {
            f"{role}_kernel": self.kernel_initializer,
            f"{role}_bias": self.bias_initializer,
            **self._first_values,
        }
        return LowRankProjection(
            self.num_experts,
            units,
            self.rank,
            self.alpha,
            use_bias=self.use_bias and (self.down_bias or role != "down"),
            kernel_initializer=first[f"{role}_kernel"],
            bias_initializer=first[f"{role}_bias"],
            trainable=self.trainable and role not in self._made_frozen,
            dtype=self.dtype_policy,
            name=name,
        )

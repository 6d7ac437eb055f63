"""Quantised layers and low-rank adapters."""

import functools
from collections.abc import Callable

import keras
from keras import ops

# How Keras reads the `filters` of `quantize`. Keras 3.15.
from keras.src.quantizers.utils import should_quantize_layer


def has_lora(layer: keras.Layer) -> bool:
    """Whether adapters are enabled on the layer itself.

    `lora_enabled` is set by Dense, EinsumDense, Embedding and the
    convolutions, 3.15.
    """
    return bool(getattr(layer, "lora_enabled", False))


def rows_of_quantized(layer: keras.layers.EinsumDense, index):
    """Float kernels of some rows of a stacked int8 `EinsumDense`.

    Under int8 the public `kernel` is the integers; `kernel_scale`, shaped for
    the einsum's output, turns them back. Row by row, so that only the rows
    asked for become floats. Keras 3.15.

    Args:
        layer: `EinsumDense("end,edf->enf")`, built and quantized.
        index: int32 `(N,)`, rows of the first kernel axis; one past the last
            stands for any.

    Returns:
        `(N, D, F)` in the layer's compute dtype, adapters merged.

    Raises:
        NotImplementedError: Under a quantization mode other than int8.
    """
    if layer.quantization_mode != "int8":
        raise NotImplementedError(
            "The dropless engine reads expert kernels one by one, which works "
            "for float and int8 kernels. Received: layer "
            f"{layer.path!r} with quantization mode "
            f"{layer.quantization_mode!r}. Build the layer with "
            'dispatch="capacity" or dispatch="dense".'
        )
    dtype = layer.compute_dtype
    index = ops.minimum(index, layer._kernel.shape[0] - 1)
    kernel = ops.cast(ops.take(layer._kernel, index, axis=0), dtype)
    scale = ops.take(layer.kernel_scale, index, axis=0)
    # The scale comes as the einsum's output would need it: (E, 1, F).
    scale = ops.reshape(scale, (-1, 1, kernel.shape[-1]))
    kernel = kernel / ops.cast(scale, dtype)
    if layer.lora_enabled:
        a = ops.take(layer.lora_kernel_a, index, axis=0)
        update = ops.matmul(a, layer.lora_kernel_b)
        update = update * (layer.lora_alpha / layer.lora_rank)
        kernel = kernel + ops.cast(update, dtype)
    return kernel


def look_before_quantizing(look: Callable) -> None:
    """Calls `look` with a whole model before Keras quantizes any of it.

    `Model.quantize` changes one layer after the other and asks none of them
    before; what a layer then refuses leaves a model half changed. There is no
    hook in front of that walk, and what a plain functional model calls is the
    class's own method: so the method is put behind one that looks first. It
    gets its mode and config resolved by `Layer.__new__`. Keras 3.15.

    Args:
        look: `(model, mode, config, chosen) -> None`, which raises to refuse;
            `chosen(layer)` says whether the `filters` let a layer through.
    """
    original = keras.Model.quantize

    @functools.wraps(original)
    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        def chosen(layer):
            return should_quantize_layer(layer, filters)

        look(self, mode, config, chosen)
        return original(
            self, mode=mode, config=config, filters=filters, **kwargs
        )

    keras.Model.quantize = quantize

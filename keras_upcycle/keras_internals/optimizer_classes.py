"""What our optimizers derive from beside Keras's own."""

import re
from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import ops

from keras_upcycle.keras_internals.optimizers import optimizer_scalars

# What has an axis of experts before those of a dense block's weights.
_STACK = re.compile(
    r"(?:^|/)expert_(?:up|gate|down|attention_\w+)"
    r"/(?:kernel|bias|lora_kernel_a)$"
)


class FreshSlots:
    """For an optimizer some of whose slots start late.

    Bias correction and decay in Keras's optimizers count `iterations`, for all
    variables alike. A mixin that counts from the start of the slots instead
    for the variables that came later; learning rates go on as they were. All
    updates of a step pass `_backend_update_step`, which torch and TensorFlow
    override. Keras 3.15.

    Args:
        fresh: Numbers of the late variables among those it is built with.
        fresh_since: `iterations` when their slots started, integer.
    """

    def __init__(self, *args, fresh=(), fresh_since=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fresh = tuple(fresh)
        self.fresh_since = int(fresh_since)
        self._counts_fresh = False

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        if hasattr(self, "_u_product"):  # Nadam's own bias correction
            self._fresh_u_product = keras.Variable(
                1.0, dtype=self._u_product.dtype, trainable=False
            )

    @property
    def iterations(self):
        count = super().iterations
        if not self._counts_fresh:
            return count
        own = count - self.fresh_since
        # Whoever sets the count back starts all slots anew, at once. Fewer
        # than no steps would make bias correction NaN.
        return ops.where(own < 0, ops.convert_to_tensor(count), own)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        parts = ([], [])
        for pair in zip(grads, trainable_variables, strict=True):
            late = self._get_variable_index(pair[1]) in self.fresh
            parts[late].append(pair)
        for late, part in enumerate(parts):
            if part:
                self._count_fresh(bool(late))
                super()._backend_update_step(
                    [pair[0] for pair in part],
                    [pair[1] for pair in part],
                    learning_rate,
                )
                self._count_fresh(False)

    def _count_fresh(self, late):
        if late == self._counts_fresh:
            return
        # Past Keras's `__setattr__`, which would track the variables again.
        object.__setattr__(self, "_counts_fresh", late)
        if hasattr(self, "_u_product"):
            both = self._u_product, self._fresh_u_product
            object.__setattr__(self, "_u_product", both[1])
            object.__setattr__(self, "_fresh_u_product", both[0])

    def get_config(self):
        return {
            **super().get_config(),
            "fresh": list(self.fresh),
            "fresh_since": self.fresh_since,
        }


class FactorsByVariable:
    """For an optimizer that treats some variables' gradients or rates apart.

    A mixin, to stand before the optimizer's class. Gradients pass
    `_backend_apply_gradients` unscaled and in front of accumulation and
    clipping; updates pass `update_step` one by one or, on torch, all at once
    `_parallel_update_step`; weight decay asks for the learning rate itself.
    Keras 3.15.

    Attributes:
        gradient_scales: Floats in the order of the variables that the
            optimizer is built with.
        rate_scales: The same for the learning rate.
        proportional: Whether an update is the learning rate times something.
            Where it is not, what it did to the variable is scaled.
    """

    name: str
    gradient_scales = ()
    rate_scales = ()
    proportional = True
    _rate_scale = 1.0

    def _backend_apply_gradients(self, grads, trainable_variables):
        factors = [
            self.gradient_scales[self._get_variable_index(variable)]
            for variable in trainable_variables
        ]
        scaled = [
            gradient if factor == 1 else ops.multiply(gradient, factor)
            for gradient, factor in zip(grads, factors, strict=True)
        ]
        super()._backend_apply_gradients(scaled, trainable_variables)

    def _get_current_learning_rate(self):
        rate = super()._get_current_learning_rate()
        return rate if self._rate_scale == 1 else rate * self._rate_scale

    def _apply_weight_decay(self, variables):
        decaying = [v for v in variables if self._use_weight_decay(v)]
        for factor, part in self._by_rate(decaying):
            self._rate_scale = factor
            super()._apply_weight_decay([decaying[n] for n in part])
        self._rate_scale = 1.0

    def update_step(self, gradient, variable, learning_rate):
        factor = self._rate_scale_of(variable)
        if factor == 1:
            super().update_step(gradient, variable, learning_rate)
        elif factor and self.proportional:
            super().update_step(gradient, variable, learning_rate * factor)
        else:
            # With a rate of 0 Ftrl would divide by it, and the memory of
            # momentum, which is of rates times gradients, would be lost.
            before = ops.copy(ops.convert_to_tensor(variable))
            super().update_step(gradient, variable, learning_rate)
            after = ops.convert_to_tensor(variable)
            self.assign(variable, before + factor * (after - before))

    def _parallel_update_step(self, grads, variables, learning_rate):
        # Nadam's own step counts itself, and must not count every part.
        scalars = optimizer_scalars(self).values()
        before = [(v, ops.copy(v.value)) for v in scalars]
        for factor, part in self._by_rate(variables):
            for variable, value in before:
                variable.assign(value)
            own = [variables[n] for n in part]
            still = [] if factor else [(v, ops.copy(v.value)) for v in own]
            super()._parallel_update_step(
                [grads[n] for n in part], own, learning_rate * (factor or 1.0)
            )
            for variable, value in still:
                variable.assign(value)

    def _rate_scale_of(self, variable):
        return self.rate_scales[self._get_variable_index(variable)]

    def _by_rate(self, variables):
        """The positions of the variables, factor by factor."""
        parts = {}
        for position, variable in enumerate(variables):
            factor = self._rate_scale_of(variable)
            parts.setdefault(factor, []).append(position)
        return list(parts.items())


class MuonOfExperts:
    """For a Muon that also serves stacks of experts' kernels.

    Keras's Muon leaves all but matrices to AdamW, and its scale reads a
    matrix's shape from the front. Its Newton-Schulz iteration takes stacks as
    they are. Keras 3.15.
    """

    def _should_use_adamw(self, variable):
        stacked = len(variable.shape) == 3 and min(variable.shape[1:]) > 1
        if not (stacked and variable.name == "kernel"):
            return super()._should_use_adamw(variable)
        return any(re.search(key, variable.path) for key in self.exclude_layers)

    def lr_adjust(self, x):
        if self.rms_rate is None:
            return x
        return x * float(max(x.shape[-2:])) ** 0.5 * self.rms_rate


def _is_stack_of_experts(optimizer, variable):
    """Whether the variable has a leading axis of experts.

    TensorFlow passes its own variable, which has no path: the optimizer knows
    the Keras variable at the same place. Keras 3.15.
    """
    known = optimizer._trainable_variables
    variable = known[optimizer._get_variable_index(variable)]
    return len(variable.shape) >= 3 and bool(_STACK.search(variable.path))


def _of_one_expert(variable):
    return tuple(range(1, len(variable.shape)))


class AdafactorOfExperts:
    """For an Adafactor that takes every expert for itself.

    Keras's factors the last two axes, which leaves experts apart, but takes
    the size of the parameters and that of the update, by which it scales and
    clips, over the whole stack. Both go through `_rms`. Keras 3.15.
    """

    _rms_axes = None

    def update_step(self, gradient, variable, learning_rate):
        stacked = _is_stack_of_experts(self, variable)
        self._rms_axes = _of_one_expert(variable) if stacked else None
        super().update_step(gradient, variable, learning_rate)

    def _rms(self, x):
        if self._rms_axes is None:
            return super()._rms(x)
        squares = ops.mean(ops.square(x), axis=self._rms_axes, keepdims=True)
        return ops.sqrt(squares)


class LambOfExperts:
    """For a Lamb that takes every expert for itself.

    Keras's scales the update by the norm of the whole stack. What it made of
    its slots is kept, and the update done again from them. Keras 3.15.
    """

    def update_step(self, gradient, variable, learning_rate):
        before = ops.copy(ops.convert_to_tensor(variable))
        super().update_step(gradient, variable, learning_rate)
        if not _is_stack_of_experts(self, variable):
            return
        number = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, before.dtype)
        first = ops.convert_to_tensor(self._momentums[number])
        second = ops.convert_to_tensor(self._velocities[number])
        first = first / (1.0 - ops.power(self.beta_1, step))
        second = second / (1.0 - ops.power(self.beta_2, step))
        update = first / (ops.sqrt(second) + self.epsilon)

        def norm(x):
            axes = _of_one_expert(variable)
            squares = ops.sum(ops.square(x), axis=axes, keepdims=True)
            return ops.sqrt(squares)

        size, length = norm(before), norm(update)
        both = ops.logical_and(size > 0, length > 0)
        ones = ops.ones_like(length)
        ratio = ops.where(both, size / ops.where(both, length, ones), ones)
        rate = ops.cast(learning_rate, before.dtype)
        self.assign(variable, before - ratio * rate * update)


class GradientMeter(keras.optimizers.Optimizer):
    """Adds up what gradients are, of stacks `(E, ...)`, and changes nothing.

    Any backend's `fit` computes them, and the number of a variable is the same
    for what a backend hands over in its place. Keras 3.15.

    Args:
        size: Function of a gradient and its weight, both float32.
        watched: The variables to add up; others are passed over.
    """

    def __init__(self, size: Callable, watched: Iterable[keras.Variable]):
        super().__init__(learning_rate=0.0, name="gradient_meter")
        self.size = size
        # Not the variables: Keras would take them for the optimizer's own.
        self._watched = {id(variable) for variable in watched}

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        watched = [v for v in variables if id(v) in self._watched]
        self._sums = [
            self.add_variable((v.shape[0],), dtype="float32", name="sum")
            for v in watched
        ]
        self._place = {
            self._get_variable_index(v): n for n, v in enumerate(watched)
        }

    def update_step(self, gradient, variable, learning_rate):
        del learning_rate
        place = self._place.get(self._get_variable_index(variable))
        if place is None:
            return
        size = self.size(
            ops.cast(gradient, "float32"), ops.cast(variable, "float32")
        )
        size = ops.sum(size, axis=tuple(range(1, len(size.shape))))
        self.assign_add(self._sums[place], size)

    def found(self, variable: keras.Variable) -> np.ndarray:
        """What was added up, float64 `(E,)`."""
        place = self._place[self._get_variable_index(variable)]
        return ops.convert_to_numpy(self._sums[place]).astype("float64")

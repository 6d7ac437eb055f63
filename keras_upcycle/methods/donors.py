"""Several donors: experts that were trained apart, mixed into one model."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import families, keras_internals
from keras_upcycle.conversion import model_checks, pairing
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import surgery
from keras_upcycle.layers.expert_init import ExpertInit
from keras_upcycle.layers.moe_layers import moe_layers_in
from keras_upcycle.methods.expert_weights import (
    ExpertWeights,
    array,
    dense_sites,
    float_weights,
)
from keras_upcycle.state import layer_state, sameness
from keras_upcycle.state.first_values import ByExpert

AVERAGE, BASE, LAST = "average", "base", "last"
# Stands among the donors for the model that is upcycled.
UPCYCLED = "the upcycled model itself"


class FromDonors(ExpertInit):
    """Experts that start as the blocks of several dense models.

    Derive from it and say in `order` which expert comes from which donor.

    Args:
        donors: Dense models, or `ExpertWeights`.
        name: What one of them is, in messages.
    """

    def __init__(self, donors: Iterable[Any], name: str):
        if _is_donor(donors):
            donors = [donors]
        if isinstance(donors, str) or not isinstance(donors, Iterable):
            raise TypeError(
                f"The `{name}s` must be a list of Keras models or "
                f"`ExpertWeights`. Received: {name}s={donors!r} of type "
                f"{type(donors).__name__}."
            )
        self.donors = list(donors)
        self.name = name
        if not self.donors:
            raise ValueError(
                f"`{name}s` must hold at least one {name}. Received: an empty "
                "list. Pass dense models of one architecture."
            )
        for number, donor in enumerate(self.donors):
            if not _is_donor(donor):
                raise TypeError(
                    f"Each of `{name}s` must be a Keras model or an "
                    f"`ExpertWeights`. Received: number {number} of type "
                    f"{type(donor).__name__}. Load models before, not classes."
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.donors)} {self.name}s)"

    def order(self, num_experts: int) -> Sequence[int]:
        """For each expert the number of its donor."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `order(num_experts)`."
        )

    def prepare(self, model):
        for number, donor in enumerate(self.donors):
            if donor is not UPCYCLED:
                _check_donor(model, donor, f"{self.name} {number}".capitalize())

    def values(self, block, router, num_experts, seed):
        del router, seed
        order = self.order(num_experts)
        kernels = {n: _kernels(self.donors[n], block) for n in set(order)}
        return {
            name: _stacked([kernels[n][name] for n in order])
            for name in block.kernels
        }


def check_hold_others(donors: Iterable[Any], name: str, remedy: str) -> None:
    """Raises `ValueError` for `ExpertWeights` of feed-forward blocks alone."""
    for number, donor in enumerate(donors):
        if isinstance(donor, ExpertWeights) and donor.others is None:
            raise ValueError(
                "An average of the other weights needs them. Received: "
                f"{name} {number}, an `ExpertWeights` that holds feed-forward "
                "blocks alone. Make it with `other_weights=True`, pass the "
                f"model itself, or pass `{remedy}`."
            )


def write_others(
    dense: keras.Model, moe: keras.Model, donors: Sequence[Any]
) -> None:
    """Puts the donors' mean into what a sparse model has outside experts.

    Args:
        dense: The dense model.
        moe: What `upcycle_model` made of it.
        donors: Checked models, or `ExpertWeights` that hold other weights.
    """
    sources = [
        ExpertWeights.view(dense) if donor is UPCYCLED else _view(donor)
        for donor in donors
    ]
    keys = {id(v): key for key, v in ExpertWeights.view(dense).items()}
    by_key = [dict(source.items()) for source in sources]
    for pair in pairing.of_whole_experts(dense, moe):
        key = keys.get(id(pair.dense))
        if pair.relation != pairing.COPIED or key is None:
            continue
        # Summed in float64: equal donors give their own value to the bit.
        values = [array(each[key]) for each in by_key]
        mean = np.mean(values, axis=0, dtype="float64").astype("float32")
        pair.sparse.assign(ops.convert_to_tensor(mean))
    for layer in keras_internals.all_layers(moe):
        layer_state.refresh(layer)


def _is_donor(value):
    return isinstance(value, keras.Model | ExpertWeights) or value is UPCYCLED


def _view(donor):
    if isinstance(donor, ExpertWeights):
        return donor
    return ExpertWeights.view(donor)


def _kernels(donor, block):
    if donor is UPCYCLED:
        return block.kernels
    if isinstance(donor, ExpertWeights):
        return donor.blocks[block.index]
    return dense_sites(donor)[block.index].kernels


def _stacked(values):
    return ByExpert(
        lambda experts: np.stack([array(values[e]) for e in experts])
    )


def _check_donor(base, donor, name):
    sites = families.family_of(base).find(base).sites
    if isinstance(donor, ExpertWeights):
        donor.check_fits(sites, name)
        if donor.others is not None:
            own = ExpertWeights.view(base).others
            _check_shapes(
                [tuple(v.shape) for v in donor.others],
                [tuple(v.shape) for v in own],
                name,
            )
        return
    if moe_layers_in(donor):
        raise UpcycleError(
            f"{name} must be dense. Received: {donor.name!r}, which holds "
            "MoE layers already. Pass the dense model that it came "
            "from."
        )
    if type(donor) is not type(base):
        raise UpcycleError(
            f"{name} must be of the class of the upcycled model, a "
            f"{type(base).__name__}. Received: {donor.name!r}, a "
            f"{type(donor).__name__}. Load all of them the same way."
        )
    _check_shapes(_structure(donor), _structure(base), name)
    for site, other in zip(sites, dense_sites(donor), strict=True):
        activations = [_activation(each) for each in (other, site)]
        if activations[0] != activations[1]:
            raise UpcycleError(
                f"{name} must compute what the upcycled model does. Received: "
                f"activation {activations[0]!r} in block {other.path!r}, where "
                f"the model has {activations[1]!r}. Take models of one "
                "architecture."
            )
    for layer, other in surgery.matched(base, donor):
        if not sameness.same_files(layer, other):
            raise UpcycleError(
                f"{name} must read its inputs as the upcycled model does. "
                f"Received: layer {other.name!r} ({type(other).__name__}), "
                "which holds another vocabulary, or other assets, than that "
                "of the upcycled model: weights that belong to different "
                "words cannot be mixed. Take models that share it."
            )
    model_checks.check_donor(donor, name)


def _structure(model):
    return [
        (type(layer).__name__, variable.name, tuple(variable.shape))
        for layer, variable in float_weights(model)
    ]


def _check_shapes(received, expected, name):
    if received == expected:
        return
    differ = next(
        (
            pair
            for pair in zip(received, expected, strict=False)
            if pair[0] != pair[1]
        ),
        (f"{len(received)} weights", f"{len(expected)} weights"),
    )
    raise UpcycleError(
        f"{name} must have the weights of the upcycled model, in its order. "
        f"Received: {differ[0]}, expected {differ[1]}. Take models of one "
        "architecture, made the same way."
    )


def _activation(site):
    function = keras.activations.get(site.activation)
    return getattr(function, "__name__", type(function).__name__)

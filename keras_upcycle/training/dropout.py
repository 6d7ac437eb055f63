"""`set_dropout`: other dropout rates for a model that is built already.

Fine-tuning wants more dropout in experts than elsewhere, each of which sees a
share of few tokens; and pretraining often wanted none at all.
"""

import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_upcycle import checks, keras_internals, tables
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.layers.moe_layers import moe_layers_in

# Of these the rate is all there is to set.
_DROPOUTS = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)
# Where KerasHub's layers and models keep what their files hold of it.
_SETTINGS = ("dropout", "dropout_rate", "attention_dropout")
_IN_CONFIGS = ("keras_hub.src.models.t5.", "keras_hub.src.models.vit.")


@dataclass(frozen=True)
class DropoutReport:
    """What `set_dropout` set. Print it.

    Attributes:
        dense: From the path of a layer outside the experts to its rate before
            and after.
        experts: The same for the experts' hidden layers, by MoE layer.
        left: Paths of other layers that drop or make noise, which stay as
            they were.
        forgotten: Classes that are made anew from a config of their own, which
            may not hold the new rates.

    Example:
        >>> print(DropoutReport(dense={"drop": (0.0, 0.1)}, experts={}))
        1 rates set outside experts, 0 in them.
        layer ...
    """

    dense: Mapping[str, tuple[float, float]]
    experts: Mapping[str, tuple[float, float]]
    left: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (path, part, f"{before:g}", f"{after:g}")
            for part, changes in (
                ("dense", self.dense),
                ("experts", self.experts),
            )
            for path, (before, after) in changes.items()
        ]
        rows += [(path, "left as it is", "", "") for path in self.left]
        table = tables.text(("layer", "part", "before", "now"), rows)
        return (
            f"{len(self.dense)} rates set outside experts, "
            f"{len(self.experts)} in them.\n{table}"
        )


def set_dropout(
    model: keras.Model,
    dense: float | None = None,
    experts: float | None = None,
) -> DropoutReport:
    """Sets the dropout rates of a built model, also where there was none.

    Of a sparse model or, with `dense` alone, of a dense one. Rates are in the
    configs that `.keras` files, presets and clones are made from, so that
    they come back. `fit` goes on with the new rates and the optimizer as it
    is: what the model, and models inside it, had compiled is dropped. What
    holds this model and is compiled itself, or a step of your own, keeps the
    old rates until it is compiled again.

    References: Komatsuzaki et al., Sparse Upcycling (arXiv 2212.05055),
    appendix A: fine-tuning on SuperGLUE with expert dropout 0.1 (Base) and
    0.3 (Large). Fedus et al., Switch Transformers (2101.03961), section 2.2,
    for more dropout in experts than elsewhere.

    Args:
        model: A Keras model, built. Give the very model that you call `fit` on,
            not a backbone inside it.
        dense: Float in `[0, 1)` or `None`, the rate of all dropout outside the
            experts' hidden layers: `Dropout` and `SpatialDropout` layers, on
            the weights of attention too, and what follows an MoE layer in the
            block's place. A place is not invented: a model that has no such
            layer keeps none. `None` (default) leaves them.
        experts: Float in `[0, 1)` or `None`, the rate on the hidden layers of
            all experts, shared ones too. `None` (default) leaves them.

    Returns:
        A `DropoutReport`.

    Raises:
        TypeError: If `model` is no Keras layer, or a rate no number.
        ValueError: For a rate outside `[0, 1)`, for none at all, or a model
            that is not built.
        UpcycleError: If there is nothing to set: no MoE layer, or no dropout
            outside experts; or if attention cannot drop. Nothing was changed
            then.

    Warns:
        UserWarning: For layers that drop in a way of their own and stay as
            they were, and for classes of yours that are made anew from their
            own config when the model is loaded.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ...     keras.layers.Dropout(0.0, name="drop"),
        ... ])
        >>> moe = keras_upcycle.upcycle_model(dense, num_experts=4)
        >>> report = set_dropout(moe, dense=0.1, experts=0.3)
        >>> report.dense
        {'drop': (0.0, 0.1)}
        >>> moe.layers[0].dropout
        0.3
    """
    rates = {"dense": dense, "experts": experts}
    for name, rate in rates.items():
        if rate is not None:
            checks.check_rate(name, rate)
    if dense is None and experts is None:
        raise ValueError(
            "At least one of `dense` and `experts` must be a rate in [0, 1). "
            "Received: dense=None and experts=None."
        )
    checks.check_instance("model", model, keras.Layer, "a Keras model or layer")
    if not model.built:
        raise ValueError(
            "`model` must be built, or its layers are not there yet. Received: "
            f"{model.name!r}, not built. Call it on a batch first."
        )
    mixtures = moe_layers_in(model)
    if experts is not None and not mixtures:
        raise UpcycleError(
            "`experts` is the rate in MoE layers. Received: "
            f"{model.name!r} with none. Pass `dense` alone."
        )
    places = _Places(model, mixtures)
    if dense:
        _check_places(model, places)
    changed = {}
    if dense is not None:
        changed = places.set(float(dense))
    of_experts = {}
    if experts is not None:
        for path, layer in _named(mixtures):
            of_experts[path] = (float(layer.dropout), float(experts))
            layer.set_dropout(hidden=float(experts))
    keras_internals.drop_compiled_training(model)
    keras_internals.drop_compiled_inference(model)
    left = forgotten = ()
    if dense is not None:
        left, forgotten = tuple(places.left), tuple(places.forgotten)
    report = DropoutReport(changed, of_experts, left, forgotten)
    _warn(report)
    return report


class _Places:
    """Where a model drops outside its experts' hidden layers."""

    def __init__(self, model, mixtures):
        inside = {
            id(below)
            for mixture in mixtures
            for below in keras_internals.all_layers(mixture)
        }
        self.outside = [
            layer
            for layer in keras_internals.all_layers(model)
            if id(layer) not in inside
        ]
        self.dropouts = [x for x in self.outside if type(x) in _DROPOUTS]
        self.attention = [
            x
            for x in self.outside
            if keras_internals.attention_rate(x) is not None
        ]
        # What an MoE layer drops of its output, where the dense block would.
        of_blocks = {
            id(below)
            for layer in self.outside
            if _is_hub(layer)
            for below in keras_internals.sublayers(layer)
        }
        self.mixtures = [
            x for x in mixtures if id(x) in of_blocks or x.output_drop
        ]
        own = {id(x) for x in (*self.dropouts, *self.attention)}
        # A recurrent layer hands its rates on to its cell.
        cells = {
            id(below)
            for layer in self.outside
            if isinstance(layer, keras.layers.RNN)
            for below in keras_internals.sublayers(layer)
        }
        self.left = [
            _path(x)
            for x in self.outside
            if id(x) not in own and id(x) not in cells and _drops(x)
        ]
        self.forgotten = sorted(
            {type(x).__name__ for x in self.outside if self._forgets(x)}
        )

    def set(self, rate):
        """Sets all, and gives what each path had before and has now."""
        changed = {}

        def note(path, before):
            name, number = path, 2
            while name in changed:  # KerasHub has paths that collide
                name, number = f"{path}#{number}", number + 1
            changed[name] = (float(before), rate)

        for layer in self.attention:
            keras_internals.set_attention_rate(layer, rate)
        for layer in self.dropouts:
            note(_path(layer), layer.rate)
            keras_internals.set_rate(layer, rate)
        for layer in self.mixtures:
            note(f"{_path(layer)}/output", layer.output_dropout)
            layer.set_dropout(output=rate)
        for layer in self.outside:
            if _is_hub(layer):
                for name in _SETTINGS:
                    if _is_number(getattr(layer, name, None)):
                        setattr(layer, name, rate)
        return changed

    def _forgets(self, layer):
        """Whether a layer makes its `Dropout`s anew from its own config."""
        if type(layer).__module__.startswith(("keras.", "keras_upcycle.")):
            return False
        if any(
            kind.__module__.startswith(_IN_CONFIGS)
            for kind in type(layer).__mro__
        ):
            return False
        ids = {id(x) for x in (*self.dropouts, *self.attention)}
        return any(id(x) in ids for x in keras_internals.sublayers(layer))


def _check_places(model, places):
    if not (places.dropouts or places.attention or places.mixtures):
        raise UpcycleError(
            "`dense` is the rate of dropout outside experts. Received: "
            f"{model.name!r}, which has no `Dropout` layer there, and none is "
            "invented. Build the model with its layers at the rate 0, or pass "
            "`experts` alone."
        )
    for layer in places.attention:
        if keras_internals.uses_flash_attention(layer):
            raise UpcycleError(
                "Flash attention has no dropout. Received: dense above 0 and "
                f"layer {_path(layer)!r} with `flash_attention=True`. Build "
                "the layer without it."
            )


def _named(mixtures: list[MoEFeedForward]):
    names = {}
    for layer in mixtures:
        path, number = _path(layer), 2
        while path in names:
            path, number = f"{_path(layer)}#{number}", number + 1
        names[path] = layer
    return names.items()


def _warn(report):
    if report.left:
        warnings.warn(
            "These layers drop or make noise in a way of their own and were "
            f"left as they are: {', '.join(report.left)}. Set them yourself.",
            stacklevel=3,
        )
    if report.forgotten:
        warnings.warn(
            "Layers of these classes are made anew from their own config when "
            "a file is loaded, which may not hold the new rates: "
            f"{', '.join(report.forgotten)}. Call `set_dropout` again then.",
            stacklevel=3,
        )


def _path(layer):
    return layer.path or layer.name


def _is_hub(layer):
    return any(
        kind.__module__.startswith("keras_hub.") for kind in type(layer).__mro__
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _drops(layer):
    """Whether an unknown layer drops, as far as one can see from outside."""
    if type(layer).__name__.endswith("Dropout"):
        return True
    if isinstance(layer, keras.layers.Dropout):
        return True
    if _is_hub(layer):
        return False
    return any(
        _is_number(rate) and rate > 0
        for name in ("dropout", "recurrent_dropout", "stddev")
        for rate in [getattr(layer, name, None)]
    )

"""Two models side by side: a dense one, and what `upcycle_model` made of it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import keras

from keras_upcycle import families
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import Family, FeedForwardSite
from keras_upcycle.layers import moe_layers
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward


class Origin(NamedTuple):
    """Where a variable of the sparse model comes from.

    Attributes:
        variable: Of the sparse model.
        source: Of the dense model; `None` for what is new, as routers are.
        layer: The mixture it belongs to; `None` for what was only copied.
        name: Which of the dense block's variables the source is, such as
            `"up_kernel"`; `None` for what was only copied, or is new.
    """

    variable: keras.Variable
    source: keras.Variable | None
    layer: MoEFeedForward | None = None
    name: str | None = None


def converted(
    dense: keras.Model, moe: keras.Model
) -> tuple[Family, list[tuple[FeedForwardSite, MoEFeedForward]]]:
    """The family, and site and mixture for every converted block.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    family = families.family_of(dense)
    sites = family.find(dense).sites
    family_of_moe = families.family_of(moe)
    try:
        places = family_of_moe.places(moe, sites)
    except (KeyError, ValueError, AttributeError) as error:
        raise _no_pair(dense, moe, f"which do not match: {error}") from error
    if len(places) != len(sites):
        raise _no_pair(
            dense,
            moe,
            f"with {len(sites)} feed-forward blocks and {len(places)} places",
        )
    found = [
        (site, layer)
        for site, layer in zip(sites, places, strict=True)
        if isinstance(layer, MoEFeedForward)
    ]
    if not found:
        if moe_layers.mixtures_in(moe):
            raise _no_pair(
                dense, moe, "whose mixtures stand where `dense` has no block"
            )
        raise UpcycleError(
            "`moe` must hold at least one mixture of experts where `dense` "
            f"has a feed-forward block. Received: {moe.name!r} with none. "
            "Pass the dense model first and the upcycled one second."
        )
    return family, found


def origins(dense: keras.Model, moe: keras.Model) -> list[Origin]:
    """The origin of every weight of the sparse model.

    Layers are matched by name where a model lists them, and their variables by
    order: KerasHub numbers its norm layers automatically, and some of its
    paths collide.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    _, places = converted(dense, moe)
    found = []
    left_out = set()
    for site, layer in places:
        if layer.intermediate_dim != site.intermediate_dim:
            raise UpcycleError(
                "Experts must be as wide as the dense block, to come from it "
                "or to go back to it as a whole. Received: experts of width "
                f"{layer.intermediate_dim} for block {site.path!r} of width "
                f"{site.intermediate_dim}, such as slices of it."
            )
        own = {}
        for name, source in site.kernels.items():
            if name == "down_bias" and layer.output_bias is not None:
                # One for all, as the dense block's own.
                variable = layer.output_bias.bias
                own[id(variable)] = (source, None, None)
                left_out.add(id(source))
                continue
            role, part = name.split("_")
            expert = getattr(layer.experts.projections[role], part)
            own[id(expert)] = (source, layer, name)
            left_out.add(id(source))
        for variable in layer.weights:
            origin = own.get(id(variable), (None, layer))
            found.append(Origin(variable, *origin))
            left_out.add(id(variable))
    for source, variable in _pairs(dense, moe, left_out):
        found.append(Origin(variable, source))
    return found


def counterparts(
    dense: keras.Model,
    moe: keras.Model,
    places: Iterable[tuple[FeedForwardSite, MoEFeedForward]],
) -> list[tuple[keras.Variable, keras.Variable | None]]:
    """Which weight of the dense model each of the sparse one stands for.

    As `origins`, but also where experts are no copies of a dense block: cut
    from it, narrower, or beside a shared network. A kernel in the role of a
    dense one stands for it, whatever its values.

    Args:
        dense: The dense model.
        moe: What was made of it.
        places: The site and the mixture of every converted block.

    Returns:
        `(weight of moe, weight of dense)`; `None` for what is new.

    Raises:
        UpcycleError: If the other weights do not match.
    """
    found = []
    left_out = set()
    for site, layer in places:
        own = {}
        left_out.update(id(source) for source in site.kernels.values())
        for networks in layer.networks:
            for role, projection in networks.projections.items():
                for part in ("kernel", "bias"):
                    variable = getattr(projection, part)
                    own[id(variable)] = site.kernels.get(f"{role}_{part}")
        if layer.output_bias is not None:
            own[id(layer.output_bias.bias)] = site.kernels.get("down_bias")
        for variable in layer.weights:
            found.append((variable, own.get(id(variable))))
            left_out.add(id(variable))
    for source, variable in _pairs(dense, moe, left_out):
        found.append((variable, source))
    return found


def copies(
    old: keras.Model,
    new: keras.Model,
    known: Iterable[tuple[keras.Variable, keras.Variable]],
) -> list[tuple[keras.Variable, keras.Variable]]:
    """The weights of two models that are alike but for some parts, in pairs.

    Args:
        old: A model.
        new: One like it.
        known: `(weight of new, weight of old)` of parts that are not alike.

    Returns:
        The same pairs, and those of all other weights.
    """
    found = list(known)
    left_out = {id(variable) for pair in found for variable in pair}
    return found + [(v, source) for source, v in _pairs(old, new, left_out)]


def copied(
    dense: keras.Model, moe: keras.Model
) -> Iterator[tuple[keras.Variable, keras.Variable]]:
    """`(source, variable)` of every weight outside the converted blocks.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    _, places = converted(dense, moe)
    left_out = set()
    for site, layer in places:
        left_out.update(id(source) for source in site.kernels.values())
        left_out.update(id(variable) for variable in layer.weights)
    yield from _pairs(dense, moe, left_out)


def _pairs(
    dense: keras.Layer, moe: keras.Layer, left_out: set[int]
) -> Iterator[tuple[keras.Variable, keras.Variable]]:
    """Variables that were copied, each once."""
    both = [
        {layer.name: layer for layer in getattr(model, "layers", ())}
        for model in (dense, moe)
    ]
    old, new = (_left(model.weights, left_out) for model in (dense, moe))
    if all(both):
        for name, layer in both[0].items():
            if name in both[1]:
                yield from _pairs(layer, both[1][name], left_out)
        old, new = (_left(model.weights, left_out) for model in (dense, moe))
    kinds = [[(v.name, tuple(v.shape)) for v in vs] for vs in (old, new)]
    if kinds[0] != kinds[1]:
        raise _no_pair(
            dense, moe, f"whose other weights differ: {kinds[0]} and {kinds[1]}"
        )
    for source, variable in zip(old, new, strict=True):
        left_out.update((id(source), id(variable)))
        yield source, variable


def _left(variables, left_out):
    unique = {id(v): v for v in variables if id(v) not in left_out}
    return list(unique.values())


def _no_pair(dense, moe, why):
    return UpcycleError(
        "`moe` must be what `upcycle_model` made of `dense`. Received: "
        f"{dense.name!r} ({type(dense).__name__}) and {moe.name!r} "
        f"({type(moe).__name__}), {why}."
    )

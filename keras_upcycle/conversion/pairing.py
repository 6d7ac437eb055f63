"""Two models side by side: a dense one, and what `upcycle_model` made of it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import keras

from keras_upcycle import checks, families, keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import Family, FeedForwardSite
from keras_upcycle.families.attention_sites import mixture_of, projections_of
from keras_upcycle.layers import moe_layers
from keras_upcycle.layers.attention_mixture import AttentionMixture
from keras_upcycle.layers.low_rank import LowRankProjection
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward

# What a weight of the sparse model is to the one that it stands for.
COPIED = "copied"  # of the same shape, outside experts
STACKED = "stacked"  # (E, ...): that of every expert, each as large
CUT = "cut"  # in its role, of another size: slices, or a shared network
NEW = "new"  # it stands for none, as routers


class Pair(NamedTuple):
    """A weight of the sparse model and the dense one that it stands for.

    Attributes:
        sparse: Of the sparse model.
        dense: Of the dense model; `None` if `relation` is `NEW`.
        relation: `COPIED`, `STACKED`, `CUT` or `NEW`.
        layer: The MoE layer whose experts hold it, or the `AttentionMixture`;
            `None` if it is `COPIED`.
        name: Which of the dense block's weights it stands for, such as
            `"up_kernel"` or `"query_kernel"`; `None` outside blocks and
            attention's experts, and if it is `NEW`.
    """

    sparse: keras.Variable
    dense: keras.Variable | None
    relation: str
    layer: MoEFeedForward | AttentionMixture | None = None
    name: str | None = None


def converted(
    dense: keras.Model, moe: keras.Model
) -> tuple[Family, list[tuple[FeedForwardSite, MoEFeedForward]]]:
    """The family, and site and MoE layer for every converted block.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    for name, model in (("dense", dense), ("moe", moe)):
        checks.check_instance(name, model, keras.Model, "a Keras model")
    family = families.family_of(dense)
    sites = family.find(dense).sites
    if not sites and family.mixtures(dense):
        raise UpcycleError(
            "`dense` must be dense. Received: "
            f"{dense.name!r} ({type(dense).__name__}), a mixture of KerasHub's "
            "own, of which there is no dense model to compare with or to go "
            "back to. Compare outputs with its copy by `adopt_model`; "
            "`extract_expert` gives one expert of one layer, and "
            '`export_model(model, "keras_hub")` the stock model.'
        )
    family_of_moe = families.family_of(moe)
    try:
        places = family_of_moe.current_layers(moe, sites)
    except (LookupError, ValueError, AttributeError) as error:
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
    if not found and not moe_layers.attention_routing_in(moe):
        if moe_layers.moe_layers_in(moe):
            raise _no_pair(
                dense, moe, "whose MoE layers stand where `dense` has no block"
            )
        raise UpcycleError(
            "`moe` must hold at least one MoE layer where `dense` "
            f"has a feed-forward block. Received: {moe.name!r} with none. "
            "Pass the dense model first and the upcycled one second."
        )
    return family, found


def of_block(site: FeedForwardSite, layer: MoEFeedForward) -> list[Pair]:
    """What each weight of an MoE layer stands for in the dense block.

    Args:
        site: The dense block.
        layer: The MoE layer in its place, built.

    Returns:
        The pairs of all its weights, a router's among them.
    """
    found = []
    for networks in layer.networks:
        alike = (
            networks is layer.experts
            and networks.intermediate_dim == site.intermediate_dim
        )
        for role, projection in networks.projections.items():
            low_rank = isinstance(projection, LowRankProjection)
            for part in ("kernel", "bias"):
                name = f"{role}_{part}"
                sparse = getattr(
                    projection.base if low_rank else projection, part
                )
                dense = site.kernels.get(name)
                if sparse is not None and dense is not None:
                    dense = keras_internals.shown(dense)
                    relation = STACKED if alike else CUT
                    if low_rank:  # everyone's, as the dense block's own
                        relation = COPIED
                    found.append(Pair(sparse, dense, relation, layer, name))
    if layer.output_bias is not None and "down_bias" in site.kernels:
        # One for all experts, as the dense block's own.
        name = "down_bias"
        bias = layer.output_bias.bias
        found.append(Pair(bias, site.kernels[name], COPIED, name=name))
    known = {id(pair.sparse) for pair in found}
    return found + [
        Pair(variable, None, NEW, layer)
        for variable in layer.weights
        if id(variable) not in known
    ]


def pairs(
    dense: keras.Model,
    moe: keras.Model,
    places: Iterable[tuple[FeedForwardSite, MoEFeedForward]] | None = None,
) -> list[Pair]:
    """What each weight of the sparse model stands for in the dense one.

    Layers are matched by name where a model lists them, and their variables by
    order: KerasHub numbers its norm layers automatically, and some of its
    paths collide.

    Args:
        dense: The dense model.
        moe: What was made of it.
        places: The site and the MoE layer of every converted block; `None` to
            find them.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    if places is None:
        _, places = converted(dense, moe)
    places = list(places)
    found = [pair for place in places for pair in of_block(*place)]
    of_attention = _of_attention(dense, moe)
    found += of_attention
    left_out = {id(pair.sparse) for pair in found}
    left_out.update(id(pair.dense) for pair in of_attention)
    for site, _ in places:
        left_out.update(
            id(keras_internals.shown(source))
            for source in site.kernels.values()
        )
    return found + [
        Pair(variable, source, COPIED)
        for source, variable in _pairs(dense, moe, left_out)
    ]


def _of_attention(dense: keras.Model, moe: keras.Model) -> list[Pair]:
    """What is not copied of attention whose heads, or copies, are routed."""
    found = [
        Pair(variable, None, NEW)
        for routed in moe_layers.routed_heads_in(moe)
        for variable in routed.new_weights
    ]
    if not moe_layers.attention_mixtures_in(moe):
        return found
    old, new = (
        list(families.family_of(model).attention_layers(model).values())
        for model in (dense, moe)
    )
    if len(old) != len(new):
        raise _no_pair(
            dense, moe, f"with {len(old)} and {len(new)} attention layers"
        )
    for source, layer in zip(old, new, strict=True):
        mixture = mixture_of(layer)
        if mixture is None:
            continue
        found += [Pair(v, None, NEW, mixture) for v in mixture.router.weights]
        owned = projections_of(source, mixture.shared_key_values)
        for role, projection in mixture.projections.items():
            for part in ("kernel", "bias"):
                stacked = getattr(projection, part)
                if stacked is not None:
                    one = getattr(owned[role], part)
                    name = f"{role}_{part}"
                    found.append(Pair(stacked, one, STACKED, mixture, name))
    return found


def of_whole_experts(dense: keras.Model, moe: keras.Model) -> list[Pair]:
    """As `pairs`, where every expert is as large as the block it stands for.

    What is cut beside them, a shared network, counts as new.

    Raises:
        UpcycleError: As `pairs`; and if experts are narrower than the block.
    """
    _, places = converted(dense, moe)
    for site, layer in places:
        if layer.intermediate_dim != site.intermediate_dim:
            raise UpcycleError(
                "Experts must be as wide as the dense block, to come from it "
                "or to go back to it as a whole. Received: experts of width "
                f"{layer.intermediate_dim} for block {site.path!r} of width "
                f"{site.intermediate_dim}, such as slices of it. Keep the "
                'dense model, or convert it with `expert_init="copy"`.'
            )
    return [
        Pair(pair.sparse, None, NEW, pair.layer)
        if pair.relation == CUT
        else pair
        for pair in pairs(dense, moe, places)
    ]


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


def alike(
    old: keras.Model, new: keras.Model
) -> list[tuple[keras.Variable, keras.Variable]]:
    """`(weight of new, weight of old)`: one is the other with experts in its
    attention."""
    known = _of_attention(old, new)
    left_out = {id(v) for pair in known for v in (pair.sparse, pair.dense)}
    found = [
        (pair.sparse, pair.dense) for pair in known if pair.dense is not None
    ]
    return found + [(v, source) for source, v in _pairs(old, new, left_out)]


def copied(
    dense: keras.Model, moe: keras.Model
) -> Iterator[tuple[keras.Variable, keras.Variable]]:
    """`(weight of dense, weight of moe)` outside the converted blocks.

    Raises:
        UpcycleError: If the two are not a dense model and its sparse copy.
    """
    for pair in pairs(dense, moe):
        if pair.relation == COPIED and pair.name is None:
            yield pair.dense, pair.sparse


def _name(variable):
    """Its name, without the number that Keras gives one that has none."""
    automatic = variable.name.rstrip("0123456789") == "variable_"
    return "variable" if automatic else variable.name


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
    kinds = [[(_name(v), tuple(v.shape)) for v in vs] for vs in (old, new)]
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
        f"({type(moe).__name__}), {why}. Pass the dense model first and the "
        "one that was made of it second."
    )

"""Which blocks are converted, and what is asked for each stack."""

import enum
import fnmatch
from collections.abc import Mapping

import numpy as np

from keras_upcycle import checks

LAYER_CHOICES = ("last_half", "every_other", "all", "all_but_first")
_LISTS = (list, tuple, range, set, frozenset)


class Asked(enum.Enum):
    """What a stack gets that the caller named no setting for."""

    DEFAULT = "the family's or recipe's own"
    DENSE = "nothing: it stays dense"


def by_stack(name, value, sites):
    """A setting for each stack, from one value for all or from a mapping.

    In a mapping a stack that is not named gets its default, and `None` leaves
    a stack dense. A name may leave out the backbone's where that is clear.
    """
    stacks = list(dict.fromkeys(site.stack for site in sites))
    # A serialized router is a mapping, too.
    if not isinstance(value, Mapping) or "class_name" in value:
        value = _without_array(value)
        if name == "layers":
            _check_names(value, sites)
        counts = isinstance(value, _LISTS) and not _are_names(value)
        if checks.is_integer(value) or isinstance(value, slice):
            counts = True
        if counts and len(stacks) > 1:
            shown = list(value) if isinstance(value, _LISTS) else value
            raise ValueError(
                f"`{name}` must say whose blocks a list counts, since the "
                f"model has the stacks {stacks}. Received: {name}={value!r}. "
                f"Pass a mapping, such as {{{stacks[0]!r}: "
                f"{shown!r}}}; a stack left out gets its default, and "
                "`None` leaves one dense."
            )
        default = Asked.DEFAULT if value is None else value
        return dict.fromkeys(stacks, default)
    result = dict.fromkeys(stacks, Asked.DEFAULT)
    unknown = []
    for key, setting in value.items():
        meant = [s for s in stacks if s == key] or [
            s for s in stacks if s.endswith(f"/{key}")
        ]
        if len(meant) != 1:
            unknown.append(key)
            continue
        setting = _without_array(setting)
        if name == "layers":
            own = [site for site in sites if site.stack == meant[0]]
            _check_names(setting, own)
        result[meant[0]] = Asked.DENSE if setting is None else setting
    if unknown:
        raise ValueError(
            f"`{name}` names stacks that the model does not have. Received: "
            f"{name} for {unknown}. The stacks are {stacks}."
        )
    return result


def choose(sites, layers, router, recipe):
    """The sites to convert: each stack by its own rule, or its default."""
    chosen = []
    for stack, choice in layers.items():
        own = [site for site in sites if site.stack == stack]
        if Asked.DENSE in (choice, router[stack]):
            continue
        if choice is Asked.DEFAULT:
            choice = None
            if recipe is not None:
                choice = recipe.value(own[0].modality, "layers")
            if choice is None:
                # The family's, which leaves out what it protects.
                chosen += _unprotected(
                    own, _by_rule(own, own[0].default_layers)
                )
                continue
        if checks.is_integer(choice):
            choice = [choice]
        if isinstance(choice, slice):
            chosen += own[choice]
        elif isinstance(choice, _LISTS):
            chosen += _listed(own, list(choice))
        else:
            chosen += _by_rule(own, choice)
    return tuple(sorted(chosen, key=lambda site: site.index))


def _without_array(value):
    """A list where it is an array; nothing else compares entry by entry."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    return value


def _are_names(value):
    return bool(value) and all(isinstance(each, str) for each in value)


def _is_called(site, name):
    """Whether a name, or a pattern of one, is a site's or its block's."""
    *blocks, _ = site.path.split("/") if "/" in site.path else (site.path, "")
    parts = (site.path, *blocks, *site.path.split(" -> "))
    return any(fnmatch.fnmatchcase(part, name) for part in parts)


def _check_names(value, sites):
    """Raises `ValueError` for a name that no block has."""
    if isinstance(value, str):
        value = [] if value in LAYER_CHOICES else [value]
    if not isinstance(value, _LISTS):
        return
    for name in value:
        if isinstance(name, str) and not any(
            _is_called(site, name) for site in sites
        ):
            raise ValueError(
                f"`layers` must be one of {list(LAYER_CHOICES)}, numbers of "
                "blocks, names of blocks, a slice, or a function from a "
                f"FeedForwardSite to a bool. Received: layers={name!r}, and no "
                "block is called so. The blocks are "
                f"{[site.path for site in sites]}."
            )


def _listed(sites, entries):
    """What a list names: blocks by their numbers, or by their names."""
    names = [entry for entry in entries if isinstance(entry, str)]
    found = [s for s in sites if any(_is_called(s, name) for name in names)]
    numbers = [entry for entry in entries if not isinstance(entry, str)]
    found += [s for s in _by_indices(sites, numbers) if s not in found]
    return found


def _by_indices(sites, indices):
    by_index = dict(enumerate(sites))
    for index in indices:
        if not checks.is_integer(index):
            raise TypeError(
                "`layers` must list integers or names. Received: "
                f"layers={indices!r}, with {index!r} of type "
                f"{type(index).__name__}. `find_feed_forwards(model)` or "
                "`find_attention(model)` numbers the blocks."
            )
        if not -len(sites) <= index < len(sites):
            raise ValueError(
                f"`layers` must list block numbers from 0 to {len(sites) - 1}"
                f". Received: layers={indices!r}, with {index}. "
                "`find_feed_forwards(model)` or `find_attention(model)` lists "
                "the blocks."
            )
    positions = sorted({int(index) % len(sites) for index in indices})
    return [by_index[position] for position in positions]


def _by_rule(sites, rule):
    if callable(rule):
        checks.check_takes("layers", rule, "site")
        return [site for site in sites if _is_chosen(rule, site)]
    if rule == "last_half":
        # Of one block the half is none, if that block is protected.
        return _unprotected(sites, sites[-max(1, len(sites) // 2) :])
    if rule == "every_other":
        return sites[1::2]
    if rule == "all":
        return list(sites)
    if rule == "all_but_first":
        return sites[1:]
    if isinstance(rule, str):
        return _listed(sites, [rule])
    raise ValueError(
        f"`layers` must be one of {list(LAYER_CHOICES)}, a list of block "
        "numbers or names, a slice, or a function from a FeedForwardSite to a "
        f"bool. Received: layers={rule!r}."
    )


def _is_chosen(rule, site):
    chosen = rule(site)
    try:
        return bool(chosen)
    except (TypeError, ValueError) as error:  # an array of several entries
        raise TypeError(
            "`layers` must be a function from a FeedForwardSite to a bool. "
            f"Received: one that gives {type(chosen).__name__} for "
            f"{site.path!r}. Return True for the blocks to convert."
        ) from error


def _unprotected(sites, chosen):
    """Those chosen that may be converted without being asked for."""
    protected = sites[0] if sites[0].protects_first else None
    return [site for site in chosen if site is not protected]

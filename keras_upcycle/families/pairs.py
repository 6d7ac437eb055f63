"""Recognises a feed-forward network in the graph of a plain model.

Two projections with an activation between, or a gated unit: two projections
of the same tensor, one of them activated, whose product goes to a third.
"""

from typing import NamedTuple

import keras

from keras_upcycle.families import plain_layers
from keras_upcycle.families.between_projections import (
    function_of,
    is_dropout,
    is_linear,
    is_product,
    why_not_between,
)
from keras_upcycle.families.plain_layers import named


class Pair(NamedTuple):
    """The layers of a network in a graph.

    `layers` are all that experts take the place of, the one whose place the
    MoE layer takes first, and `operations` what goes with them and is no
    layer, such as a product. `roles` has `"up"`, `"down"` and where gated
    `"gate"`, as `projection` gives them.
    """

    layers: tuple
    operations: tuple
    roles: dict
    activation: object
    dropout: float


class _Branch(NamedTuple):
    """A projection and the activations behind it, before a product."""

    first: keras.Layer
    between: tuple


def projection(operation):
    """The `Dense`, or what computes as one, that an operation of a graph is.

    One inside a `TimeDistributed` works on the last axis all the same.
    """
    if type(operation) is keras.layers.TimeDistributed:
        operation = operation.layer
        return operation if type(operation) is keras.layers.Dense else None
    return operation if plain_layers.is_projection(operation) else None


def pair_from(graph, first, sharing):
    """The network that a projection begins, or why there is none.

    Args:
        graph: A `Graph`.
        first: An operation of it that is a projection.
        sharing: A `Sharing` of the whole model.
    """
    (entry, *_) = graph.by_operation[id(first)][0]
    if getattr(entry, "sparse", False):
        return "its input is a sparse tensor, which experts do not take"
    between, end = _follow(graph, first)
    if isinstance(end, str):
        return end
    branches = [_Branch(first, between)]
    behind = ()
    product = None
    if is_product(end):
        product = end
        branches = _branches(graph, end, entry)
        if isinstance(branches, str):
            return branches
        behind, end = _follow(graph, product)
        if isinstance(end, str):
            return end
        if is_product(end):
            return f"its output is multiplied again, by {named(end)}"
    down = end
    if graph.times[id(down)] > 1:
        return _called_again(down)
    return (
        _obstacle(entry, branches, behind, down, graph.masked)
        or _why_not_called_so(graph, branches, behind, down)
        or _why_shared(sharing, branches, behind, down)
        or _pair(branches, product, behind, down)
    )


def _follow(graph, start):
    """What follows up to a projection or a product, and that; or a reason."""
    chain = [start]
    while True:
        last = chain[-1]
        if graph.times[id(last)] > 1:
            return (), _called_again(last)
        (hidden,) = graph.by_operation[id(last)][1]
        readers = graph.readers.get(id(hidden), [])
        if id(hidden) in graph.outputs or not readers:
            return (), "its output is an output of the model"
        if len(readers) > 1:
            names = ", ".join(map(named, readers))
            return (), (
                f"the hidden tensor after {last.name!r} has "
                f"{len(readers)} consumers: {names}. Only a `Dense` that "
                "nothing else reads along with can become experts"
            )
        reader = readers[0]
        if projection(reader) is not None or is_product(reader):
            return tuple(chain[1:]), reader
        reason = why_not_between(reader)
        if reason is not None:
            return (), (
                f"its output goes to {reader.name!r} "
                f"({type(reader).__name__}), {reason}"
            )
        chain.append(reader)


def _branches(graph, product, entry):
    """The two branches of a product in the order of its operands."""
    tensors = graph.by_operation[id(product)][0]
    if len(tensors) != 2:
        return (
            f"its output goes to {named(product)}, which multiplies "
            f"{len(tensors)} tensors, while a gated unit multiplies two"
        )
    found = []
    for tensor in tensors:
        behind = []
        operation = graph.makers.get(id(tensor))
        while operation is not None and why_not_between(operation) is None:
            behind.insert(0, operation)
            (before, *_) = graph.by_operation[id(operation)][0]
            operation = graph.makers.get(id(before))
        if operation is None or projection(operation) is None:
            return (
                f"its output is multiplied, by {named(product)}, with what "
                "is no projection of the same tensor, while a gated unit "
                "multiplies two projections"
            )
        if graph.by_operation[id(operation)][0][0] is not entry:
            return (
                f"its output is multiplied, by {named(product)}, with "
                f"{named(operation)}, which projects another tensor"
            )
        _, end = _follow(graph, operation)
        if isinstance(end, str):
            return end
        found.append(_Branch(operation, tuple(behind)))
    if found[0].first is found[1].first:
        return (
            f"{named(product)} multiplies its output with itself, while a "
            "gated unit multiplies two projections"
        )
    if any(is_dropout(each) for one in found for each in one.between):
        return "a Dropout stands before the product, not after it"
    return found


def _activated(branch):
    """What a branch applies to its projection, or why it cannot be told."""
    own = projection(branch.first).activation
    if not branch.between:
        return own, None
    activations = [each for each in branch.between if not is_dropout(each)]
    if activations and not is_linear(own):
        return None, (
            f"{branch.first.name!r} has an activation and another one "
            f"follows, {named(activations[0])}"
        )
    if len(activations) > 1:
        return None, "more than one activation stands between the two"
    return (function_of(activations[0]) if activations else own), None


def _obstacle(entry, branches, behind, down, masked):
    """Why experts could not do what the network does, or `None`."""
    functions = []
    for branch in branches:
        function, reason = _activated(branch)
        if reason is not None:
            return reason
        functions.append(function)
    if len(branches) == 2 and not any(map(is_linear, functions)):
        return (
            "both projections of the product are activated, while experts "
            "activate one"
        )
    after = [*branches[0].between, *behind] if len(branches) == 1 else behind
    dropouts = [each for each in after if is_dropout(each)]
    activations = [each for each in after if not is_dropout(each)]
    if len(dropouts) > 1:
        return "more than one Dropout stands between the two"
    if len(branches) == 2 and activations:
        return f"{named(activations[0])} stands behind the product"
    if activations and dropouts and after[0] is dropouts[0]:
        return "its Dropout stands before the activation, not after it"
    last = projection(down)
    layers = [projection(branch.first) for branch in branches]
    width, hidden = entry.shape[-1], layers[0].kernel.shape[-1]
    if last.kernel.shape[-1] != width:
        return (
            f"{down.name!r} gives width {last.kernel.shape[-1]}, not the "
            f"input's {width}, while a block of experts keeps the width"
        )
    if not is_linear(last.activation):
        return f"{down.name!r} has an activation, which experts have not"
    reasons = [
        plain_layers.why_not_dense(layer, masked or _is_dense(layer))
        for layer in (*layers, last)
    ]
    reasons += [plain_layers.why_not_dropout(layer) for layer in dropouts]
    for branch in branches:
        for layer in (branch.first, *branch.between, down):
            if isinstance(layer, keras.Layer) and not is_dropout(layer):
                holds = [projection(layer)] if projection(layer) else []
                reasons.append(plain_layers.why_not_plain(layer, holds))
                if masked or projection(layer) is None:
                    reasons.append(plain_layers.why_no_mask(layer))
    for reason in reasons:
        if reason is not None:
            return reason
    biased = {layer.bias is None for layer in (*layers, last)}
    if len(biased) > 1:
        if len(branches) == 1:
            return "one of the two has a bias and the other has none"
        return "some of its layers have a bias and others have none"
    chain = [
        layer
        for layer in (*layers, *dropouts, last)
        if isinstance(layer, keras.Layer)
    ]
    for layer in chain:
        if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
            return (
                f"{named(layer)} has a DTypePolicyMap, which goes by the path "
                "of a layer, and experts have a path of their own. Give the "
                "layer one policy"
            )
    others = [
        each
        for branch in branches
        for each in branch.between
        if isinstance(each, keras.Layer) and not is_dropout(each)
    ]
    return plain_layers.why_not_one_dtype([*chain, *others]) or next(
        filter(
            None,
            (
                plain_layers.why_not_activation(
                    function, hidden, len(entry.shape)
                )
                for function in functions
            ),
        ),
        None,
    )


def _is_dense(layer):
    # An `EinsumDense` lets no mask pass, which matters where there is one.
    return type(layer) is keras.layers.Dense


def _why_not_called_so(graph, branches, behind, down):
    """Arguments of a call that a MoE layer's call would not have."""
    for layer in _all(branches, behind, down):
        inputs, _ = graph.by_operation[id(layer)]
        given = {
            name: value
            for name, value in graph.keywords[id(layer)].items()
            if value is not None and value is not False
        }
        if len(inputs) > 1 or given:
            said = ", ".join(f"{k}={v!r}" for k, v in given.items())
            return (
                f"{named(layer)} is called with more than its input: "
                f"{said or 'several tensors'}. Experts follow the model's "
                "own `training` and mask"
            )
    return None


def _why_shared(sharing, branches, behind, down):
    layers = [
        layer
        for layer in _all(branches, behind, down)
        if isinstance(layer, keras.Layer)
    ]
    return next(filter(None, map(sharing.why, layers)), None)


def _pair(branches, product, behind, down):
    roles = {"down": projection(down)}
    functions = [_activated(branch)[0] for branch in branches]
    activation = functions[0]
    if len(branches) == 1:
        roles["up"] = projection(branches[0].first)
    else:
        # The gate is what is activated; of two linear ones the first.
        gate = (
            1 if is_linear(functions[0]) and not is_linear(functions[1]) else 0
        )
        activation = functions[gate]
        roles["gate"] = projection(branches[gate].first)
        roles["up"] = projection(branches[1 - gate].first)
    dropouts = [
        each for each in (*branches[0].between, *behind) if is_dropout(each)
    ]
    layers = _all(branches, behind, down)
    if product is not None:
        layers.insert(-1, product)
    rate = dropouts[0].rate if dropouts else 0.0
    own, operations = (
        tuple(each for each in layers if isinstance(each, keras.Layer) is kind)
        for kind in (True, False)
    )
    return Pair(own, operations, roles, activation, rate)


def _all(branches, behind, down):
    """All operations but the product, the first operand's projection first."""
    found = []
    for branch in branches:
        found += [branch.first, *branch.between]
    return [*found, *behind, down]


def _called_again(layer):
    return (
        f"{layer.name!r} is called more than once: experts in its place would "
        "serve one call alone. Give each call a layer of its own"
    )

"""Functional models: their class and their nodes."""

from collections.abc import Iterator

import keras

# What `keras.Model(inputs, outputs)` makes; Keras does not export the class,
# and making a model to ask for its type would advance the automatic names of
# the user's own models. Keras 3.15.
from keras.src.models.functional import Functional as Functional


def output_shapes(operation) -> list[list[tuple]]:
    """The shapes that each call of an operation gave, over all graphs.

    `Operation._inbound_nodes`, Keras 3.15.
    """
    return [
        [tuple(tensor.shape) for tensor in node.outputs]
        for node in operation._inbound_nodes
    ]


def tracked_nodes(model: keras.Model) -> Iterator[tuple]:
    """The graph of a functional model, a call at a time.

    `Functional._nodes_by_depth` and `Node` hold what `clone_model` uses too;
    nothing public tells which layer consumes which. Keras 3.15.

    Yields:
        `(operation, inputs, outputs, kwargs)`: the operation called, the
        `KerasTensor`s it got and gave, and the keyword arguments of the call,
        in order from the model's inputs to its outputs.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                yield (
                    node.operation,
                    list(node.arguments.keras_tensors),
                    list(node.outputs),
                    dict(node.arguments.kwargs),
                )


def sequential_as_functional(model: keras.Sequential) -> keras.Model:
    """The functional model that a built `Sequential` keeps inside.

    `Sequential._functional`, 3.15. It shares the layers, so its graph says
    what the `Sequential` computes.
    """
    return model._functional

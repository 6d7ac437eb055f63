"""Who calls what in a plain model: Keras's own record of its graph."""

from collections import Counter

import keras

from keras_upcycle import keras_internals
from keras_upcycle.families import surgery

# Layers that attend causally without saying so in the call.
_CAUSAL_LAYERS = ("TransformerDecoder", "CachedMultiHeadAttention")


def graphs_of(model):
    """From the model and every plain model inside it, by id, to its graph.

    A layer that stands in two of them is called more than once, and where
    one of them is causal all of them are taken to be.
    """
    graphs = {}

    def enter(plain):
        if id(plain) in graphs:
            return
        graphs[id(plain)] = graph = Graph(plain)
        for operation in graph.order:
            if surgery.is_plain_model(operation):
                enter(operation)

    enter(model)
    times = sum((graph.times for graph in graphs.values()), Counter())
    causal = any(graph.causal for graph in graphs.values())
    masked = any(map(_makes_masks, keras_internals.all_layers(model)))
    for graph in graphs.values():
        graph.times, graph.causal, graph.masked = times, causal, masked
    return graphs


def _makes_masks(layer):
    return isinstance(layer, keras.layers.Masking) or getattr(
        layer, "mask_zero", False
    )


def operations_of(model, graphs, inside="", seen=None):
    """`(place, graph, operation)` of all graphs, inputs first, each once.

    A place is a path of names: of the models entered, then the operation's.
    """
    seen = set() if seen is None else seen
    graph = graphs[id(model)]
    for operation in graph.order:
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        place = f"{inside}{operation.name}"
        if surgery.is_plain_model(operation):
            yield from operations_of(operation, graphs, f"{place}/", seen)
        else:
            yield place, graph, operation


class Graph:
    """Who calls what, from Keras's own record of the graph."""

    def __init__(self, model):
        if isinstance(model, keras.Sequential):
            model = keras_internals.sequential_as_functional(model)
        self.calls = list(keras_internals.tracked_nodes(model))
        self.order = list(
            {id(call[0]): call[0] for call in self.calls}.values()
        )
        self.times = Counter(id(call[0]) for call in self.calls)
        self.outputs = {id(tensor) for tensor in model.outputs}
        self.readers = {}
        self.makers = {}
        self.by_operation = {}
        self.keywords = {}
        self.causal = False
        # Whether any layer of the whole model attaches masks to tensors.
        self.masked = False
        for operation, inputs, outputs, kwargs in self.calls:
            self.by_operation[id(operation)] = (inputs, outputs)
            self.keywords[id(operation)] = kwargs
            for tensor in outputs:
                self.makers[id(tensor)] = operation
            for tensor in inputs:
                self.readers.setdefault(id(tensor), []).append(operation)
            if kwargs.get("use_causal_mask"):
                self.causal = True
            if type(operation).__name__ in _CAUSAL_LAYERS:
                self.causal = True

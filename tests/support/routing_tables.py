"""A routing as a table, whichever side chose."""

import numpy as np
from keras import ops

from keras_upcycle.types import TokenChoice


def tables(chosen, length, num_experts):
    """A routing as `weights` and `processed`, each `(G, S, E)`."""
    fields = [
        None if field is None else ops.convert_to_numpy(field)
        for field in chosen[:3]
    ]
    groups = len(fields[0])
    weights = np.zeros((groups, length, num_experts))
    processed = np.zeros((groups, length, num_experts), bool)
    if isinstance(chosen, TokenChoice):
        experts, values, _ = fields
        for g, s, k in np.ndindex(experts.shape):
            if experts[g, s, k] < num_experts:
                place = g, s, experts[g, s, k]
                assert not processed[place]
                weights[place], processed[place] = values[g, s, k], True
            else:
                assert values[g, s, k] == 0
    else:
        tokens, values, active = fields
        for g, e, c in np.ndindex(tokens.shape):
            if active[g, e, c]:
                place = g, tokens[g, e, c], e
                assert not processed[place]
                weights[place], processed[place] = values[g, e, c], True
            else:
                assert values[g, e, c] == 0
    return weights, processed

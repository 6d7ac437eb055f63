"""Writes the page of models: `python -m keras_upcycle.families.models_page`.

The table of KerasHub's models is made from the rows that convert them.
"""

import keras_hub

from keras_upcycle.families import (
    keras_hub_mixtures,
    keras_hub_refused,
    keras_hub_table,
)
from keras_upcycle.families.rows import Model, Stack
from keras_upcycle.keras_internals.keras_hub import inner_class, subclasses_for

_HEAD = """\
# Models

`upcycle_model` converts these as they are, and gives back a model of the same
kind: a backbone stays a backbone, a task a task with its preprocessor.
Written by `python -m keras_upcycle.families.models_page`, from the rows of
`keras_upcycle/families/keras_hub_table.py`.

Every row is tried on small random models (`tests/families/test_every_row.py`):
the sparse model starts as the dense one, to 5e-6 of its largest output;
changed experts change the output; a `.keras` file and a preset give exactly
the same model; `densify_model` gives exactly the dense one; one step trains
experts and routers. Every task named here as well, through its stock entry
points, with greedy generation the same token for token
(`tests/families/test_every_task.py`).

*Top-2*: each token goes to two experts, and at inference none is left out, so
that a token sees no later one. *Expert Choice*: experts take tokens, within
one example and none of its padding. Both are defaults: `router=` and `layers=`
choose otherwise, by the stack's name where a model has several
(`layers={"vision": "last_half", "text": None}` leaves the text tower dense).

Heads of self-attention become experts too with `attention=`, in all of them but
FNet and RWKV7, which have no attention, XLNet, whose two streams share a
projection, and MMDiT, whose attention stands outside of its blocks
(`tests/families/test_routed_attention.py`; `find_attention` lists them).

| backbone | tasks | stack | router | layers |
|---|---|---|---|---|
"""
_OWN = """
## Models of your own

As they are:

- a functional or `Sequential` model around one of these backbones;
- one with `keras_hub.layers.TransformerEncoder`, `TransformerDecoder` or
  `FNetEncoder` in it;
- one with pairs of `Dense` layers, in plain models inside it too.

A Transformer block that you wrote, in such a model or in a subclassed one, is
named once:

```python
keras_upcycle.register_block(TransformerBlock, up="ffn1", down="ffn2")
```

Anything else takes a `keras_upcycle.register_family`, see `CONTRIBUTING.md`.

`find_feed_forwards(model, explain=True)` prints what is found in a model, and
why the rest is not converted.

## Mixtures of KerasHub's own

`adopt_model` takes these, which run every expert on every token, and gives a
model of the same kind whose MoE layers are this package's: the same outputs,
losses and gradients to rounding, the same tokens generated
(`tests/families/test_adopted_mixtures.py`). `export_model(model, "keras_hub")`
is the way back, to the last bit.

MIXTURES
## What is not converted

| backbone | reason |
|---|---|
"""


def page() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for row in keras_hub_table.MODELS:
        lines += [_line(row, stack) for stack in row.stacks]
    mixtures = [
        f"- `{row.backbone}`: {_tasks(row)}\n"
        for row in keras_hub_mixtures.MODELS
        if inner_class(row.backbone) is not None
    ]
    lines.append(_OWN.replace("MIXTURES\n", "".join(mixtures) + "\n"))
    reasons: dict[str, list[str]] = {}
    refused = {**keras_hub_refused.REFUSED, **keras_hub_mixtures.DENSE}
    for name, reason in refused.items():
        if inner_class(name) is not None:
            reasons.setdefault(reason, []).append(f"`{name}`")
    lines += [
        f"| {', '.join(names)} | {reason} |\n"
        for reason, names in reasons.items()
    ]
    return "".join(lines)


def _line(row: Model, stack: Stack) -> str:
    first = stack is row.stacks[0]
    name = row.backbone.rpartition(".")[2]
    router = "Top-2" if stack.causal else "Expert Choice"
    layers = "last half" if stack.modality == "vision" else "every other"
    cells = [
        f"`{name}`" if first else "",
        _tasks(row) if first else "",
        f"`{stack.name}`",
        router,
        layers,
    ]
    return f"| {' | '.join(cells)} |\n"


def _tasks(row: Model) -> str:
    kind = inner_class(row.backbone)
    name = row.backbone.rpartition(".")[2]
    tasks = [] if kind is None else subclasses_for(keras_hub.models.Task, kind)
    shown = sorted(f"`{_short(task, name)}`" for task in tasks)
    return ", ".join(shown) or "none"


def _short(task: type, backbone: str) -> str:
    """A task's name without the model's, which the line says."""
    return task.__name__.removeprefix(backbone.removesuffix("Backbone"))


if __name__ == "__main__":
    print(page(), end="")

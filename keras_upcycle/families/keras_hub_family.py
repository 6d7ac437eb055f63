"""KerasHub's backbones and tasks, all by the rows of one table."""

from typing import Any

import keras_hub
from keras import ops

from keras_upcycle import keras_internals
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import (
    attention_sites,
    sparse_blocks,
    sparse_holders,
    surgery,
)
from keras_upcycle.families.base import (
    AttentionFindings,
    Family,
    Findings,
    layers_flops,
)
from keras_upcycle.families.block_sites import looked_at, path_of, site_of
from keras_upcycle.families.keras_hub_classes import (
    arguments_of,
    blocks_of,
    complete_config,
    converted,
    sparse_class,
    stock_class,
)
from keras_upcycle.families.routed_attention import heads_in
from keras_upcycle.families.rows import Model

_LANGUAGE_MODELS = (keras_hub.models.CausalLM, keras_hub.models.Seq2SeqLM)


class KerasHubFamily(Family):
    """A backbone of KerasHub and its tasks.

    Experts choose in bidirectional stacks, tokens in causal ones, which must
    not look ahead. Of language every other block is converted, from the
    second, and of vision the last half, as Sparse Upcycling did (arXiv
    2212.05055, section 3.1).

    Args:
        row: What the table says of the backbone.
    """

    def __init__(self, row: Model):
        self.row = row
        self.name = row.backbone.rpartition(".")[2]

    @property
    def inner_classes(self):
        return sparse_blocks.known_blocks() + sparse_holders.known_holders()

    def find(self, model):
        backbone = backbone_of(model)
        _check_tokenizer(model)
        findings = Findings()
        for stack in self.row.stacks:
            for number, block in enumerate(blocks_of(backbone, stack)):
                row = sparse_blocks.row_of(block)
                path = path_of(stack, number, block, row, findings)
                found, reason = looked_at(block, row)
                if reason is not None:
                    findings.rejected.append((path, reason))
                    continue
                index = len(findings.sites)
                site = site_of(index, path, stack, number, block, row, found)
                findings.sites.append(site)
        return findings

    def rebuild(self, model, sites, replacements):
        old = backbone_of(model)
        experts = {stack.name: {} for stack in self.row.stacks}
        replaced, chosen = [], []
        for site in sites:
            if site.index not in replacements:
                continue
            block = self._block(old, site)
            layer = replacements[site.index]
            experts[site.stack][str(site.number)] = layer
            replaced += sparse_blocks.replaceable(block)
            chosen.append(site)
        config = complete_config(old)
        kind = type(old)
        if replacements:
            kind = sparse_class(kind)
            config["experts"] = experts
        with keras_internals.without_values():
            new = kind.from_config(config)
        given = [
            layer
            for site in chosen
            for layer in sparse_blocks.new_layers(self._block(new, site))
        ]
        surgery.copy_state(old, new, replaced, given, from_config=True)
        keras_internals.draw_first_values(new)
        if model is old:
            return new
        return _task(model, new, sparse_class if replacements else None)

    def find_attention(self, model):
        backbone = backbone_of(model)
        found = AttentionFindings()
        for stack, number, place, layer in self._attention(backbone):
            path = f"{stack.name}/{number}/{place}"
            reason = attention_sites.why_not(layer)
            if reason is not None:
                found.rejected.append((path, reason))
                continue
            found.sites.append(
                attention_sites.site_of(
                    len(found.sites), path, stack, number, place, layer
                )
            )
        return found

    def attention_layers(self, model):
        return {
            f"{stack.name}/{number}/{place}": layer
            for stack, number, place, layer in self._attention(
                backbone_of(model)
            )
        }

    def _attention(self, backbone):
        for stack in self.row.stacks:
            for number, block in enumerate(blocks_of(backbone, stack)):
                if not sparse_blocks.is_known(block):
                    continue
                for place, layer in attention_sites.places_in(block).items():
                    yield stack, number, place, layer

    def causal_heads(self, model):
        return [
            routed
            for stack in self.row.stacks
            if stack.causal
            for block in blocks_of(backbone_of(model), stack)
            for routed in heads_in(block)
        ]

    def copy_for_heads(self, model):
        old = backbone_of(model)
        config = old.get_config()
        if "experts" not in config:
            config = {**complete_config(old), "experts": {}}
        with keras_internals.without_values():
            new = sparse_class(type(old)).from_config(config)
        surgery.copy_state(old, new, from_config=True)
        keras_internals.draw_first_values(new)
        return new if model is old else _task(model, new, sparse_class)

    def route_alike(self, model, new):
        heads = getattr(backbone_of(model), "attention_experts", None)
        if heads:
            backbone_of(new).route_heads(heads)

    def route_heads(self, model, heads):
        settings: dict[str, dict[str, dict[str, Any]]] = {}
        for site, arguments in heads.items():
            blocks = settings.setdefault(site.stack, {})
            blocks.setdefault(str(site.number), {})[site.place] = arguments
        backbone_of(model).route_heads(settings)

    def current_layers(self, model, sites):
        backbone = backbone_of(model)
        return [
            sparse_blocks.current_layer(self._block(backbone, site))
            for site in sites
        ]

    def blocks(self, model):
        backbone = backbone_of(model)
        count = getattr(backbone, "num_layers", None)
        stacks = {
            stack.name: blocks_of(backbone, stack) for stack in self.row.stacks
        }
        if any(len(blocks) != count for blocks in stacks.values()):
            return None
        return stacks

    def build_dense(self, model, **changes):
        old = backbone_of(model)
        config = {**complete_config(old), **changes}
        with keras_internals.without_values():
            new = stock_class(type(old)).from_config(config)
        if model is old:
            return new
        # A task on torch reads the values of what it is made of.
        keras_internals.draw_first_values(new)
        return _task(model, new, stock_class, copy=False)

    def compile_arguments(self, model):
        sampler = getattr(model, "sampler", None)
        if sampler is None:
            return {}
        # Of its own: a sampler holds the state of its random generator.
        return {"sampler": type(sampler).from_config(sampler.get_config())}

    def matmul_flops(self, model):
        backbone = backbone_of(model)
        everything = layers_flops(keras_internals.all_layers(model))
        stacks = [s for s in self.row.stacks if blocks_of(backbone, s)]
        flops = {}
        for stack in stacks:
            blocks = blocks_of(backbone, stack)
            flops[stack.name] = _flops(blocks)
        rest = everything - sum(flops.values())
        if len(stacks) == 2 and stacks[1].causal and not stacks[0].causal:
            # Cross-attention projects the encoder's tokens to keys and values.
            crossing = _crossing_flops(blocks_of(backbone, stacks[1]))
            flops[stacks[0].name] += crossing
            flops[stacks[1].name] -= crossing
        if isinstance(model, _LANGUAGE_MODELS):
            # Logits: a product with the embedding, which no `Dense` shows.
            size = backbone.hidden_dim * backbone.vocabulary_size
            flops[stacks[-1].name] += 2 * size
        if len(stacks) == 1:
            flops[stacks[0].name] += rest
        elif rest:
            flops[None] = rest
        return flops

    def check_inputs(self, model, inputs):
        size = getattr(backbone_of(model), "vocabulary_size", None)
        if size is None or not isinstance(inputs, dict):
            return
        for name in (n for n in inputs if n.endswith("token_ids")):
            ids = ops.convert_to_numpy(inputs[name])
            wrong = ids[(ids < 0) | (ids >= size)]
            if wrong.size:
                raise ValueError(
                    f"`inputs[{name!r}]` must hold ids from 0 to {size - 1}, "
                    f"the model's vocabulary. Received: {wrong.size} others, "
                    f"such as {int(wrong[0])}. The tokenizer that made them "
                    "is not the model's."
                )

    def real_positions(self, model, inputs):
        backbone = backbone_of(model)
        masks = {
            stack.name: _mask(stack, backbone, inputs)
            for stack in self.row.stacks
            if blocks_of(backbone, stack)
        }
        last = list(masks.values())[-1]
        if all(mask is None for mask in masks.values()):
            return None

        def of_output(name, output):
            own = [mask for stack, mask in masks.items() if stack in str(name)]
            # Of an output that an example has once there are no positions.
            per_token = len(output.shape) >= 3
            return (own or [last])[0] if per_token else None

        outputs = model.output
        if isinstance(outputs, dict):
            return {key: of_output(key, out) for key, out in outputs.items()}
        if isinstance(outputs, (list, tuple)):
            return [of_output(None, out) for out in outputs]
        return of_output(None, outputs)

    def _block(self, backbone, site):
        for stack in self.row.stacks:
            if stack.name == site.stack:
                return blocks_of(backbone, stack)[site.number]
        raise ValueError(
            f"Site {site.path!r} is not a block of {backbone.name!r}. Pass "
            "the sites that `find` gave for this very model."
        )


def _mask(stack, backbone, inputs):
    """The real positions of what a stack puts out, `None` for all."""
    if callable(stack.mask):
        return stack.mask(backbone, inputs)
    if isinstance(inputs, dict) and stack.mask is not None:
        return inputs.get(stack.mask)
    return None


def _task(old, backbone, change, copy=True):
    """The task around a new backbone, its head and preprocessor kept.

    Args:
        old: A task.
        backbone: The new backbone.
        change: `sparse_class` or `stock_class`; `None` for the same class.
        copy: Whether what the task itself holds is copied.
    """
    change = change or (lambda kind: kind)
    kind = stock_class(type(old))
    config = kind.get_config(old)
    config["backbone"] = backbone
    config["preprocessor"] = converted(old.preprocessor, change)
    if "head_dtype" in arguments_of(kind):
        head = getattr(old, "output_dense", None)
        config["head_dtype"] = _own_policy(head, old.backbone)
    new = change(type(old)).from_config(config)
    if copy:
        # Layer by layer: the flag of a whole task would be handed down to its
        # backbone, which has been given its own. Some tasks list the layers
        # of their backbone as theirs.
        sides = [
            [
                layer
                for layer in keras_internals.sublayers(task)
                if id(layer) not in inside
            ]
            for task in (old, new)
            for inside in [
                {id(one) for one in keras_internals.all_layers(task.backbone)}
            ]
        ]
        for pair in zip(*sides, strict=True):
            surgery.copy_state(*pair, from_config=True)
        keras_internals.set_trainable_alone(new, old.trainable)
        keras_internals.draw_first_values(new)
    return new


def _own_policy(head, backbone):
    """The head's policy where it is not the backbone's, else `None`.

    A head that follows its backbone must go on doing so when the model is
    loaded with another `dtype`.
    """
    if head is None or head.dtype_policy.name == backbone.dtype_policy.name:
        return None
    return head.dtype_policy


def _check_tokenizer(model):
    """Ids past the embedding's end: JAX would give NaN and say nothing."""
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    size = getattr(backbone_of(model), "vocabulary_size", None)
    if tokenizer is None or size is None:
        return
    try:
        known = tokenizer.vocabulary_size()
    except Exception:  # it has no vocabulary yet, and each says so its own way
        return
    if known > size:
        raise UpcycleError(
            "The tokenizer of a model must not know more tokens than the "
            f"model. Received: {model.name!r} with a tokenizer of {known} "
            f"tokens and vocabulary_size={size}. Use the tokenizer that the "
            "model was trained with."
        )


def _crossing_flops(blocks):
    """Of what a decoder's blocks do to the encoder's tokens."""
    found: list[Any] = []
    for block in blocks:
        for name, layer in keras_internals.named_sublayers(block).items():
            if "cross" not in name:
                continue
            found += [
                below
                for below in keras_internals.all_layers(layer)
                if below.name.startswith(("key", "value", "k_proj", "v_proj"))
            ]
    return layers_flops(found)


def _flops(blocks):
    return sum(layers_flops(keras_internals.all_layers(b)) for b in blocks)


def backbone_of(model):
    """The backbone of a task; a backbone itself."""
    # Some backbones have a backbone of their own.
    return model.backbone if isinstance(model, keras_hub.models.Task) else model

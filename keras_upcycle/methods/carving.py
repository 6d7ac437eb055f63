"""Carving: a dense block cut by what its neurons do, without training.

Pei et al., CMoE (arXiv 2502.04416): neurons that are active for most tokens
become a shared expert, the others experts of neurons that are active together,
and a neuron of each expert stands in for a trained router.
"""

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_upcycle import checks, families
from keras_upcycle.conversion.recipe import (
    ANY,
    Choice,
    Note,
    Recipe,
    Required,
    add_recipe,
)
from keras_upcycle.layers.expert_init import SHARED, ExpertInit, generator
from keras_upcycle.layers.moe_layers import check_batch
from keras_upcycle.methods import activation_patterns, hidden_slices
from keras_upcycle.methods.activation_patterns import Patterns
from keras_upcycle.methods.carving_router import CarvingRouter
from keras_upcycle.methods.neuron_groups import (
    ACTIVATIONS,
    GROUPINGS,
    Cut,
    cut_of,
)

# The authors' number of neurons that a token marks, of 11,008 as of 14,336.
_ACTIVE = 10


class Carving(ExpertInit):
    """Experts are parts of the dense block that are active together.

    The dense model runs on some inputs. A token marks the `active_neurons`
    hidden neurons of a block with the largest absolute activations, and a
    neuron's rate is the share of tokens that mark it. The `shared` share of
    the neurons with the highest rates becomes a network that every token
    meets. The others become `num_experts` experts of one width: balanced
    k-means of which tokens mark a neuron, begun at the neurons of the highest
    rates. Of each expert the neuron nearest to its centre is the router's:
    `CarvingRouter` chooses the experts whose neurons are the most active.

    Nothing is copied, scaled or trained, and the output bias is added once,
    outside. A token that meets all experts meets the dense block, exactly; of
    `top_k` experts it gets what they and the shared neurons add to the output,
    so that the sparse model starts near the dense one, not as it.
    `verify_upcycle` measures how near. A token meets `shared + (1 - shared)
    top_k / num_experts` of a block.

    References: Pei et al., CMoE (arXiv 2502.04416), with the choices of the
    authors' code; groups in place of its exact assignment are filled as
    `FeedForwardSlices(order="cluster")` fills them, and k-means goes on until
    nothing moves, where that code makes one round. Cuts by weights are
    MoEfication's (2110.01786), random ones LLaMA-MoE's (2406.16554).

    Args:
        inputs: Array, tensor or structure of them: a batch as the model is
            called on, after preprocessing; or a list or iterator of batches.
            They run eagerly, at inference, when the model is converted. The
            authors' code takes 16,384 tokens. Padding that the model is told
            of does not count.
        shared: Float in `[0, 1)`, the share of a block's hidden neurons that
            every token meets; what is left must be a multiple of
            `num_experts`. Defaults to 0.25; 0 leaves the shared expert out.
        active_neurons: Integer, at least 1, or `None`: the neurons that a
            token marks. Defaults to `None`: 10, the paper's for blocks of
            11,008, or a quarter of the neurons where that is less.
        grouping: String, which neurons make an expert: `"activations"`
            (default), as above; to compare with, `"weights"`, balanced k-means
            of their input weights, or `"random"`. Shared neurons and the
            router are found in the same way.
        normalize: Boolean, whether norms of tokens and neurons are divided out
            of the activations that are ranked, and of the router's kernels,
            as in the authors' code. Defaults to `True`.
        max_tokens: Integer, at least 1: by how many tokens, spread evenly over
            all, neurons are grouped. Memory grows with it, times a block's
            width. Defaults to 4096.

    Raises:
        TypeError, ValueError: For a setting outside its range, or inputs that
            are no batch; when used, for a router that is no `CarvingRouter`, a
            width that does not divide, and inputs that the model cannot take
            or that send no token to a block.
        UpcycleError: When used, for an activation of which a hidden unit
            depends on others, such as softmax.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> x = keras.random.normal((64, 8), seed=0)
        >>> moe = keras_upcycle.upcycle_model(
        ...     dense, 4, recipe="carving", expert_init=Carving(x),
        ... )
        >>> layer = moe.layers[0]
        >>> layer.shared_intermediate_dim, layer.intermediate_dim
        (4, 3)
        >>> report = keras_upcycle.verify_upcycle(dense, moe, x)
        >>> report.layers[0].slices_met
        2.0
    """

    def __init__(
        self,
        inputs: Any,
        *,
        shared: float = 0.25,
        active_neurons: int | None = None,
        grouping: str = ACTIVATIONS,
        normalize: bool = True,
        max_tokens: int = 4096,
    ):
        if not isinstance(inputs, Iterator):
            for batch in inputs if isinstance(inputs, list) else [inputs]:
                check_batch("inputs", batch)
        self._inputs = inputs
        self.shared = checks.check_rate("shared", shared)
        if active_neurons is not None:
            active_neurons = checks.check_count(
                "active_neurons", active_neurons
            )
        self.active_neurons = active_neurons
        self.grouping = checks.check_choice("grouping", grouping, GROUPINGS)
        self.normalize = checks.check_flag("normalize", normalize)
        self.max_tokens = checks.check_count("max_tokens", max_tokens)
        self._start(None)

    def prepare(self, model):
        self._start(model)
        self._widths = {
            site.index: site.intermediate_dim
            for site in families.family_of(model).find(model).sites
        }

    def layout(self, num_experts, intermediate_dim):
        left = intermediate_dim - self._shared_width(intermediate_dim)
        if left % num_experts or not left:
            most = intermediate_dim // num_experts
            width = min(max(round(left / num_experts), 1), most) * num_experts
            share = 1.0 - width / intermediate_dim
            fitting = f"shared={share:.6g}, or " if width else ""
            raise ValueError(
                "Experts share evenly out what the shared expert leaves, so "
                "`num_experts` must divide it. Received: num_experts="
                f"{num_experts} for {left} of {intermediate_dim} neurons, with "
                f"shared={self.shared}. Pass {fitting}a divisor of {left}."
            )
        return num_experts, left // num_experts

    def router_settings(self, block, router):
        if not isinstance(router, CarvingRouter):
            return {}  # `check` says why not
        return {
            "activation": block.activation,
            "gated": block.gated,
            "use_bias": block.use_bias,
        }

    def check(self, block, router, num_experts):
        hidden_slices.check(block)
        if not isinstance(router, CarvingRouter):
            raise ValueError(
                "Carving makes the router of its neurons, so it must be a "
                f"`CarvingRouter`. Received: a {type(router).__name__} for "
                f'block {block.path!r}. Pass recipe="carving", or '
                "router=keras_upcycle.CarvingRouter(top_k)."
            )
        width = block.intermediate_dim
        if self.active_neurons is not None and self.active_neurons > width:
            raise ValueError(
                "`active_neurons` must be at most the hidden width of every "
                f"block. Received: active_neurons={self.active_neurons} for "
                f"{width} neurons in block {block.path!r}. Lower it."
            )
        if self._widths.get(block.index, width) != width:
            raise ValueError(
                "Carving chooses the shared neurons of a block itself, so it "
                f"must be given the whole of it. Received: {width} of "
                f"{self._widths[block.index]} neurons of block {block.path!r}. "
                "Pass `Carving(inputs, shared=...)` as it is, not within "
                "`SharedExperts`."
            )
        self._blocks[block.index] = block

    def values(self, block, router, num_experts, seed):
        cut = self._cut(block, num_experts, seed)
        found = hidden_slices.first_values(
            block.kernels,
            num_experts,
            dict.fromkeys(block.kernels, 1.0),
            order=cut.routed.ravel().astype("int32"),
        )
        if len(cut.shared):
            for name, variable in block.kernels.items():
                if hidden_slices.neuron_axis(name) is not None:
                    found[SHARED + name] = _neurons(variable, name, cut.shared)
        return found

    def layer_settings(self, block):
        width = self._shared_width(block.intermediate_dim)
        own = {"shared_intermediate_dim": width} if width else {}
        return {**hidden_slices.layer_settings(block.kernels), **own}

    def start_router(self, block, router, num_experts, seed):
        cut = self._cut(block, num_experts, seed)
        names = {"up": ("kernel", "logits_bias")}
        if block.gated:
            names = {"gate": names["up"], "up": ("up_kernel", "up_bias")}
        first = {}
        for role, own in names.items():
            kernel = block.kernels[f"{role}_kernel"]
            first[own[0]] = self._chosen(kernel, kernel, cut)
            if block.use_bias:
                bias = block.kernels[f"{role}_bias"]
                first[own[1]] = self._chosen(bias, kernel, cut)
        router.start_from(first)

    def _chosen(self, variable, kernel, cut):
        """A first value: of the representatives, along the last axis."""
        index = cut.representatives.astype("int32")

        def value(shape, dtype=None):
            found, size = (
                ops.take(ops.cast(v.value, "float32"), index, axis=-1)
                for v in (variable, kernel)
            )
            if self.normalize:
                norms = activation_patterns.norms(size, 0)
                found = found / ops.reshape(norms, (-1,))
            return ops.reshape(ops.cast(found, dtype), shape)

        return value

    def _start(self, model):
        """Forgets what was found in a model, for another one."""
        self._model = None if model is None else weakref.ref(model)
        self._widths: dict[int, int] = {}
        self._blocks: dict[int, Any] = {}
        self._patterns: dict[int, Patterns] = {}
        self._cuts: dict[int, Cut] = {}

    def _shared_width(self, width: int) -> int:
        return round(self.shared * width)

    def _cut(self, block, num_experts, seed) -> Cut:
        """Of a block, asked for more than once."""
        if block.index in self._cuts:
            return self._cuts[block.index]
        if block.index not in self._patterns:
            self._record()
        kernel = block.kernels["gate_kernel" if block.gated else "up_kernel"]
        self._cuts[block.index] = cut_of(
            # Let go, since marks are large.
            self._patterns.pop(block.index),
            self._shared_width(block.intermediate_dim),
            num_experts,
            grouping=self.grouping,
            kernel=kernel.value,
            drawn=generator(seed),
        )
        return self._cuts[block.index]

    def _record(self):
        """Looks at all chosen blocks, which no estimate needs."""
        sites = list(self._blocks.values())
        found = activation_patterns.recorded(
            self._model(),
            self._inputs,
            sites,
            [self._active(site.intermediate_dim) for site in sites],
            normalize=self.normalize,
            max_tokens=self.max_tokens,
        )
        for site, own in zip(sites, found, strict=True):
            self._patterns[site.index] = own
            self._warn_of_few(site, own)

    def _warn_of_few(self, site, patterns):
        count = self._active(site.intermediate_dim)
        if patterns.tokens * count >= site.intermediate_dim:
            return
        warnings.warn(
            "`inputs` hold few tokens for carving, and neurons that none marks "
            f"are grouped by chance. Received: {patterns.tokens} tokens, each "
            f"of which marks {count} of {site.intermediate_dim} neurons in "
            f"block {site.path!r}. Pass more batches.",
            stacklevel=7,
        )

    def _active(self, width: int) -> int:
        if self.active_neurons is not None:
            return self.active_neurons
        return max(1, min(_ACTIVE, width // 4))


def _neurons(variable, name, index):
    """A first value: some neurons of a dense block's weight."""

    def value(shape, dtype=None):
        axis = hidden_slices.neuron_axis(name)
        part = ops.take(variable.value, index.astype("int32"), axis=axis)
        return ops.reshape(ops.cast(part, dtype), shape)

    return value


RECIPE = Recipe(
    name="carving",
    paper="Pei et al., CMoE, arXiv 2502.04416",
    changes=(
        "neurons that are always active are shared, the others cut into "
        "experts by what they do on some data"
    ),
    costs="some batches of data; no parameters, no training",
    fails=(
        "untrained it is far off, the more so the fewer neurons run: in this "
        "project's example 2.13 nats a byte with 75 % of them, 3.05 with 25 %, "
        "dense 1.51"
    ),
    choices={
        ANY: (
            Choice(
                "expert_init",
                Required("Carving(x_train[:256])", "data"),
                "the paper: shared and routed experts by activation rates; its "
                "code: on 8 sequences of 2,048 tokens, of which each marks 10 "
                "neurons. It shares 2 of 16 parts (S2A2E16); a quarter is ours",
            ),
            Choice(
                "router",
                (CarvingRouter, {"top_k": 2, "bias_update_rate": 0.0}),
                "the paper: representative neurons, no loss, dropless. Its "
                "S2A2E16 runs 2 of 14 routed experts, a quarter of a block "
                "with the shared ones. It balances by biases that move by "
                "0.001; that they stay is ours, since they cost more than any "
                "cut gained (guides/methods.md)",
            ),
            Choice("layers", "all", "the paper: every block, the first too"),
            Note(
                "num_experts",
                "14, beside 2 shared ones",
                "the example of the authors' code counts 16; you pass the "
                "routed ones",
            ),
            Note(
                "tuning",
                "LoRA of rank 8 at 5.65e-5, the router's scale at 1e-3",
                "the authors' code: one epoch of 2,048 sequences",
            ),
        ),
    },
)
add_recipe(RECIPE)

"""Step 3's model: the dense one, with an expert to put in and a vector."""

import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.conversion import pairing, plan, upcycle
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import check_batch
from keras_upcycle.methods.expert_weights import ExpertWeights, array, as_pool
from keras_upcycle.routing import functional
from keras_upcycle.routing import losses as router_losses
from keras_upcycle.routing.router import Router
from keras_upcycle.state import half_precision
from keras_upcycle.training import freezing
from keras_upcycle.types import Tensor, TokenChoice


def attraction(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """UpIT's auxiliary loss: small where tokens point along the vector.

    The cross-entropy of `sigmoid(h . r)` with the target 1, which is
    `-log sigmoid(h . r)`; the mean over real tokens.

    References: UpIT (arXiv 2410.01610), router initialisation.

    Args:
        logits: float32 `(G, S, 1)`, the products `h . r`.
        mask: bool `(G, S)`, `True` at real tokens; `None` means all.

    Returns:
        Scalar float32.

    Example:
        >>> round(float(attraction(keras.ops.zeros((1, 3, 1)))), 4)
        0.6931
    """
    if mask is not None:  # padding may hold anything
        logits = ops.where(ops.expand_dims(mask, -1), logits, 0.0)
    values = ops.softplus(ops.negative(logits))
    return router_losses.token_mean(values[..., 0], mask)


@keras.saving.register_keras_serializable(package="keras_upcycle")
class RoutingVectorRouter(Router):
    """The router of a single expert: a vector that learns, and gates nothing.

    Every token goes to expert 0 with weight 1. In training the kernel `(D, 1)`
    is drawn towards the layer's inputs by `attraction`.

    Args:
        weight: Of that loss. Defaults to 0.5, the paper's `1 - alpha`.
        **kwargs: Of `Router`; `group` defaults to `"batch"`.

    Example:
        >>> layer = MoEFeedForward(1, 16, router=RoutingVectorRouter())
        >>> tuple(layer(keras.ops.ones((2, 5, 8))).shape)
        (2, 5, 8)
    """

    def __init__(self, weight=0.5, *, group="batch", **kwargs):
        super().__init__(group=group, **kwargs)
        self.weight = weight

    def check(self, num_experts):
        if num_experts != 1:
            raise ValueError(
                "A `RoutingVectorRouter` belongs to a single expert. "
                f"Received: num_experts={num_experts}. Use a `TopKRouter` for "
                "more."
            )

    def choose(self, logits, mask, training) -> TokenChoice:
        if training and self.weight:
            self.penalize("attraction", attraction(logits, mask))
        return functional.top_k(logits, 1, mask=mask)

    def losses_by_name(self):
        own = {"attraction": self.weight} if self.weight else {}
        return {**super().losses_by_name(), **own}

    def average_experts_per_token(self, num_experts, length=None):
        return 1.0

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}


class Samples(NamedTuple):
    """Examples as `fit` takes them, as NumPy arrays.

    Attributes:
        x: Inputs of the model, preprocessed: an array or a structure of them.
        y: Integer labels or token ids, `(N,)` or `(N, S)`.
        sample_weight: float32, of the shape of `y`.
    """

    x: Any
    y: np.ndarray
    sample_weight: np.ndarray

    def __len__(self):
        return len(self.y)

    def rows(self, index: np.ndarray) -> "Samples":
        """Some of the samples."""
        return Samples(
            keras.tree.map_structure(lambda a: a[index], self.x),
            self.y[index],
            self.sample_weight[index],
        )


def samples_of(data: Any) -> Samples:
    """Checks `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        TypeError: If it is no such tuple.
        ValueError: If the parts differ in length, or a sample has no token
            that counts.
    """
    if isinstance(data, Samples):
        return data
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        raise TypeError(
            "`data` must be a tuple (x, y) or (x, y, sample_weight) of "
            "preprocessed arrays, as `fit` takes them. Received: "
            f"{type(data).__name__}. A `tf.data.Dataset` has none: collect "
            "some of its batches."
        )
    x = keras.tree.map_structure(_numpy, data[0])
    y = _numpy(data[1])
    weight = np.ones(y.shape, "float32")
    if len(data) == 3 and data[2] is not None:
        weight = _numpy(data[2])
    parts = [*keras.tree.flatten(x), y, weight]
    for part in parts:
        if part.dtype == object or not part.ndim:
            raise TypeError(
                "`data` must hold arrays with a row for each sample. Received: "
                f"one of dtype {part.dtype} and shape {part.shape}. Pass "
                "arrays, as of `np.asarray`."
            )
    if y.dtype.kind not in "iu":
        raise TypeError(
            "The labels in `data` must be integers. Received: dtype "
            f"{y.dtype}. Pass class numbers or token ids, such as the argmax "
            "of one-hot labels."
        )
    weight = weight.astype("float32")
    lengths = {len(part) for part in parts}
    if len(lengths) != 1 or not len(y):
        raise ValueError(
            "All parts of `data` must have the same number of rows, at least "
            f"1. Received: {sorted(lengths)}. Pass a row of each for a sample."
        )
    if weight.shape != y.shape[: weight.ndim]:
        raise ValueError(
            "`sample_weight` in `data` must have one entry for each label, or "
            f"for each sample. Received: shape {weight.shape} for labels of "
            f"shape {y.shape}. Leave it out, and all count alike."
        )
    weight = np.broadcast_to(
        weight.reshape(weight.shape + (1,) * (y.ndim - weight.ndim)), y.shape
    )
    empty = np.flatnonzero(weight.reshape(len(y), -1).sum(1) <= 0)
    if len(empty):
        raise ValueError(
            "Each sample in `data` must have a token that counts, of a "
            f"positive weight. Received: {len(empty)} without one, such as "
            f"number {empty[0]}. Leave them out."
        )
    return Samples(x, y, weight)


class WorkingCopy:
    """A copy of the dense model in which one expert at a time stands.

    Args:
        model: The dense model; it is not changed.
        experts: Of the pool.
        router: As for `upcycle_model`: says which stacks stay dense.
        layers: As for `upcycle_model`.
        recipe: As for `upcycle_model`, where `layers` says nothing.
        weight: Of the loss `attraction`.
    """

    def __init__(
        self, model, experts, *, router, layers, recipe=None, weight=0.5
    ):
        self.experts = as_pool(experts)
        if not self.experts:
            raise ValueError(
                "`experts` must hold at least one expert. Received: an empty "
                "list. Collect some with `ExpertCheckpoints`."
            )
        decided = plan.make(
            model,
            len(self.experts),
            router=router,
            layers=layers,
            init="copy",
            recipe=recipe,
        )
        for number, expert in enumerate(self.experts):
            expert.check_fits(decided.findings.sites, f"Expert {number}")
        stacks: dict[str, list] = {}
        for site in decided.findings.sites:
            stacks.setdefault(site.stack, []).append(site)
        numbers = {
            stack: [n for n, s in enumerate(own) if s in decided.chosen] or None
            for stack, own in stacks.items()
        }
        with warnings.catch_warnings():
            # The first block, compile settings: of the result, not of this.
            warnings.simplefilter("ignore")
            self.model = upcycle.upcycle_model(
                model,
                1,
                router=RoutingVectorRouter(weight),
                layers=numbers,
            )
        # Samples are preprocessed already.
        if getattr(self.model, "preprocessor", None) is not None:
            self.model.preprocessor = None
        places = pairing.converted(model, self.model)[1]
        self.layers = {site.index: layer for site, layer in places}
        # By the key of `ExpertWeights.items`, less its first part.
        self._weights = {
            (site.index, pair.name): pair.sparse
            for site, layer in places
            for pair in pairing.of_block(site, layer)
            if pair.relation == pairing.STACKED
        }

    def place(self, expert: ExpertWeights) -> None:
        """Puts an expert in every converted block's place."""
        for (index, name), variable in self._weights.items():
            value = expert.blocks[index][name]
            variable.assign(np.reshape(value, variable.shape))

    def placed(self, expert: ExpertWeights) -> ExpertWeights:
        """`expert`, with what now stands in the converted blocks."""
        blocks = [dict(block) for block in expert.blocks]
        for (index, name), variable in self._weights.items():
            shape = blocks[index][name].shape
            blocks[index][name] = array(variable).reshape(shape)
        return ExpertWeights(blocks, expert.others, expert.description)

    def compile(self, alpha, learning_rate, from_logits, train_experts):
        """Ready for `train_on_batch`, routers alone or with their experts."""
        freezing.freeze(self.model, (freezing.EXPERTS, freezing.DENSE))
        freezing.unfreeze(self.model, freezing.ROUTER)
        if train_experts:
            freezing.unfreeze(self.model, freezing.EXPERTS)
            half_precision.warn_of_training(self.model)
        optimizer = keras.optimizers.Adam(learning_rate)
        self.model.compile(
            optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=from_logits, reduction="mean_with_sample_weight"
            ),
            loss_weights=float(alpha),
        )
        optimizer.build(self.model.trainable_variables)
        self._fresh = [array_as_is(v) for v in optimizer.variables]

    def restart_optimizer(self):
        """As it was when compiled; compiling again would trace again."""
        variables = self.model.optimizer.variables
        for variable, value in zip(variables, self._fresh, strict=True):
            variable.assign(value)

    def losses(self, samples: Samples, from_logits: bool) -> np.ndarray:
        """Mean loss of each sample over its tokens that count, `(N,)`."""
        check_batch("data", samples.x, self.model)
        predicted = np.asarray(self.model.predict_on_batch(samples.x))
        if predicted.shape[:-1] != samples.y.shape:
            raise UpcycleError(
                "The model must predict one distribution for each label. "
                f"Received: predictions of shape {predicted.shape} for labels "
                f"of shape {samples.y.shape}. Pass the task with its head, "
                "not a backbone, and integer labels."
            )
        counted = samples.y[samples.sample_weight > 0]
        classes = predicted.shape[-1]
        if counted.min() < 0 or counted.max() >= classes:
            raise ValueError(
                "The labels in `data` must be from 0 to "
                f"{classes - 1}, one of the model's classes. Received: labels "
                f"from {counted.min()} to {counted.max()}. Give what does not "
                "count the weight 0, in `sample_weight`."
            )
        predicted = predicted.astype("float32")
        if from_logits:
            predicted = predicted - predicted.max(-1, keepdims=True)
            total = np.log(np.exp(predicted).sum(-1))
        else:
            predicted = np.log(np.maximum(predicted, 1e-30))
            total = 0.0
        labels = np.clip(samples.y[..., None], 0, classes - 1).astype("int64")
        loss = total - np.take_along_axis(predicted, labels, -1)[..., 0]
        count = len(loss)
        weight = samples.sample_weight.reshape(count, -1).astype("float64")
        mean = (loss.reshape(count, -1) * weight).sum(1) / weight.sum(1)
        if not np.isfinite(mean).all():
            raise ValueError(
                "`data` must give finite losses. Received: NaN or infinity. "
                "Look for such values in the samples, or in what the model "
                "predicts of them."
            )
        return mean


def array_as_is(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable in its own dtype."""
    return np.array(ops.convert_to_numpy(variable.value))


def _numpy(value):
    if hasattr(value, "numpy") and not isinstance(value, np.ndarray):
        value = ops.convert_to_numpy(value)
    return checks.array_of(value)

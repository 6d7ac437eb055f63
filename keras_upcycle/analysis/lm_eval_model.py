"""`lm_eval_model`: a decoder for EleutherAI's evaluation harness."""

import warnings
from typing import Any

import keras
import keras_hub

from keras_upcycle import checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.moe_layers import moe_layers_in
from keras_upcycle.routing.top_k_router import TopKRouter


def lm_eval_model(
    model: keras.Model,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Any:
    """A KerasHub decoder as `lm_eval` evaluates it, sparse or dense.

    All three kinds of tasks: those that compare the likelihoods of answers, of
    whole texts, and of what is generated. Install with the extra `lm-eval`.

    Inputs are padded to a multiple of 64 tokens, so that few programs are
    compiled. A text begins with the tokenizer's start token where the
    preprocessor adds one, as in training; what is longer than `max_length`
    loses its beginning.

    Reference: Gao et al., EleutherAI's Language Model Evaluation Harness,
    https://github.com/EleutherAI/lm-evaluation-harness.

    Args:
        model: A Keras model, a `keras_hub.models.CausalLM` with a preprocessor
            that has a tokenizer, whose inputs are `token_ids` and
            `padding_mask`. It is not changed.
        batch_size: Integer, at least 1: texts that the model is called on at
            once. Defaults to 8.
        max_length: Integer, at least 2, or `None`: tokens that the model sees
            at once, generated ones included. Defaults to `None`: the
            preprocessor's `sequence_length`.

    Returns:
        An `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        TypeError: If `model` is no `CausalLM`.
        ValueError: For a setting outside its range.
        UpcycleError: If it has no tokenizer, or other inputs.
        ImportError: If `lm_eval` is not installed.

    Example:
        ```python
        import lm_eval

        moe = keras_hub.models.CausalLM.from_preset("my_mixture")
        results = lm_eval.simple_evaluate(
            model=keras_upcycle.lm_eval_model(moe), tasks=["hellaswag"]
        )
        print(lm_eval.utils.make_table(results))
        ```
    """
    checks.check_instance(
        "model",
        model,
        keras_hub.models.CausalLM,
        "a `keras_hub.models.CausalLM`",
    )
    batch_size = checks.check_count("batch_size", batch_size)
    preprocessor = model.preprocessor
    if getattr(preprocessor, "tokenizer", None) is None:
        raise UpcycleError(
            "`model` must have a preprocessor with a tokenizer, to read tasks. "
            f"Received: {model.name!r} with preprocessor={preprocessor!r}. Set "
            "`model.preprocessor`."
        )
    inputs = model.input
    names = set(inputs) if isinstance(inputs, dict) else {inputs.name}
    if names != {"token_ids", "padding_mask"}:
        raise UpcycleError(
            "`model` must read text alone, by `token_ids` and `padding_mask`. "
            f"Received: {model.name!r} with inputs {sorted(names)}."
        )
    if max_length is None:
        max_length = preprocessor.sequence_length
    max_length = checks.check_count("max_length", max_length)
    if max_length < 2:
        raise ValueError(
            "`max_length` must be at least 2, a token to see and one to "
            f"predict. Received: max_length={max_length}."
        )
    checks.check_installed("lm_eval_model", "lm_eval", "lm-eval")
    _warn_of_neighbours(model)
    from keras_upcycle.analysis.harness_model import HarnessModel

    return HarnessModel(model, batch_size, max_length)


def _warn_of_neighbours(model):
    """Where what is beside a text in a batch changes its likelihood."""
    for layer in moe_layers_in(model):
        router = layer.router
        drops = (
            isinstance(router, TopKRouter)
            and router.eval_capacity_factor is not None
        )
        if drops or router.mixes_tokens:
            warnings.warn(
                f"Experts of {layer.path!r} choose or drop tokens by what is "
                "beside them, later tokens included, so that likelihoods "
                "depend on the batch. Evaluate with a `TopKRouter` that has "
                "eval_capacity_factor=None.",
                stacklevel=3,
            )
            return

"""`adopt_model`: KerasHub's own mixtures, with MoE layers of this package."""

import warnings

import keras

from keras_upcycle import checks, families
from keras_upcycle.conversion import compile_settings, model_checks, pairing
from keras_upcycle.errors import UpcycleError
from keras_upcycle.families import copy_checks, stock_mixtures, surgery


def adopt_model(model: keras.Model) -> keras.Model:
    """A copy of a KerasHub mixture whose experts are `MoEFeedForward` layers.

    KerasHub's Mixtral, Qwen-MoE, Qwen3-MoE, Qwen3.5-MoE, GPT-OSS and Gemma 4
    run every expert on every token and throw most of it away. The copy
    computes the same to rounding at every real token, by the chosen experts
    alone (`python -m benchmarks.adopt` shows how much faster), and everything
    that takes a MoE layer takes it: `RouterMonitor`, `prune_experts`,
    `freeze`, `set_dropout`, `ku.distribution.ExpertParallel`, LoRA and int8.
    It is of the same kind: a task stays a task with its preprocessor,
    `generate`, `save_to_preset` and `.keras` files work.
    `export_model(adopted, "keras_hub")` is the way back.

    No token is left out, as in the stock model, in training either
    (`capacity_factor=None`). The load-balancing loss and its weight are the
    stock model's, over real tokens. At padding the output is 0, where the
    stock model computes something that nobody reads. Routers are in float32
    whatever the policy.

    The model is not changed and shares no weights with the result. Frozen
    layers stay frozen; compile settings are carried as by `upcycle_model`.

    Args:
        model: A Keras model, built: a backbone of KerasHub that is a mixture,
            or a task around one.

    Returns:
        A new model of the same structure.

    Raises:
        TypeError: If `model` is no Keras model.
        UpcycleError: If it holds no mixture of KerasHub's, is quantized, or
            holds LoRA adapters or weights that are not finite.

    Example:
        >>> stock = keras_hub.models.MixtralBackbone(
        ...     vocabulary_size=32, num_layers=2, num_query_heads=2,
        ...     num_key_value_heads=2, hidden_dim=8, intermediate_dim=16,
        ...     num_experts=8, top_k=2,
        ... )
        >>> model = adopt_model(stock)
        >>> ids = np.arange(12).reshape(2, 6)
        >>> inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        >>> bool(ops.all(ops.abs(model(inputs) - stock(inputs)) < 1e-4))
        True
    """
    checks.check_instance("model", model, keras.Model, "a Keras model")
    model_checks.check_not_upcycled(model)
    family = families.family_of(model)
    sites = family.mixtures(model)
    if not sites:
        raise UpcycleError(
            "`model` must hold mixtures of experts of KerasHub's own. "
            f"Received: {model.name!r} ({type(model).__name__}) with none. The "
            f"models that do are {families.mixtures_known()}; `upcycle_model` "
            "makes a mixture of a dense model."
        )
    model_checks.check_donor(model, "The model", "Adopt")
    _say_what_is_lost(model, sites)
    layers = {site.index: stock_mixtures.layer_of(site.found) for site in sites}
    result = family.rebuild(model, sites, layers)
    known = []
    for site in sites:
        layer = layers[site.index]
        stock_mixtures.finish(site.found, layer)
        known += [
            (each.ours, each.stock)
            for each in stock_mixtures.counterparts(site.found, layer)
        ]
    if result.count_params() != model.count_params():
        raise UpcycleError(
            f"The family {family.name!r} did not rebuild the model as planned: "
            f"expected {model.count_params():,} parameters. Received: "
            f"{result.count_params():,}. This is a bug of the family; please "
            "report it."
        )
    copy_checks.check_methods(model, result)
    surgery.copy_added(model, result)
    compile_settings.carry(
        family, model, result, lambda: pairing.copies(model, result, known)
    )
    return result


def _say_what_is_lost(model, sites):
    for site in sites:
        name = site.found.network.noise
        rate = 0.0 if name is None else getattr(site.found.holder, name)
        if rate:
            warnings.warn(
                f"`{name}` of {model.name!r} is not carried over: the stock "
                "layer's noise calls a function that Keras has not, so that it "
                f"cannot be trained. Received: {name}={rate}. Pass "
                "`noise_stddev` to a router of your own for noise.",
                stacklevel=3,
            )
            return

"""Bad input: what was wrong, what came, what to do; and nothing is changed."""

import keras
import keras_hub
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle
from keras_upcycle import (
    UpcycleError,
    estimate_upcycle,
    families,
    upcycle_model,
)

pytestmark = pytest.mark.one_backend

CALLS = pytest.mark.parametrize("call", [upcycle_model, estimate_upcycle])


def refused(model, error, match, *args, call=upcycle_model, **kwargs):
    """Checks the error, and that the model is as it was."""
    before = models.weights(model)
    paths = [v.path for v in model.weights]
    names = [layer.name for layer in model.layers]
    flags = [v.trainable for v in model.weights]
    with pytest.raises(error, match=match) as raised:
        call(model, *(args or (4,)), **kwargs)
    models.assert_same_weights(model, before)
    assert [v.path for v in model.weights] == paths
    assert [layer.name for layer in model.layers] == names
    assert [v.trainable for v in model.weights] == flags
    return str(raised.value)


# Arguments.


@CALLS
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0, ValueError, "`num_experts` must be at least 1.*num_experts=0"),
        (-2, ValueError, "num_experts=-2"),
        (2.0, TypeError, "`num_experts` must be an integer.*=2.0.*float"),
        ("4", TypeError, "num_experts='4' of type str"),
        (True, TypeError, "num_experts=True of type bool"),
        (None, TypeError, "num_experts=None"),
    ],
    ids=["0", "negative", "float", "str", "bool", "None"],
)
def test_num_experts(call, value, error, match):
    refused(models.sequential(), error, match, value, call=call)


@CALLS
@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        ("first_half", ValueError, "'every_other'.*layers='first_half'"),
        (3, ValueError, r"from 0 to 1.*layers=\[3\]"),
        ([2], ValueError, r"from 0 to 1.*layers=\[2\].*find_feed_forwards"),
        ([-3], ValueError, r"from 0 to 1.*layers=\[-3\], with -3"),
        ([0.5], TypeError, r"list integers.*0\.5 of type float"),
        ([True], TypeError, "True of type bool"),
        (["up_9"], ValueError, "'up_9', and no block is called so.*'up_0 ->"),
        ([], UpcycleError, r"at least one of the 2.*layers=\[\]"),
        (lambda site: False, UpcycleError, "selects none"),
        ({"decoder": "all"}, ValueError, r"\['decoder'\].*\['encoder'\]"),
    ],
    ids=[
        "unknown name",
        "number",
        "too large",
        "too small",
        "float",
        "bool",
        "layer name",
        "empty",
        "function that selects none",
        "unknown stack",
    ],
)
def test_layers(call, layers, error, match):
    refused(models.dense_pairs(), error, match, call=call, layers=layers)


@CALLS
@pytest.mark.parametrize(
    ("router", "error", "match"),
    [
        (
            "topk",
            ValueError,
            r"'expert_choice', 'skywork', 'top_k'.*router='topk'",
        ),
        (3, TypeError, "router=3 of type int"),
        (keras_upcycle.TopKRouter, TypeError, "`router` must be"),
        (
            keras_upcycle.TopKRouter(top_k=5),
            ValueError,
            "top_k=5, num_experts=4.*Lower `top_k`",
        ),
        ({"decoder": "top_k"}, ValueError, r"\['decoder'\].*\['encoder'\]"),
        ({"encoder": "best"}, ValueError, "router='best'"),
    ],
    ids=[
        "unknown name",
        "number",
        "class",
        "top_k above num_experts",
        "unknown stack",
        "unknown name in a mapping",
    ],
)
def test_router(call, router, error, match):
    refused(models.dense_pairs(), error, match, call=call, router=router)


@pytest.mark.parametrize(
    ("router", "match"),
    [
        (keras_upcycle.TopKRouter, "capacity_factor=0.*Pass `None`"),
        (keras_upcycle.ExpertChoiceRouter, "must be positive.*=0"),
    ],
    ids=["top_k", "expert_choice"],
)
def test_capacity_factor(router, match):
    with pytest.raises(ValueError, match=match):
        router(capacity_factor=0)
    with pytest.raises(ValueError, match=r"capacity_factor=-1\.5"):
        router(capacity_factor=-1.5)


def test_dispatch():
    refused(
        models.sequential(),
        ValueError,
        r"`dispatch` must be one of \['auto'.*'dense'.*dispatch='sorted'",
        dispatch="sorted",
    )


@pytest.mark.parametrize(
    ("init", "error", "match"),
    [
        ("noise", ValueError, "`expert_init` must be one of.*'noise'"),
        (7, TypeError, "expert_init=7 of type int"),
    ],
    ids=["unknown name", "number"],
)
def test_expert_init(init, error, match):
    refused(models.sequential(), error, match, expert_init=init)


@pytest.mark.parametrize(
    "model",
    [None, "model.keras", layers.Dense(3)],
    ids=["None", "str", "layer"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda model: upcycle_model(model, 4),
        lambda model: estimate_upcycle(model, 4),
        keras_upcycle.find_feed_forwards,
    ],
    ids=["upcycle_model", "estimate_upcycle", "find_feed_forwards"],
)
def test_what_is_no_model(call, model):
    with pytest.raises(TypeError, match=r"`model` must be a Keras model.*type"):
        call(model)


# Models.


@CALLS
def test_no_block_found(call):
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(4), layers.Dense(3)], name="narrow"
    )
    message = refused(
        model,
        UpcycleError,
        "No feed-forward block found in model 'narrow'",
        call=call,
    )
    for part in (
        "Looked for",
        "backbones of KerasHub",
        "register_block",
        "register_family",
        "find_feed_forwards(model, explain=True)",
    ):
        assert part in message


def test_unbuilt():
    model = keras.Sequential([layers.Dense(8), layers.Dense(4)], name="raw")
    with pytest.raises(UpcycleError, match=r"'raw'.*not built.*Call it on"):
        upcycle_model(model, 4)
    assert not model.built


@CALLS
@pytest.mark.parametrize(
    "build",
    [
        models.vit_backbone,
        models.vit_classifier,
        models.transfer_model,
        models.dense_pairs,
        models.sequential,
    ],
    ids=lambda build: build.__name__,
)
def test_upcycled_already(call, build):
    moe = upcycle_model(build(), 3)
    refused(
        moe,
        UpcycleError,
        "must be dense.*MoE layer of 3 experts already.*dense model",
        call=call,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    ("build", "path"),
    [
        (models.vit_classifier, "transformer_block_1/mlp/dense_1/kernel"),
        (models.vit_classifier, "predictions/bias"),
        (models.dense_pairs, "down_0/bias"),
    ],
    ids=["a block that is kept", "the head", "dense_pairs"],
)
def test_a_weight_that_is_not_finite_is_named(build, path, value):
    model = build()
    (variable,) = [v for v in model.weights if v.path.endswith(path)]
    broken = models.array(variable).copy()
    broken.flat[-1] = value
    variable.assign(broken)
    refused(model, UpcycleError, f"must be finite.*{path}.*earlier|{path}.*NaN")


def test_a_donor_with_lora():
    model = models.vit_backbone()
    model.enable_lora(2, ["dense_1"])
    refused(model, UpcycleError, "LoRA.*dense_1.*Merge them first")


def test_merging_lora_as_the_message_says_works(tmp_path):
    model, images = models.vit_backbone(), models.images()
    model.enable_lora(2, ["dense_1"])
    for variable in model.trainable_weights:
        if "lora" in variable.path:
            variable.assign_add(np.full(variable.shape, 0.1, "float32"))
    model.save_weights(tmp_path / "merged.weights.h5")
    fresh = models.vit_backbone()
    fresh.load_weights(tmp_path / "merged.weights.h5")
    gap = models.relative_gap(
        models.output(fresh, images), models.output(model, images)
    )
    assert gap <= 1e-5
    upcycle_model(fresh, 4)


def test_a_donor_in_int8():
    model = models.sequential()
    model.quantize("int8")
    refused(
        model,
        UpcycleError,
        r"must be floats.*quantized to 'int8'.*quantize\('int8'\)",
    )


class OwnTraining(keras.Model):
    """A functional model whose `train_step` a copy would lose."""

    def train_step(self, *args):
        return super().train_step(*args)


class HiddenLayers(keras.Model):
    def __init__(self):
        super().__init__()
        self.up = layers.Dense(models.HIDDEN)
        self.down = layers.Dense(models.WIDTH)

    def call(self, x):
        return self.down(self.up(x))


def own_training():
    dense = models.dense_pairs()
    return OwnTraining(dense.input, dense.output)


def hidden_layers():
    model = HiddenLayers()
    model(models.tokens(2, models.WIDTH))
    return model


class DerivedBackbone(keras_hub.models.ViTBackbone):
    pass


def derived_backbone():
    return DerivedBackbone(**models.vit_backbone().get_config())


@CALLS
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (own_training, "OwnTraining"),
        (hidden_layers, "HiddenLayers"),
        (derived_backbone, "DerivedBackbone"),
    ],
    ids=["train_step", "hidden layers", "derived backbone"],
)
def test_a_subclassed_model(call, build, name):
    refused(
        build(),
        UpcycleError,
        f"is a {name}.*no family knows.*`train_step`.*register_family",
        call=call,
    )


def test_a_graph_extended_from_backbone_output():
    backbone = models.vit_backbone()
    model = keras.Model(backbone.input, layers.Dense(3)(backbone.output))
    refused(
        model,
        UpcycleError,
        r"extended from `backbone\.output`.*head\(backbone\(inputs\)\)",
    )


def test_a_pair_behind_a_graph_extended_from_backbone_output():
    """A pair is found, but Keras cannot make the rest anew."""
    backbone = models.vit_backbone()
    x = layers.Dense(models.HIDDEN, activation="gelu")(backbone.output)
    model = keras.Model(backbone.input, layers.Dense(models.WIDTH)(x))
    refused(
        model,
        UpcycleError,
        r"(?s)vit_patching_and_embedding.*head\(backbone\(inputs\)\)",
    )


def causal(mark):
    x = inputs = keras.Input((6, models.WIDTH))
    if mark == "use_causal_mask":
        attention = layers.MultiHeadAttention(2, 8)
        x = layers.add([x, attention(x, x, use_causal_mask=True)])
    else:
        decoder = keras_hub.layers.TransformerDecoder(
            models.HIDDEN, 2, name="up"
        )
        return keras.Model(inputs, decoder(x))
    hidden = layers.Dense(models.HIDDEN, activation="gelu", name="up")(x)
    x = layers.add([x, layers.Dense(models.WIDTH, name="down")(hidden)])
    return keras.Model(inputs, x)


@CALLS
@pytest.mark.parametrize("mark", ["use_causal_mask", "TransformerDecoder"])
@pytest.mark.parametrize(
    "router",
    [
        "expert_choice",
        keras_upcycle.ExpertChoiceRouter(1.0),
        {"encoder": "expert_choice"},
    ],
    ids=["name", "object", "mapping"],
)
def test_expert_choice_in_a_causal_stack(call, mark, router):
    if mark == "TransformerDecoder" and isinstance(router, dict):
        router = {"decoder": "expert_choice"}
    refused(
        causal(mark),
        UpcycleError,
        'causal.*Received: router=.*up[ /].*Use router="top_k"',
        call=call,
        router=router,
    )


def test_top_k_in_a_causal_stack_sees_no_later_token():
    dense = models.randomized(causal("use_causal_mask"))
    moe = models.set_routers(upcycle_model(dense, 4))
    # Experts that differ, or nothing could show.
    for kernel in models.mixtures(moe)[0].experts.weights:
        noise = models.tokens(*kernel.shape, seed=len(kernel.shape))
        kernel.assign(models.array(kernel) + noise)
    x = models.tokens(2, 6, models.WIDTH)
    changed = x.copy()
    changed[:, 4:] += 1.0
    first, second = models.output(moe, x), models.output(moe, changed)
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-5)
    assert np.any(np.abs(first[:, 4:] - second[:, 4:]) > 1e-3)


# Families.


class BadFamily(keras_upcycle.Family):
    """Finds one block and describes it wrongly."""

    name = "BadFamily"

    def __init__(self, kernels):
        self.kernels = kernels

    def find(self, model):
        site = keras_upcycle.FeedForwardSite(
            index=0,
            path="the/block",
            stack="encoder",
            layers=(model.up,),
            kernels={
                name: keras.Variable(np.zeros(shape, "float32"))
                for name, shape in self.kernels.items()
            },
            activation="relu",
            protects_first=False,
        )
        return families.Findings([site])


@pytest.mark.parametrize(
    ("kernels", "match"),
    [
        ({"up_kernel": (8, 16)}, r"\['down_kernel'\] missing"),
        (
            {"up_kernel": (8, 16), "down_kernel": (8, 16)},
            r"do not fit together.*\(16, 8\)",
        ),
        (
            {"up_kernel": (8, 16, 1), "down_kernel": (16, 8)},
            "no matrix",
        ),
        (
            {"up_kernel": (8, 16), "down_kernel": (16, 8), "up_bias": (16,)},
            "do not fit together.*'down_bias'",
        ),
        (
            {
                "up_kernel": (8, 16),
                "down_kernel": (16, 8),
                "gate_kernel": (8, 15),
            },
            "do not fit together.*gate_kernel",
        ),
        (
            {"up_kernel": (8, 16), "down_kernel": (16, 8), "wi": (8, 16)},
            r"unknown names \['wi'\]",
        ),
    ],
    ids=[
        "kernel missing",
        "down the wrong way",
        "no matrix",
        "one bias",
        "gate too narrow",
        "unknown name",
    ],
)
@CALLS
def test_a_family_whose_kernels_do_not_fit(call, kernels, match, monkeypatch):
    known = dict(families.registry._FAMILIES)
    monkeypatch.setattr(families.registry, "_FAMILIES", known)
    keras_upcycle.register_family(HiddenLayers, BadFamily(kernels))
    refused(
        hidden_layers(),
        UpcycleError,
        f"'the/block'.*{match}.*mistake in the family",
        call=call,
    )


class Rebuilds(BadFamily):
    """Describes its block well, and puts `made` in the model's place."""

    def __init__(self, made):
        super().__init__({"up_kernel": (16, 32), "down_kernel": (32, 16)})
        self.made = made

    def rebuild(self, model, sites, replacements):
        return self.made(replacements[0])


class HalfRemoved(keras.Model):
    """The mixture is there, and so is the dense block."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.dense = hidden_layers()
        self.built = True


def half_removed(mixture):
    mixture.build((None, models.WIDTH))
    return HalfRemoved(mixture)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda mixture: hidden_layers(), "put every layer.*Received: 0 of 1"),
        (HalfRemoved, "put every layer.*Received: 0 of 1"),
        (half_removed, "expected .* parameters. Received: "),
    ],
    ids=["left out", "unbuilt", "dense block left in"],
)
def test_a_family_that_does_not_rebuild_is_found_out(made, match, monkeypatch):
    known = dict(families.registry._FAMILIES)
    monkeypatch.setattr(families.registry, "_FAMILIES", known)
    keras_upcycle.register_family(HiddenLayers, Rebuilds(made))
    refused(hidden_layers(), UpcycleError, f"'BadFamily'.*{match}")

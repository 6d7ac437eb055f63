"""What users type for numbers, flags, seeds and words, for every public name.

A table says of every argument of every public name what it takes. What cannot
work is refused by the argument's name, where it is given; what NumPy has of
numbers is taken, and comes out as Python's own.
"""

import inspect
import json

import hub_models
import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_upcycle as ku
from keras_upcycle import checks

pytestmark = pytest.mark.one_backend

DENSE = models.sequential()
MOE = ku.upcycle_model(DENSE, 2, layers="all", router="ds_moe")
X = np.ones((2, *MOE.input_shape[1:]), "float32")
EXPERTS = [ku.ExpertWeights.from_model(DENSE)] * 2
READINGS = []

# What is wrong for each kind of argument, and what NumPy has that is right.
NO_NUMBER = [True, np.True_, "2", [2], np.array([2]), 2j, len]
NOT_FINITE = [float("inf"), float("nan"), -np.inf, np.float32("nan"), 10**400]
WRONG = {
    "count": [*NO_NUMBER, *NOT_FINITE[:-1], 2.5, np.float64(2), 0, -1],
    "number": [*NO_NUMBER, *NOT_FINITE, -0.5, np.float32(-1)],
    "factor": [*NO_NUMBER, *NOT_FINITE, 0, -1.5, np.float64(0)],
    "share": [*NO_NUMBER, *NOT_FINITE, 1.5, -0.1, np.int64(2)],
    "rate": [*NO_NUMBER, *NOT_FINITE, 1, 1.5, -0.1, np.float32(1)],
    "flag": ["no", "False", 0, 1, np.int64(1), 1.0, [], [True], len],
    "seed": ["s", True, np.True_, 1.5, np.float64(3), -5, 2**31, [1], np.nan],
    "word": ["nonsense", "", 3, True, ["a"], np.array(["a"]), len, 1.5],
    "path": [3, True, ["a.csv"], 1.5, len],
    "verbose": ["no", "auto", 1.5, [1], len],
}
# A word or a count.
WRONG["word#"] = [*WRONG["count"], "nonsense", ["a"]]
RIGHT = {
    "count": [np.int64(2), np.int32(2), np.uint8(2), np.array(2)],
    "number": [np.float32(0.5), np.float64(0.5), np.int64(1), np.array(0.5)],
    "factor": [np.float32(0.5), np.float16(2), np.int64(1), np.array(0.5)],
    "share": [np.float32(0.5), np.int64(1), np.int64(0), np.array(0.5)],
    "rate": [np.float32(0.5), np.float64(0.25), np.int64(0), np.array(0.5)],
    "flag": [np.True_, np.False_, np.array(True)],
    "seed": [np.int64(3), np.uint32(3), np.array(3), None, 0, 2**31 - 1],
    "word": [],
    "word#": [np.int64(2), np.array(2)],
    "path": [],
    "verbose": [np.int64(0), False, np.False_],
}
OPTIONAL = "?"  # after a kind: `None` is taken as well
ROUTER = {"z_loss": "number", "group": "word#", "trainable": "flag"}
NOISY = {
    **ROUTER,
    "temperature": "factor",
    "noise_stddev": "number",
    "seed": "seed",
}
TOP_K = {
    **NOISY,
    "top_k": "count",
    "capacity_factor": "factor?",
    "eval_capacity_factor": "factor?",
    "load_balance_loss": "number",
    "importance_loss": "number",
    "mutual_information_loss": "number",
    "bias_update_rate": "number",
    "softmax": "word",
    "drop_policy": "word",
    "router_gradient": "word",
    "balance_over": "word",
    "batches_per_step": "count?",
}
UPCYCLE = {"num_experts": "count", "router": "word?", "layers": "word?"}
VECTORS = {
    "alpha": "share?",
    "epochs": "count",
    "batch_size": "count",
    "learning_rate": "factor",
    "equal_steps": "flag",
    "train_experts": "flag",
    "from_logits": "flag",
    "seed": "seed",
    "verbose": "verbose",
}
OPTIMIZER = keras.optimizers.SGD(0.1)
LLAMA = hub_models.dense("LlamaBackbone")
SPARSE_LLAMA = ku.upcycle_model(LLAMA, 2, target="mixtral")

# From a public name to what it is called with, and to its arguments' kinds.
TABLE = {
    "MoEFeedForward": (
        {
            "num_experts": 2,
            "intermediate_dim": 4,
            "shared_intermediate_dim": 2,
            "low_rank": 2,
        },
        {
            "num_experts": "count",
            "intermediate_dim": "count",
            "router": "word",
            "gated": "flag",
            "use_bias": "flag",
            "dropout": "rate",
            "output_dropout": "rate",
            "shared_intermediate_dim": "count?",
            "shared_gate": "flag",
            "low_rank": "count?",
            "low_rank_alpha": "factor?",
            "output_bias": "flag",
            "dispatch": "word",
            "trainable_experts": "flag",
            "remat": "flag",
            "trainable": "flag",
        },
    ),
    "TopKRouter": ({}, {**TOP_K, "normalize": "flag"}),
    "ExpertChoiceRouter": (
        {},
        {
            **NOISY,
            "capacity_factor": "factor",
            "eval_capacity_factor": "factor?",
            "normalize": "flag",
        },
    ),
    "SkyworkRouter": (
        {},
        {
            **{k: v for k, v in TOP_K.items() if k != "capacity_factor"},
            "normalize": "flag",
            "capacity_factor": "factor",
            "logits_stddev": "factor",
            "drop_scale": "number",
            "smoothing": "rate",
        },
    ),
    "CarvingRouter": (
        {},
        {**TOP_K, "gated": "flag", "use_bias": "flag"},
    ),
    "Carving": (
        {"inputs": X},
        {
            "shared": "rate",
            "active_neurons": "count?",
            "grouping": "word",
            "normalize": "flag",
            "max_tokens": "count",
        },
    ),
    "DefaultMoERouter": (
        {},
        {
            **TOP_K,
            "default_forward": "word",
            "decay": "rate",
            "score_weighting": "word",
            "use_default_at_inference": "flag",
        },
    ),
    "DSMoERouter": (
        {},
        {
            **ROUTER,
            "selection": "word",
            "normalize": "flag",
            "mutual_information_loss": "number",
        },
    ),
    "DropUpcycling": (
        {},
        {
            "ratio": "share",
            "index_sharing": "word",
            "permute": "flag",
            "router_initializer": "word?",
        },
    ),
    "RandomNoise": (
        {},
        {
            "ratio": "share",
            "stddev": "number",
            "index_sharing": "word",
            "permute": "flag",
        },
    ),
    "FeedForwardSlices": ({}, {"order": "word", "exact": "flag"}),
    "VirtualGroups": (
        {"granularity": 2},
        {"granularity": "count", "scaling": "word", "exact": "flag"},
    ),
    "SharedExperts": ({}, {"intermediate_dim": "count?"}),
    "LowRankExperts": ({}, {"rank": "count", "alpha": "factor?"}),
    "ReplicateShuffleCut": (
        {},
        {
            "intermediate_dim": "count?",
            "ratio": "share",
            "index_sharing": "word",
            "rescale": "flag",
        },
    ),
    "BranchTrainMix": (
        {"donors": [DENSE], "other_weights": "base"},
        {"other_weights": "word", "include_base": "flag"},
    ),
    "UpIT": ({"experts": EXPERTS}, {"other_weights": "word"}),
    "ExpertCheckpoints": (
        {},
        {
            "every": "factor",
            "every_steps": "count?",
            "directory": "path?",
            "other_weights": "flag",
        },
    ),
    "RouterMonitor": (
        {},
        {
            "every": "count",
            "log": "path?",
            "detail": "flag",
            "max_dropped": "number",
        },
    ),
    "InverseSquareRoot": (
        {"learning_rate": 0.1},
        {
            "learning_rate": "factor",
            "warmup_steps": "count",
            "warmup": "word",
            "timescale": "count?",
        },
    ),
    "upcycle_model": (
        {"model": DENSE, "num_experts": 2},
        {
            **UPCYCLE,
            "expert_init": "word?",
            "dispatch": "word",
            "remat": "flag",
            "expert_dropout": "rate?",
            "seed": "seed",
            "recipe": "word?",
        },
    ),
    "can_export": (
        {"model": SPARSE_LLAMA, "format": "keras_hub"},
        {"format": "word", "target": "word?", "untie_embeddings": "flag"},
    ),
    "export_model": (
        {"model": SPARSE_LLAMA, "format": "keras_hub"},
        {"format": "word", "target": "word?", "untie_embeddings": "flag"},
    ),
    "estimate_upcycle": (
        {"model": DENSE, "num_experts": 2, "mesh": 2},
        {
            **UPCYCLE,
            "expert_init": "word?",
            "recipe": "word?",
            "sequence_length": "count?",
            "tokens_per_device": "count?",
            "shard_dense": "flag",
        },
    ),
    "find_feed_forwards": ({"model": DENSE}, {"explain": "flag"}),
    "find_attention": ({"model": DENSE}, {"explain": "flag"}),
    "upcycle_attention": ({"model": LLAMA}, {"seed": "seed"}),
    "RoutedHeads": (
        {"projection": keras.layers.Dense(8), "num_heads": 4},
        {
            "num_heads": "count",
            "router": "word",
            "num_experts": "count?",
            "num_key_value_heads": "count?",
        },
    ),
    "prune_experts": (
        {"moe": MOE, "inputs": X},
        {"num_experts": "count?", "min_share": "share?"},
    ),
    "predict_upcycling": (
        {"parameters": 1e9, "tokens_spent": 1e10, "tokens_left": 1e10},
        {
            "parameters": "factor",
            "flops_ratio": "factor",
            "num_experts": "count",
            "top_k": "count",
        },
    ),
    "grow_experts": (
        {"moe": MOE, "num_experts": 4},
        {
            "num_experts": "count",
            "router": "word",
            "split": "number",
            "seed": "seed",
        },
    ),
    "expert_usefulness": (
        {"moe": MOE, "x": X, "y": X, "loss": "mse"},
        {"measure": "word", "batch_size": "count?"},
    ),
    "densify_model": ({"moe": MOE, "dense": DENSE}, {"experts": "word"}),
    "extract_expert": ({"moe": MOE, "dense": DENSE}, {"expert": "word"}),
    "set_active_experts": (
        {"model": MOE},
        {
            "top_k": "count?",
            "threshold": "number?",
            "batch_threshold": "number?",
            "part": "word?",
        },
    ),
    "freeze": ({"model": MOE}, {"part": "word"}),
    "unfreeze": ({"model": MOE}, {"part": "word"}),
    "upcycle_optimizer": (
        {"optimizer": OPTIMIZER, "dense": DENSE, "moe": MOE},
        {"rescale_moments": "flag?", "slots": "word"},
    ),
    "expand_experts": (
        {"experts": EXPERTS, "num_experts": 3, "base": DENSE},
        {
            "num_experts": "count",
            "drop_rate": "rate",
            "parents": "word",
            "seed": "seed",
        },
    ),
    "perplexity_buckets": (
        {"experts": EXPERTS, "model": DENSE, "data": (X, X)},
        {"batch_size": "count", "from_logits": "flag", "verbose": "verbose"},
    ),
    "routing_vectors": (
        {
            "experts": EXPERTS,
            "model": DENSE,
            "data": (X, X),
            "buckets": np.array([0, 1]),
        },
        VECTORS,
    ),
    "upit_upcycle": (
        {"model": DENSE, "num_experts": 2, "experts": EXPERTS},
        {
            "num_experts": "count",
            "expand": "flag",
            "drop_rate": "rate",
            "parents": "word",
            "router_init": "word",
            "other_weights": "word",
            "dispatch": "word",
            "remat": "flag",
            **VECTORS,
        },
    ),
    "plot_expert_load": ({"readings": READINGS}, {"path": "path"}),
    "plot_expert_assignments": ({"shares": {}}, {"path": "path"}),
    "plot_expert_tokens": ({"model": MOE, "text": "a"}, {"path": "path"}),
    "RandomExperts": ({}, {"count": "count?", "distribution": "word"}),
    "tile_depth": (
        {"model": models.vit_backbone(), "times": 2},
        {"times": "count", "order": "word"},
    ),
    "set_dropout": ({"model": MOE}, {"dense": "rate?", "experts": "rate?"}),
    "few_shot_probe": (
        {"train": (X, np.array([0, 1])), "test": (X, np.array([0, 1]))},
        {
            "shots": "count",
            "l2": "factor",
            "draws": "count",
            "seed": "seed",
            "batch_size": "count",
        },
    ),
    "get_recipe": ({}, {"identifier": "word"}),
}
# Arguments that a test below or another file is about, by public name; ""
# holds for all. A new argument is to be put into the table or here.
ELSEWHERE = {
    "": {
        *("kwargs", "activation", "kernel_initializer", "bias_initializer"),
        *("model", "moe", "dense", "inputs", "data", "experts", "router"),
        *("layers", "title", "base"),
    },
    # Asks for `noise_stddev` first; one for each expert.
    "TopKRouter": {"load_loss", "expert_groups"},
    "MoEFeedForward": {"frozen_projections", "quantization_configs"},
    "few_shot_probe": {"train", "test"},
    "SkyworkRouter": {"load_loss", "expert_groups"},
    "CarvingRouter": {"load_loss", "expert_groups", "normalize"},
    "DSMoERouter": {"top_k", "threshold"},  # only with a selection
    "SharedExperts": {"routed"},
    "BranchTrainMix": {"donors"},
    "UpIT": {"routing_vectors"},
    "InverseSquareRoot": {"cooldown_start", "cooldown_steps"},
    "prune_experts": {"keep"},
    # At least 1; see `tests/conversion`.
    "predict_upcycling": {"tokens_spent", "tokens_left"},
    "RouterMonitor": {"writers"},
    "grow_experts": {"usefulness"},
    "expert_usefulness": {"x", "y", "loss", "verbose"},
    "estimate_upcycle": {
        *("mesh", "target", "budget", "optimizer", "trainable", "batch"),
        "attention",
    },
    # Of one model or one format, see `tests/export`.
    "upcycle_model": {"target", "attention"},
    "upcycle_attention": {"experts"},
    "RoutedHeads": {"projection", "shared_heads"},
    "export_model": {"folder", "dtype", "max_shard_size", "config"},
    "upcycle_optimizer": {"optimizer"},
    "routing_vectors": {"buckets"},
    "plot_expert_load": {"readings"},
    "plot_expert_assignments": {"shares", "names"},
    "plot_expert_tokens": {"text", "tokens"},
}
# No settings of their own, or plain records.
WITHOUT = {
    *("ActiveExpertsReport", "PruneReport", "RouterReading", "UpcycleReport"),
    *("UpcycleEstimate", "UpcycleError", "Recipe", "Family"),
    *("adopt_model", "ExportCheck", "load_adapters", "merge_experts"),
    *("save_adapters", "MemoryPlan", "GrowthReport", "UpcyclingPrediction"),
    *("DropoutReport", "FewShotResult", "per_expert", "mixture_from_scratch"),
    *("FeedForwardSite", "ExpertInit", "ExpertWeights", "Router"),
    "Float32Activation",
    *("measure_active_experts", "expert_assignments", "verify_upcycle"),
    "register_block",
    *("register_family", "scale_gradients", "scale_learning_rate"),
    # Of packages that may be missing: their own tests.
    *("TensorBoardWriter", "WandbWriter", "lm_eval_model"),
    *("MixtureEstimate", "estimate_mixture"),
    *("AttentionSite", "AttentionExperts", "CopiedAttention"),
}
CASES = [
    (name, argument, kind)
    for name, (_, kinds) in TABLE.items()
    for argument, kind in kinds.items()
]
CONFIGURED = [
    case for case in CASES if hasattr(getattr(ku, case[0]), "get_config")
]


def call(name, **changed):
    return getattr(ku, name)(**{**TABLE[name][0], **changed})


def refused(name, argument, value):
    before = [models.array(v).copy() for v in DENSE.weights]
    shown = rf"`?{argument if argument != 'identifier' else 'recipe'}"
    with pytest.raises((TypeError, ValueError), match=shown) as raised:
        call(name, **{argument: value})
    assert "Received" in str(raised.value)
    for a, b in zip(before, DENSE.weights, strict=True):
        np.testing.assert_array_equal(a, models.array(b))


def test_every_argument_of_every_public_name_is_accounted_for():
    public = {name for name in vars(ku) if not name.startswith("_")}
    public = {n for n in public if callable(getattr(ku, n))}
    assert public - WITHOUT == set(TABLE)
    for name, (_, kinds) in TABLE.items():
        listed = {*kinds, *ELSEWHERE[""], *ELSEWHERE.get(name, ())}
        arguments = set(inspect.signature(getattr(ku, name)).parameters)
        assert arguments <= listed, name


@pytest.mark.parametrize(("name", "argument", "kind"), CASES)
def test_what_cannot_work_is_refused_by_name(name, argument, kind):
    wrong = list(WRONG[kind.rstrip(OPTIONAL)])
    if not kind.endswith(OPTIONAL) and kind != "seed":
        wrong.append(None)
    if argument == "layers":
        wrong.remove(len)  # a function of one argument is a rule
    for value in wrong:
        refused(name, argument, value)


@pytest.mark.parametrize(("name", "argument", "kind"), CONFIGURED)
def test_numpys_numbers_come_out_as_pythons(name, argument, kind):
    for value in RIGHT[kind.rstrip(OPTIONAL)]:
        config = call(name, **{argument: value}).get_config()
        json.dumps(keras.saving.serialize_keras_object(config))
        if argument in ("router", "kernel_initializer"):
            continue
        assert type(config[argument]) in (int, float, bool, type(None))
        if value is not None:
            assert config[argument] == np.asarray(value).item()


def test_numpys_numbers_do_for_functions():
    count = np.int32(2)
    moe = ku.upcycle_model(
        DENSE,
        count,
        router=ku.TopKRouter(np.int64(1), normalize=np.True_),
        layers=np.array([0, -1]),
        remat=np.False_,
        seed=np.int64(3),
    )
    same = ku.upcycle_model(
        DENSE, 2, router=ku.TopKRouter(1), layers=[0, -1], seed=3
    )
    models.assert_same_weights(moe, models.weights(same))
    json.dumps(moe.get_config())
    estimate = ku.estimate_upcycle(DENSE, count, layers=[np.int64(0)])
    assert type(estimate.num_experts) is int
    smaller, _ = ku.prune_experts(moe, X, num_experts=np.int64(1), keep=None)
    assert {m.num_experts for m in models.mixtures(smaller)} == {1}
    ku.densify_model(moe, np.array([1, 0]), dense=DENSE)
    ku.extract_expert(moe, np.int64(1), dense=DENSE)
    assert ku.set_active_experts(MOE, top_k=np.int64(1)) == 2
    assert ku.set_active_experts(MOE, threshold=np.float32(0.5)) == 2
    ku.set_active_experts(MOE)


def test_the_largest_seed_serves_every_block():
    seed = checks.LARGEST_SEED
    moe = ku.upcycle_model(
        DENSE,
        2,
        layers="all",
        router=ku.TopKRouter(1, noise_stddev=0.1, seed=seed),
        expert_init=ku.DropUpcycling(),
        seed=seed,
    )
    assert np.isfinite(models.array(moe(X, training=True))).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("expert_init", ku.DropUpcycling),
        ("expert_init", ku.ExpertInit),
        ("router", ku.TopKRouter),
        ("router", keras.layers.Dense),
    ],
)
@pytest.mark.parametrize("name", ["upcycle_model", "estimate_upcycle"])
def test_a_class_in_the_place_of_an_instance_is_refused(name, argument, value):
    with pytest.raises(TypeError, match=f"`{argument}`.*not its class"):
        call(name, **{argument: value})


def test_classes_are_refused_elsewhere_too():
    with pytest.raises(TypeError, match=r"`routed`.*not its class.*Make one"):
        ku.SharedExperts(4, ku.DropUpcycling)
    with pytest.raises(TypeError, match=r"`router`.*not its class"):
        ku.MoEFeedForward(2, 4, router=ku.TopKRouter)
    with pytest.raises(TypeError, match="model"):
        ku.upcycle_model(keras.Model, 2)
    with pytest.raises(TypeError, match="optimizer"):
        ku.scale_learning_rate(keras.optimizers.Adam, {})
    with pytest.raises(TypeError, match=r"donors.*type"):
        ku.BranchTrainMix(keras.Model)
    with pytest.raises(TypeError, match="experts="):
        ku.UpIT("abc")


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"selection": "top_k", "top_k": True}, "top_k"),
        ({"selection": "top_k", "top_k": "2"}, "top_k"),
        ({"selection": "top_k", "top_k": 0}, "top_k"),
        ({"selection": "threshold", "threshold": np.inf}, "threshold"),
        ({"selection": "threshold", "threshold": "1"}, "threshold"),
    ],
)
def test_what_a_selection_needs_is_refused_by_name(settings, argument):
    with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
        ku.DSMoERouter(**settings)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1, "3", True, 2j])
def test_a_cool_down_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match="`cooldown_start`"):
        ku.InverseSquareRoot(0.1, cooldown_start=value, cooldown_steps=3)
    with pytest.raises((TypeError, ValueError), match="`cooldown_steps`"):
        ku.InverseSquareRoot(0.1, cooldown_start=3, cooldown_steps=value)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1, "3", True, None])
@pytest.mark.parametrize("scale", [ku.scale_learning_rate, ku.scale_gradients])
def test_factors_are_refused_by_their_key(scale, value):
    with pytest.raises((TypeError, ValueError), match=r"factors.*router"):
        scale(OPTIMIZER, {"/router/": value})


def test_factors_of_numpy_are_saved():
    scaled = ku.scale_learning_rate(OPTIMIZER, {"x": np.float32(0.5)})
    json.dumps(scaled.get_config())


@pytest.mark.parametrize(
    "inputs",
    [np.zeros((0, 8)), [], {}, None],
    ids=["array", "list", "dict", "None"],
)
def test_nothing_is_not_compared(inputs):
    word = "inputs=None" if inputs is None else "at least one example.*0"
    for call in (
        lambda: ku.verify_upcycle(DENSE, MOE, inputs),
        lambda: ku.expert_assignments(MOE, inputs, [0]),
    ):
        with pytest.raises((TypeError, ValueError), match=word):
            call()
    if inputs is not None:
        with pytest.raises(ValueError, match="inputs"):
            ku.RouterMonitor(dense=DENSE, inputs=inputs)
        with pytest.raises(ValueError, match="inputs"):
            ku.measure_active_experts(MOE, inputs)
        with pytest.raises(ValueError, match="inputs"):
            ku.prune_experts(MOE, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ku.freeze(MOE, []),
        lambda: ku.unfreeze(MOE, ()),
        lambda: ku.upcycle_model(DENSE, 2, layers=[]),
        lambda: ku.upcycle_model(DENSE, 2, layers=np.array([], int)),
        lambda: ku.BranchTrainMix([]),
        lambda: ku.UpIT([]),
        lambda: ku.ExpertWeights([]),
        lambda: ku.densify_model(MOE, [], dense=DENSE),
        lambda: ku.plot_expert_load([], "x.png"),
        lambda: ku.plot_expert_assignments({}, "x.png"),
        lambda: ku.prune_experts(MOE, X, keep={"no such": []}),
    ],
)
def test_empty_lists_are_refused(call):
    with pytest.raises(ValueError, match="Received"):
        call()


@pytest.mark.parametrize(
    "layers",
    [True, np.True_, "All", [True], [1.0], ["0"], np.array([0.0]), 1.0, 9],
)
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises((TypeError, ValueError), match="`layers`"):
        ku.upcycle_model(DENSE, 2, layers=layers)


def test_functions_of_the_wrong_arity_are_refused():
    with pytest.raises(TypeError, match=r"`layers` must be a function \(site"):
        ku.upcycle_model(DENSE, 2, layers=lambda: True)
    with pytest.raises(TypeError, match=r"`experts` .*values, name, layer"):
        ku.densify_model(MOE, lambda values: values, dense=DENSE)
    with pytest.raises(TypeError, match=r"`model` must be a function \(\)"):
        ku.estimate_upcycle(lambda size: DENSE, 2)


def test_a_saved_layer_of_numpys_numbers_loads(tmp_path):
    layer = ku.MoEFeedForward(
        np.int64(2),
        np.int32(4),
        router=ku.TopKRouter(np.int64(1), capacity_factor=np.float32(1.25)),
        dropout=np.float32(0.25),
        gated=np.True_,
        shared_intermediate_dim=np.array(3),
    )
    model = keras.Sequential([keras.Input((5,)), layer, layers.Dense(2)])
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    x = np.ones((3, 5), "float32")
    np.testing.assert_allclose(
        models.array(again(x)), models.array(model(x)), atol=1e-6
    )

"""The public names, their docstrings, and what importing them costs."""

import inspect
import os
import subprocess
import sys

import keras
import pytest
from places import ROOT

import keras_upcycle
from keras_upcycle import families

NAMES = {
    "BranchTrainMix",
    "Carving",
    "CarvingRouter",
    "ActiveExpertsReport",
    "DSMoERouter",
    "DefaultMoERouter",
    "DropUpcycling",
    "DropoutReport",
    "ExportCheck",
    "ExpertCheckpoints",
    "ExpertChoiceRouter",
    "ExpertInit",
    "ExpertWeights",
    "Family",
    "FeedForwardSite",
    "FeedForwardSlices",
    "FewShotResult",
    "Float32Activation",
    "GrowthReport",
    "LowRankExperts",
    "InverseSquareRoot",
    "MemoryPlan",
    "MixtureEstimate",
    "MoEFeedForward",
    "PruneReport",
    "RandomExperts",
    "RandomNoise",
    "Recipe",
    "ReplicateShuffleCut",
    "AttentionExperts",
    "AttentionSite",
    "CopiedAttention",
    "RoutedHeads",
    "Router",
    "RouterMonitor",
    "RouterReading",
    "SharedExperts",
    "SkyworkRouter",
    "TensorBoardWriter",
    "TopKRouter",
    "UpIT",
    "UpcycleError",
    "UpcycleEstimate",
    "UpcycleReport",
    "UpcyclingPrediction",
    "VirtualGroups",
    "WandbWriter",
    "__version__",
    "adopt_model",
    "lm_eval_model",
    "load_adapters",
    "merge_experts",
    "save_adapters",
    "can_export",
    "densify_model",
    "export_model",
    "estimate_mixture",
    "estimate_upcycle",
    "expand_experts",
    "expert_usefulness",
    "grow_experts",
    "expert_assignments",
    "extract_expert",
    "few_shot_probe",
    "find_attention",
    "find_feed_forwards",
    "freeze",
    "get_recipe",
    "per_expert",
    "perplexity_buckets",
    "measure_active_experts",
    "mixture_from_scratch",
    "plot_expert_assignments",
    "plot_expert_load",
    "plot_expert_tokens",
    "predict_upcycling",
    "prune_experts",
    "register_block",
    "register_family",
    "routing_vectors",
    "scale_gradients",
    "scale_learning_rate",
    "set_active_experts",
    "set_dropout",
    "tile_depth",
    "unfreeze",
    "upcycle_attention",
    "upcycle_model",
    "upcycle_optimizer",
    "upit_upcycle",
    "verify_upcycle",
}
FUNCTIONS = sorted(name for name in NAMES if name[0].islower())
LAYERS = (
    "CarvingRouter",
    "DSMoERouter",
    "SkyworkRouter",
    "ExpertChoiceRouter",
    "MoEFeedForward",
    "Router",
    "TopKRouter",
)


@pytest.mark.one_backend
def test_the_public_names_are_these():
    public = {
        name
        for name, value in vars(keras_upcycle).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == NAMES


@pytest.mark.one_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_docstring_has_its_sections(name):
    function = getattr(keras_upcycle, name)
    text = inspect.getdoc(function)
    sections = ["Args:", "Raises:", "Example:"]
    if not name.startswith("register_") and not name.startswith("plot_"):
        sections.insert(1, "Returns:")
    places = [text.find(f"\n{section}") for section in sections]
    assert -1 not in places, sections[places.index(-1)]
    assert places == sorted(places)
    for argument in inspect.signature(function).parameters.values():
        name = str(argument).split(":")[0]  # with its stars
        assert f"\n    {name}: " in text


@pytest.mark.one_backend
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_docstring_names_its_arguments(name):
    layer = getattr(keras_upcycle, name)
    text = inspect.getdoc(layer)
    for argument in inspect.signature(layer.__init__).parameters:
        if argument not in ("self", "kwargs"):
            assert f"{argument}:" in text or f"`{argument}`" in text, argument


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        *("ActiveExpertsReport", "ExportCheck", "MemoryPlan", "PruneReport"),
        *("UpcycleReport", "UpcycleEstimate", "GrowthReport"),
        *("UpcyclingPrediction", "MixtureEstimate"),
    ],
)
def test_a_results_docstring_names_its_fields(name):
    result = getattr(keras_upcycle, name)
    for field in result.__dataclass_fields__:
        assert f"\n    {field}: " in inspect.getdoc(result)


@pytest.mark.one_backend
def test_options_are_keyword_only():
    for name in ("upcycle_model", "estimate_upcycle"):
        parameters = inspect.signature(getattr(keras_upcycle, name)).parameters
        positional = [
            p for p in parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        assert [p.name for p in positional] == ["model", "num_experts"]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        "Experts",
        "ExpertChoiceRouter",
        "MoEFeedForward",
        "RoutingVectorRouter",
        "ScaledOptimizer",
        "TopKRouter",
        "UpcycledViTBackbone",
        "UpcycledViTEncoder",
        "UpcycledViTImageClassifier",
        "UpcycledViTImageClassifierPreprocessor",
        "UpcycledViTImageConverter",
    ],
)
def test_what_is_saved_is_registered(name):
    found = keras.saving.get_registered_object(f"keras_upcycle>{name}")
    assert found.__name__ == name
    assert found.__module__.startswith("keras_upcycle.")


@pytest.mark.one_backend
def test_known_families_are_listed():
    assert "backbones of KerasHub" in families.known_families()[0]
    assert "Dense -> Dense pairs" in families.known_families()


# Importing.

HEAVY = (
    "jax",
    "matplotlib",
    "rich",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
)


def run(code, backend):
    """The standard output of a fresh interpreter."""
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("KERAS_BACKEND", None)
    if backend:
        environment["KERAS_BACKEND"] = backend
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.one_backend
def test_importing_loads_nothing_heavy_beyond_keras_hub():
    backend = keras.backend.backend()
    code = (
        "import sys; import keras_hub; before = set(sys.modules); "
        "import keras_upcycle; print(*sorted(set(sys.modules) - before)); "
        "import keras; print(keras.backend.backend())"
    )
    *new, used = run(code, backend).split()
    assert used == backend
    assert "keras_upcycle.conversion.upcycle" in new
    heavy = [name for name in new if name.partition(".")[0] in HEAVY]
    assert heavy == []
    others = {"jax", "tensorflow", "torch"} - {backend}
    assert not [
        n for n in new if n in {f"keras_upcycle.backend.{o}" for o in others}
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow cannot be missing where it is the backend",
)
def test_it_works_where_tensorflow_is_not_installed():
    """And picks JAX where nobody asks for a backend."""
    code = """
import sys
for name in ("tensorflow", "tensorflow_text", "tensorflow_datasets"):
    sys.modules[name] = None
import keras_upcycle, keras
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8),
                          keras.layers.Dense(4)])
moe = keras_upcycle.upcycle_model(model, 2)
x = keras.ops.ones((2, 4))
print(keras_upcycle.verify_upcycle(model, moe, x).relative_difference < 1e-5)
print(keras.backend.backend())
"""
    backend = keras.backend.backend()
    unset = None if backend == "jax" else backend
    assert run(code, unset).split() == ["True", backend]

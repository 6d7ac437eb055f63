"""What fits into a budget: bytes counted on built models, order, reasons."""

import math

import hub_models
import keras
import keras_hub
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle import checks, cli
from keras_upcycle.conversion import memory_plan

pytestmark = pytest.mark.one_backend


def dense():
    return hub_models.dense("LlamaBackbone")


def bytes_of(variables):
    return sum(4 * math.prod(v.shape) for v in variables)


@pytest.mark.parametrize("part", memory_plan.TRAINABLE)
@pytest.mark.parametrize("kind", [memory_plan.WHOLE, memory_plan.LOW_RANK])
@pytest.mark.parametrize("name", ["adam", "lion", "sgd"])
def test_bytes_are_those_of_the_built_model(name, kind, part):
    experts = ku.LowRankExperts() if kind == memory_plan.LOW_RANK else None
    plan = ku.estimate_upcycle(
        dense(), 4, budget="1GB", optimizer=name, trainable=part
    )
    (option,) = [each for each in plan.options if each.experts == kind]
    moe = ku.upcycle_model(dense(), 4, experts=experts)
    if part == memory_plan.EXPERTS:
        ku.freeze(moe, "dense")
    optimizer = keras.optimizers.get(name)
    optimizer.build(moe.trainable_variables)
    assert option.fits
    assert option.weight_bytes == bytes_of(moe.weights)
    assert option.gradient_bytes == bytes_of(moe.trainable_variables)
    slots = [v for v in optimizer.variables if len(v.shape)]
    assert option.optimizer_bytes == bytes_of(slots)
    assert option.total_params == moe.count_params()
    assert option.total_bytes == (
        option.weight_bytes + option.gradient_bytes + option.optimizer_bytes
    )


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        ("adam", 2),
        ("adamw", 2),
        ("sgd", 0),
        (keras.optimizers.SGD(0.1, momentum=0.9), 1),
        ("lion", 1),
        ("rmsprop", 1),
        (keras.optimizers.Adam(amsgrad=True), 3),
    ],
    ids=["adam", "adamw", "sgd", "momentum", "lion", "rmsprop", "amsgrad"],
)
def test_slots_are_counted(optimizer, slots):
    assert memory_plan.slots_of(optimizer) == slots


def test_adafactor_of_keras_keeps_a_slot_beside_rows_and_columns():
    assert 1 < memory_plan.slots_of("adafactor") < 1.02


def test_the_largest_that_fits_comes_first_and_others_say_why():
    plan = ku.estimate_upcycle(dense(), budget="300KB")
    fits = [each for each in plan.options if each.fits]
    others = [each for each in plan.options if not each.fits]
    assert fits
    assert others
    assert plan.best is plan.options[0] is fits[0]
    sizes = [each.total_params for each in fits]
    assert sizes == sorted(sizes, reverse=True)
    assert all(each.total_bytes <= 300_000 for each in fits)
    assert all(each.total_bytes > 300_000 for each in others)
    assert {each.num_experts for each in plan.options} == set(
        memory_plan.COUNTS
    )
    text = str(plan)
    assert text.startswith(f"{len(fits)} of {len(plan.options)} fit into")
    assert "trainable='experts'" in text
    assert others[-1].weight_bytes > 300_000
    assert "weights alone" in others[-1].reason


def test_a_batch_is_told_when_it_is_what_does_not_fit():
    settings = {"batch": 4096, "sequence_length": 128, "budget": "10MB"}
    plan = ku.estimate_upcycle(dense(), 2, **settings)
    assert plan.best is None
    assert all("smaller `batch`" in each.reason for each in plan.options)
    smaller = ku.estimate_upcycle(dense(), 2, **{**settings, "batch": 1})
    assert smaller.best is not None


def test_experts_of_ones_own_are_planned_as_they_are():
    plan = ku.estimate_upcycle(
        dense(), 4, budget="1GB", experts=ku.LowRankExperts(3)
    )
    (option,) = plan.options
    moe = ku.upcycle_model(dense(), 4, experts=ku.LowRankExperts(3))
    assert option.total_params == moe.count_params()


def test_a_model_of_2e9_parameters_with_8_experts_fits_16_gb():
    """Shapes alone: 22 blocks, every other converted, batch 1 of 512."""

    def llama():
        return keras_hub.models.LlamaBackbone(
            vocabulary_size=32000,
            num_layers=26,
            num_query_heads=32,
            num_key_value_heads=4,
            hidden_dim=2304,
            intermediate_dim=9216,
        )

    plan = ku.estimate_upcycle(
        llama,
        8,
        budget="16GB",
        trainable="experts",
        batch=1,
        sequence_length=512,
    )
    low_rank, whole = plan.options
    assert low_rank.fits
    assert low_rank.experts == memory_plan.LOW_RANK
    assert low_rank.total_params > 2e9
    assert not whole.fits


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "`num_experts` must be an integer unless"),
        ({"budget": "much"}, ValueError, "`budget`.*'16GB'"),
        ({"budget": 0}, ValueError, "`budget`"),
        ({"budget": [16]}, TypeError, "`budget`"),
        ({"budget": 1e9, "optimizer": "fast"}, ValueError, "`optimizer`"),
        ({"budget": 1e9, "trainable": "most"}, ValueError, "`trainable`"),
        ({"budget": 1e9, "batch": 2}, ValueError, "sequence_length=None"),
        ({"budget": 1e9, "batch": 0}, ValueError, "`batch`"),
        ({"num_experts": 2, "batch": 2}, ValueError, "budget=None"),
        ({"num_experts": 2, "optimizer": "lion"}, ValueError, "budget=None"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        ku.estimate_upcycle(dense(), **settings)


def test_the_command_tells_it(tmp_path, capsys):
    dense().save_to_preset(str(tmp_path / "llama"))
    capsys.readouterr()
    given = ["inspect", tmp_path / "llama", "--budget", "300KB"]
    assert cli.main([*map(str, given), "--train", "experts"]) == 0
    assert "fit into" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["16GB", " 1.5 GiB ", "200MB"])
def test_budgets_are_read(text):
    number = float(text.split("G")[0].split("M")[0])
    unit = {"GB": 1e9, "iB": 2**30, "MB": 1e6}[text.strip()[-2:]]
    assert checks.check_bytes("budget", text) == int(number * unit)
    assert checks.check_bytes("budget", np.float32(16)) == 16


def peak_of(step):
    """Bytes that torch's allocator held at most, over what there was."""
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]))


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="counts torch's allocations; JAX's are in tests/distribution",
)
@pytest.mark.parametrize("part", memory_plan.TRAINABLE)
@pytest.mark.parametrize("kind", [memory_plan.WHOLE, memory_plan.LOW_RANK])
def test_a_plan_is_what_a_step_of_torch_holds_at_most(kind, part):
    """Within a tenth, weights, gradients, slots and activations together."""
    count, length, width = 64, 16, 128
    model = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(
            vocabulary_size=64,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=4,
            hidden_dim=width,
            intermediate_dim=4 * width,
        )
    )
    settings = {"router": ku.TopKRouter(2), "layers": "all"}
    plan = ku.estimate_upcycle(
        model,
        8,
        budget="1GB",
        trainable=part,
        batch=count,
        sequence_length=length,
        **settings,
    )
    (option,) = [each for each in plan.options if each.experts == kind]
    experts = ku.LowRankExperts() if kind == memory_plan.LOW_RANK else None
    moe = ku.upcycle_model(model, 8, experts=experts, **settings)
    if part == memory_plan.EXPERTS:
        ku.freeze(moe, "dense")
    moe.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    ids = np.random.default_rng(0).integers(1, 64, (count, length))
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def step():
        keras.Model.train_on_batch(moe, x, ids)

    step()  # gradients of it are there until the next one begins
    at_most = (
        option.weight_bytes
        + option.gradient_bytes
        + option.optimizer_bytes
        + peak_of(step)
    )
    assert 0.9 < at_most / option.total_bytes < 1.1

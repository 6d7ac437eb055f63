"""The benchmarks run, compare what they say, and refuse to compare nonsense.

At sizes where no time means anything: none is looked at.
"""

import json
import sys
import time

import keras
import keras_hub
import numpy as np
import pytest

from benchmarks import (
    __main__ as everything,
)
from benchmarks import (
    all_experts,
    command,
    competitors,
    convert,
    crossover,
    default_moe,
    generate,
    growth,
    layer,
    monitor,
    programs,
    shapes,
    steps,
    timing,
)

SMALL = shapes.Shape(
    tokens=32, hidden_dim=8, intermediate_dim=16, num_experts=4, gated=True
)


def run(monkeypatch, module, path, *arguments):
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark", *arguments, "--json", str(path)],
    )
    module.main()
    return json.loads(path.read_text())


def test_every_peer_that_can_run_here_computes_what_ours_does():
    """`build` compares them and raises where they differ."""
    ran, reasons = set(), {}
    for name in competitors.PEERS:
        try:
            competitors.build(name, SMALL)
            ran.add(name)
        except competitors.Unavailable as reason:
            reasons[name] = str(reason)
    assert {"KerasHub Qwen3", "KerasHub Mixtral", "KerasHub GptOss"} <= ran
    assert "one-hot einsum" in ran
    here = keras.backend.backend()
    assert ("jax.lax.ragged_dot" in ran) == (here == "jax")
    for name, reason in reasons.items():
        assert "runs on" in reason or "pip install" in reason, name


@pytest.mark.one_backend
def test_a_peer_that_computes_something_else_is_refused(monkeypatch):
    peer = competitors.PEERS["KerasHub Qwen3"]

    def wrong(shape, weights):
        return peer(shape, weights._replace(down=1.1 * weights.down))

    monkeypatch.setitem(competitors.PEERS, "KerasHub Qwen3", wrong)
    with pytest.raises(RuntimeError, match="KerasHub Qwen3 and our layer"):
        competitors.build("KerasHub Qwen3", SMALL)


@pytest.mark.one_backend
def test_a_dispatch_tensor_that_would_not_fit_is_left_out():
    large = shapes.Shape(tokens=65536)
    with pytest.raises(competitors.Unavailable, match="would take"):
        competitors.OneHotEinsum(large)


@pytest.mark.one_backend
def test_layer_compares_with_the_limit(monkeypatch, tmp_path):
    written = run(
        monkeypatch,
        layer,
        tmp_path / "layer.json",
        *("--tokens=32", "--hidden-dim=8", "--intermediate-dim=16"),
        *("--num-experts=4", "--gated", "--rounds=2"),
        *("--only", "capacity", "KerasHub Mixtral"),
    )
    (figures,) = written["shapes"]
    assert written["backend"] == keras.backend.backend()
    assert set(figures["rows"]) == {
        competitors.LIMIT,
        "capacity",
        "KerasHub Mixtral",
    }
    limit = figures["rows"][competitors.LIMIT]
    assert limit["forward_ratio"] == limit["both_ratio"] == 1.0
    for row in figures["rows"].values():
        assert row["forward_ms"] > 0
        assert row["both_rounds"] == 2


@pytest.mark.slow
@pytest.mark.one_backend
def test_growth_answers_its_questions(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "EXPERTS", (2, 4))
    written = run(
        monkeypatch,
        growth,
        tmp_path / "growth.json",
        *("--tokens=32", "--hidden-dim=8", "--intermediate-dim=16"),
        *("--num-experts=4", "--rounds=1"),
    )
    skew = {row["routing"]: row for row in written["of_skew"]}
    # Half of all tokens, and of the rest those that chose it anyway.
    assert skew["half to one"]["largest_share"] >= 0.5
    assert len(written["of_experts"]) == 5 * 2
    assert {row["ratio"] for row in written["of_experts"][::2]} == {1.0}
    assert len(written["of_tokens"]) == 3
    assert [row["hidden_layers"] for row in written["of_depth"]] == [
        "kept",
        "remat",
    ]


@pytest.mark.slow
@pytest.mark.one_backend
def test_crossover_times_every_engine(monkeypatch, tmp_path):
    written = run(
        monkeypatch,
        crossover,
        tmp_path / "crossover.json",
        *("--hidden-dim=8", "--intermediate-dim=16", "--num-experts", "4"),
        *("--tokens", "1", "8", "--rounds=1", "--training"),
    )
    assert [row["tokens"] for row in written["rows"]] == [1, 8]
    assert {"capacity", "dropless", "dense", "auto", "one dense"} == set(
        written["rows"][0]["ms"]
    )


@pytest.mark.one_backend
def test_all_experts_are_timed_as_one_and_one_by_one(monkeypatch, tmp_path):
    written = run(
        monkeypatch,
        all_experts,
        tmp_path / "all_experts.json",
        *("--tokens", "8", "--hidden-dim=8", "--intermediate-dim=16"),
        *("--num-experts=4", "--rounds=2"),
    )
    (row,) = written["rows"]
    assert row["tokens"] == 8
    for part in ("forward", "both"):
        assert set(row[part]) == set(all_experts.WAYS)
        assert min(row[part].values()) > 0


def test_both_ways_compute_the_same():
    shape = shapes.Shape(
        tokens=8, hidden_dim=8, intermediate_dim=4, num_experts=4
    )
    x = layer.tokens(shape)
    one = all_experts.AllExperts(shape, "as one")
    other = all_experts.AllExperts(shape, "one by one")
    for a, b in zip(one.weights, other.weights, strict=True):
        b.assign(a)
    one, other = map(keras.ops.convert_to_numpy, (one(x), other(x)))
    assert abs(one).max() > 1e-2
    assert abs(one - other).max() < 1e-5


@pytest.mark.slow
@pytest.mark.one_backend
def test_default_moe_is_timed_against_top_k(monkeypatch, tmp_path):
    written = run(
        monkeypatch,
        default_moe,
        tmp_path / "default_moe.json",
        *("--tokens=32", "--hidden-dim=8", "--intermediate-dim=16"),
        *("--num-experts=4", "--rounds=2"),
    )
    names = [(row["engine"], row["router"]) for row in written["rows"]]
    assert names == [
        (engine, router)
        for engine in ("capacity", "dropless")
        for router in (
            "Top-K",
            "Default MoE, backward_only",
            "Default MoE, paper",
            "DenseMixer",
        )
    ]
    for row in written["rows"]:
        assert row["ms"] > 0
        if row["router"] == "Top-K":
            assert row["ratio"] == 1.0


@pytest.mark.slow
@pytest.mark.one_backend
def test_the_monitor_is_timed_against_none(monkeypatch, tmp_path):
    written = run(
        monkeypatch,
        monitor,
        tmp_path / "monitor.json",
        *("--width=12", "--blocks=2", "--num-experts=2", "--batch-size=2"),
        *("--steps=2", "--rounds=1", "--every", "1"),
    )
    assert written["reading_ms"] > 0
    assert written["rows"].pop(monitor.NONE)["ratio"] == 1.0
    assert list(written["rows"]) == [monitor.IDLE, "RouterMonitor(every=1)"]
    for row in written["rows"].values():
        assert row["ms"] > 0


@pytest.mark.one_backend
def test_a_step_is_timed_against_the_dense_one(monkeypatch, tmp_path):
    def tiny():
        backbone = keras_hub.models.ViTBackbone(
            image_shape=(224, 224, 3),
            patch_size=56,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=32,
        )
        return keras_hub.models.ViTImageClassifier(backbone, num_classes=1000)

    monkeypatch.setitem(
        steps.MODELS, "vit_s16", (tiny, steps.images, {"encoder": 17})
    )
    written = run(
        monkeypatch,
        steps,
        tmp_path / "steps.json",
        *("--num-experts=2", "--batch-size=2", "--rounds=1"),
    )
    dense, sparse = written["rows"].values()
    assert dense["ratio"] == dense["flops_ratio"] == 1.0
    assert sparse["ms"] > 0
    # Expert Choice of capacity factor 2 doubles one of the two blocks.
    assert 1.0 < sparse["flops_ratio"] < 1.5


@pytest.mark.one_backend
def test_attention_counts_in_a_small_model(monkeypatch, tmp_path):
    arguments = "--model lm_32 --recipe none --num-experts 4 --batch-size 4"
    written = run(
        monkeypatch,
        steps,
        tmp_path / "steps.json",
        *arguments.split(),
        "--rounds=1",
    )
    sparse = written["rows"]["sparse"]
    # 1.5 blocks more for one of two, of 12 D^2 and 2 S D each, and the head.
    assert sparse["flops_ratio"] == pytest.approx(1.39, abs=0.02)


@pytest.mark.slow
@pytest.mark.one_backend
def test_the_command_is_timed_against_its_parts(monkeypatch, tmp_path):
    path = tmp_path / "command.json"
    size = ["--num-layers=2", "--hidden-dim=16", "--num-experts=2"]
    where = ["--folder", str(tmp_path), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["command", *size, "--rounds=2", *where])
    command.main()
    written = json.loads(path.read_text())
    for row in written["rounds"]:
        assert row["by_hand"] > 0
        assert list(row["seconds"]) == ["load", "convert", "save"]
        assert 0 < row["bytes_read"] < row["bytes_written"]
    assert [path.name for path in tmp_path.iterdir()] == ["command.json"]


@pytest.mark.slow
@pytest.mark.one_backend
def test_generation_is_timed_against_dense_and_every_expert(
    monkeypatch, tmp_path
):
    path = tmp_path / "generate.json"
    size = ["--hidden-dim=64", "--intermediate-dim=8", "--num-layers=2"]
    text = ["--vocabulary=32", "--source=4", "--few=1", "--many=3"]
    run = ["--cases", "2x4", "--rounds=1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["generate", *size, *text, *run])
    generate.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["batch"], row["num_experts"]) == (2, 4)
    assert 2 <= row["touched"] <= 4  # two tokens, two experts each
    assert row["dense_ms"] != 0


@pytest.mark.one_backend
def test_a_conversion_is_timed_against_a_copy(monkeypatch, tmp_path):
    def tiny(num_layers, hidden_dim=16, intermediate_dim=32):
        return keras_hub.models.ViTBackbone(
            image_shape=(16, 16, 3),
            patch_size=8,
            num_layers=num_layers,
            num_heads=2,
            hidden_dim=hidden_dim,
            mlp_dim=intermediate_dim,
        )

    path = tmp_path / "convert.json"
    monkeypatch.setitem(convert.MODELS, "vit_b16", tiny)
    size = ["--num-layers=4", "--num-experts=2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["convert", *size])
    convert.main()
    written = json.loads(path.read_text())
    assert written["dense_params"] == tiny(4).count_params()


@pytest.mark.one_backend
def test_a_sweep_changes_one_setting_at_a_time():
    base = shapes.Shape()
    swept = shapes.one_at_a_time(base)
    assert swept[0] == base
    assert len(swept) == len(set(swept)) == 11
    for shape in swept[1:]:
        changed = [
            name
            for name in shapes.SWEPT
            if getattr(shape, name) != getattr(base, name)
        ]
        assert len(changed) == 1
    assert len(shapes.product(base)) == 4 * 4 * 3 * 2 * 2


@pytest.mark.one_backend
def test_slow_functions_get_fewer_rounds():
    calls = []

    def slow():
        calls.append(None)
        end = timing.time.perf_counter() + 0.02
        while timing.time.perf_counter() < end:
            pass

    times = timing.interleaved({"slow": slow, "fast": int}, 5, budget_s=0.05)
    assert len(times["fast"]) == 5
    assert 1 <= len(times["slow"]) <= 2
    assert timing.median_ratio(times, "slow", "fast") > 1


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="JAX tells what XLA planned, TensorFlow's allocator gives nothing",
)
def test_temporary_memory_is_seen():
    """32 MiB held during the run, 32 bytes returned."""

    def work():
        held = keras.random.normal((8, 1024, 1024))
        return keras.ops.sum(held, axis=(1, 2))

    seen = programs.Program(work, None).temporary_bytes()
    assert seen >= 24 * 2**20


@pytest.mark.one_backend
def test_an_unknown_suite_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sped"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "unknown suites ['sped']; known: layer" in capsys.readouterr().err


@pytest.mark.one_backend
def test_suites_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert everything.main() == 0
    printed = capsys.readouterr().out
    assert "benchmarks.growth" in printed
    assert "benchmarks.layer --sweep" in printed


@pytest.mark.one_backend
def test_the_clock_counts_steps_and_no_more():
    """Half a second before and one after are none of its."""
    seconds = []

    class Slow(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            time.sleep(0.5)

        on_train_end = on_train_begin

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.zeros((6, 2), "float32")
    clock = timing.StepClock(3)
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        model.fit(x, x[:, :1], 2, verbose=0, callbacks=[Slow(), clock])
        seconds.append(time.perf_counter() - start)
    assert 0 < clock.seconds < seconds[1] - 0.9

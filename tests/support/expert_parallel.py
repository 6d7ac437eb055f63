"""Experts on a mesh of 8 devices beside one; run as a script, on JAX.

Prints what it found, a line of JSON each: `name` and `value`.
"""

import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import hub_models
import jax
import keras
import keras_hub
import models
import numpy as np
from keras import layers

import keras_upcycle as ku

EXPERTS, EXAMPLES, LENGTH, WIDTH, HIDDEN = 8, 16, 12, 32, 64
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def say(name, value):
    print(json.dumps({"name": name, "value": value}), flush=True)


def mesh(shape=(2, 4), axes=("data", "expert")):
    devices = keras.distribution.list_devices()[: int(np.prod(shape))]
    return keras.distribution.DeviceMesh(shape, list(axes), devices)


def functional():
    inputs = keras.Input((LENGTH, WIDTH))
    x = layers.LayerNormalization()(inputs)
    hidden = layers.Dense(HIDDEN, activation="gelu", name="up")(x)
    x = inputs + layers.Dense(WIDTH, name="down")(hidden)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def features(count=EXAMPLES):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, LENGTH, WIDTH)).astype("float32")
    return x, rng.integers(0, 3, count)


def vit():
    return models.vit_classifier(preprocessor=None)


def pictures(count=EXAMPLES):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *models.IMAGE)).astype("float32")
    return x, rng.integers(0, models.CLASSES, count)


def t5():
    backbone = models.t5_backbone(1, dropout=0.0)
    return models.t5_lm(backbone, preprocessor=None)


def text(count=EXAMPLES):
    """Real padding, of both stacks."""
    rng = np.random.default_rng(0)
    x = {}
    for stack, length in (("encoder", 9), ("decoder", 7)):
        ids = rng.integers(2, models.VOCABULARY, (count, length))
        real = np.arange(length) < rng.integers(3, length + 1, (count, 1))
        x[f"{stack}_token_ids"] = np.where(real, ids, 0)
        x[f"{stack}_padding_mask"] = real.astype("int32")
    labels = rng.integers(2, models.VOCABULARY, (count, 7))
    return x, labels


def llama():
    return keras_hub.models.LlamaCausalLM(hub_models.MODELS["LlamaBackbone"]())


def words(count=EXAMPLES):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, hub_models.WORDS, (count, 8))
    real = np.arange(8) < rng.integers(4, 9, (count, 1))
    x = {"token_ids": ids, "padding_mask": real.astype("int32")}
    return x, np.roll(ids, -1, axis=1)


class Trained:
    """A model converted and trained for three steps, as it is set up now."""

    def __init__(self, make, data, count=EXAMPLES, **options):
        options.setdefault("layers", "all")
        keras.utils.set_random_seed(0)
        self.dense = make()
        self.moe = ku.upcycle_model(self.dense, EXPERTS, seed=0, **options)
        self.moe.compile(keras.optimizers.SGD(0.1), LOSS)
        self.x, self.y = data(count)
        self.before = self.predicted()
        history = keras.Model.fit(
            self.moe,
            self.x,
            self.y,
            batch_size=count,
            epochs=3,
            shuffle=False,
            verbose=0,
        )
        self.losses = history.history["loss"]
        self.after = self.predicted()
        self.weights = [np.asarray(v.value) for v in self.moe.weights]

    def predicted(self):
        return keras.Model.predict(
            self.moe, self.x, batch_size=len(self.y), verbose=0
        )

    def gap(self, other):
        """The largest difference, over the largest value of each array."""
        both = [
            (self.before, other.before),
            (self.after, other.after),
            (self.losses, other.losses),
            *zip(self.weights, other.weights, strict=True),
        ]
        return max(
            float(np.abs(np.subtract(a, b)).max() / max(np.abs(a).max(), 1e-9))
            for a, b in both
        )


# Of each model: how it is made, its data, and settings of the conversion.
MODELS = {
    "functional": (
        functional,
        features,
        {"router": ku.ExpertChoiceRouter()},
    ),
    "groups with drops": (
        functional,
        features,
        {"router": ku.TopKRouter(2, capacity_factor=0.75, group=2)},
    ),
    "dropless": (
        functional,
        features,
        {
            "router": ku.TopKRouter(
                2,
                capacity_factor=None,
                temperature=keras.optimizers.schedules.PolynomialDecay(
                    2.0, 4, 0.5
                ),
            ),
            "remat": True,
        },
    ),
    "Default MoE, dropless": (
        functional,
        features,
        {"router": ku.DefaultMoERouter(2, capacity_factor=None)},
    ),
    "shared experts": (
        functional,
        features,
        {
            "router": ku.TopKRouter(2, group="example"),
            "expert_init": "shared_experts",
        },
    ),
    "ViT": (vit, pictures, {}),
    # No token is dropped, or which are would depend on the mesh.
    "T5": (
        t5,
        text,
        {
            "router": {
                "encoder": "expert_choice",
                "decoder": ku.TopKRouter(2, capacity_factor=8.0),
            }
        },
    ),
    "Llama": (llama, words, {"router": ku.TopKRouter(2, capacity_factor=8.0)}),
}
DISTRIBUTIONS = {
    "2 x 4": lambda: ku.distribution.ExpertParallel(mesh()),
    "shard_dense": lambda: ku.distribution.ExpertParallel(
        mesh(), shard_dense=True
    ),
    "all devices": ku.distribution.ExpertParallel,
    "other names": lambda: ku.distribution.ExpertParallel(
        mesh((4, 2), ("rows", "columns")),
        expert_axis="columns",
        batch_axes=["rows"],
    ),
    "a map of one's own": lambda: keras.distribution.ModelParallel(
        layout_map=ku.distribution.expert_layout_map(mesh()),
        batch_dim_name="data",
    ),
}
# Each model, and each way to lay it out.
PAIRS = [
    ("functional", "2 x 4"),
    ("functional", "a map of one's own"),
    ("groups with drops", "all devices"),
    ("dropless", "other names"),
    ("Default MoE, dropless", "2 x 4"),
    ("shared experts", "2 x 4"),
    ("ViT", "2 x 4"),
    ("T5", "2 x 4"),
    ("Llama", "shard_dense"),
]


@functools.cache
def trained(name, where):
    """A model trained on a mesh, or alone; more than one part looks at it."""
    make, data, options = MODELS[name]
    return Trained(make, data, **options)


def on(name, where):
    """`trained`, with the distribution that it has set for who goes on."""
    keras.distribution.set_distribution(where and DISTRIBUTIONS[where]())
    return trained(name, where)


def equals_one_device():
    for name, where in PAIRS:
        alone, spread = on(name, None), on(name, where)
        say(f"equal: {name}, {where}", alone.gap(spread))


# KerasHub's own mixtures.


def adopted():
    """GPT-OSS, whose six experts two devices share: outputs and a step."""
    where = ku.distribution.ExpertParallel(mesh((4, 2)))
    keras.distribution.set_distribution(where)
    stock = hub_models.mixture("GptOssBackbone")
    rows = {
        name: np.resize(np.asarray(value), (8, *value.shape[1:]))
        for name, value in hub_models.inputs_of(stock).items()
    }
    real = rows["padding_mask"].astype(bool)
    moe = ku.adopt_model(stock)
    # `predict` compiles once; each operation of a call would, for its mesh.
    expected = keras.Model.predict(stock, rows, verbose=0)[real]
    found = keras.Model.predict(moe, rows, verbose=0)
    gap = np.abs(found[real] - expected).max() / np.abs(expected).max()
    say("adopted: gap", float(gap))
    kernel = models.mixtures(moe)[0].experts.expert_up.kernel
    local = kernel.value.sharding.shard_shape(tuple(kernel.shape))
    say("adopted: experts a device", local[0])
    before = np.asarray(kernel.value)
    moe.compile(keras.optimizers.SGD(0.1), "mse")
    keras.Model.fit(moe, rows, np.zeros_like(found), verbose=0)
    moved = np.abs(np.asarray(kernel.value) - before).max()
    say("adopted: moved", float(moved))


# What a decoder says, and what `layout_map` adds.


def generates():
    """Greedy, with its cache: eight prompts, and one, which fills no mesh."""
    said = []
    for where in (None, DISTRIBUTIONS["2 x 4"]()):
        keras.distribution.set_distribution(where)
        keras.utils.set_random_seed(0)
        moe = ku.upcycle_model(llama(), EXPERTS, layers="all", seed=0)
        for layer in models.mixtures(moe):
            kernel = layer.experts.expert_down.kernel
            noise = np.random.default_rng(0).normal(0, 1, kernel.shape)
            kernel.assign(np.asarray(kernel.value) + noise.astype("float32"))
        moe.compile(sampler="greedy")
        x, _ = words(8)
        prompts = [x, {name: value[:1] for name, value in x.items()}]
        said.append(
            [
                np.asarray(moe.generate(p, stop_token_ids=None)["token_ids"])
                for p in prompts
            ]
        )
    for number, name in enumerate(("eight", "one")):
        say(
            f"generated: {name}",
            bool((said[0][number] == said[1][number]).all()),
        )
    changed = said[0][0] != words(8)[0]["token_ids"]
    say("generated: words", int(changed.sum()))


def tensor_parallel():
    """KerasHub's own layouts for what is no expert."""
    made = []
    devices = mesh((2, 2), ("batch", "model"))
    layout_map = keras_hub.models.LlamaBackbone.get_layout_map(devices)
    for where in (
        None,
        ku.distribution.ExpertParallel(
            devices,
            expert_axis="model",
            batch_axes=["batch"],
            layout_map=layout_map,
        ),
    ):
        keras.distribution.set_distribution(where)
        make, data, options = MODELS["Llama"]
        made.append(Trained(make, data, **options))
    say("equal: Llama, tensor parallel", made[0].gap(made[1]))
    cut = [
        v.path
        for v in made[1].moe.trainable_variables
        if "experts" not in v.path and not v.value.sharding.is_fully_replicated
    ]
    say("dense weights that are cut", len(cut))
    # Two key-value heads go over no four devices.
    devices = mesh((4, 2), ("batch", "model"))
    layout_map = keras_hub.models.LlamaBackbone.get_layout_map(devices)
    keras.distribution.set_distribution(
        ku.distribution.ExpertParallel(
            devices,
            expert_axis="model",
            batch_axes=["batch"],
            layout_map=layout_map,
        )
    )
    try:
        llama()
    except ValueError as error:
        say("refused: grouped heads", str(error))
    keras.distribution.set_distribution(None)


# What a compiled step exchanges.


def step_of(trained, count):
    """The compiled program of a step, for so many examples."""
    moe = trained.moe
    where = keras.distribution.distribution()

    def put(values):
        values = np.resize(values, (count, *values.shape[1:]))
        if where is None:
            return values
        layout = where.get_data_layout(values.shape).backend_layout
        return jax.device_put(values, layout)

    state = moe._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    step = jax.jit(
        moe.train_step,
        donate_argnums=0,
        out_shardings=None
        if where is None
        else (None, moe._get_state_sharding_spec()),
    )
    data = keras.tree.map_structure(put, (trained.x, trained.y))
    return step.lower(state, data).compile()


def bytes_of(operation, text):
    """Bytes of each result of an operation in a compiled program's text."""
    found = []
    text = re.sub(r"/\*.*?\*/", "", text)
    for match in re.finditer(
        rf"= (?P<shapes>[^=]*?) {operation}(?:-start)?\(", text
    ):
        size = 0
        for kind, shape in re.findall(
            r"(f32|s32|u32|bf16|pred)\[([\d,]*)\]", match["shapes"]
        ):
            numbers = [int(n) for n in shape.split(",") if n]
            width = {"bf16": 2, "pred": 1}.get(kind, 4)
            size += width * int(np.prod(numbers))
        found.append(size)
    return found


def exchanges():
    count = 256
    for name in ("functional", "T5"):
        alone = step_of(on(name, None), count)
        spread = step_of(on(name, "2 x 4"), count)
        text = spread.as_text()
        flops = [c.cost_analysis()["flops"] for c in (spread, alone)]
        say(f"share of operations: {name}", flops[0] / flops[1])
        for operation in ("all-to-all", "all-gather"):
            say(f"{operation}: {name}", bytes_of(operation, text))


def decoder():
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=128,
        intermediate_dim=512,
    )
    return keras_hub.models.LlamaCausalLM(backbone)


def lines(count=EXAMPLES, length=16):
    ids = np.random.default_rng(0).integers(1, 64, (count, length))
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids


def estimates():
    """What is predicted of a step beside what the compiled step does."""
    for name, shape, count, router in (
        ("2 x 4", (2, 4), 256, ku.TopKRouter(2)),
    ):
        where = ku.distribution.ExpertParallel(mesh(shape))
        keras.distribution.set_distribution(where)
        dense = decoder()
        moe = ku.upcycle_model(dense, EXPERTS, router=router, layers="all")
        moe.compile(keras.optimizers.Adam(1e-3), LOSS)
        moe.optimizer.build(moe.trainable_variables)
        x, y = lines()
        keras.Model.train_on_batch(moe, x, y)
        trained = SimpleNamespace(moe=moe, x=x, y=y)
        step = step_of(trained, count)
        text, held = step.as_text(), step.memory_analysis()
        (found,) = ku.estimate_upcycle(
            dense,
            EXPERTS,
            router=router,
            layers="all",
            mesh=where,
            tokens_per_device=count * 16 // 8,
        ).meshes
        state = found.weight_bytes + found.optimizer_bytes
        say(f"state: {name}", held.argument_size_in_bytes / state)
        memory = held.argument_size_in_bytes + held.temp_size_in_bytes
        say(f"memory: {name}", memory / found.bytes_per_device)
        moved = sum(bytes_of("all-to-all", text))
        say(f"exchanged: {name}", moved / found.exchange_bytes)
        reduced = sum(bytes_of("all-reduce", text))
        say(f"reduced: {name}", reduced / found.reduce_bytes)
        flops = step.cost_analysis()["flops"]
        say(f"operations: {name}", flops / found.flops)


# Where variables lie, and what files hold.


def plans():
    """What a plan of memory says beside what a step on one device holds."""
    keras.distribution.set_distribution(None)
    count, length = 256, 16
    for kind, experts, parts in (
        ("whole", None, ["experts"]),
        ("low_rank", ku.LowRankExperts(), ["all"]),
    ):
        for part in parts:
            dense = decoder()
            router = ku.TopKRouter(2)
            (option,) = [
                each
                for each in ku.estimate_upcycle(
                    dense,
                    EXPERTS,
                    router=router,
                    layers="all",
                    budget="80GB",
                    trainable=part,
                    batch=count,
                    sequence_length=length,
                ).options
                if each.experts == kind
            ]
            moe = ku.upcycle_model(
                dense, EXPERTS, router=router, layers="all", experts=experts
            )
            if part == "experts":
                ku.freeze(moe, "dense")
            moe.compile(keras.optimizers.Adam(1e-3), LOSS)
            moe.optimizer.build(moe.trainable_variables)
            x, y = lines()
            keras.Model.train_on_batch(moe, x, y)
            step = step_of(SimpleNamespace(moe=moe, x=x, y=y), count)
            held = step.memory_analysis()
            state = option.weight_bytes + option.optimizer_bytes
            say(f"state: {kind}, {part}", held.argument_size_in_bytes / state)
            memory = held.argument_size_in_bytes + held.temp_size_in_bytes
            say(f"memory: {kind}, {part}", memory / option.total_bytes)


def layouts():
    keras.distribution.set_distribution(
        ku.distribution.ExpertParallel(mesh(), shard_dense=True)
    )
    dense = functional()
    dense.compile(keras.optimizers.Adam(1e-2), LOSS)
    dense.fit(*features(), batch_size=EXAMPLES, verbose=0)
    moe = ku.upcycle_model(dense, EXPERTS, router="expert_choice", layers="all")
    optimizer = ku.upcycle_optimizer(dense.optimizer, dense, moe)
    moe.compile(optimizer, LOSS)
    (layer,) = models.mixtures(moe)
    first = [
        *(v for v in layer.experts.weights),
        *(
            slot
            for slots in (optimizer._momentums, optimizer._velocities)
            for slot, v in zip(slots, moe.trainable_variables, strict=True)
            if any(v is each for each in layer.experts.weights)
        ),
    ]
    say(
        "experts a device",
        sorted({v.value.addressable_shards[0].data.shape[0] for v in first}),
    )
    say("weights and slots of experts", len(first))
    say(
        "router is whole",
        layer.router.kernel.value.sharding.is_fully_replicated,
    )
    others = [
        v
        for v in moe.trainable_variables
        if not any(v is each for each in layer.experts.weights)
        and any(size % 8 == 0 for size in v.shape)
        and "router" not in v.path
    ]
    say(
        "share of a dense weight on a device",
        max(
            v.value.addressable_shards[0].data.size / v.value.size
            for v in others
        ),
    )


def topologies():
    """Saved on 8 devices, loaded on 4 and on 1, trained on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moe.keras"
        keras.distribution.set_distribution(DISTRIBUTIONS["2 x 4"]())
        make, data, options = MODELS["groups with drops"]
        moe = Trained(make, data, **options).moe
        moe.save(path)
        expected = [np.asarray(v.value) for v in moe.weights]
        x, y = data()

        def trained(model):
            return model.fit(
                x, y, batch_size=len(y), epochs=2, shuffle=False, verbose=0
            ).history["loss"]

        losses = trained(moe)
        for name, where in (
            ("4", lambda: ku.distribution.ExpertParallel(mesh((2, 2)))),
            ("1", lambda: None),
        ):
            keras.distribution.set_distribution(where())
            loaded = keras.saving.load_model(path)
            say(
                f"saved on 8, loaded on {name}",
                max(
                    float(np.abs(np.asarray(v.value) - old).max())
                    for v, old in zip(loaded.weights, expected, strict=True)
                ),
            )
            say(
                f"trained on, {name}",
                float(np.abs(np.subtract(trained(loaded), losses)).max()),
            )


# What is refused.


def refusals():
    keras.distribution.set_distribution(None)
    unspread = Trained(*MODELS["functional"][:2], **MODELS["functional"][2])
    devices = mesh()

    def of(kind, **settings):
        return lambda: kind(devices, **settings)

    parallel = ku.distribution.ExpertParallel
    bad_map = keras.distribution.LayoutMap(devices)
    bad_map["up/kernel"] = (None, "data")

    def converted(num_experts=6):
        with parallel(devices).scope():
            dense = functional()
            before = dense.get_weights()
            try:
                ku.upcycle_model(dense, num_experts, layers="all")
            finally:
                for old, new in zip(before, dense.get_weights(), strict=True):
                    np.testing.assert_array_equal(old, new)

    def called_late():
        try:
            with parallel(devices).scope():
                unspread.moe(unspread.x)
        finally:
            np.testing.assert_array_equal(unspread.predicted(), unspread.after)

    def fitted_late():
        with parallel(devices).scope():
            unspread.moe.fit(unspread.x, unspread.y, verbose=0)

    def uneven(examples, group):
        with parallel(devices).scope():
            router = ku.TopKRouter(2, group=group)
            moe = ku.upcycle_model(
                functional(), EXPERTS, router=router, layers="all"
            )
            moe.compile("sgd", LOSS)
            moe.fit(*features(examples), batch_size=examples, verbose=0)

    def mapped(axes):
        layout_map = keras.distribution.LayoutMap(devices)
        layout_map["odd/kernel"] = axes
        with parallel(devices, layout_map=layout_map).scope():
            layers.Dense(6, name="odd").build((None, 8))

    for name, act in {
        "experts": converted,
        "a layer of experts": lambda: converted_layer(parallel(devices)),
        "axis": of(parallel, expert_axis="model"),
        "batch axis": of(parallel, batch_axes=["data", "model"]),
        "no batch axis": of(parallel, batch_axes=[]),
        "map": of(parallel, layout_map={}),
        "mesh": lambda: parallel((2, 4)),
        "another mesh": of(
            parallel, layout_map=keras.distribution.LayoutMap(mesh((8, 1)))
        ),
        "map that does not divide": lambda: mapped((None, "expert")),
        "map of another rank": lambda: mapped(("expert",)),
        "called late": called_late,
        "fitted late": fitted_late,
        "groups": lambda: uneven(16, 4),
    }.items():
        try:
            act()
        except Exception as error:
            say(f"refused: {name}", f"{type(error).__name__}: {error}")
        else:
            say(f"refused: {name}", "nothing was refused")


def converted_layer(distribution):
    with distribution.scope():
        layer = ku.MoEFeedForward(6, HIDDEN)
        layer.build((None, LENGTH, WIDTH))


if __name__ == "__main__":
    for part in sys.argv[1:]:
        globals()[part]()

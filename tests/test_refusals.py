"""Every public name refuses what is no model, batch or path, by its argument.

`test_typed_settings.py` is about numbers, flags and words; here is what else
can be given. Nothing may fail deep in Keras or NumPy, and no model that was
handed over may be changed.
"""

import inspect

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.routing.statistics import RouterReading

pytestmark = pytest.mark.one_backend

DENSE = models.sequential()
MOE = ku.upcycle_model(DENSE, 2, layers="all", router="ds_moe")
X = np.ones((2, models.WIDTH), "float32")
Y = np.array([0, 1])
EXPERTS = [ku.ExpertWeights.from_model(DENSE)] * 2
KERNELS = {"up_kernel": X, "down_kernel": X.T}
ADAM = keras.optimizers.Adam()
READING = RouterReading(
    1, "moe", 1, 4, np.ones(2) / 2, 0.0, 0.0, 1.0, 0.5, 1.0, {}, 0.0
)
SHARES = {"moe": np.ones((2, 2)) / 2}

NOTHING_KERAS = [None, "model.keras", 3, True, keras.Model, X, [DENSE], {}]
NO_LIST = [3, True, "abc", len, DENSE]


class Unregistered(keras.layers.Layer):
    """A block that no test registers."""

    def call(self, inputs):
        return inputs


WRONG = {
    "model": [*NOTHING_KERAS, lambda x: x, keras.layers.Dense(3)],
    "maker": [*NOTHING_KERAS[:4], X, [DENSE], {}, keras.layers.Dense(3)],
    "layer": [*NOTHING_KERAS, lambda x: x],
    "optimizer": [*NOTHING_KERAS, "adam", keras.optimizers.Adam, DENSE],
    "batch": [
        *(None, "x", 3, len, DENSE, np.ndarray, {1}, [[1, 2], [3]]),
        *(np.float32(1), np.ones(16), np.ones((2, 3)), np.zeros((0, 16))),
        *(X.astype(complex), X.astype(object)),
    ],
    "labels": [
        *(None, "x", 3, [[1, 2], [3]], np.ndarray, np.array(["a", "b"])),
        *(np.ones(2), np.array([True, False]), np.array([None, 1])),
        *(np.zeros((2, 1, 1), int), np.zeros(3, int)),
    ],
    "pair": [None, "ab", 3, X, (X,), (X, Y, Y, Y), len, {"x": X, "y": Y}],
    "samples": [None, "ab", 3, X, (X,), (X, Y, Y, Y), [X, Y], len],
    "pool": [None, "ab", 3, True, keras.Model, [3], [keras.Model], [[DENSE]]],
    "activation": ["nope", 3, True, [1], {"a": 1}, keras.layers.ReLU],
    "initializer": ["nope", 3, True, [1], {"a": 1}, keras.layers.ReLU],
    "mapping": [3, True, "ab", [1], len],
    "list": [None, *NO_LIST],
    "words": [*NO_LIST, ["a"], ["a", "b", "c"]],
    "word": [None, 3, True, ["a"], len],
}


SAMPLES = (X, Y)
# The public name, its good arguments, and what may be wrong with each kind.
ROWS = [
    ("upcycle_model", {"num_experts": 2}, {"model": "model"}),
    ("estimate_upcycle", {"num_experts": 2}, {"model": "maker"}),
    ("adopt_model", {}, {"model": "model"}),
    (
        "plot_expert_tokens",
        {"text": "a", "path": "a.html"},
        {"model": "layer"},
    ),
    ("merge_experts", {}, {"moe": "model"}),
    ("estimate_mixture", {}, {"moe": "model"}),
    ("lm_eval_model", {}, {"model": "model"}),
    ("grow_experts", {"num_experts": 4}, {"moe": "model"}),
    ("expert_usefulness", {"x": X, "loss": "mse"}, {"moe": "model"}),
    ("save_adapters", {"path": "a.npz"}, {"moe": "model"}),
    ("load_adapters", {"path": "a.npz"}, {"moe": "model"}),
    ("can_export", {}, {"model": "model"}),
    ("export_model", {"format": "keras_hub"}, {"model": "model"}),
    ("mixture_from_scratch", {"num_experts": 2}, {"model": "model"}),
    ("tile_depth", {"times": 2}, {"model": "model"}),
    ("find_feed_forwards", {}, {"model": "model"}),
    ("find_attention", {}, {"model": "model"}),
    ("upcycle_attention", {}, {"model": "model"}),
    ("densify_model", {"moe": MOE}, {"moe": "model", "dense": "model"}),
    (
        "extract_expert",
        {"moe": MOE, "expert": 0},
        {"moe": "model", "dense": "model"},
    ),
    (
        "prune_experts",
        {"moe": MOE, "inputs": X},
        {"moe": "model", "inputs": "batch"},
    ),
    (
        "verify_upcycle",
        {"dense": DENSE, "moe": MOE, "inputs": X},
        {"dense": "model", "moe": "model", "inputs": "batch"},
    ),
    (
        "measure_active_experts",
        {"model": MOE, "inputs": X},
        {"model": "layer", "inputs": "batch"},
    ),
    (
        "expert_assignments",
        {"model": MOE, "inputs": X, "labels": Y},
        {"model": "layer", "inputs": "batch", "labels": "labels"},
    ),
    ("freeze", {"part": "experts"}, {"model": "layer"}),
    ("unfreeze", {"part": "experts"}, {"model": "layer"}),
    ("set_dropout", {"experts": 0.1}, {"model": "layer"}),
    ("set_active_experts", {"top_k": 1}, {"model": "layer"}),
    (
        "upcycle_optimizer",
        {"dense": DENSE, "moe": MOE},
        {"optimizer": "optimizer"},
    ),
    ("per_expert", {}, {"optimizer": "optimizer"}),
    (
        "scale_learning_rate",
        {"optimizer": ADAM, "factors": {}},
        {"optimizer": "optimizer", "factors": "mapping"},
    ),
    (
        "scale_gradients",
        {"optimizer": ADAM, "factors": {}},
        {"optimizer": "optimizer", "factors": "mapping"},
    ),
    (
        "few_shot_probe",
        {"train": SAMPLES, "test": SAMPLES, "shots": 1},
        {"train": "pair", "test": "pair", "model": "model"},
    ),
    (
        "RouterMonitor",
        {"dense": DENSE, "inputs": X},
        {"dense": "model", "inputs": "batch"},
    ),
    ("ExpertCheckpoints", {}, {"model": "model"}),
    ("BranchTrainMix", {}, {"donors": "pool"}),
    (
        "UpIT",
        {"experts": EXPERTS},
        {"experts": "pool", "routing_vectors": "mapping"},
    ),
    (
        "expand_experts",
        {"experts": EXPERTS, "num_experts": 3, "base": DENSE},
        {"experts": "pool", "base": "model"},
    ),
    (
        "perplexity_buckets",
        {"experts": EXPERTS, "model": DENSE, "data": SAMPLES},
        {"experts": "pool", "model": "model", "data": "samples"},
    ),
    (
        "routing_vectors",
        {"experts": EXPERTS, "model": DENSE, "data": SAMPLES, "buckets": Y},
        {"model": "model", "data": "samples", "buckets": "labels"},
    ),
    (
        "upit_upcycle",
        {
            "model": DENSE,
            "num_experts": 2,
            "experts": EXPERTS,
            "data": SAMPLES,
        },
        {"model": "model", "experts": "pool", "data": "samples"},
    ),
    ("ExpertWeights.from_model", {}, {"model": "model"}),
    (
        "ExpertWeights",
        {"blocks": [KERNELS]},
        {"blocks": "list", "others": "list", "description": "word"},
    ),
    (
        "MoEFeedForward",
        {"num_experts": 2, "intermediate_dim": 4},
        {
            "activation": "activation",
            "kernel_initializer": "initializer",
            "bias_initializer": "initializer",
            "quantization_configs": "mapping",
        },
    ),
    ("Router", {"group": "batch"}, {"kernel_initializer": "initializer"}),
    ("Float32Activation", {}, {"activation": "activation"}),
    ("CarvingRouter", {}, {"activation": "activation"}),
    (
        "plot_expert_load",
        {"readings": [READING], "path": "x.png"},
        {"readings": "list", "title": "word"},
    ),
    (
        "plot_expert_assignments",
        {"shares": SHARES, "path": "x.png"},
        {"shares": "mapping", "names": "words", "title": "word"},
    ),
    ("register_family", {"model_class": "a.B"}, {"family": "model"}),
    (
        "register_block",
        {"block_class": Unregistered, "up": "up", "down": "down"},
        {"activation": "activation"},
    ),
]
CASES = [
    pytest.param(name, good, argument, kind, id=f"{name}-{argument}")
    for name, good, kinds in ROWS
    for argument, kind in kinds.items()
]
# What is handed over by these names is to be in the table, but for the others.
HANDED = {
    *("model", "moe", "dense", "inputs", "data", "base", "optimizer"),
    *("labels", "train", "test", "donors", "activation", "readings", "shares"),
    *("kernel_initializer", "bias_initializer", "blocks", "others"),
}
OTHERWISE = {
    ("upit_upcycle", "base"),  # as `expand_experts`, which it calls
    ("Carving", "inputs"),  # shapes once it is used, see its tests
    ("upcycle_optimizer", "dense"),  # once the optimizer was looked at
    ("upcycle_optimizer", "moe"),
    ("set_dropout", "dense"),  # a rate
    ("plot_expert_tokens", "inputs"),  # beside `tokens`
    ("estimate_upcycle", "optimizer"),  # a name, see `test_memory_plan`
    ("CopiedAttention", "donors"),  # when it is used, as all its settings
    # Records, which families and reports make.
    *(("DropoutReport", "dense"), ("FeedForwardSite", "activation")),
}


def target(name):
    found = ku
    for part in name.split("."):
        found = getattr(found, part)
    return found


def refused(run, argument):
    with pytest.raises((TypeError, ValueError, OSError)) as raised:
        run()
    message = str(raised.value)
    assert f"`{argument}`" in message, message
    assert "Received" in message, message


@pytest.fixture(autouse=True)
def _nothing_changes():
    before = [models.weights(model) for model in (DENSE, MOE)]
    yield
    for model, values in zip((DENSE, MOE), before, strict=True):
        models.assert_same_weights(model, values)


def test_all_that_is_handed_over_is_in_the_table():
    listed = {(name, each) for name, _, kinds in ROWS for each in kinds}
    for name in vars(ku):
        made = getattr(ku, name)
        if name.startswith("_") or not callable(made) or name == "UpcycleError":
            continue
        handed = HANDED & set(inspect.signature(made).parameters)
        missing = {(name, each) for each in handed} - listed - OTHERWISE
        assert not missing


@pytest.mark.parametrize(("name", "good", "argument", "kind"), CASES)
def test_nonsense_is_refused_by_name(name, good, argument, kind):
    run = target(name)
    default = inspect.signature(run).parameters[argument].default
    for value in WRONG[kind]:
        if value is None and default is None:  # it means something then
            continue
        refused(lambda value=value: run(**{**good, argument: value}), argument)


def test_models_of_an_optimizer_are_refused_by_name():
    optimizer = keras.optimizers.Adam()
    optimizer.build(DENSE.trainable_variables)
    for value in WRONG["model"]:
        refused(
            lambda v=value: ku.upcycle_optimizer(optimizer, v, MOE), "dense"
        )
        refused(
            lambda v=value: ku.upcycle_optimizer(optimizer, DENSE, v), "moe"
        )


def test_another_kind_of_model_is_no_pair():
    vit = models.vit_backbone()
    for dense, moe in ((vit, MOE), (DENSE, ku.upcycle_model(vit, 2))):
        with pytest.raises(ku.UpcycleError, match=r"`moe` must be what.*Pass"):
            ku.verify_upcycle(dense, moe, X)


# Features of examples.


@pytest.mark.parametrize(
    "examples",
    ["x", [[1, 2], [3]], X.astype(complex), X.astype(object), DENSE, {1}],
    ids=["str", "ragged", "complex", "object", "model", "set"],
)
def test_features_that_are_no_numbers(examples):
    with pytest.raises(TypeError, match=r"`train`.*numbers.*Received"):
        ku.few_shot_probe((examples, Y), (X, Y), shots=1)


@pytest.mark.parametrize(
    "examples",
    [None, "x", X[:, :3], X[0], X[:0], X.astype(object), {"a": X}],
    ids=["None", "str", "width", "rank", "empty", "object", "dict"],
)
def test_a_model_that_cannot_predict_keeps_its_weights(examples):
    with pytest.raises(ValueError, match=r"`train` must .*Received"):
        ku.few_shot_probe((examples, Y), (X, Y), shots=1, model=DENSE)
    DENSE.predict(X, verbose=0)


def test_a_seed_may_be_drawn():
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).normal(size=(60, 4))
    data = (noise, labels)

    def found(seed):
        return ku.few_shot_probe(data, data, shots=2, seed=seed).accuracies

    keras.utils.set_random_seed(1)
    first, second = found(None), found(None)
    keras.utils.set_random_seed(1)
    assert found(None) == first != second


# Samples.


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.array([-1, 0]), "from 0 to 2.*from -1"),
        (np.array([0, 9]), "from 0 to 2.*to 9"),
        (np.array([0.0, 1.0]), "integers.*float64.*argmax"),
        (None, "a row for each sample"),
    ],
)
def test_labels_that_no_class_has(labels, match):
    with pytest.raises((TypeError, ValueError), match=f"`data`.*{match}"):
        ku.perplexity_buckets(EXPERTS, DENSE, (X, labels), verbose=0)


def test_a_label_that_does_not_count_may_be_any():
    labels = np.array([[-100, 1], [2, 0]])
    dense = models.sequence_dense_pairs()
    experts = [ku.ExpertWeights.from_model(dense)]
    x = models.tokens(2, 2, models.WIDTH)
    x = np.concatenate([x] * 3, axis=1)
    labels = np.concatenate([labels] * 3, axis=1)
    weight = (labels >= 0).astype("float32")
    found = [
        ku.perplexity_buckets(
            experts, dense, (x, each, weight), verbose=0
        ).perplexity
        for each in (labels, np.maximum(labels, 0))
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_give_no_loss(value):
    x = np.full_like(X, value)
    with pytest.raises(ValueError, match=r"`data` must give finite losses"):
        ku.perplexity_buckets(EXPERTS, DENSE, (x, Y), verbose=0)


def test_samples_of_another_width():
    with pytest.raises(ValueError, match=r"`data` must be a batch.*\(2, 3\)"):
        ku.perplexity_buckets(EXPERTS, DENSE, (X[:, :3], Y), verbose=0)


# What functions give.


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda values, name, layer: None, "must give floats"),
        (lambda values, name, layer: "a", "must give floats"),
        (
            lambda values, name, layer: np.ones(2),
            r"of shape.*\(2,\).*up_kernel",
        ),
        (lambda values, name, layer: values[0] * np.nan, "finite"),
    ],
)
def test_experts_that_a_function_makes_are_looked_at(function, match):
    with pytest.raises((TypeError, ValueError), match=f"`experts`.*{match}"):
        ku.densify_model(MOE, function, dense=DENSE)


def test_layers_that_a_function_cannot_choose():
    with pytest.raises(
        TypeError, match=r"`layers` must be a function.*ndarray"
    ):
        ku.upcycle_model(DENSE, 2, layers=lambda site: np.ones(3))


def test_a_model_is_no_function_of_kernels():
    with pytest.raises(TypeError, match=r"`expert_init` must be.*Sequential"):
        ku.upcycle_model(DENSE, 2, expert_init=DENSE)


def test_a_router_that_chooses_nothing():
    class Undecided(ku.Router):
        def choose(self, logits, mask, training):
            return None

    layer = ku.MoEFeedForward(2, 4, router=Undecided(group="batch"))
    with pytest.raises(TypeError, match=r"`Undecided.choose` must return"):
        layer(X)


@pytest.mark.parametrize(
    "choices", [None, 3, {"any": (1,)}, {"any": ("router",)}]
)
def test_a_recipe_of_no_choices(choices):
    with pytest.raises(TypeError, match=r"`choices` must be a mapping"):
        ku.Recipe("mine", "none", choices)


@pytest.mark.parametrize("kernels", [{0: "a"}, {0: X[0]}, {"x": X}, {True: X}])
def test_routing_vectors_that_are_none(kernels):
    with pytest.raises((TypeError, ValueError), match="`routing_vectors`"):
        ku.UpIT(EXPERTS, kernels)


@pytest.mark.parametrize(
    "blocks", [[3], [{}], [{"up_kernel": X}], [{1: X}], [[KERNELS]]]
)
def test_blocks_without_kernels(blocks):
    with pytest.raises((TypeError, ValueError), match=r"`blocks`.*Received"):
        ku.ExpertWeights(blocks)


@pytest.mark.parametrize(
    "share", [None, "x", np.ones(2), np.ones((2, 2, 2)), np.zeros((0, 2))]
)
def test_shares_that_are_none(share, tmp_path):
    with pytest.raises(ValueError, match=r"`shares`.*'moe'"):
        ku.plot_expert_assignments({"moe": share}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_a_layer_of_integers(dtype):
    with pytest.raises(ValueError, match="`dtype` must be a float policy"):
        ku.MoEFeedForward(2, 4, dtype=dtype)


def test_a_quantization_config_of_no_role():
    with pytest.raises(ValueError, match=r"`quantization_configs`.*'experts'"):
        ku.MoEFeedForward(2, 4, quantization_configs={"experts": "int8"})


# Files.

WRITE = {
    "load": lambda path: ku.plot_expert_load([READING], path),
    "assignments": lambda path: ku.plot_expert_assignments(SHARES, path),
    "weights": EXPERTS[0].save,
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
def test_nothing_is_written_where_there_is_no_folder(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path`.*Make the folder"):
        write(tmp_path / "none" / "a.png")
    with pytest.raises(IsADirectoryError, match=r"`path`.*which is a folder"):
        write(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"`path`.*which is a folder"):
        write("")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.csv"])
@pytest.mark.parametrize("write", ["load", "assignments"])
def test_a_picture_says_its_format(write, name, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end.*'a.png'"):
        WRITE[write](tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (ku.ExpertWeights.load, "path"),
        (lambda path: ku.plot_expert_load(path, "x.png"), "readings"),
    ],
    ids=["weights", "log"],
)
def test_a_file_that_is_not_there_is_named(read, name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`{name}`.*none.npz.*writes"):
        read(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError, match=f"`{name}`.*folder.*writes"):
        read(str(tmp_path))


def test_a_log_in_no_folder_is_told_before_training(tmp_path):
    moe = ku.upcycle_model(DENSE, 2)
    moe.compile("sgd", "mse")
    monitor = ku.RouterMonitor(log=tmp_path / "none" / "log.csv")
    before = models.weights(moe)
    with pytest.raises(FileNotFoundError, match=r"`log`.*Make the folder"):
        moe.fit(X, models.tokens(2, 3), verbose=0, callbacks=[monitor])
    models.assert_same_weights(moe, before)


def test_checkpoints_in_a_file(tmp_path):
    place = tmp_path / "there"
    place.write_text("")
    for run in (
        lambda: ku.ExpertCheckpoints(directory=place),
        lambda: ku.ExpertCheckpoints.load(place),
    ):
        with pytest.raises(NotADirectoryError, match=r"`directory`.*a file"):
            run()

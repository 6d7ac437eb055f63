"""What holds for every task of KerasHub on a backbone of the table.

As in `test_every_row`: all on torch, a handful on the other backends.
"""

import importlib.util

import hub_models
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.families import keras_hub_classes
from keras_upcycle.layers.moe_layers import moe_layers_in

EXPERTS = 4
CLASSES = 3
# Of tasks that are made with more than a backbone.
ARGUMENTS = {
    keras_hub.models.TextClassifier: {"num_classes": CLASSES},
    keras_hub.models.ImageClassifier: {"num_classes": CLASSES},
    keras_hub.models.DepthEstimator: {"depth_estimation_type": "relative"},
}
# What needs more than a backbone to be made or run: tried by hand, see each.
ELSEWHERE = {
    "DFineObjectDetector": "takes boxes, and predicts through them",
    "SAMImageSegmenter": "takes prompts",
    "BLIP2Seq2SeqLM": "needs BLIP-2 around T5",
    "PARSeqCausalLM": "reads its tokenizer when it is made",
    "ESMProteinClassifier": "takes strings of amino acids alone",
}
# Where the stock, dense task fails as well.
STOCK_PRESET = {
    "MoonshineAudioToText": "reads its config where a path stands",
    "BLIP2CausalLM": "`CausalLM.from_preset` takes OPT for the model",
}
STOCK_GENERATE = {
    "Gemma3CausalLM": "puts `None` for images without a preprocessor",
    "RWKV7CausalLM": "needs what its preprocessor makes",
}
UNLIKE = ("GemmaCausalLM", "BartSeq2SeqLM")


def _tasks():
    found = {}
    for stock in keras_hub_classes.stock_to_sparse():
        if not issubclass(stock, keras_hub.models.Task):
            continue
        name = stock.backbone_cls.__name__
        if stock.__name__ not in ELSEWHERE and name in hub_models.MODELS:
            found[stock.__name__] = stock
    return found


TASKS = _tasks()
NAMES = list(TASKS)
if keras.backend.backend() != "torch" and importlib.util.find_spec("torch"):
    NAMES = [name for name in NAMES if name in UNLIKE]


@pytest.fixture(scope="module", params=NAMES)
def kind(request):
    return TASKS[request.param]


@pytest.fixture(scope="module")
def dense(kind):
    backbone = hub_models.MODELS[kind.backbone_cls.__name__]()
    settings = next(
        (more for base, more in ARGUMENTS.items() if issubclass(kind, base)),
        {},
    )
    return hub_models.randomized(
        kind(backbone=backbone, preprocessor=None, **settings)
    )


@pytest.fixture(scope="module")
def moe(dense):
    router = ku.TopKRouter(2, capacity_factor=None)
    with pytest.warns(UserWarning, match="first block"):
        return ku.upcycle_model(
            dense, EXPERTS, router=router, layers="all", seed=3
        )


@pytest.fixture(scope="module")
def inputs(dense):
    return hub_models.inputs_of(dense)


def outputs(model, inputs):
    """What a model gives; of tokens, where the padding is none of them."""
    found = ops.convert_to_numpy(
        keras.tree.flatten(model(inputs, training=False))[0]
    )
    masks = (
        [value for name, value in inputs.items() if name.endswith("mask")]
        if isinstance(inputs, dict)
        else []
    )
    if masks and found.ndim == 3 and masks[-1].shape == found.shape[:2]:
        return found[masks[-1].astype(bool)]
    return found


def test_a_task_starts_as_the_dense_one(kind, dense, moe, inputs):
    assert type(moe) is keras_hub_classes.sparse_class(kind)
    assert type(moe.backbone).__name__ == (
        f"Upcycled{kind.backbone_cls.__name__}"
    )
    expected = outputs(dense, inputs)
    found = np.abs(expected - outputs(moe, inputs)).max()
    assert found < 5e-6 * max(1, np.abs(expected).max())


def test_stock_entry_points_find_it(kind, moe, inputs, tmp_path):
    if kind.__name__ in STOCK_PRESET:
        pytest.skip(f"stock: {STOCK_PRESET[kind.__name__]}")
    expected = outputs(moe, inputs)
    moe.save_to_preset(str(tmp_path))
    bases = [
        base
        for base in kind.__mro__
        if base.__module__.startswith("keras_hub") and base is not object
    ]
    for base in (kind, bases[1]):
        loaded = base.from_preset(str(tmp_path), preprocessor=None)
        assert type(loaded) is type(moe)
        np.testing.assert_array_equal(outputs(loaded, inputs), expected)


def test_a_keras_file_gives_the_same(kind, moe, inputs, tmp_path):
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    np.testing.assert_array_equal(outputs(loaded, inputs), outputs(moe, inputs))


def test_the_way_back_is_the_stock_task(kind, dense, moe, inputs):
    again = ku.densify_model(moe)
    assert type(again) is kind
    np.testing.assert_array_equal(
        outputs(again, inputs), outputs(dense, inputs)
    )


def test_it_says_what_the_dense_one_says(kind, dense, moe, inputs):
    if not hasattr(dense, "generate"):
        pytest.skip("the task generates nothing")
    if kind.__name__ in STOCK_GENERATE:
        pytest.skip(f"stock: {STOCK_GENERATE[kind.__name__]}")
    said = []
    for model in (dense, moe):
        model.compile(sampler="greedy")
        prompt = {key: np.array(value) for key, value in inputs.items()}
        said.append(model.generate(prompt, stop_token_ids=None))
    for one, other in zip(
        *[keras.tree.flatten(each) for each in said], strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        )


def test_one_step_of_fit_trains_it(kind, moe, inputs):
    found = moe(inputs, training=False)
    sgd = keras.optimizers.SGD(0.05)
    if getattr(found, "shape", (0,))[-1] in (hub_models.WORDS, CLASSES):
        compiled = {"optimizer": sgd}
        target = np.ones(tuple(found.shape[:-1]), "int32")
    else:
        compiled = {"optimizer": sgd, "loss": "mse", "metrics": []}
        target = keras.tree.map_structure(
            lambda x: np.full(tuple(x.shape), 0.1, "float32"), found
        )
    layers = moe_layers_in(moe)
    before = [
        ops.convert_to_numpy(ops.copy(layer.experts.expert_down.kernel.value))
        for layer in layers
    ]
    moe.compile(**compiled)
    moe.fit(inputs, target, epochs=1, verbose=0, batch_size=2)
    for layer, old in zip(layers, before, strict=True):
        kernel = ops.convert_to_numpy(layer.experts.expert_down.kernel)
        assert (kernel != old).any()

"""What holds for every backbone of the table, on small random models.

All of them run on torch, which compiles nothing; a handful of unlike ones on
the other backends.
"""

import importlib.util

import hub_models
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from places import ROOT

import keras_upcycle as ku
from keras_upcycle.families import (
    keras_hub_mixtures,
    keras_hub_refused,
    keras_hub_table,
    models_page,
    registry,
)
from keras_upcycle.keras_internals.keras_hub import inner_class
from keras_upcycle.layers.moe_layers import moe_layers_in

EXPERTS = 4
# On backends that compile: one for each way in which a row can differ.
UNLIKE = ("BertBackbone", "LlamaBackbone, tied", "SigLIPBackbone")
NAMES = list(hub_models.MODELS)
if keras.backend.backend() != "torch" and importlib.util.find_spec("torch"):
    NAMES = list(UNLIKE)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def everywhere(dense, **kwargs):
    """Each token by two experts, in each block, and no token left out."""
    router = ku.TopKRouter(2, capacity_factor=None)
    settings = {"router": router, "layers": "all", "seed": 3, **kwargs}
    with pytest.warns(UserWarning, match="first block"):
        return ku.upcycle_model(dense, EXPERTS, **settings)


@pytest.fixture(scope="module")
def moe(name):
    return everywhere(hub_models.dense(name))


@pytest.fixture(scope="module")
def inputs(name):
    return hub_models.inputs_of(hub_models.dense(name))


def outputs(model, inputs):
    """The arrays that a model gives, at real positions."""
    keras.utils.set_random_seed(4)
    found = model(inputs, training=False)
    masks = registry.family_of(model).real_positions(model, inputs)
    if isinstance(found, dict):
        masks = masks or dict.fromkeys(found)
        pairs = [(found[key], masks[key]) for key in found]
    elif isinstance(found, (list, tuple)):
        pairs = zip(found, masks or [None] * len(found), strict=True)
    else:
        pairs = [(found, masks)]
    arrays = []
    for tensor, mask in pairs:
        for array in map(ops.convert_to_numpy, keras.tree.flatten(tensor)):
            keep = ... if mask is None else np.asarray(mask).astype(bool)
            arrays.append(array[keep].astype("float32"))
    return arrays


def difference(some, others):
    """The largest, in proportion to the largest value of each output."""
    return max(
        np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)
        for a, b in zip(some, others, strict=True)
        if a.size
    )


def changed(moe, amount=0.3):
    """Changes two of each block's experts, for a router of few tokens may
    leave one without any."""
    rng = np.random.default_rng(5)
    for layer in moe_layers_in(moe):
        kernel = layer.experts.expert_down.kernel
        noise = rng.normal(0, amount, tuple(kernel.shape))
        noise[2:] = 0
        kernel.assign(ops.convert_to_numpy(kernel.value) + noise)


def test_a_sparse_model_starts_as_the_dense_one(name, moe, inputs):
    dense = hub_models.dense(name)
    found = difference(outputs(dense, inputs), outputs(moe, inputs))
    assert found < 5e-6
    assert type(moe).__name__ == f"Upcycled{type(dense).__name__}"
    assert isinstance(moe, type(dense))


def test_each_stack_of_the_row_is_found(name):
    dense = hub_models.dense(name)
    row = registry.family_of(dense).row
    expected = {stack.name for stack in row.stacks}
    found = {site.stack for site in ku.find_feed_forwards(dense)}
    # What these have only with images or another language model.
    missing = {
        "Gemma3Backbone": {"vision"},
        "Qwen3_5Backbone": {"vision"},
        "T5Gemma2Backbone": {"vision"},
        # One kernel of its decoder holds gate and up.
        "MoonshineBackbone": {"decoder"},
    }.get(name, set())
    assert found == expected - missing


def test_changed_experts_change_the_output(name, moe, inputs, tmp_path):
    other = everywhere(hub_models.dense(name))
    changed(other)
    assert difference(outputs(moe, inputs), outputs(other, inputs)) > 1e-4


def test_files_give_the_same_model(name, moe, inputs, tmp_path):
    expected = outputs(moe, inputs)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    assert type(loaded) is type(moe)
    assert difference(expected, outputs(loaded, inputs)) == 0
    moe.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is type(moe)
    assert difference(expected, outputs(loaded, inputs)) == 0


def test_the_way_back_is_exact(name, moe, inputs):
    dense = hub_models.dense(name)
    again = ku.densify_model(moe)
    assert type(again) is type(dense)
    assert difference(outputs(dense, inputs), outputs(again, inputs)) == 0


def test_by_default_a_step_trains_experts_and_router(name, inputs):
    dense = hub_models.dense(name)
    moe = ku.upcycle_model(dense, EXPERTS, layers="all_but_first", seed=3)
    # Equal experts give a router no gradient.
    changed(moe)
    layers = moe_layers_in(moe)
    assert layers
    before = [_values(layer) for layer in layers]

    def loss(y_true, y_pred):
        return ops.mean(ops.square(y_pred - 0.1))

    moe.compile(keras.optimizers.SGD(0.05), loss=loss)
    target = keras.tree.map_structure(
        lambda x: np.zeros(tuple(x.shape), "float32"),
        moe(inputs, training=False),
    )
    moe.train_on_batch(inputs, target)
    # What no output depends on has no gradient: DETR's discarded layers.
    moved = [
        {
            key
            for key, value in _values(layer).items()
            if (value != old[key]).any()
        }
        for layer, old in zip(layers, before, strict=True)
    ]
    assert any({"expert_up", "expert_down", "router"} <= each for each in moved)


def _values(layer):
    kernels = {
        "expert_up": layer.experts.expert_up.kernel,
        "expert_down": layer.experts.expert_down.kernel,
        "router": layer.router.weights[0],
    }
    return {
        key: ops.convert_to_numpy(ops.copy(kernel.value))
        for key, kernel in kernels.items()
    }


@pytest.mark.one_backend
def test_every_backbone_of_keras_hub_has_a_row_or_a_reason():
    rows = (*keras_hub_table.MODELS, *keras_hub_mixtures.MODELS)
    known = {inner_class(row.backbone) for row in rows}
    refused = set(map(inner_class, keras_hub_refused.REFUSED))
    assert not known & refused
    public = {
        kind
        for kind in vars(keras_hub.models).values()
        if isinstance(kind, type)
        and issubclass(kind, keras_hub.models.Backbone)
        and kind is not keras_hub.models.Backbone
    }
    missing = public - known - refused
    assert not missing, (
        f"{sorted(kind.__name__ for kind in missing)} of KerasHub "
        f"{keras_hub.__version__} have neither a row in "
        "families/keras_hub_table.py nor a reason in keras_hub_refused.py: "
        "CONTRIBUTING shows how a row is written"
    )


@pytest.mark.one_backend
def test_every_row_is_tried():
    tried = {name.partition(",")[0] for name in hub_models.MODELS}
    rows = {row.backbone.rpartition(".")[2] for row in keras_hub_table.MODELS}
    assert rows == tried


@pytest.mark.one_backend
def test_the_page_of_models_is_what_the_rows_say():
    written = (ROOT / "guides" / "models.md").read_text()
    assert written == models_page.page(), (
        "python -m keras_upcycle.families.models_page > guides/models.md"
    )

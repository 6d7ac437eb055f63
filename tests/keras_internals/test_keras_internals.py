"""Fails loudly when a private attribute of Keras stops behaving."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_upcycle import keras_internals


def inner_model():
    inputs = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(8, name="up")(inputs)
    outputs = keras.layers.Dense(4, name="down")(hidden)
    return keras.Model(inputs, outputs, name="inner")


@keras.saving.register_keras_serializable(package="keras_upcycle_tests")
class Holder(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(3, name="first")
        self.second = keras.layers.Dense(4, name="second")

    def build(self, input_shape):
        self.own = self.add_weight(shape=(2,), name="own")
        self.fixed = self.add_weight(shape=(5,), name="fixed", trainable=False)
        self.seed = keras.random.SeedGenerator(1)
        self.first.build(input_shape)
        self.second.build((None, 3))
        self.built = True

    def call(self, x):
        return self.second(self.first(x))


def test_sublayers_come_in_the_order_of_their_making():
    holder = Holder()
    assert keras_internals.sublayers(holder) == [holder.first, holder.second]


def test_all_layers_go_all_the_way_down():
    model = keras.Sequential([keras.Input((4,)), Holder(name="h")])
    found = keras_internals.all_layers(model)
    holder = model.get_layer("h")
    for layer in (model, holder, holder.first, holder.second):
        assert layer in found


def test_own_variables_are_those_of_no_sublayer():
    holder = Holder()
    holder.build((None, 4))
    found = keras_internals.own_variables(holder)
    assert [v.shape for v in found[:2]] == [(2,), (5,)]
    assert len(found) == 3  # and the seed's state
    below = {id(v) for v in holder.first.variables + holder.second.variables}
    assert not below & {id(v) for v in found}
    assert len(below) + len(found) == len(holder.variables)


def test_replace_sublayer_forgets_the_old_one():
    holder = Holder()
    x = np.ones((2, 4), "float32")
    holder(x)
    old, new = holder.second, keras.layers.Dense(4, use_bias=False)
    new.build((None, 3))
    keras_internals.replace_sublayer(holder, "second", new)
    assert holder.second is new
    assert keras_internals.sublayers(holder) == [holder.first, new]
    held = {id(v) for v in holder.weights}
    assert not held & {id(v) for v in old.weights}
    assert {id(v) for v in new.weights} <= held
    np.testing.assert_allclose(
        ops.convert_to_numpy(holder(x)),
        ops.convert_to_numpy(new(holder.first(x))),
        atol=1e-6,
    )
    # Locked again, as Keras leaves a built layer.
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        holder.third = keras.layers.Dense(2)


def test_replace_sublayer_locks_again_after_an_error():
    holder = Holder()
    holder.build((None, 4))
    with pytest.raises(AttributeError, match="nothing"):
        keras_internals.replace_sublayer(holder, "nothing", Holder())
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        holder.third = keras.layers.Dense(2)


def test_build_inside_gives_the_owners_path():
    layer = keras.layers.Dense(2, name="moe")
    keras_internals.build_inside("model/block_3", layer, (None, 4))
    assert layer.path == "model/block_3/moe"
    assert layer.kernel.path == "model/block_3/moe/kernel"


def test_build_inside_leaves_a_built_layer_and_the_scopes_alone():
    layer = keras.layers.Dense(2, name="moe")
    layer.build((None, 4))
    kernel = layer.kernel
    keras_internals.build_inside("model", layer, (None, 4))
    assert layer.kernel is kernel
    assert kernel.path == "moe/kernel"
    after = keras.layers.Dense(2, name="after")
    keras_internals.build_inside("", after, (None, 4))
    assert after.path == "after"


def test_tracked_nodes_tell_who_feeds_whom_from_inputs_to_outputs():
    model = inner_model()
    nodes = list(keras_internals.tracked_nodes(model))
    assert [node[0].name for node in nodes] == ["up", "down"]
    (_, up_in, up_out, _), (_, down_in, down_out, _) = nodes
    assert up_in[0] is model.inputs[0]
    assert up_out[0] is down_in[0]
    assert down_out[0] is model.outputs[0]


def test_tracked_nodes_hold_keyword_arguments_and_several_inputs():
    first, second = keras.Input((4,)), keras.Input((4,))
    added = keras.layers.Add(name="add")([first, second])
    outputs = keras.layers.Dropout(0.5, name="drop")(added, training=True)
    nodes = {
        node[0].name: node
        for node in keras_internals.tracked_nodes(
            keras.Model([first, second], outputs)
        )
    }
    assert len(nodes["add"][1]) == 2
    assert nodes["drop"][3]["training"] is True


def test_sequential_keeps_a_functional_model_of_the_same_layers():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    functional = keras_internals.sequential_as_functional(model)
    operations = [node[0] for node in keras_internals.tracked_nodes(functional)]
    assert operations == model.layers


def test_policy_of_tree_is_the_own_policy_unless_something_is_quantized():
    model = keras.Sequential([keras.Input((4,)), Holder(dtype="bfloat16")])
    holder = model.layers[0]
    assert keras_internals.policy_of_tree(holder).name == "bfloat16"
    model.quantize("int8")
    policies = keras_internals.policy_of_tree(holder)
    assert policies.default_policy.name == "bfloat16"
    assert set(policies) == {holder.first.path, holder.second.path}
    assert policies[holder.first.path].quantization_mode == "int8"


def test_policy_of_tree_keeps_a_map():
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["a/b"] = keras.dtype_policies.DTypePolicy("bfloat16")
    layer = keras.layers.Dense(2, dtype=policies)
    own = keras_internals.policy_of_tree(layer)
    assert own.get_config() == layer.dtype_policy.get_config()


def test_has_lora_says_whether_adapters_are_there():
    layer = keras.layers.Dense(2)
    layer.build((None, 4))
    assert not keras_internals.has_lora(layer)
    layer.enable_lora(1)
    assert keras_internals.has_lora(layer)
    assert not keras_internals.has_lora(keras.layers.Dropout(0.5))


# Rows of a stacked kernel.


def stacked(bias=True, **kwargs):
    layer = keras.layers.EinsumDense(
        "end,edf->enf",
        output_shape=(None, 6),
        bias_axes="ef" if bias else None,
        bias_initializer="random_normal",
        name="expert_up",
        **kwargs,
    )
    layer.build((3, None, 4))
    return layer


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_rows_of_int8_give_what_the_layer_gives_but_for_rounding(lora):
    layer = stacked()
    before = ops.convert_to_numpy(layer.kernel)
    layer.quantize("int8")
    if lora:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(ops.ones(layer.lora_kernel_b.shape))
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    index = np.arange(3, dtype="int32")
    kernels = keras_internals.rows_of_quantized(
        layer, ops.convert_to_tensor(index)
    )
    found = ops.convert_to_numpy(ops.matmul(x, kernels) + layer.bias)
    own = ops.convert_to_numpy(layer(x))
    # The layer also rounds its inputs.
    assert np.abs(found - own).max() <= 0.03 * np.abs(own).max()
    moved = np.abs(ops.convert_to_numpy(kernels) - before).max()
    assert (moved > 0.1) == lora


def test_rows_of_int8_are_those_asked_for_and_one_past_the_last_is_any():
    layer = stacked()
    layer.quantize("int8")
    every = ops.convert_to_numpy(
        keras_internals.rows_of_quantized(layer, ops.arange(3, dtype="int32"))
    )
    index = ops.convert_to_tensor(np.array([2, 0, 2, 3], "int32"))
    some = ops.convert_to_numpy(keras_internals.rows_of_quantized(layer, index))
    np.testing.assert_array_equal(some[:3], every[[2, 0, 2]])
    assert np.isfinite(some).all()


def test_rows_of_int8_are_of_the_compute_dtype():
    layer = stacked(dtype="mixed_bfloat16")
    layer.quantize("int8")
    rows = keras_internals.rows_of_quantized(layer, ops.zeros((2,), "int32"))
    assert keras.backend.standardize_dtype(rows.dtype) == "bfloat16"


def test_rows_of_int8_undo_the_scale_kernel_by_kernel():
    layer = stacked(bias=False)
    kernel = np.random.default_rng(1).normal(size=(3, 4, 6))
    kernel *= np.array([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    layer.kernel.assign(kernel)
    layer.quantize("int8")
    index = ops.arange(3, dtype="int32")
    found = keras_internals.rows_of_quantized(layer, index)
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127
    error = np.abs(ops.convert_to_numpy(found) - kernel)
    assert (error <= 0.51 * step).all()


def test_rows_of_other_quantizations_are_refused():
    layer = stacked()
    layer.quantize("int4")
    message = (
        "layer 'expert_up' with quantization mode 'int4'. "
        'Build the layer with dispatch="capacity" or dispatch="dense"'
    )
    with pytest.raises(NotImplementedError, match=message):
        keras_internals.rows_of_quantized(layer, ops.zeros((1,), "int32"))


# Layers without values.


def test_layers_made_without_values_have_shapes_and_take_values_later():
    with keras_internals.without_values():
        layer = keras.layers.Dense(3, name="later")
        layer.build((None, 2))
    assert layer.count_params() == 9
    assert not any(keras_internals.has_value(v) for v in layer.weights)
    keras_internals.set_first_value(
        layer.kernel, lambda shape, dtype: ops.full(shape, 2.0, dtype)
    )
    keras_internals.draw_first_values(layer)
    assert all(keras_internals.has_value(v) for v in layer.weights)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(np.ones((1, 2), "float32"))), [[4.0] * 3]
    )


def test_no_later_scope_initialises_what_was_left_without_a_value():
    """Keras keeps a list of such variables, and would draw them all."""
    with keras_internals.without_values():
        left = keras.layers.Dense(3)
        left.build((None, 2))
    with keras.StatelessScope():
        keras.layers.Dense(2).build((None, 2))
    assert not keras_internals.has_value(left.kernel)


def test_an_error_inside_leaves_keras_as_it_was():
    def fail():
        with keras_internals.without_values():
            keras.layers.Dense(3).build((None, 2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    assert keras_internals.has_value(layer.kernel)


# Presets.


def test_a_presets_files_name_their_classes(saved):
    preset = str(saved / "vit")
    models = keras_hub.models
    for file, expected in (
        ("task.json", models.ViTImageClassifier),
        ("config.json", models.ViTBackbone),
        ("preprocessor.json", models.ViTImageClassifierPreprocessor),
        ("image_converter.json", keras_hub.layers.ViTImageConverter),
        ("tokenizer.json", None),
    ):
        assert keras_internals.preset_class(preset, file) is expected
    backbone = str(saved / "t5_backbone")
    assert keras_internals.preset_class(backbone, "task.json") is None


def test_files_of_other_formats_and_unknown_classes(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "task.json").write_text('{"registered_name": "mine>Thing"}')
    preset = str(tmp_path)
    assert keras_internals.preset_class(preset, "tokenizer.json") is None
    with pytest.raises(ValueError, match="mine>Thing"):
        keras_internals.preset_class(preset, "task.json")


# Flags, seeds and optimizers' insides.


def test_made_to_train_is_what_trains_unless_frozen():
    holder = keras.layers.BatchNormalization(name="norm")
    holder.build((None, 3))
    names = {v.name for v in keras_internals.made_to_train(holder)}
    assert names == {"gamma", "beta"}
    holder.trainable = False
    assert {
        v.name for v in keras_internals.made_to_train(holder)
    } == names  # still
    dense = keras.layers.Dense(3)
    dense.build((None, 4))
    dense.enable_lora(2)
    names = {v.name for v in keras_internals.made_to_train(dense)}
    assert names == {"bias", "lora_kernel_a", "lora_kernel_b"}


def test_a_flag_set_alone_goes_no_further():
    model = inner_model()
    keras_internals.set_trainable_alone(model, False)
    assert not model.trainable
    assert model.get_layer("up").trainable
    assert all(v.trainable for v in model.weights)


def test_a_tree_is_frozen_whatever_its_own_flag():
    model = inner_model()
    keras_internals.set_trainable_alone(model, False)
    keras_internals.freeze_tree(model)
    assert not model.get_layer("up").trainable
    assert not any(v.trainable for v in model.weights)


def test_seed_states_are_those_of_all_layers_each_once():
    drop = keras.layers.Dropout(0.5)
    model = keras.Sequential(
        [keras.Input((4,)), drop, keras.layers.Dense(4), drop]
    )
    assert [id(s) for s in keras_internals.seed_states(model)] == [
        id(drop.seed_generator.state)
    ]
    assert keras_internals.seed_states(inner_model()) == []


def test_decay_exclusions_are_copied():
    model = inner_model()
    spared = model.get_layer("up").kernel
    old, new = keras.optimizers.AdamW(), keras.optimizers.AdamW()
    old.exclude_from_weight_decay(var_list=[spared], var_names=["bias"])
    keras_internals.copy_decay_exclusions(old, new)
    assert [keras_internals.decays(new, v) for v in model.weights] == [
        False,
        False,
        True,
        False,
    ]


def test_optimizers_still_have_what_factors_hook_into():
    """A hook that Keras no longer calls would do nothing, silently."""
    hooks = [
        name
        for name in vars(keras_internals.FactorsByVariable)
        if callable(getattr(keras_internals.FactorsByVariable, name))
        and not name.startswith("__")
    ]
    own = {"_rate_scale_of", "_by_rate", "_parallel_update_step"}
    if keras.backend.backend() == "torch":
        own.remove("_parallel_update_step")
    for name in set(hooks) - own:
        assert callable(getattr(keras.optimizers.Adam(), name))


def test_the_optimizer_of_a_step_is_found_while_it_runs():
    seen = []

    class Looks(keras.layers.Layer):
        def call(self, inputs, training=None):
            if training:
                seen.append(keras_internals.optimizer_of_step())
            return inputs

    inputs = keras.Input((2,))
    inner = keras.Model(inputs, Looks()(keras.layers.Dense(2)(inputs)))
    inner.compile("sgd", "mse")  # does not train the model around it
    model = keras.Sequential([keras.Input((2,)), inner])
    model.compile("adam", "mse")
    x = np.ones((4, 2), "float32")
    model(x, training=True)
    assert seen == [None]
    model.fit(x, x, verbose=0)
    model.train_on_batch(x, x)
    # torch's symbolic calls are no step.
    assert model.optimizer in seen
    assert inner.optimizer not in seen
    assert seen[-1] is model.optimizer

"""T5: masks, causality, generation, data, presets: what two stacks add."""

import functools

import keras
import keras_hub
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_upcycle as ku
from keras_upcycle import keras_internals
from keras_upcycle.conversion import plan
from keras_upcycle.families import (
    keras_hub_classes,
    placeholders,
    sparse_blocks,
)
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.layers.moe_feed_forward import MoEFeedForward
from keras_upcycle.routing import functional
from keras_upcycle.types import TokenChoice

EXPERTS = 4
# Everything routed: the decoder's default, and for the encoder too.
TOP_2 = {"encoder": ku.TopKRouter(top_k=2)}
DROPLESS = {
    "encoder": ku.ExpertChoiceRouter(capacity_factor=2.0),
    "decoder": ku.TopKRouter(top_k=2, capacity_factor=None),
}
UNEVEN = [(6, 5), (4, 2), (1, 3)]


def still(**kwargs):
    """A backbone without dropout: training and inference compute alike."""
    return models.t5_backbone(dropout=0.0, **kwargs)


@functools.cache
def trained():
    """Sparse, its experts all different, as after training."""
    return models.fixed(ku.upcycle_model(still(), EXPERTS, router=DROPLESS))


def at_real(outputs, inputs):
    """Both stacks' outputs at real positions, one array each."""
    return [
        models.array(outputs[f"{stack}_sequence_output"])[
            inputs[f"{stack}_padding_mask"].astype(bool)
        ]
        for stack in ("encoder", "decoder")
    ]


def outcome(model, inputs, training):
    """Outputs at real positions, auxiliary losses, routing statistics."""
    with record_calls() as calls:
        outputs = model(inputs, training=training)
    loads = [
        models.array(
            functional.expert_load(call.routing, call.layer.num_experts)
        )
        for call in calls
    ]
    losses = [float(loss) for loss in model.losses]
    return at_real(outputs, inputs), losses, loads


def assert_same(received, expected, atol):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


# Step 0.


@pytest.mark.thinned
@pytest.mark.parametrize(
    "build", [models.t5_backbone, models.t5_lm], ids=["gated", "plain"]
)
def test_step_0_with_every_token_routed(build):
    dense = build()
    moe = ku.upcycle_model(dense, EXPERTS, router=TOP_2)
    report = ku.verify_upcycle(dense, moe, models.t5_inputs(lengths=UNEVEN))
    assert len(report.layers) == 2
    for layer in report.layers:
        assert layer.relative_difference <= 1e-5
        assert layer.unrouted_fraction == 0.0
        assert layer.mean_combine_weight == pytest.approx(1.0, abs=1e-6)
    assert report.relative_difference <= 1e-4


@pytest.mark.one_backend
def test_step_0_in_bfloat16():
    dense = models.t5_backbone(dtype="bfloat16")
    moe = ku.upcycle_model(dense, EXPERTS, router=TOP_2)
    report = ku.verify_upcycle(dense, moe, models.t5_inputs(lengths=UNEVEN))
    assert 0.0 <= report.relative_difference <= 2e-2
    for layer in models.mixtures(moe):
        assert layer.router.kernel.dtype == "float32"
        assert layer.experts.expert_up.kernel.dtype == "bfloat16"
    outputs = moe(models.t5_inputs())
    assert {ops.dtype(x) for x in outputs.values()} == {"bfloat16"}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="of the stock model, alike everywhere; nothing to compile here",
)
def test_float16_is_nan_in_the_stock_model_too():
    """A reminder: T5 adds -1e9 in float16, which is infinity."""
    dense = models.t5_backbone(dtype="mixed_float16")
    outputs = dense(models.t5_inputs(lengths=UNEVEN))
    encoded = models.array(outputs["encoder_sequence_output"])
    assert not np.all(np.isfinite(encoded))


@pytest.mark.thinned
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_expert_choice_equals_dense_on_routed_tokens(factor):
    dense = models.t5_backbone()
    router = {"encoder": ku.ExpertChoiceRouter(capacity_factor=factor)}
    moe = ku.upcycle_model(dense, 8, router=router, seed=0)
    # All experts but one are nearly of one mind, which leaves tokens to none.
    kernel = models.mixtures(moe)[0].router.kernel
    value = 0.01 * models.array(kernel)
    value[:, 0] = np.random.default_rng(0).normal(size=models.WIDTH)
    kernel.assign(value)
    inputs = models.t5_inputs(lengths=[(6, 5), (5, 4), (3, 2)])
    with record_calls() as calls:
        moe(inputs)
    (site,) = [
        s
        for s in ku.find_feed_forwards(dense)
        if s.stack == "encoder" and s.index == 1
    ]
    (call,) = [c for c in calls if not isinstance(c.routing, TokenChoice)]
    expected = models.array(site(call.inputs))
    received = models.array(call.outputs)
    tokens, active = (
        ops.convert_to_numpy(call.routing.tokens),
        ops.convert_to_numpy(call.routing.active),
    )
    routed = np.zeros(received.shape[:2], bool)
    for example, expert, slot in np.argwhere(active):
        routed[example, tokens[example, expert, slot]] = True
    real = inputs["encoder_padding_mask"].astype(bool)
    assert not np.any(routed & ~real)
    np.testing.assert_allclose(received[routed], expected[routed], atol=1e-5)
    assert np.all(received[~routed] == 0.0)
    report = ku.verify_upcycle(dense, moe, inputs)
    unrouted = 1.0 - routed.sum() / real.sum()
    assert 0.0 < unrouted < 1.0
    assert report.layers[0].unrouted_fraction == pytest.approx(unrouted)
    assert report.layers[0].relative_difference <= 1e-5


# Padding.


# Any lengths and ids, in arrays of one shape: nothing compiles anew.
ANY_INPUTS = st.builds(
    models.t5_inputs,
    seed=st.integers(0, 99),
    lengths=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=3, max_size=3
    ),
)
FEW = settings(max_examples=6, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    "training", [False, True], ids=["inference", "training"]
)
@FEW
@given(inputs=ANY_INPUTS, step=st.integers(1, models.VOCABULARY - 1))
def test_ids_under_the_padding_change_nothing(training, inputs, step):
    others = dict(inputs)
    for stack in ("encoder", "decoder"):
        ids = inputs[f"{stack}_token_ids"].copy()
        hidden = inputs[f"{stack}_padding_mask"] == 0
        ids[hidden] = (ids[hidden] + step) % models.VOCABULARY
        others[f"{stack}_token_ids"] = ids
    expected = outcome(trained(), inputs, training)
    received = outcome(trained(), others, training)
    assert bool(expected[1]) == training
    for a, b in zip(received, expected, strict=True):
        assert_same(a, b, atol=0.0)


@pytest.mark.parametrize(
    "training", [False, True], ids=["inference", "training"]
)
def test_more_padding_changes_nothing(training):
    inputs = models.t5_inputs(lengths=UNEVEN)
    padded = {
        name: np.pad(value, ((0, 0), (0, 4))) for name, value in inputs.items()
    }
    expected = outcome(trained(), inputs, training)
    received = outcome(trained(), padded, training)
    for a, b in zip(received, expected, strict=True):
        assert_same(a, b, atol=2e-5)


@pytest.mark.one_backend
def test_without_the_mask_padding_would_matter():
    """The control: the tests above see what they should see."""
    inputs = models.t5_inputs(lengths=UNEVEN)
    others = {**inputs, "encoder_token_ids": inputs["encoder_token_ids"].copy()}
    others["encoder_token_ids"][inputs["encoder_padding_mask"] == 0] = 3
    block = trained().encoder_transformer_layers[1]
    hand_down = sparse_blocks.real_positions
    try:
        sparse_blocks.real_positions = lambda mask, tokens: None
        gap = [
            np.abs(a - b).max()
            for a, b in zip(
                at_real(trained()(inputs), inputs),
                at_real(trained()(others), inputs),
                strict=True,
            )
        ]
    finally:
        sparse_blocks.real_positions = hand_down
    assert isinstance(block.input_projector, MoEFeedForward)
    assert max(gap) > 1e-3


@pytest.mark.one_backend
def test_an_example_alone_and_in_a_batch_give_the_same():
    inputs = models.t5_inputs(lengths=UNEVEN)
    together = trained()(inputs, training=False)
    one = {name: value[1:2] for name, value in inputs.items()}
    alone = trained()(one, training=False)
    picked = {name: value[1:2] for name, value in together.items()}
    assert_same(at_real(alone, one), at_real(picked, one), atol=2e-5)


@pytest.mark.parametrize(
    "training", [False, True], ids=["inference", "training"]
)
@FEW
@given(
    seed=st.integers(0, 99),
    place=st.integers(1, 4),
    step=st.integers(1, models.VOCABULARY - 1),
)
def test_a_later_token_changes_nothing_before_it(training, seed, place, step):
    inputs = models.t5_inputs(seed=seed)
    changed = inputs["decoder_token_ids"].copy()
    changed[:, place] = (changed[:, place] + step) % models.VOCABULARY
    before, after = (
        models.array(
            trained()({**inputs, "decoder_token_ids": ids}, training=training)[
                "decoder_sequence_output"
            ]
        )
        for ids in (inputs["decoder_token_ids"], changed)
    )
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert np.any(before[:, place:] != after[:, place:])


@pytest.mark.one_backend
def test_a_capacity_in_training_is_lifted_at_inference():
    """The default decoder drops in training only, so inference is causal."""
    moe = ku.upcycle_model(models.t5_backbone(), EXPERTS)
    encoder, decoder = models.mixtures(moe)
    assert encoder.router.get_config()["capacity_factor"] == 2.0
    assert encoder.router.group == "example"
    assert decoder.router.top_k == 2
    assert decoder.router.load_balance_loss == 0.01
    assert decoder.router.eval_capacity_factor is None


# Stacks.


def converted(moe):
    return {
        (stack, int(number))
        for stack, of_stack in moe.experts.items()
        for number in of_stack
    }


@functools.cache
def four_blocks():
    """Of shapes alone: decisions are made on those."""
    with keras_internals.without_values():
        return keras_hub.models.T5Backbone(
            models.VOCABULARY, 4, 2, models.WIDTH, models.HIDDEN
        )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 3)}),
        ({"layers": {"encoder": None}}, {("decoder", 1), ("decoder", 3)}),
        ({"router": {"decoder": None}}, {("encoder", 1), ("encoder", 3)}),
        (
            {"layers": {"encoder": [-1], "decoder": "last_half"}},
            {("encoder", 3), ("decoder", 2), ("decoder", 3)},
        ),
        (
            {"layers": lambda site: site.index in (2, 5)},
            {("encoder", 2), ("decoder", 1)},
        ),
    ],
    ids=["default", "dense encoder", "dense decoder", "lists", "function"],
)
def test_layers_and_routers_by_stack(arguments, expected):
    chosen = plan.make(four_blocks(), EXPERTS, **arguments).chosen
    # The encoder's four blocks are counted first.
    assert {(site.stack, site.index % 4) for site in chosen} == expected


@pytest.mark.one_backend
@pytest.mark.parametrize("dense_stack", ["encoder", "decoder"])
def test_a_stack_left_dense_is_dense(dense_stack):
    dense = models.t5_backbone()
    moe = ku.upcycle_model(dense, EXPERTS, layers={dense_stack: None})
    other = {"encoder": "decoder", "decoder": "encoder"}[dense_stack]
    assert converted(moe) == {(other, 1)}
    grown = moe.count_params() - dense.count_params()
    block = 3 * models.WIDTH * models.HIDDEN
    assert grown == (EXPERTS - 1) * block + models.WIDTH * EXPERTS


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"router": {"decoder": "expert_choice"}},
            ku.UpcycleError,
            r"causal decoder.*router='expert_choice'.*\"top_k\"",
        ),
        ({"router": "expert_choice"}, ku.UpcycleError, "causal"),
        (
            {"router": {"middle": "top_k"}},
            ValueError,
            r"\['middle'\].*\['encoder', 'decoder'\]",
        ),
        ({"layers": [1]}, ValueError, r"layers=\[1\].*'encoder': \[1\]"),
        (
            {"layers": {"encoder": None, "decoder": None}},
            ku.UpcycleError,
            "at least one",
        ),
        (
            {"layers": {"decoder": [4]}},
            ValueError,
            r"from 0 to 3.*layers=\[4\]",
        ),
    ],
    ids=["decoder", "both", "stack", "list", "nothing", "range"],
)
def test_bad_choices_for_two_stacks(arguments, error, message):
    dense = four_blocks()
    with pytest.raises(error, match=message):
        ku.upcycle_model(dense, EXPERTS, **arguments)
    with pytest.raises(error, match=message):
        ku.estimate_upcycle(dense, EXPERTS, **arguments)


@pytest.mark.one_backend
def test_the_mixture_drops_out_where_the_dense_block_did():
    moe = ku.upcycle_model(models.t5_backbone(dropout=0.3), EXPERTS)
    for block in (
        moe.encoder_transformer_layers[1],
        moe.decoder_transformer_layers[1],
    ):
        mixture = block.input_projector
        assert (mixture.dropout, mixture.output_dropout) == (0.3, 0.3)
        assert type(block.dropout_layer) is placeholders.PassOn
        assert block.self_attention_dropout.rate == 0.3


@pytest.mark.one_backend
def test_nothing_of_the_dense_feed_forward_is_left():
    moe = ku.upcycle_model(models.t5_backbone(), EXPERTS)
    block = moe.decoder_transformer_layers[1]
    names = {v.path.split("/")[-2] for v in block.weights}
    assert not names & {"input_projector", "gate_projector"}
    below = keras_internals.sublayers(block)
    assert len([x for x in below if isinstance(x, MoEFeedForward)]) == 1
    assert not any(isinstance(x, keras.layers.Dense) for x in below)


@pytest.mark.one_backend
def test_a_frozen_block_stays_frozen():
    dense = models.t5_backbone()
    dense.decoder_transformer_layers[1].trainable = False
    moe = ku.upcycle_model(dense, EXPERTS)
    encoder, decoder = models.mixtures(moe)
    assert encoder.trainable_weights
    assert not decoder.trainable_weights


@pytest.mark.one_backend
def test_a_t5_inside_a_users_model():
    backbone = models.t5_backbone(name="trunk")
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in models.t5_inputs()
    }
    hidden = backbone(inputs)["encoder_sequence_output"]
    outputs = keras.layers.Dense(models.CLASSES)(hidden[:, 0])
    dense = models.randomized(keras.Model(inputs, outputs))
    moe = ku.upcycle_model(
        dense, EXPERTS, router=TOP_2, layers={"decoder": None}
    )
    assert converted(moe.get_layer("trunk")) == {("encoder", 1)}
    batch = models.t5_inputs(lengths=UNEVEN)
    gap = models.relative_gap(
        models.output(moe, batch), models.output(dense, batch)
    )
    assert gap <= 1e-5


@pytest.mark.one_backend
@pytest.mark.parametrize("nested", [False, True])
def test_every_other_block_of_each_stack_by_default(nested):
    model, prefix = models.t5_backbone(num_layers=4), ""
    if nested:
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in models.t5_inputs()
        }
        prefix = f"{model.name}/"
        model = keras.Model(inputs, model(inputs)["decoder_sequence_output"])
    made = plan.make(model, EXPERTS)
    sites = {stack: [] for stack in ("encoder", "decoder")}
    for site in made.findings.sites:
        sites[site.stack.removeprefix(prefix)].append(site)
    assert [len(own) for own in sites.values()] == [4, 4]
    for own in sites.values():
        assert [site in made.chosen for site in own] == [False, True] * 2


# Generation.


def sampler(name):
    return {
        "greedy": lambda: keras_hub.samplers.GreedySampler(),
        "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
        "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.9, seed=1),
        "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(
            k=3, alpha=0.4
        ),
    }[name]()


@functools.cache
def talker(name):
    """The dense model, or a sparse one that routes every token."""
    if name == "dense":
        dense = models.t5_lm(still(use_gated_activation=True))
        # Spread the logits: a random model would say one word for ever.
        embedding = dense.backbone.token_embedding.reverse_embeddings
        embedding.assign(4.0 * embedding)
        return dense
    arguments = {
        "top 2": {"router": TOP_2},
        "all tokens": {
            "router": {
                "encoder": ku.ExpertChoiceRouter(capacity_factor=EXPERTS)
            }
        },
        "dense encoder": {"layers": {"encoder": None}},
    }
    return ku.upcycle_model(talker("dense"), EXPERTS, seed=0, **arguments[name])


@functools.cache
def said_by(name, how, stop=None):
    """Ids and mask; the same call again costs nothing."""
    talker(name).compile(sampler=sampler(how))
    result = talker(name).generate(prompts(), stop_token_ids=stop)
    return result["decoder_token_ids"], result["decoder_padding_mask"]


def prompts():
    """Padded sources; targets of which one or two tokens are given."""
    inputs = models.t5_inputs(target=7, lengths=[(6, 2), (3, 1), (5, 2)])
    start = inputs["decoder_padding_mask"] == 1
    inputs["decoder_token_ids"] = np.where(
        start, inputs["decoder_token_ids"], 0
    )
    return inputs


def assert_says_the_same(name, how, stop=None):
    expected = said_by("dense", how, stop)
    for a, b in zip(said_by(name, how, stop), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    # Not the same word everywhere: the test could tell a difference.
    assert len(np.unique(expected[0])) > 4


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.thinned
@pytest.mark.parametrize("how", ["greedy", "beam", "top_p", "contrastive"])
def test_every_sampler_says_what_the_dense_model_says(how):
    assert_says_the_same("top 2", how)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["all tokens", "dense encoder"])
def test_every_way_to_route_all_tokens_says_the_same(name):
    assert_says_the_same(name, "greedy")


@pytest.mark.one_backend
def test_generation_stops_where_the_dense_model_stops():
    ids, _ = said_by("dense", "greedy")
    stop = (int(ids[0, 4]), int(ids[1, 3]))  # words that do come up
    assert_says_the_same("top 2", "greedy", stop)
    _, mask = said_by("dense", "greedy", stop)
    assert not np.all(mask)


@pytest.mark.one_backend
def test_the_sampler_is_carried_over():
    dense = models.t5_lm()
    dense.compile(sampler=sampler("top_p"))
    moe = ku.upcycle_model(dense, EXPERTS)
    assert type(moe.sampler) is keras_hub.samplers.TopPSampler
    assert moe.sampler is not dense.sampler
    assert moe.sampler.get_config() == dense.sampler.get_config()


# Text in, text out.


@functools.cache
def reader():
    """A dense model with a tokenizer, and its sparse copy."""
    preprocessor = models.t5_preprocessor()
    known = preprocessor.tokenizer.vocabulary_size()
    dense = models.t5_lm(
        models.t5_backbone(vocabulary_size=known), preprocessor=preprocessor
    )
    dense.compile(sampler="greedy")
    return dense, ku.upcycle_model(dense, EXPERTS, router=TOP_2)


def sentences():
    return {
        "encoder_text": [
            "the quick brown fox",
            "airplane",
            "lazy dog at airport",
        ],
        "decoder_text": ["the dog", "fox", "airport"],
    }


@pytest.mark.one_backend
def test_a_task_stays_a_task_with_its_tokenizer_and_lengths():
    dense, moe = reader()
    assert isinstance(moe, keras_hub.models.T5Seq2SeqLM)
    assert isinstance(
        moe.preprocessor, keras_hub.models.T5Seq2SeqLMPreprocessor
    )
    assert moe.preprocessor.encoder_sequence_length == 8
    assert moe.preprocessor.decoder_sequence_length == 6
    said = [model.generate(["lazy fox", "airport"]) for model in (dense, moe)]
    assert said[0] == said[1]


@pytest.mark.one_backend("jax")  # on torch no task tracks its preprocessor
def test_a_task_that_has_spoken_is_converted_too():
    """KerasHub's preprocessor makes two of its layers when it is called."""
    dense, _ = reader()
    said = dense.generate(["lazy fox", "airport"])
    moe = ku.upcycle_model(dense, EXPERTS, router=TOP_2)
    moe.compile(sampler="greedy")
    assert moe.generate(["lazy fox", "airport"]) == said


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("how", ["keras file", "preset"])
def test_a_reloaded_task_says_the_same(how, tmp_path):
    _, moe = reader()
    expected = moe.generate(["the quick brown fox jumped over", "airport"])
    if how == "keras file":
        moe.save(tmp_path / "moe.keras")
        loaded = [keras.saving.load_model(tmp_path / "moe.keras")]
    else:
        preset = str(tmp_path / "preset")
        moe.save_to_preset(preset)
        loaded = [
            known.from_preset(preset)
            for known in (
                keras_hub.models.Seq2SeqLM,
                keras_hub.models.T5Seq2SeqLM,
                keras_hub.models.CausalLM,
                keras_hub_classes.UpcycledT5Seq2SeqLM,
            )
        ]
    for model in loaded:
        assert type(model) is keras_hub_classes.UpcycledT5Seq2SeqLM
        models.assert_same_weights(model, moe)
        assert model.preprocessor.encoder_sequence_length == 8
        assert model.preprocessor.decoder_sequence_length == 6
    loaded[0].compile(sampler="greedy")  # no file holds the sampler
    assert (
        loaded[0].generate(["the quick brown fox jumped over", "airport"])
        == expected
    )


@pytest.mark.one_backend
def test_parts_of_a_preset_are_found_by_every_entry_point(tmp_path):
    _, moe = reader()
    preset = str(tmp_path / "preset")
    moe.save_to_preset(preset)
    for known in (keras_hub.models.Backbone, keras_hub.models.T5Backbone):
        models.assert_same_weights(known.from_preset(preset), moe.backbone)
    ids = moe.preprocessor.tokenizer("lazy dog")
    for known in (
        keras_hub.tokenizers.Tokenizer,
        keras_hub.tokenizers.T5Tokenizer,
    ):
        found = known.from_preset(preset)
        assert type(found) is keras_hub_classes.UpcycledT5Tokenizer
        np.testing.assert_array_equal(found("lazy dog"), ids)
    for known in (
        keras_hub.models.Seq2SeqLMPreprocessor,
        keras_hub.models.T5Seq2SeqLMPreprocessor,
    ):
        found = known.from_preset(preset)
        assert type(found) is keras_hub_classes.UpcycledT5Seq2SeqLMPreprocessor
        assert found.encoder_sequence_length == 8
        assert found.decoder_sequence_length == 6


@pytest.mark.one_backend
def test_dense_presets_are_not_disturbed_and_lose_their_lengths(tmp_path):
    """The second half is stock, and why our preprocessor saves them."""
    dense, _ = reader()
    preset = str(tmp_path / "preset")
    dense.save_to_preset(preset)
    loaded = keras_hub.models.Seq2SeqLM.from_preset(preset)
    assert type(loaded) is keras_hub.models.T5Seq2SeqLM
    assert (
        type(loaded.preprocessor.tokenizer) is keras_hub.tokenizers.T5Tokenizer
    )
    assert loaded.preprocessor.encoder_sequence_length == 1024


@pytest.mark.one_backend
def test_int8_reaches_the_experts_and_is_saved(tmp_path):
    moe = ku.upcycle_model(models.t5_backbone(), EXPERTS, router=TOP_2)
    moe.quantize("int8")
    for layer in models.mixtures(moe):
        assert layer.experts.expert_gate.quantization_mode == "int8"
    moe.save(tmp_path / "moe.keras")
    loaded = keras.saving.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, moe)
    inputs = models.t5_inputs(lengths=UNEVEN)
    np.testing.assert_array_equal(
        models.output(loaded, inputs), models.output(moe, inputs)
    )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="KerasHub's dense T5 cannot be exported on JAX or torch either",
)
def test_a_saved_model_serves_any_length(tmp_path):
    import tensorflow as tf

    moe = models.fixed(ku.upcycle_model(models.t5_backbone(), EXPERTS))
    path = str(tmp_path / "served")
    moe.export(path, format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(path)
    for source, target in ((6, 5), (9, 2)):
        inputs = models.t5_inputs(
            lengths=[(source, target), (source - 2, 1)],
            source=source,
            target=target,
        )
        received, expected = served.serve(inputs), moe(inputs)
        assert_same(
            at_real(received, inputs), at_real(expected, inputs), atol=1e-5
        )


# Training.


class Batches(keras.utils.PyDataset):
    """Three batches of two examples; padding has the weight 0."""

    def __init__(self, x, y, weights):
        super().__init__()
        self.parts = (x, y, weights)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        return keras.tree.map_structure(lambda value: value[rows], self.parts)


def batches():
    inputs = models.t5_inputs(lengths=2 * UNEVEN)
    labels = np.roll(inputs["decoder_token_ids"], -1, axis=1)
    return Batches(inputs, labels, inputs["decoder_padding_mask"])


@functools.cache
def learner():
    """A dense model, its weights, its sparse copy, and that one's weights."""
    dense = models.t5_lm(still())
    moe = ku.upcycle_model(dense, EXPERTS, seed=0)
    moe.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return dense, models.weights(dense), moe, models.weights(moe)


@functools.cache
def trained_on(kind):
    """Weights and losses after a pass over `batches`, given as `kind`.

    Each time from the same weights, with the same compiled step.
    """
    *_, moe, first = learner()
    moe.set_weights(first)
    data = batches()
    if kind == "arrays":
        x, y, weights = data.parts
        history = moe.fit(
            x, y, sample_weight=weights, batch_size=2, shuffle=False, verbose=0
        )
    elif kind == "tf.data":
        import tensorflow as tf

        dataset = tf.data.Dataset.from_tensor_slices(data.parts).batch(2)
        history = moe.fit(dataset, verbose=0)
    else:
        history = moe.fit(data, verbose=0, shuffle=False)
    return models.weights(moe), history.history["loss"]


@pytest.mark.one_backend
@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["tf.data", "PyDataset"])
def test_fit_takes_any_data_and_learns_the_same(kind):
    expected, loss = trained_on("arrays")
    received, same_loss = trained_on(kind)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_training_moves_experts_apart_and_no_weight_of_the_donor():
    dense, before, moe, first = learner()
    trained, _ = trained_on("arrays")
    moe.set_weights(trained)
    for layer in models.mixtures(moe):
        kernels = models.array(layer.experts.expert_up.kernel)
        assert np.any(kernels[0] != kernels[1])
    assert any(np.any(a != b) for a, b in zip(first, trained, strict=True))
    models.assert_same_weights(dense, before)
    models.array(dense(batches()[0][0])[0])  # its buffers live


@pytest.mark.one_backend
def test_text_from_a_py_dataset_is_preprocessed():
    class Text(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (sentences(),)

    # Not the cached one: `set_random_seed`, called for every test, clears
    # TensorFlow's cache of kernels, which owns the tokenizer's vocabulary.
    _, moe = reader.__wrapped__()
    scores = moe.evaluate(Text(workers=1), verbose=0, return_dict=True)
    whole = moe.evaluate(sentences(), verbose=0, return_dict=True)
    assert scores["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    predicted = moe.predict(Text(), verbose=0)
    assert predicted.shape == (6, 6, moe.backbone.vocabulary_size)


@pytest.mark.one_backend
def test_a_py_dataset_validates_only_beside_another():
    moe = ku.upcycle_model(models.t5_lm(), EXPERTS)
    x, y, weights = batches().parts
    with pytest.raises(
        ValueError, match=r"PyDataset.*Received: x of type dict"
    ):
        moe.fit(x, y, sample_weight=weights, validation_data=batches())


# Ids that the model does not know.


@pytest.mark.one_backend
@pytest.mark.parametrize("wrong", [-1, models.VOCABULARY])
def test_verify_names_ids_outside_the_vocabulary(wrong):
    dense = models.t5_backbone()
    moe = ku.upcycle_model(dense, EXPERTS)
    inputs = models.t5_inputs()
    inputs["decoder_token_ids"][1, 2] = wrong
    with pytest.raises(
        ValueError, match=rf"decoder_token_ids.*such as {wrong}"
    ):
        ku.verify_upcycle(dense, moe, inputs)


@pytest.mark.one_backend
def test_a_tokenizer_that_knows_more_than_the_model_is_refused():
    backbone = models.t5_backbone(vocabulary_size=20)
    dense = models.t5_lm(backbone, preprocessor=models.t5_preprocessor())
    with pytest.raises(ku.UpcycleError, match="vocabulary_size=20"):
        ku.upcycle_model(dense, EXPERTS)


# Sizes.

SHAPES = {
    "base": (12, 12, 768, 2048, 247_577_856, 2.00),
    "large": (24, 16, 1024, 2816, 783_150_080, 7.22),
    "xl": (24, 32, 2048, 5120, 2_849_757_184, 26.26),
}


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_t5_1_1_grows_to_the_papers_sizes(name):
    layers, heads, width, hidden, dense, billions = SHAPES[name]
    estimate = ku.estimate_upcycle(
        lambda: keras_hub.models.T5Backbone(
            vocabulary_size=32128,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=width,
            intermediate_dim=hidden,
            key_value_dim=64,
            tie_embedding_weights=False,
        ),
        32,
    )
    assert estimate.dense_params == dense
    grown = layers * (31 * 3 * width * hidden + 32 * width)
    assert estimate.total_params == dense + grown
    assert round(estimate.total_params / 1e9, 2) == billions


@pytest.mark.one_backend("jax")
def test_an_example_costs_its_tokens_stack_by_stack():
    dense = models.t5_lm(models.t5_backbone())
    source, target = 10, 3
    estimate = ku.estimate_upcycle(
        dense, 8, sequence_length={"encoder": source, "decoder": target}
    )
    width, hidden = models.WIDTH, models.HIDDEN
    attention, inner = 4 * width * 12, 3 * width * hidden
    crossing = 2 * width * 12  # keys and values, for each source token
    encoder = 2 * 2 * (attention + inner) + 2 * 2 * crossing
    decoder = 2 * 2 * (2 * attention + inner) - 2 * 2 * crossing
    logits = 2 * width * models.VOCABULARY
    assert estimate.dense_flops_per_example == (
        source * encoder + target * (decoder + logits)
    )
    # ceil(2 * 10 / 8) = 3 slots for each of 8 experts of the encoder. The
    # decoder's buffers are a batch's: 1.25 * 2 slots for each of its tokens.
    more = 2 * inner * (3 * 8 - source) + 2 * inner * target * (1.25 * 2 - 1)
    routing = 2 * width * 8 * (source + target)
    assert estimate.flops_per_example == (
        estimate.dense_flops_per_example + more + routing
    )
    assert "FLOPs for an example" in str(estimate)
    with pytest.raises(ValueError, match=r"\['encoder', 'decoder'\]"):
        ku.estimate_upcycle(dense, 8, sequence_length={"encoder": 10})

"""From a Hugging Face folder to a mixture, by KerasHub's own converters.

The folders are small and made here with `transformers`. Its models are
torch's, so all of this runs on torch.
"""

import importlib.util
import json

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.layers.moe_layers import moe_layers_in

WORDS, WIDTH, HIDDEN, LENGTH, EXPERTS = 40, 24, 20, 7, 4
pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "torch",
        reason="models of transformers are torch's: it runs there",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="transformers, which makes the folders, is not installed",
    ),
]
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
# From the class in transformers to its settings and the class in KerasHub.
KINDS = {
    "Llama": ({**DECODER, "rope_theta": 10000.0}, "Llama3Backbone"),
    "Mistral": ({**DECODER, "sliding_window": None}, "MistralBackbone"),
    "Qwen2": (
        {**DECODER, "use_sliding_window": False, "max_window_layers": 2},
        "QwenBackbone",
    ),
    "Qwen3": (
        {**DECODER, "head_dim": 8, "use_sliding_window": False},
        "Qwen3Backbone",
    ),
    "Gemma": (
        {**DECODER, "head_dim": 8, "tie_word_embeddings": True},
        "GemmaBackbone",
    ),
    "GPT2": (
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_inner": None,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
        },
        "GPT2Backbone",
    ),
    "Bert": (
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
        },
        "BertBackbone",
    ),
}
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """From a kind to `(folder, model of transformers)`, made when asked."""
    import torch
    import transformers

    made = {}

    def folder(kind):
        if kind not in made:
            settings, _ = KINDS[kind]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**settings)
            head = "Model" if kind in ("Bert", "GPT2") else "ForCausalLM"
            model = getattr(transformers, f"{kind}{head}")(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.2)
            path = tmp_path_factory.mktemp(kind)
            model.save_pretrained(path)
            made[kind] = str(path), getattr(model, "model", model)
        return made[kind]

    return folder


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def inputs(kind):
    ids = np.random.default_rng(0).integers(1, WORDS, (2, LENGTH))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"token_ids": ids, "padding_mask": mask}
    if kind == "Bert":
        batch["segment_ids"] = np.zeros_like(ids)
    return batch


def outputs(model, batch):
    found = model(batch, training=False)
    if isinstance(found, dict):
        found = found["sequence_output"]
    return ops.convert_to_numpy(found)[batch["padding_mask"].astype(bool)]


def test_a_folder_is_loaded_and_upcycled(kind, folders, tmp_path):
    import torch

    path, theirs = folders(kind)
    dense = keras_hub.models.Backbone.from_preset(path)
    assert type(dense).__name__ == KINDS[kind][1]
    batch = inputs(kind)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(batch["token_ids"]),
            attention_mask=torch.tensor(batch["padding_mask"]),
        ).last_hidden_state.numpy()
    expected = expected[batch["padding_mask"].astype(bool)]
    # KerasHub rounds Mistral's weights through float16, and its BERT has
    # another epsilon under the root.
    tolerance = {"Mistral": 2e-2, "Bert": 1e-3}.get(kind, 1e-4)
    scale = np.abs(expected).max()
    assert np.abs(outputs(dense, batch) - expected).max() < tolerance * scale
    moe = ku.upcycle_model(
        dense, EXPERTS, router=ku.TopKRouter(2, capacity_factor=None)
    )
    assert len(moe_layers_in(moe)) == 1
    found = np.abs(outputs(moe, batch) - outputs(dense, batch)).max()
    assert found < 5e-6 * scale
    moe.save_to_preset(str(tmp_path / "moe"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "moe"))
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(moe, batch))


def test_a_classifier_with_its_tokenizer(folders, tmp_path):
    path, _ = folders("Bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    with open(f"{path}/vocab.txt", "w") as file:
        file.write("\n".join(words))
    with open(f"{path}/tokenizer_config.json", "w") as file:
        json.dump({"do_lower_case": True}, file)
    dense = keras_hub.models.TextClassifier.from_preset(path, num_classes=3)
    dense.preprocessor.sequence_length = 12
    moe = ku.upcycle_model(dense, EXPERTS)
    text = ["a b c", "d e f g h"]
    assert moe.predict(text, verbose=0).shape == (2, 3)
    moe.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    moe.fit(text, np.array([0, 2]), verbose=0)
    moe.save_to_preset(str(tmp_path / "moe"))
    loaded = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "moe"))
    assert type(loaded) is type(moe)
    np.testing.assert_array_equal(
        loaded.predict(text, verbose=0), moe.predict(text, verbose=0)
    )


def test_a_language_model_says_the_same(folders, tmp_path):
    path, _ = folders("GPT2")
    words = [*LETTERS, "Ġ", "<|endoftext|>"]
    with open(f"{path}/vocab.json", "w") as file:
        json.dump({word: number for number, word in enumerate(words)}, file)
    with open(f"{path}/merges.txt", "w") as file:
        file.write("#version: 0.2\n")
    dense = keras_hub.models.CausalLM.from_preset(path)
    moe = ku.upcycle_model(dense, EXPERTS)
    said = []
    for model in (dense, moe):
        model.compile(sampler="greedy")
        said.append(model.generate("abc", max_length=9))
    assert said[0] == said[1]
    moe.save_to_preset(str(tmp_path / "moe"))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "moe"))
    loaded.compile(sampler="greedy")
    assert loaded.generate("abc", max_length=9) == said[0]

"""Folders of Hugging Face, read by `transformers`, which knows nothing of us.

Its models are torch's, so what compares with them runs on torch; what is
written is written on each backend.
"""

import importlib.util
import json

import hub_models
import keras
import keras_hub
import models
import numpy as np
import pytest
from test_to_keras_hub import trained

import keras_upcycle as ku
from keras_upcycle.export import to_hugging_face

pytest.importorskip("safetensors")
with_transformers = [
    pytest.mark.skipif(
        keras.backend.backend() != "torch",
        reason="models of transformers are torch's: it runs there",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="transformers, which reads the folders, is not installed",
    ),
]
SOURCES = {
    "LlamaBackbone": "mixtral",
    "MistralBackbone": "mixtral",
    "Qwen3Backbone": "qwen3_moe",
    "MixtralBackbone": None,
    "Qwen3MoeBackbone": None,
}
CLASSES = {
    "LlamaBackbone": "MixtralForCausalLM",
    "MistralBackbone": "MixtralForCausalLM",
    "MixtralBackbone": "MixtralForCausalLM",
    "Qwen3Backbone": "Qwen3MoeForCausalLM",
    "Qwen3MoeBackbone": "Qwen3MoeForCausalLM",
}


def sparse(name):
    if SOURCES[name] is None:
        return ku.adopt_model(hub_models.mixture(name))
    settings = {}
    if name == "Qwen3Backbone":
        # Where both agree about the epsilon of queries and keys.
        settings["layer_norm_epsilon"] = 1e-5
    dense = hub_models.MODELS[name](**settings)
    return trained(ku.upcycle_model(dense, 4, target=SOURCES[name]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """From a name to the model and its folder."""
    made = {}

    def of(name):
        if name not in made:
            moe = sparse(name)
            folder = tmp_path_factory.mktemp("export") / name
            ku.export_model(moe, "hugging_face", folder)
            made[name] = moe, folder
        return made[name]

    return of


def logits(moe, inputs):
    hidden = moe(inputs, training=False)
    return models.array(moe.token_embedding(hidden, reverse=True))


@pytest.mark.parametrize("name", list(SOURCES))
class TestTransformers:
    pytestmark = with_transformers

    def loaded(self, folder):
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )

    def test_logits_are_equal_and_no_tensor_is_left_over(self, name, exported):
        import torch

        moe, folder = exported(name)
        theirs, info = self.loaded(folder)
        assert type(theirs).__name__ == CLASSES[name]
        assert not any(info.values()), info
        inputs = hub_models.inputs_of(moe, seed=3)
        with torch.no_grad():
            found = theirs(
                torch.tensor(inputs["token_ids"]),
                attention_mask=torch.tensor(inputs["padding_mask"]),
            ).logits.numpy()
        real = inputs["padding_mask"].astype(bool)
        expected = logits(moe, inputs)[real]
        scale = np.abs(expected).max()
        # Qwen3-MoE of KerasHub has another epsilon for queries and keys.
        tolerance = 2e-5 if name == "Qwen3MoeBackbone" else 3e-6
        np.testing.assert_allclose(
            found[real], expected, atol=tolerance * scale
        )

    def test_greedy_words_are_equal(self, name, exported):
        import torch

        moe, folder = exported(name)
        theirs, _ = self.loaded(folder)
        prompt = np.array([[3, 9, 4]])
        found = theirs.generate(
            torch.tensor(prompt), max_new_tokens=6, do_sample=False
        ).numpy()
        tokens = prompt
        for _ in range(6):
            mask = np.ones_like(tokens)
            batch = {"token_ids": tokens, "padding_mask": mask}
            following = logits(moe, batch)[:, -1].argmax(-1)
            tokens = np.concatenate([tokens, following[:, None]], axis=1)
        np.testing.assert_array_equal(found, tokens)


def files_of(folder):
    from safetensors.numpy import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("name", ["LlamaBackbone", "Qwen3Backbone"])
def test_each_weight_is_in_the_file_once(name, exported):
    moe, folder = exported(name)
    tensors = files_of(folder)
    assert sum(t.size for t in tensors.values()) == moe.count_params()
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == moe.vocabulary_size
    layer = moe.transformer_layers[1].moe_layer
    prefix = "model.layers.1.mlp.experts.2.down_proj"
    if name == "LlamaBackbone":
        prefix = "model.layers.1.block_sparse_moe.experts.2.w2"
    np.testing.assert_array_equal(
        tensors[f"{prefix}.weight"],
        models.array(layer.experts.expert_down.kernel)[2].T,
    )


@pytest.mark.parametrize("name", ["LlamaBackbone", "Qwen3Backbone"])
def test_kerashub_reads_it_too(name, exported):
    moe, folder = exported(name)
    if name == "Qwen3Backbone":
        # KerasHub's converter does not read which blocks are dense.
        pytest.skip("KerasHub's converter of Qwen3-MoE takes no dense block")
    loaded = keras_hub.models.Backbone.from_preset(str(folder))
    assert type(loaded).__name__ == "MixtralBackbone"
    inputs = hub_models.inputs_of(moe)
    real = inputs["padding_mask"].astype(bool)
    expected = models.array(moe(inputs))[real]
    np.testing.assert_allclose(
        models.array(loaded(inputs))[real],
        expected,
        atol=3e-6 * np.abs(expected).max(),
    )


@pytest.mark.one_backend
def test_shards_hold_what_one_file_holds(exported, tmp_path):
    moe, folder = exported("LlamaBackbone")
    ku.export_model(
        moe, "hugging_face", tmp_path / "shards", max_shard_size="10KB"
    )
    index = json.loads(
        (tmp_path / "shards" / "model.safetensors.index.json").read_text()
    )
    names = set(index["weight_map"].values())
    assert len(names) > 2
    assert {
        p.name for p in (tmp_path / "shards").glob("*.safetensors")
    } == names
    whole, parts = files_of(folder), files_of(tmp_path / "shards")
    assert set(whole) == set(parts) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in whole.values()
    )
    for key, value in whole.items():
        np.testing.assert_array_equal(parts[key], value)
    for file in names:
        largest = (tmp_path / "shards" / file).stat().st_size
        # One tensor of more than a shard stands alone.
        assert largest < 2 * 10**4


@pytest.mark.one_backend
def test_a_file_may_be_narrower_than_the_model(exported, tmp_path):
    moe, folder = exported("LlamaBackbone")
    ku.export_model(moe, "hugging_face", tmp_path / "half", dtype="bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    whole = files_of(folder)
    for key, value in files_of(tmp_path / "half").items():
        assert value.dtype.name == "bfloat16"
        np.testing.assert_allclose(
            value.astype("float32"), whole[key], rtol=2**-8, atol=0
        )


@pytest.mark.one_backend
def test_tied_embeddings_of_qwen3_stay_tied(tmp_path):
    dense = hub_models.MODELS["Qwen3Backbone"](
        tie_word_embeddings=True, layer_norm_epsilon=1e-5
    )
    moe = ku.upcycle_model(dense, 4, target="qwen3_moe")
    ku.export_model(moe, "hugging_face", tmp_path / "moe")
    assert "lm_head.weight" not in files_of(tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["tie_word_embeddings"]


@pytest.mark.one_backend
def test_another_epsilon_is_said_aloud(tmp_path):
    dense = hub_models.MODELS["Qwen3Backbone"]()
    moe = ku.upcycle_model(dense, 4, target="qwen3_moe")
    with pytest.warns(UserWarning, match="epsilon of 1e-05 here and of 1e-06"):
        ku.export_model(moe, "hugging_face", tmp_path / "moe")


@pytest.mark.one_backend
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers, which reads the tokenizers, is not installed",
)
class TestTokenizers:
    def read(self, folder):
        import transformers

        return transformers.AutoTokenizer.from_pretrained(folder)

    def exported(self, backbone, preprocessor, task, target, folder):
        dense = task(
            backbone=hub_models.MODELS[backbone](layer_norm_epsilon=1e-5),
            preprocessor=preprocessor,
        )
        moe = ku.upcycle_model(dense, 4, target=target)
        ku.export_model(moe, "hugging_face", folder)
        return self.read(folder)

    def test_sentence_pieces(self, tmp_path):
        tokenizer = keras_hub.models.LlamaTokenizer(hub_models.proto())
        theirs = self.exported(
            "LlamaBackbone",
            keras_hub.models.LlamaCausalLMPreprocessor(tokenizer),
            keras_hub.models.LlamaCausalLM,
            "mixtral",
            tmp_path / "moe",
        )
        for text in ("the quick brown fox", "an airport"):
            own = np.asarray(tokenizer(text)).tolist()
            assert theirs(text)["input_ids"] == [1, *own]
        generation = json.loads(
            (tmp_path / "moe" / "generation_config.json").read_text()
        )
        assert generation["bos_token_id"] == 1
        assert generation["eos_token_id"] == 2

    def test_pairs_of_bytes(self, tmp_path):
        letters = [chr(n) for n in range(ord("a"), ord("x") + 1)]
        words = [*letters, "Ġ", "th", "the", "<|im_end|>", "<|endoftext|>"]
        tokenizer = keras_hub.models.Qwen3Tokenizer(
            {word: number for number, word in enumerate(words)},
            ["t h", "th e"],
        )
        theirs = self.exported(
            "Qwen3Backbone",
            keras_hub.models.Qwen3CausalLMPreprocessor(tokenizer),
            keras_hub.models.Qwen3CausalLM,
            "qwen3_moe",
            tmp_path / "moe",
        )
        text = "the quick brown fox"
        own = np.asarray(tokenizer(text)).tolist()
        assert theirs(text)["input_ids"] == own
        assert theirs.decode(own) == text
        assert theirs.eos_token == "<|im_end|>"
        assert theirs("a<|im_end|>")["input_ids"] == [0, len(words) - 2]

    def test_one_without_a_counterpart_is_refused(self, tmp_path):
        words = ["t", "h", "th", "<|endoftext|>"]
        tokenizer = keras_hub.models.GPT2Tokenizer(
            {word: number for number, word in enumerate(words)}, ["t h"]
        )
        from keras_upcycle.export import hugging_face_tokenizer

        with pytest.raises(ku.UpcycleError, match=r"GPT2Tokenizer.*None"):
            hugging_face_tokenizer.files(tokenizer)


# What goes wrong.


@pytest.mark.one_backend
def test_what_cannot_be_written_leaves_nothing(exported, tmp_path, monkeypatch):
    moe, _ = exported("LlamaBackbone")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(to_hugging_face, "_array", full)
    with pytest.raises(OSError, match="No space left"):
        ku.export_model(moe, "hugging_face", tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.one_backend
def test_nothing_is_overwritten(exported, tmp_path):
    moe, _ = exported("LlamaBackbone")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        ku.export_model(moe, "hugging_face", tmp_path / "moe")
    assert [p.name for p in (tmp_path / "moe").iterdir()] == ["mine.txt"]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"folder": None}, ValueError, "`folder` must say where"),
        ({"folder": 3}, TypeError, "`folder` must be"),
        ({"folder": "no/such/place"}, FileNotFoundError, "Make it first"),
        ({"dtype": "int8"}, ValueError, "`dtype`"),
        ({"max_shard_size": 0}, ValueError, "`max_shard_size`"),
        ({"max_shard_size": "5 discs"}, ValueError, "`max_shard_size`"),
        ({"max_shard_size": "0GB"}, ValueError, "`max_shard_size`"),
        ({"config": {"hidden_size": 3}}, ValueError, "hidden_size"),
        ({"config": ["a"]}, TypeError, "`config`"),
        ({"target": "qwen3_moe"}, ku.UpcycleError, "not what qwen3_moe can"),
        ({"target": "mistral"}, ValueError, "`target`"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_name(
    exported, tmp_path, settings, error, message
):
    moe, _ = exported("LlamaBackbone")
    settings = {"folder": tmp_path / "moe", **settings}
    with pytest.raises(error, match=message):
        ku.export_model(moe, "hugging_face", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.one_backend
def test_entries_of_ones_own_are_written(exported, tmp_path):
    moe, _ = exported("LlamaBackbone")
    ku.export_model(
        moe,
        "hugging_face",
        tmp_path / "moe",
        config={"max_position_embeddings": 64, "note": "mine"},
    )
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert config["note"] == "mine"


@pytest.mark.one_backend
def test_a_mixture_without_names_is_told_where_it_can_go():
    moe = ku.adopt_model(hub_models.mixture("GptOssBackbone"))
    check = ku.can_export(moe)
    assert not check
    assert "format='keras_hub'" in str(check)
    assert ku.can_export(moe, "keras_hub")


@pytest.mark.one_backend
def test_without_safetensors_it_says_what_to_install(
    exported, tmp_path, monkeypatch
):
    moe, _ = exported("LlamaBackbone")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: (
            None if name == "safetensors" else find(name, *more)
        ),
    )
    with pytest.raises(ImportError, match="pip install safetensors"):
        ku.export_model(moe, "hugging_face", tmp_path / "moe")

"""A tokenizer of KerasHub's as files that `transformers` loads."""

import json
from typing import Any

import keras_hub

from keras_upcycle.errors import UpcycleError
from keras_upcycle.families.keras_hub_classes import stock_class

# Of Qwen and of Llama 3: how text is split before pairs of bytes are merged.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "Qwen": _LETTERS + r"\p{N}" + _REST,
    "Llama3": _LETTERS + r"\p{N}{1,3}" + _REST,
}


def files(tokenizer: Any) -> dict[str, bytes]:
    """From a file's name to what it holds; nothing without a tokenizer.

    Raises:
        UpcycleError: For a tokenizer that has no counterpart.
    """
    if tokenizer is None:
        return {}
    kind = stock_class(type(tokenizer))
    if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        return {
            "tokenizer.model": tokenizer.proto,
            "tokenizer_config.json": _json(
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "add_bos_token": True,
                    "add_eos_token": False,
                    "legacy": False,
                    "unk_token": "<unk>",
                    **_special(tokenizer),
                }
            ),
        }
    names = [name for name in _SPLITS if kind.__name__.startswith(name)]
    if not isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer) or (
        not names
    ):
        raise UpcycleError(
            "A tokenizer must be a SentencePiece one, or Qwen's or Llama 3's. "
            f"Received: {kind.__name__}. Set `model.preprocessor = None` to "
            "export without it."
        )
    return {
        "tokenizer.json": _json(_byte_pairs(tokenizer, names[0])),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": names[0] == "Llama3",
                "clean_up_tokenization_spaces": False,
                **_special(tokenizer),
            }
        ),
    }


def _special(tokenizer):
    found = {
        f"{short}_token": getattr(tokenizer, f"{name}_token", None)
        for short, name in (("bos", "start"), ("eos", "end"), ("pad", "pad"))
    }
    return {name: token for name, token in found.items() if token is not None}


def _byte_pairs(tokenizer, name):
    vocabulary = dict(tokenizer.vocabulary)
    added = [
        token for token in tokenizer.unsplittable_tokens if token in vocabulary
    ]
    merges = [m for m in tokenizer.merges if not m.startswith("#version")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in sorted(added, key=vocabulary.__getitem__)
        ],
        "normalizer": {"type": "NFC"} if name == "Qwen" else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLITS[name]},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": _post_processor(tokenizer, name, vocabulary),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {
                token: number
                for token, number in vocabulary.items()
                if token not in added
            },
            "merges": merges,
        },
    }


def _post_processor(tokenizer, name, vocabulary):
    """Llama 3 begins every text with a token of its own; Qwen with none."""
    start = getattr(tokenizer, "start_token", None)
    if name != "Llama3" or start is None:
        return None
    special = {"SpecialToken": {"id": start, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pair = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, special, pair],
        "special_tokens": {
            start: {"id": start, "ids": [vocabulary[start]], "tokens": [start]}
        },
    }


def _json(content):
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
